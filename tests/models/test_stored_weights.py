"""Headers of weight files: what they say, what is refused and in which words, and how names are mapped."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rlhf_cli.errors import ModelError
from rlhf_cli.models.stored_weights import (
    ADAPTER,
    plain_names,
    read_stored_weights,
    stored_heads,
)


def test_headers_say_what_safetensors_reads(tmp_path: Path):
    tensors = {"a.weight": torch.zeros(3, 5), "b": torch.zeros(7, dtype=torch.bfloat16), "c": torch.tensor(1.0)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = read_stored_weights(tmp_path)
    assert {name: (one.shape, one.dtype) for name, one in found.items()} == {
        "a.weight": ((3, 5), "F32"),
        "b": ((7,), "BF16"),
        "c": ((), "F32"),
    }


def test_shards_are_found_through_their_index(tiny_gpt2: Path, tmp_path: Path):
    AutoModelForCausalLM.from_pretrained(tiny_gpt2).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    whole, shards = read_stored_weights(tiny_gpt2), read_stored_weights(tmp_path)
    assert {name: one.shape for name, one in shards.items()} == {name: one.shape for name, one in whole.items()}
    lost = sorted(tmp_path.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(ModelError, match=f"1 of the .* files .* missing, such as {lost.name}"):
        read_stored_weights(tmp_path)


def test_no_weight_is_read(tmp_path: Path):
    """A header that lists 40 GB is read from a sparse file in milliseconds."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [10**10], "data_offsets": [0, 4 * 10**10]}}).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 4 * 10**10)
    started = time.process_time()
    assert read_stored_weights(tmp_path)["w"].shape == (10**10,)
    assert time.process_time() - started < 0.5


_LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32\nsize 2690\n"


@pytest.mark.parametrize(
    ("content", "message", "hint"),
    [
        pytest.param(lambda whole: whole[: len(whole) // 2], "is truncated: it has", "again", id="half of the weights"),
        pytest.param(lambda whole: whole[:100], "is truncated: it has 100 bytes", "again", id="half of the header"),
        pytest.param(lambda _: _LFS.encode(), "is a pointer of git-LFS", "git lfs pull", id="LFS"),
        pytest.param(lambda _: b"<!DOCTYPE html><html>log in</html>", "not a safetensors file", "again", id="a page"),
        pytest.param(lambda _: b"", "is empty", "again", id="nothing"),
        pytest.param(lambda whole: whole[:8] + b"{" * 200 + whole[208:], "header is damaged", "again", id="header"),
        pytest.param(lambda _: (2).to_bytes(8, "little") + b"{}", "holds no weights", "again", id="no tensor"),
    ],
)
def test_damaged_files_are_named(content, message: str, hint: str, tiny_llama: Path, tmp_path: Path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(content((tiny_llama / file.name).read_bytes()))
    with pytest.raises(ModelError, match=message) as caught:
        read_stored_weights(tmp_path)
    assert str(file) in caught.value.message
    assert hint in (caught.value.hint or "")


def test_an_adapters_weights_have_their_own_name(tiny_llama: Path, tmp_path: Path):
    with pytest.raises(ModelError, match=r"there is no adapter_model\.safetensors"):
        read_stored_weights(tiny_llama, ADAPTER)
    shutil.copy(tiny_llama / "model.safetensors", tmp_path / "adapter_model.safetensors")
    assert read_stored_weights(tmp_path, ADAPTER)


@pytest.mark.parametrize(
    ("stored", "plain"),
    [
        ("_orig_mod.model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("module._orig_mod.h.0.ln_1.bias", "h.0.ln_1.bias"),
        ("base_model.model.transformer.wte.weight", "transformer.wte.weight"),
        ("model.layers.0._checkpoint_wrapped_module._orig_mod.mlp.weight", "model.layers.0.mlp.weight"),
        ("_fsdp_wrapped_module.lm_head.weight", "lm_head.weight"),
        ("pretrained_model.lm_head.weight", "lm_head.weight"),
        ("model.embed_tokens.weight", "model.embed_tokens.weight"),
    ],
)
def test_wrappers_are_removed_from_names(stored: str, plain: str):
    assert plain_names([stored]) == {stored: plain}


def test_a_prefix_is_removed_only_if_all_names_have_it():
    mixed = ["module.a.weight", "b.weight"]
    assert plain_names(mixed) == dict(zip(mixed, mixed, strict=True))
    beside = plain_names(["pretrained_model.model.norm.weight", "v_head.summary.weight"])
    assert list(beside.values()) == ["model.norm.weight", "v_head.summary.weight"]


def test_heads_are_found_outside_of_the_layers():
    weights = {
        "v_head.summary.weight": (1, 16),
        "v_head.summary.bias": (1,),
        "model.layers.0.score.weight": (16, 16),
        "lm_head.weight": (320, 16),
    }
    [head] = stored_heads(weights)
    assert (head.name, head.rows, head.width, head.has_bias) == ("v_head.summary", 1, 16, True)


def test_equal_names_after_mapping_are_refused(tiny_llama: Path, tmp_path: Path):
    from rlhf_cli.models.checkpoint import open_checkpoint

    tensors = load_file(tiny_llama / "model.safetensors")
    name = next(iter(tensors))
    save_file(tensors | {f"_orig_mod.{name}": tensors[name].clone()}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="two stored weights are both"):
        open_checkpoint(str(tmp_path))
