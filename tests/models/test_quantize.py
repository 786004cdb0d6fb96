"""Weights in 4 and 8 bits under adapters (QLoRA): what is quantized, what still holds of PPO, what is written.

With bitsandbytes, which runs on the CPU; the refusals need none.
"""

from __future__ import annotations

import importlib.util
import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_cli.data.examples import Example
from rlhf_cli.errors import ModelError
from rlhf_cli.generation.sampling import Sampling
from rlhf_cli.models import quantize as quantize
from rlhf_cli.models.adapter_layers import adapter_layers
from rlhf_cli.models.loading import ModelSource, load_policy, load_tokenizer
from rlhf_cli.models.lora import add_lora, merge_lora
from rlhf_cli.models.quantize import quantized
from rlhf_cli.models.reward_model.files import save_reward_model
from rlhf_cli.models.reward_model.loading import load_reward_model, new_reward_model
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.settings.shared import LoraSettings
from rlhf_cli.stages.ppo.forward_passes import Completions, ForwardPasses
from rlhf_cli.stages.ppo.model_loading import load_ppo_models
from rlhf_cli.stages.ppo.model_saving import save_ppo_models
from rlhf_cli.stages.ppo.settings import PPOSettings

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed: pip install .[quantized]"
)
BITS = ("4bit", "8bit")
IDS = torch.arange(5, 17).reshape(2, 6)
PROMPTS, ANSWERS = [[5, 6, 7], [5, 6, 7, 8, 9], [10, 11]], [[3, 4, 5, 6], [7, 8], [9, 10, 11, 12, 13]]


def load(folder: Path, bits: str, **settings):
    settings = PPOSettings(lora=LoraSettings(rank=4, alpha=8.0), **settings)
    return load_ppo_models(ModelSource(str(folder), quantize=bits), settings, reward_path=None, template=None)


@needs_bitsandbytes
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2", "tiny_t5"])
def test_the_backbone_is_quantized_and_nothing_else(name, bits, request):
    folder = request.getfixturevalue(name)
    model = load_policy(ModelSource(str(folder), quantize=bits))
    assert quantized(model) == bits
    small = {str(parameter.dtype) for parameter in model.parameters() if parameter.dtype != torch.float32}
    assert small == {"torch.uint8" if bits == "4bit" else "torch.int8"}
    assert model.get_output_embeddings().weight.dtype == torch.float32
    inputs = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        theirs = load_policy(ModelSource(str(folder)))(input_ids=IDS, **inputs).logits
        off = (model(input_ids=IDS, **inputs).logits - theirs).abs().max() / theirs.abs().max()
    assert 0 < off < (0.5 if bits == "4bit" else 0.05)
    assert quantized(load_policy(ModelSource(str(folder), quantize=bits), dtype=torch.float32)) == "none"


@needs_bitsandbytes
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("recompute", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
def test_adapters_train_on_quantized_weights(name, recompute, bits, request):
    """KL 0 and ratio 1 at first, in whatever batches; then every adapter's weight has a gradient, in float32."""
    models = load(request.getfixturevalue(name), bits, gradient_checkpointing=recompute).models
    texts = [""] * 3
    given = Completions(texts, PROMPTS, ANSWERS, texts, [True] * 3, torch.zeros(3))
    torch.nn.init.ones_(models.value_head.weight)
    whole, single = (
        ForwardPasses(models, autocast=nullcontext, micro_batch_size=size, temperature=1.0) for size in (3, 1)
    )
    before = whole.rollout_tensors(given)
    torch.testing.assert_close(before.logprobs, before.reference_logprobs, atol=1e-5, rtol=0)
    torch.testing.assert_close(before.logprobs, single.rollout_tensors(given).logprobs, atol=1e-4, rtol=0)
    # PEFT's own layers for such weights, which guard the gradient against bitsandbytes' views.
    assert {type(layer).__module__ for _, layer in adapter_layers(models.model)} == {"peft.tuners.lora.bnb"}
    trained = [*models.policy_parameters(), *models.critic_parameters()]
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(0.05 * torch.randn_like(parameter))
    batch = whole.batch(given, [0, 1, 2])
    with models.policy() as model:
        whole.logprobs(model, batch).logprobs.sum().backward()
    with models.critic() as model:
        whole.values(model, batch).sum().backward()
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    assert all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in trained)


@needs_bitsandbytes
def test_gradients_are_those_of_the_weights_as_they_are_rounded(tiny_llama):
    """Through every layer: a packed kernel without a backward pass would stop them, silently."""
    model = load_policy(ModelSource(str(tiny_llama), quantize="4bit"))
    from bitsandbytes.functional import dequantize_4bit  # pyright: ignore[reportMissingImports]

    plain = load_policy(ModelSource(str(tiny_llama)))
    with torch.no_grad():
        for (_, mine), (_, theirs) in zip(model.named_modules(), plain.named_modules(), strict=True):
            if type(mine).__name__ == "Linear4bit":
                theirs.weight.copy_(dequantize_4bit(mine.weight.data, mine.weight.quant_state))
    gradients = []
    for each in (model, plain):
        torch.manual_seed(0)
        parameters = add_lora(each, LoraSettings(rank=4, alpha=8.0))
        with torch.no_grad():
            each(input_ids=IDS)  # in evaluation mode and without gradient, as when it samples
            for parameter in parameters:
                parameter.add_(0.05 * torch.randn_like(parameter))
        each(input_ids=IDS).logits.logsumexp(-1).sum().backward()
        gradients.append([parameter.grad for parameter in parameters])
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-3)


@needs_bitsandbytes
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
def test_the_policy_is_merged_into_the_weights_on_disk(name, bits, request, tmp_path):
    folder = request.getfixturevalue(name)
    models = load(folder, bits).models
    with torch.no_grad():
        for parameter in models.policy_parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    settings = PPOSettings.model_validate({"lora": {"rank": 4, "alpha": 8.0}})
    probe, source = [Example([5, 6], [7, 8])], ModelSource(str(folder), quantize=bits)
    assert save_ppo_models(models, source, settings, tmp_path, probe=probe, sampling=Sampling(), stop_ids=[2]) < 1e-9
    written = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    exact = load_policy(ModelSource(str(folder)))
    add_lora(exact, LoraSettings(rank=4, alpha=8.0), name="policy")
    state = {key: value for key, value in models.state().items() if key.startswith("policy.")}
    weights = dict(exact.base_model.named_parameters())
    for key, value in state.items():
        head, factor = key.removeprefix("policy.").rsplit(".lora_", 1)
        weights[f"{head}.lora_{factor[0]}.policy.weight"].data.copy_(value)
    with torch.no_grad():
        torch.testing.assert_close(written(input_ids=IDS).logits, exact(input_ids=IDS).logits, atol=1e-5, rtol=1e-4)
    with pytest.raises(ModelError, match="cannot merge into quantized weights"), models.policy() as model:
        merge_lora(model, "policy")


@needs_bitsandbytes
@pytest.mark.parametrize("bits", BITS)
def test_a_reward_model_is_trained_on_quantized_weights_and_scores_on_either(bits, tiny_llama, tmp_path):
    source = ModelSource(str(tiny_llama), quantize=bits)
    reward_model = new_reward_model(source, template=None, lora=LoraSettings(rank=4, alpha=8.0))
    assert quantized(reward_model.model) == bits
    assert reward_model.head.weight.dtype == torch.float32
    loss = reward_model(
        reward_model.batch([reward_model.encode("Why?", "Because."), reward_model.encode("x", "so")])
    ).sum()
    loss.backward()
    assert all(p.grad is not None for n, p in reward_model.named_parameters() if p.requires_grad and "lora_A" not in n)
    save_reward_model(reward_model, tmp_path)
    texts = ["Why?", "x"], ["Because.", "so"]
    expected = reward_model.requires_grad_(False).score(*texts)
    again = load_reward_model(source.at(str(tmp_path)), template=None)
    assert again.score(*texts) == pytest.approx(expected, abs=1e-5)
    made = load_ppo_models(
        source, PPOSettings(lora=LoraSettings(rank=4, alpha=8.0)), reward_path=str(tmp_path), template=None
    )
    assert made.reward_model is not None
    assert made.reward_model.is_shared
    assert made.reward_model.score(*texts) == pytest.approx(expected, abs=1e-4)
    assert load_reward_model(ModelSource(str(tmp_path)), template=None).score(*texts) == pytest.approx(
        expected, abs=0.5
    )


@needs_bitsandbytes
def test_a_classifier_without_an_adapter_is_not_quantized(tiny_llama, tmp_path):
    AutoModelForSequenceClassification.from_pretrained(tiny_llama, num_labels=1).save_pretrained(tmp_path)
    load_tokenizer(ModelSource(str(tiny_llama))).save_pretrained(tmp_path)
    assert quantized(load_reward_model(ModelSource(str(tmp_path), quantize="4bit"), template=None)) == "none"


@needs_bitsandbytes
def test_the_whole_run_on_quantized_weights(tiny_llama, tmp_path, rlhf):
    texts = ["What is bread?", "Why is the sky blue?", "The cat sat", "First heat the oven", "A short answer"]
    lines = {
        "prompts": [{"prompt": text} for text in texts],
        "demos": [{"prompt": text, "completion": " So."} for text in texts],
        "ranked": [{"prompt": text, "chosen": " So.", "rejected": " No."} for text in texts],
    }
    for name, records in lines.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "r.yaml").write_text(
        f"""
model: {{path: {tiny_llama}, quantize: 4bit, precision: float32}}
data: {{prompts: prompts.jsonl, holdout: 0.3}}
sft: {{data: demos.jsonl, batch_size: 4, lora: {{rank: 2}}, gradient_checkpointing: true}}
label: {{by: import, data: ranked.jsonl}}
train_rm: {{lora: {{rank: 2}}, batch_size: 4}}
ppo: {{steps: 1, prompts_per_step: 2, max_new_tokens: 4, lora: {{rank: 2}}}}
"""
    )
    result = rlhf("run", "r.yaml", "--run-dir", "run")
    assert "the critic starts from the reward model" in result.stderr
    metrics = json.loads((tmp_path / "run/ppo/metrics.jsonl").read_text().splitlines()[0])
    assert metrics["objective/kl"] == pytest.approx(0.0, abs=1e-4)
    for stage in ("sft", "ppo"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / stage)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert not hasattr(model.config, "quantization_config")


def test_without_bitsandbytes_it_says_what_to_install(tiny_llama, monkeypatch):
    monkeypatch.setattr(quantize.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="needs bitsandbytes, which is not installed") as caught:
        load_policy(ModelSource(str(tiny_llama), quantize="4bit"))
    assert "pip install 'rlhf-cli[quantized]'" in (caught.value.hint or "")


def test_a_device_it_does_not_serve_is_named(tiny_llama, monkeypatch):
    monkeypatch.setattr(quantize.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(quantize, "failure_reason", lambda how, device: "NotImplementedError: no kernel")
    with pytest.raises(
        ModelError, match=r"`model\.quantize: 8bit`: bitsandbytes fails on `cpu`: NotImplementedError: no kernel"
    ):
        load_policy(ModelSource(str(tiny_llama), quantize="8bit"))


@pytest.mark.parametrize("stage", ["sft", "train_rm", "ppo"])
def test_stages_that_train_all_weights_refuse_it(stage):
    sections = {"sft": {"data": "demos.jsonl"}, "train_rm": {}, "ppo": {}}
    recipe = {"model": {"path": "base", "quantize": "8bit"}} | sections
    Recipe.model_validate(recipe)
    with pytest.raises(ValidationError, match=f"`{stage}.adapter: none` trains all of them"):
        Recipe.model_validate(recipe | {stage: sections[stage] | {"adapter": "none"}})


def test_nothing_is_quantized_unless_asked(tiny_llama):
    model = load_policy(ModelSource(str(tiny_llama)))
    add_lora(model, LoraSettings(rank=2, alpha=4.0))
    assert quantized(model) == "none"
    assert {type(layer).__name__ for _, layer in adapter_layers(model)} == {"FusedLoraLinear"}
