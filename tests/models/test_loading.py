"""Loading: what is refused and in which words, what is switched off, what a model is held in."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    BartConfig,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    T5Config,
    ViTConfig,
)

from rlhf_cli.errors import ModelError
from rlhf_cli.models.device import resolve_device
from rlhf_cli.models.loading import ModelSource, context_length, load_config, load_policy, load_tokenizer
from rlhf_cli.models.weight_loading import disable_dropout


def test_policies_of_both_architectures_load_in_the_asked_precision(tiny_llama: Path, tiny_t5: Path):
    for folder in (tiny_llama, tiny_t5):
        model = load_policy(ModelSource(str(folder), dtype=torch.bfloat16))
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        assert not model.training
        assert load_policy(ModelSource(str(folder), dtype=torch.bfloat16), dtype=torch.float32).dtype == torch.float32


def test_dropout_is_off_wherever_a_configuration_keeps_it(tiny_gpt2: Path):
    assert AutoConfig.from_pretrained(tiny_gpt2).attn_pdrop == 0.1
    model = load_policy(ModelSource(str(tiny_gpt2))).train()
    assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} == {0.0}
    ids = torch.arange(12).reshape(2, 6)
    assert torch.equal(model(ids).logits, model(ids).logits)
    bart = BartConfig(attention_dropout=0.2, encoder_layerdrop=0.3, decoder_layerdrop=0.3)
    for config in (T5Config(dropout_rate=0.3), bart, MixtralConfig(router_jitter_noise=0.1)):
        disable_dropout(config)
        random = ("dropout", "layerdrop", "jitter")
        assert not any(v for k, v in vars(config).items() if any(word in k for word in random) and isinstance(v, float))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "is not a model folder: it has no config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"holds no weights: there is no model\.safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"torn"), "is not a safetensors file"),
    ],
)
def test_a_damaged_folder_is_named(break_it, message: str, tiny_llama: Path, tmp_path: Path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    break_it(folder)
    with pytest.raises(ModelError, match=message) as caught:
        load_policy(ModelSource(str(folder)))
    assert str(folder) in caught.value.message


def test_pickled_weights_are_not_read(tiny_llama: Path, tmp_path: Path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    state = load_policy(ModelSource(str(tiny_llama))).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"holds its weights as pytorch_model\.bin, a pickle") as caught:
        load_policy(ModelSource(str(folder)))
    command = (caught.value.hint or "").partition("python -c ")[2]
    exec(shlex.split(command)[0], {})
    assert torch.equal(load_policy(ModelSource(str(folder))).lm_head.weight, state["lm_head.weight"])


def test_what_writes_no_text_is_no_policy(tiny_bert: Path, tmp_path: Path):
    with pytest.raises(ModelError, match="is a bert model, which cannot generate text"):
        load_policy(ModelSource(str(tiny_bert)))
    ViTConfig().save_pretrained(tmp_path / "vit")
    with pytest.raises(ModelError, match="is a vit model, which cannot generate text"):
        load_policy(ModelSource(str(tmp_path / "vit")))


def test_a_folder_without_all_weights_is_no_policy(tiny_llama: Path, tmp_path: Path):
    AutoModel.from_pretrained(tiny_llama).save_pretrained(tmp_path / "bare")  # tied: the head is there all the same
    load_policy(ModelSource(str(tmp_path / "bare")))
    whole = load_policy(ModelSource(str(tiny_llama)))
    state = {key: weight for key, weight in whole.state_dict().items() if ".layers.1." not in key}
    whole.save_pretrained(tmp_path / "half", state_dict=state)
    with pytest.raises(ModelError, match=r"9 weights of a llama model are missing, such as `model\.layers\.1\."):
        load_policy(ModelSource(str(tmp_path / "half")))


def test_a_place_that_is_nowhere_is_refused(tmp_path: Path):
    for load in (load_config, load_tokenizer):
        with pytest.raises(ModelError, match="no such folder"):
            load(ModelSource("nobody/no-such-model"))


def test_context_length_is_the_positions():
    assert context_length(LlamaConfig(max_position_embeddings=77)) == 77
    assert context_length(GPT2Config(n_positions=55)) == 55
    assert context_length(T5Config()) == 10**9


def test_the_context_of_a_model_that_reads_images_is_that_of_its_text():
    text = Gemma3TextConfig(max_position_embeddings=256)
    assert context_length(Gemma3Config(text_config=text)) == 256


def test_devices():
    assert resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(ModelError, match=r"`model\.device` must be auto, cpu or cuda, got `tpu9`"):
        resolve_device("tpu9")
    if not torch.cuda.is_available():
        with pytest.raises(ModelError, match="no CUDA device"):
            resolve_device("cuda")


def test_a_revision_belongs_to_its_own_place():
    source = ModelSource("a/b", revision="abc", trust_remote_code=True, dtype=torch.bfloat16)
    other = source.at("c/d")
    assert (other.revision, other.trust_remote_code, other.dtype) == (None, False, torch.bfloat16)
    assert source.at("a/b") is source
