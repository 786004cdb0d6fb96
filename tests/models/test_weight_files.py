"""Weight files written tensor by tensor are, byte for byte, those that `save_pretrained` writes."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers.core_model_loading import revert_weight_conversion

from rlhf_cli.models import weight_files
from rlhf_cli.models.loading import ModelSource, load_policy
from rlhf_cli.models.weight_files import WeightFiles, stored_state
from tests.conftest import byte_level_tokenizer
from tests.families.zoo import save_tiny


def model_of(family: str, folder: Path):
    save_tiny(family, byte_level_tokenizer(chat=True), folder)
    return load_policy(ModelSource(str(folder), attention="eager"), dtype=torch.float32)


def weights_of(model) -> list[tuple[str, torch.Tensor]]:
    return list(revert_weight_conversion(model, stored_state(model)).items())


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("model*"))}


@pytest.mark.parametrize(
    ("family", "max_file"), [("llama", "50GB"), ("qwen3_moe", "50GB"), ("llama", "20KB"), ("gpt2", "20KB")]
)
def test_bytes_in_any_order_are_those_of_save_pretrained(family: str, max_file: str, tmp_path: Path):
    """Tied and untied embeddings, transposed layers, experts that are stored apart; one file and several."""
    model = model_of(family, tmp_path / "model")
    for name in ("expected", "streamed"):
        (tmp_path / name).mkdir()
    model.save_pretrained(tmp_path / "expected", max_shard_size=max_file)
    weights = weights_of(model)
    random.Random(1).shuffle(weights)
    WeightFiles(model, tmp_path / "streamed", max_file=max_file).write(weights)
    expected = content(tmp_path / "expected")
    assert content(tmp_path / "streamed") == expected
    assert len(expected) == 1 if max_file == "50GB" else len(expected) > 3


def test_a_weight_that_is_missing_unknown_or_of_another_shape_is_an_error(tmp_path: Path):
    model = model_of("llama", tmp_path / "model")
    weights = weights_of(model)
    name, value = weights[0]
    with pytest.raises(RuntimeError, match="1 weights were not written"):
        WeightFiles(model, tmp_path).write(weights[1:])
    for wrong in (("other", value), (name, value[:-1]), (name, value)):
        with pytest.raises(RuntimeError, match="has no location"):
            WeightFiles(model, tmp_path).write([*weights, wrong])


def test_values_are_cast_to_the_dtype_of_their_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = model_of("llama", tmp_path / "model")
    weights = weights_of(model)
    monkeypatch.setattr(weight_files, "PIECE_BYTES", 100)  # bytes at once
    model.save_pretrained(tmp_path / "expected")
    rounded = {name: value.bfloat16().float() for name, value in weights}
    WeightFiles(model, tmp_path).write((name, value.bfloat16()) for name, value in weights)
    found = load_policy(ModelSource(str(tmp_path / "expected"), attention="eager"))
    (tmp_path / "model.safetensors").rename(tmp_path / "expected" / "model.safetensors")
    read = dict(weights_of(load_policy(ModelSource(str(tmp_path / "expected"), attention="eager"))))
    assert all(torch.equal(read[name], rounded[name]) for name in rounded)
    assert any(not torch.equal(value, rounded[name]) for name, value in weights_of(found))
