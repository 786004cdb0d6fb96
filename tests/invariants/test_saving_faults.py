"""A fault while a stage writes its model ends the stage: no artifact differs from what was trained without a word."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rlhf_cli.errors import ModelError
from rlhf_cli.models import adapter_files
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.stages.ppo import run as ppo
from rlhf_cli.stages.reward_model import run as train_rm
from rlhf_cli.stages.sft import run as sft
from tests.conftest import CHAT_TEMPLATE
from tests.stages.context import stage_context

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def chat_model(tiny_qwen2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "chat"
    shutil.copytree(tiny_qwen2, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def run(stage: str, adapter: str, model: Path, folder: Path) -> None:
    """Train for a few steps, as the command does; the artifact is `folder/output`."""
    data = folder / "data.jsonl"
    rows = [
        {"prompt": f"What is {n}?", "completion": f" It is {n}.", "completions": [f" It is {n}.", " No."]}
        | ({"ranking": [[0], [1]]} if stage == "train-rm" else {})
        for n in range(16)
    ]
    keys = {"sft": ("prompt", "completion"), "train-rm": ("prompt", "completions", "ranking"), "ppo": ("prompt",)}
    data.write_text("".join(json.dumps({key: row[key] for key in keys[stage]}) + "\n" for row in rows))
    (folder / "reward.py").write_text(
        "def score(prompts, completions):\n    return [float(len(c)) for c in completions]\n"
    )
    function = f"{folder / 'reward.py'}:score"
    common = {"adapter": adapter, "learning_rate": 1e-2}
    section = {
        "sft": {"data": str(data), "epochs": 1, "batch_size": 4},
        "train-rm": {"data": str(data), "epochs": 1, "normalize": False},
        "ppo": {"rewards": [{"function": function}], "steps": 1, "prompts_per_step": 4, "max_new_tokens": 4},
    }[stage]
    name = stage.replace("-", "_")
    recipe = Recipe.model_validate(
        {
            "model": {"path": str(model), "precision": "float32", "attention": "eager"},
            "data": {"holdout": 0.3},
            name: section | common,
        }
    )
    places = {name: folder / name for name in ("output", "work")}
    for place in places.values():
        place.mkdir()
    if stage == "sft":
        sft.run(stage_context(stage, recipe, base=model, demonstrations=data, **places))
    elif stage == "train-rm":
        train_rm.run(stage_context(stage, recipe, policy=model, rankings=data, **places))
    else:
        ppo.run(stage_context(stage, recipe, policy=model, prompts=data, rewards=(function,), **places))


def _last(state: State) -> str:
    return sorted(key for key in state if key.endswith("weight"))[-1]


def _dropped(state: State) -> State:
    return {key: value for key, value in state.items() if key != _last(state)}


def _rounded(state: State) -> State:
    return {key: value.bfloat16() for key, value in state.items()}


def _changed(state: State) -> State:
    return state | {_last(state): state[_last(state)] * 0.99}


def spoil_model(change: Callable[[State], State], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let transformers write other weights than it was given."""
    save = PreTrainedModel.save_pretrained

    def spoiled(self: PreTrainedModel, folder: Path, **named: object) -> None:
        save(self, folder, **named)
        path = Path(folder) / "model.safetensors"
        save_file(change(load_file(path)), path, {"format": "pt"})

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", spoiled)


def spoil_adapter(change: Callable[[State], State], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let other factors be written than those that were trained."""

    def damaged(state, path, **named):
        save_file(change(state), path, **named)

    monkeypatch.setattr(adapter_files, "save_file", damaged)


def spoil_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the chat template be lost."""
    save = PreTrainedTokenizerBase.save_pretrained

    def spoiled(self: PreTrainedTokenizerBase, folder: Path, **named: object) -> None:
        save(self, folder, **named)
        (Path(folder) / "chat_template.jinja").unlink()

    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", spoiled)


@pytest.mark.parametrize("stage", ["sft", "train-rm", "ppo"])
@pytest.mark.parametrize("fault", ["dropped", "dtype", "changed", "adapter", "dropped factor", "template"])
def test_no_stage_ends_with_another_model_than_it_trained(stage, fault, chat_model, tmp_path, monkeypatch):
    is_of_adapter = fault in ("adapter", "dropped factor")
    if fault == "template":
        spoil_tokenizer(monkeypatch)
    elif is_of_adapter:
        spoil_adapter(_changed if fault == "adapter" else _dropped, monkeypatch)
    else:
        spoil_model({"dropped": _dropped, "dtype": _rounded, "changed": _changed}[fault], monkeypatch)
    with pytest.raises(ModelError, match=r"is not the model that was trained|is missing|does not fit"):
        run(stage, "lora" if is_of_adapter or fault == "template" else "none", chat_model, tmp_path)


@pytest.mark.parametrize("adapter", ["lora", "none"])
@pytest.mark.parametrize("stage", ["sft", "train-rm", "ppo"])
def test_without_a_fault_they_end(stage, adapter, chat_model, tmp_path):
    run(stage, adapter, chat_model, tmp_path)
    assert (tmp_path / "output" / "contract.json").is_file()
