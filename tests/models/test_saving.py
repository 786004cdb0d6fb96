"""Model folders: what is written loads again as it was, holds no pickle, and never a weight that is not finite."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, LlamaForCausalLM

from rlhf_cli.errors import DiskError, DivergedError, ModelError
from rlhf_cli.models.build import build_model
from rlhf_cli.models.lora import add_lora
from rlhf_cli.models.saving import generation_config, save_model_folder
from rlhf_cli.progress import say_once
from rlhf_cli.settings.shared import BuildSettings, LoraSettings


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2", "tiny_t5"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_models_load_as_they_were(name: str, dtype: torch.dtype, request, tmp_path: Path):
    source = request.getfixturevalue(name)
    kind = AutoModelForSeq2SeqLM if name == "tiny_t5" else AutoModelForCausalLM
    model, tokenizer = kind.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    expected = {key: weight.to(dtype) for key, weight in model.state_dict().items()}
    save_model_folder(model, tokenizer, tmp_path / "out", dtype=dtype)
    read = kind.from_pretrained(tmp_path / "out", dtype="auto").state_dict()
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[key], expected[key]) for key in expected)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again("What is the sky?").input_ids == tokenizer("What is the sky?").input_ids
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert not {path for path in files if path.endswith((".bin", ".pt", ".pth", ".pkl"))}
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"} <= files


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_never_saved(value: float, tiny_llama: Path, tmp_path: Path):
    model, tokenizer = LlamaForCausalLM.from_pretrained(tiny_llama), AutoTokenizer.from_pretrained(tiny_llama)
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = value
    with pytest.raises(DivergedError, match=r"1 of the 2,048 values of `model\.layers\.1\.mlp\.up_proj\.weight`"):
        save_model_folder(model, tokenizer, tmp_path / "out", dtype=torch.float32)
    assert not (tmp_path / "out").exists()


def test_a_weight_too_large_for_the_saved_dtype_is_refused(tiny_llama: Path, tmp_path: Path):
    model, tokenizer = LlamaForCausalLM.from_pretrained(tiny_llama), AutoTokenizer.from_pretrained(tiny_llama)
    model.model.norm.weight.data[0] = 1e6
    with pytest.raises(DivergedError, match="not finite in float16"):
        save_model_folder(model, tokenizer, tmp_path / "out", dtype=torch.float16)


def test_adapters_are_merged_first(tiny_llama: Path, tmp_path: Path):
    model, tokenizer = LlamaForCausalLM.from_pretrained(tiny_llama), AutoTokenizer.from_pretrained(tiny_llama)
    add_lora(model, LoraSettings(rank=2, alpha=2.0))
    with pytest.raises(ModelError, match="cannot save a model that carries adapters") as caught:
        save_model_folder(model, tokenizer, tmp_path, dtype=torch.float32)
    assert "merge_lora" in (caught.value.hint or "")


def test_generation_config_knows_how_answers_end(tiny_llama: Path, tmp_path: Path):
    model, tokenizer = LlamaForCausalLM.from_pretrained(tiny_llama), AutoTokenizer.from_pretrained(tiny_llama)
    model.generation_config.eos_token_id = [7, 9]
    model.generation_config.temperature = 0.3  # beside do_sample=False, which transformers refuses to write
    save_model_folder(model, tokenizer, tmp_path, dtype=torch.float32)
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert saved["eos_token_id"] == [tokenizer.eos_token_id, 7, 9]
    assert saved["pad_token_id"] == tokenizer.eos_token_id
    stored = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in stored  # tied: once on disk


def test_nothing_else_of_the_generation_config_survives(tiny_gpt2: Path, tmp_path: Path):
    """Penalties, top-k and forced tokens would move `generate` away from the distribution that was trained."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_gpt2), AutoTokenizer.from_pretrained(tiny_gpt2)
    moved = {"repetition_penalty": 1.3, "min_new_tokens": 5, "no_repeat_ngram_size": 3, "typical_p": 0.9, "top_k": 7}
    moved |= {"forced_eos_token_id": 3, "suppress_tokens": [4], "min_p": 0.1, "num_beams": 4, "max_length": 9}
    for name, value in moved.items():
        setattr(model.generation_config, name, value)
    generation = generation_config(model, tokenizer, [11], temperature=0.7, max_new_tokens=30)
    save_model_folder(model, tokenizer, tmp_path, dtype=torch.float32, generation=generation)
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert not saved.keys() & (moved.keys() - {"top_k"})
    assert saved["eos_token_id"] == [tokenizer.eos_token_id, 11]
    expected = {"do_sample": True, "temperature": 0.7, "top_p": 1.0, "top_k": 0, "max_new_tokens": 30}
    assert {name: saved[name] for name in expected} == expected


def test_a_folder_that_cannot_be_made_is_a_disk_error(tiny_llama: Path, tmp_path: Path):
    model, tokenizer = LlamaForCausalLM.from_pretrained(tiny_llama), AutoTokenizer.from_pretrained(tiny_llama)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DiskError, match="cannot write the model"):
        save_model_folder(model, tokenizer, tmp_path / "file" / "out", dtype=torch.float32)


@pytest.mark.slow
def test_a_built_model_says_how_to_load_it_and_that_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    sizes = {"hidden_size": 16, "layers": 1, "heads": 2, "feed_forward_size": 32, "vocab_size": 270}
    build = BuildSettings(context_length=16, norm="layer", **sizes)  # neither a Llama nor a GPT-2
    build_model(tmp_path / "built", ["some text"], build, seed=0)
    model, tokenizer = (kind.from_pretrained(tmp_path / "built") for kind in (AutoModelForCausalLM, AutoTokenizer))
    say_once.cache_clear()
    save_model_folder(model, tokenizer, tmp_path / "out", dtype=torch.float32)
    assert "LOADING.md beside it says how other programs load it" in " ".join(capsys.readouterr().err.split())
    text = (tmp_path / "out" / "LOADING.md").read_text().replace("FOLDER", str(tmp_path / "out"))
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    check = f"{code}\nassert type(model).__name__ == 'TransformerForCausalLM', type(model)"
    subprocess.run([sys.executable, "-c", check], check=True)
