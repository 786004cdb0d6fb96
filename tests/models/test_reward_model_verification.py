"""The reward model on disk gives the rewards of the one that was trained, or the stage fails."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlhf_cli.data.records import Message
from rlhf_cli.errors import ModelError
from rlhf_cli.models.loading import ModelSource
from rlhf_cli.models.reward_model import verification
from rlhf_cli.models.reward_model.files import save_reward_model
from rlhf_cli.models.reward_model.loading import load_reward_model, new_reward_model
from rlhf_cli.models.reward_model.model import RewardModel
from rlhf_cli.models.reward_model.verification import probe_texts, save_trained_reward_model
from rlhf_cli.settings.shared import LoraSettings
from tests.conftest import CHAT_TEMPLATE

TEXTS = [(f"What is {number}?", "It is " + "a number " * number) for number in range(12)]
LORA = LoraSettings(rank=2, alpha=8.0)


def trained(folder: Path, lora: LoraSettings | None, dtype: torch.dtype = torch.float32) -> RewardModel:
    """A reward model after a training that changed all that trains."""
    source = ModelSource(str(folder), attention="eager", dtype=dtype, precision=dtype)
    reward_model = new_reward_model(source, template=None, lora=lora)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in reward_model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight), alpha=0.05)
    if not reward_model.is_encoder:
        reward_model.bias += 0.25
    reward_model.mean, reward_model.std = 0.5, 2.0
    return reward_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lora", [LORA, None])
@pytest.mark.parametrize("model", ["tiny_qwen2", "tiny_gpt2", "tiny_bert"])
def test_what_is_written_has_the_rewards_of_training(model, lora, dtype, request, tmp_path):
    reward_model = trained(request.getfixturevalue(model), lora, dtype)
    probe = probe_texts(reward_model, TEXTS)
    assert [text for _, text in probe] == [text for _, text in TEXTS[:8]], "the shortest"
    assert save_trained_reward_model(reward_model, tmp_path, probe=probe) < 1e-6
    assert {weight.device.type for weight in reward_model.model.parameters()} == {"meta"}
    scores = load_reward_model(ModelSource(str(tmp_path)), template=None).score(*zip(*TEXTS, strict=True))
    assert max(scores) - min(scores) > 1e-3


def _tensors(name: str, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        save_file(change(load_file(folder / name)), folder / name, {"format": "pt"})

    return changed


def _fields(name: str, **fields: object) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return changed


FIRST_SCALED = lambda state: state | {(key := sorted(state)[0]): state[key] * 1.01}  # noqa: E731
WITHOUT_FIRST = lambda state: {key: state[key] for key in sorted(state)[1:]}  # noqa: E731
IN_BFLOAT16 = lambda state: {key: value.bfloat16() for key, value in state.items()}  # noqa: E731


@pytest.mark.parametrize(
    ("lora", "change", "problem"),
    [
        pytest.param(LORA, _tensors("adapter/adapter_model.safetensors", FIRST_SCALED), "other values", id="stale"),
        pytest.param(LORA, _tensors("adapter/adapter_model.safetensors", WITHOUT_FIRST), "is missing", id="dropped"),
        pytest.param(LORA, _tensors("head.safetensors", FIRST_SCALED), "other values", id="head"),
        pytest.param(LORA, _tensors("head.safetensors", WITHOUT_FIRST), "is missing", id="no bias"),
        pytest.param(LORA, _tensors("head.safetensors", IN_BFLOAT16), "must be F32", id="dtype of the head"),
        pytest.param(LORA, _fields("adapter/adapter_config.json", lora_alpha=4.0), "alpha / rank is 2", id="scale"),
        pytest.param(LORA, _fields("reward.json", mean=0.6), "rewards differ by up to 0.05", id="normalization"),
        pytest.param(LORA, _fields("reward.json", template="Q: {prompt}"), "rewards differ", id="template"),
        pytest.param(None, _tensors("model.safetensors", IN_BFLOAT16), "must be F32", id="dtype"),
        pytest.param(
            None,
            _tensors("model.safetensors", lambda state: state | {"score.weight": -state["score.weight"]}),
            "rewards differ",
            id="another head",
        ),
        pytest.param(None, _fields("tokenizer_config.json", eos_token="a"), "another special token", id="tokenizer"),
    ],
)
def test_a_fault_of_saving_is_refused(lora, change, problem, tiny_llama, tmp_path, monkeypatch):
    reward_model = trained(tiny_llama, lora)

    def spoiled(*arguments, **named):
        save_reward_model(*arguments, **named)
        change(tmp_path)

    monkeypatch.setattr(verification, "save_reward_model", spoiled)
    with pytest.raises(ModelError, match="is not the model that was trained") as caught:
        save_trained_reward_model(reward_model, tmp_path, probe=TEXTS[:4])
    assert problem in caught.value.message
    assert "run the command again" in (caught.value.hint or "")


def test_comparing_needs_no_device(tiny_llama, tmp_path):
    """The reward model was trained on a GPU, whose attention may not run here."""
    reward_model = trained(tiny_llama, LORA)
    reward_model.source = replace(reward_model.source, device=torch.device("cuda"), attention="triton")
    assert save_trained_reward_model(reward_model, tmp_path, probe=TEXTS[:4]) < 1e-6


@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_nan_is_a_difference_wherever_it_is(position: int):
    written = [0.5, 1.0, 1.5]
    assert verification.largest_difference([0.5, 1.25, 1.5], written) == 0.25
    written[position] = math.nan
    assert math.isnan(verification.largest_difference([0.5, 1.0, 1.5], written))
    assert math.isnan(verification.largest_difference(written, [0.5, 1.0, 1.5]))


def test_an_adapter_is_read_with_its_own_tokenizer(tiny_llama, tmp_path):
    """Its base may have another chat template than the one that the reward model was trained with."""
    shutil.copytree(tiny_llama, tmp_path / "base")
    reward_model = trained(tmp_path / "base", LORA)
    reward_model.format.tokenizer.chat_template = CHAT_TEMPLATE.replace("<|", "[").replace("|>", "]")
    reward_model.format = replace(reward_model.format, template="chat")
    turns = (Message("user", "What is 3?"),)
    (tmp_path / "rm").mkdir()
    expected = reward_model.requires_grad_(False).score([turns], ["It is 3."])
    assert save_trained_reward_model(reward_model, tmp_path / "rm", probe=[(turns, "It is 3.")]) < 1e-6
    written = load_reward_model(ModelSource(str(tmp_path / "rm")), template=None)
    assert written.score([turns], ["It is 3."]) == pytest.approx(expected, abs=1e-5)
