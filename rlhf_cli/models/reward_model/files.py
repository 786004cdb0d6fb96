"""The files of a reward model: `reward.json`, and either a classifier folder or an adapter with its head."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from rlhf_cli.errors import ModelError
from rlhf_cli.models.lora import adapter_state, save_adapter
from rlhf_cli.models.reward_model.classifier import head_parameters
from rlhf_cli.models.saving import require_finite, save_model_folder, writing

if TYPE_CHECKING:
    from rlhf_cli.models.reward_model.model import RewardModel

ADAPTER_FOLDER = "adapter"

_FORMAT = 1
_HEAD = "head.safetensors"


@dataclass(frozen=True)
class RewardModelConfig:
    """What `reward.json` says.

    Attributes:
        kind: "decoder" or "encoder".
        adapter: LoRA on a base, otherwise all weights are in the folder.
        base: the model it was trained from: a path relative to the folder, or a hub id.
        base_revision: of a hub id.
        template: of prompts that are plain text.
        mean: raw reward that counts as 0.
        std: raw difference that counts as 1.
        hidden_size: d of the head.
    """

    kind: str
    adapter: bool
    base: str
    base_revision: str | None
    template: str | None
    mean: float
    std: float
    hidden_size: int

    def base_path(self, folder: Path) -> str:
        """The base as it can be loaded."""
        local = folder / self.base
        return str(local.resolve()) if local.is_dir() else self.base


def read_reward_config(folder: Path) -> RewardModelConfig | None:
    """The card of one of our reward models; None for anything else.

    Raises:
        ModelError: a damaged card, or one of a later version.
    """
    path = folder / "reward.json"
    if not path.is_file():
        return None
    try:
        fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = fields.pop("format")
        if version != _FORMAT:
            raise ModelError(f"{path} is of format {version}; this version reads {_FORMAT}", hint="upgrade rlhf-cli")
        card = RewardModelConfig(**fields)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(f"{path} is damaged: {error}", hint="run `rlhf train-rm` again") from error
    return card


def save_artifact(scorer: RewardModel, folder: Path, *, final: Path) -> None:
    """See `scorer.save_reward_model`."""
    base = _relative_base(scorer.source.path, final)
    card = RewardModelConfig(
        kind="encoder" if scorer.is_encoder else "decoder",
        adapter=scorer.is_adapter,
        base=base,
        base_revision=scorer.source.revision,
        template=scorer.format.template,
        # A classifier of transformers has no place for a bias that is not its own, so the mean takes it in.
        mean=scorer.mean if scorer.is_adapter else scorer.mean - float(scorer.bias),
        std=scorer.std,
        hidden_size=scorer.head.in_features,
    )
    text = json.dumps({"format": _FORMAT} | asdict(card), indent=2, ensure_ascii=False)
    with writing("the reward model", folder):
        (folder / "reward.json").write_text(text + "\n", encoding="utf-8")
        if scorer.is_adapter:
            _save_adapter(scorer, folder, base)
        else:
            _save_classifier(scorer, folder)


def _save_adapter(scorer: RewardModel, folder: Path, base: str) -> None:
    head = _head_tensors(scorer)
    require_finite(head | adapter_state(scorer.model), what="the reward model")
    save_adapter(scorer.model, folder / ADAPTER_FOLDER, base=base)
    save_file(head, folder / _HEAD)
    scorer.format.tokenizer.save_pretrained(str(folder))


def _save_classifier(scorer: RewardModel, folder: Path) -> None:
    model, tokenizer = scorer.model, scorer.format.tokenizer
    if not scorer.is_encoder:
        # Transformers finds the last token as the last one that is not padding: where padding is the end token it would
        # find another one, so it is told of no padding and then refuses batches instead of scoring them wrongly.
        config, pad = model.config.get_text_config(), tokenizer.pad_token_id
        is_usable = isinstance(pad, int) and pad != tokenizer.eos_token_id and pad < config.vocab_size
        config.pad_token_id = pad if is_usable else None
    save_model_folder(model, tokenizer, folder, dtype=torch.float32)


def _relative_base(path: str, final: Path) -> str:
    """A base in the same run directory by a relative path, so that the run can be moved; others as they are."""
    base = Path(path)
    if not base.is_dir():
        return path
    base, final = base.resolve(), final.resolve()
    return os.path.relpath(base, final) if final.parent in base.parents else str(base)


def _head_tensors(scorer: RewardModel) -> dict[str, torch.Tensor]:
    if scorer.is_encoder:
        trained = head_parameters(scorer.model, is_encoder=True)
        return {name: parameter.detach().float().cpu().contiguous() for name, parameter in trained.items()}
    head = scorer.head
    bias = scorer.bias if head.bias is None else scorer.bias + head.bias
    return {"weight": head.weight.detach().float().cpu().contiguous(), "bias": bias.detach().float().cpu().contiguous()}


def load_reward_head(folder: Path, card: RewardModelConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of a decoder adapter's head in the scale of rewards: ((w h + b) - mean) / std."""
    try:
        head = load_file(folder / _HEAD)
        return head["weight"].float() / card.std, (head["bias"].float() - card.mean) / card.std
    except (OSError, KeyError, SafetensorError) as error:
        raise ModelError(f"cannot read {folder / _HEAD}: {error}", hint="run `rlhf train-rm` again") from error


def load_head(scorer: RewardModel, folder: Path) -> None:
    """Put the head of an adapter artifact in place; raises `ModelError` where it does not fit."""
    path = folder / _HEAD
    try:
        tensors = load_file(path)
        with torch.no_grad():
            if scorer.is_encoder:
                for name, parameter in head_parameters(scorer.model, is_encoder=True).items():
                    parameter.data = tensors[name].to(scorer.device)
                return
            head = scorer.head
            head.weight.data = tensors["weight"].to(scorer.device).view_as(head.weight)
            scorer.bias.copy_(tensors["bias"])
            if head.bias is not None:
                head.bias.zero_()
    except (OSError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{path} does not fit its base: {error}", hint="run `rlhf train-rm` again") from error
