"""A file that one process cannot read ends all of them, before any waits for what the others read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.errors import ModelError
from rlhf_cli.models.loading import ModelSource
from rlhf_cli.models.reward_model.sharded import load_sharded_reward_model, new_sharded_reward_model
from rlhf_cli.models.sharded_loading import UnreadModel
from rlhf_cli.stages.ppo import critic_initialization as critics


def reward_model(base: Path, folder: Path) -> ModelSource:
    AutoModelForSequenceClassification.from_pretrained(base, num_labels=1).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return ModelSource(str(folder))


def critic(kind: str, base: Path, folder: Path) -> Path:
    folder.mkdir()
    save_file({"weight": torch.zeros(1, 8), "bias": torch.zeros(1)}, folder / "value_head.safetensors")
    of_base = str(base) if kind == "adapter" else None
    config = {"format": 1, "kind": kind, "base": of_base, "base_revision": None}
    (folder / "critic.json").write_text(json.dumps(config))
    return folder


OPENED: dict[str, Callable[[Path, Path], object]] = {
    "reward model": lambda base, folder: load_sharded_reward_model(reward_model(base, folder), template=None),
    "new reward model": lambda base, _: new_sharded_reward_model(ModelSource(str(base)), template=None, lora=None),
    "critic": lambda base, _: critics.model_from_policy(ModelSource(str(base)), is_sharded=True),
    "critic's adapter": lambda base, folder: critics.adapter_from_folder(
        ModelSource(str(base)), critic("adapter", base, folder), is_sharded=True
    ),
    "critic's head": lambda base, folder: critics.head_from_folder(critic("head", base, folder), is_sharded=True),
}


@pytest.mark.parametrize("case", OPENED)
def test_a_file_that_another_process_cannot_read_is_an_error_here(case, tiny_llama, tmp_path, monkeypatch):
    told: list[object] = []

    def exchanged(processes: ProcessGroup, own: object) -> list[object]:
        told.append(own)
        return [own, [3, "a damaged file", "copy it again"]]  # a `ModelError`

    def read(*given: object, **named: object) -> None:
        raise AssertionError("this process reads weights, for which it would wait for the other")

    monkeypatch.setattr(ProcessGroup, "all_gather_object", exchanged)
    monkeypatch.setattr(UnreadModel, "read", read)
    with pytest.raises(ModelError, match="a damaged file"):
        OPENED[case](tiny_llama, tmp_path / "saved")
    assert told == [None], "here nothing failed"
