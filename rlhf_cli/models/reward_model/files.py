"""Files of a reward model: `reward.json`, and either a classifier folder or an adapter with its head."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_cli.errors import ModelError
from rlhf_cli.models.adapter_files import check_targets, read_adapter_config, save_adapter
from rlhf_cli.models.adapter_layers import adapter_state
from rlhf_cli.models.base_model import check_base, hash_weights, locate_base
from rlhf_cli.models.policy_adapter import ADAPTER_FOLDER, relative_base
from rlhf_cli.models.reward_model.classifier import head_parameters, read_head
from rlhf_cli.models.saving import require_finite, save_model_folder, writing
from rlhf_cli.models.sharding import whole
from rlhf_cli.models.stored_weights import ADAPTER, read_header, read_stored_weights

if TYPE_CHECKING:
    from rlhf_cli.models.loading import ModelSource
    from rlhf_cli.models.reward_model.model import RewardModel

_FORMAT = 1
_CONFIG = "reward.json"
HEAD_FILE = "head.safetensors"


@dataclass(frozen=True)
class RewardModelConfig:
    """The content of `reward.json`.

    Attributes:
        kind: "decoder" or "encoder".
        adapter: True for LoRA on a base model, False if the folder holds all weights.
        base: the model it was trained from, as a path relative to the folder or a hub id.
        base_revision: commit of a base model on the hub.
        template: template of plain-text prompts.
        mean: raw reward that is normalized to 0.
        std: raw difference that is normalized to 1.
        hidden_size: width d of the head.
        template_kwargs: arguments of the chat template.
        base_sha256: of the base's weight files, see `base_model.hash_weights`; None if the base is on the hub or the
            folder holds all weights.
    """

    kind: str
    adapter: bool
    base: str
    base_revision: str | None
    template: str | None
    mean: float
    std: float
    hidden_size: int
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    base_sha256: str | None = None

    def __post_init__(self) -> None:
        """Check types and values, which come from a file; raises `ValueError`."""
        checks = {
            "kind": self.kind in ("decoder", "encoder"),
            "adapter": isinstance(self.adapter, bool),
            "base": isinstance(self.base, str),
            "base_revision": isinstance(self.base_revision, str | None),
            "template": isinstance(self.template, str | None),
            "mean": _is_number(self.mean),
            "std": _is_number(self.std) and self.std > 0,
            "hidden_size": isinstance(self.hidden_size, int) and self.hidden_size > 0,
            "template_kwargs": isinstance(self.template_kwargs, Mapping),
            "base_sha256": isinstance(self.base_sha256, str | None),
        }
        if wrong := [name for name, is_right in checks.items() if not is_right]:
            raise ValueError(f"`{wrong[0]}` cannot be {getattr(self, wrong[0])!r}")

    def base_path(self, folder: Path) -> str:
        """Return the path or hub id of the base; raises `ModelError` if it is a path where no folder is."""
        return locate_base(self.base, folder / _CONFIG)

    def base_source(self, source: ModelSource) -> ModelSource:
        """Return where the base of the adapter at `source` comes from; raises as `base_path`."""
        return replace(source.at(self.base_path(source.folder)), revision=self.base_revision)

    def check_base(self, folder: Path) -> None:
        """Raise `ModelError` if the base's weights are not those on which the adapter was trained."""
        check_base(self.base_path(folder), self.base_sha256, folder / _CONFIG)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read_reward_config(folder: Path) -> RewardModelConfig | None:
    """Read `reward.json`; return None if the folder has none, as with classifiers of other origin.

    Raises:
        ModelError: the file is damaged or of a later format.
    """
    path = folder / _CONFIG
    if not path.is_file():
        return None
    try:
        fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = fields.pop("format")
        if version != _FORMAT:
            raise ModelError(f"{path}: format must be {_FORMAT}, got {version}", hint="upgrade rlhf-cli")
        return RewardModelConfig(**fields)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(f"{path} is damaged: {error}", hint="run `rlhf train-rm` again") from error


def refuse_adapter_as_start(path: str, config: RewardModelConfig | None) -> None:
    """Raise `ModelError` for a reward model saved as an adapter, from which no other can be trained."""
    if config is not None and config.adapter:
        raise ModelError(
            f"cannot train from `{path}`: it is a reward model saved as an adapter on {config.base}",
            hint="start from that base, or from a reward model that was trained with `adapter: none`",
        )


def check_adapter_files(folder: Path, config: RewardModelConfig) -> None:
    """Check the files of a reward model saved as an adapter, from the headers of its weights.

    Raises:
        ModelError: a file is missing or damaged, or the head has another width than `reward.json` says.
    """
    adapter = folder / ADAPTER_FOLDER
    read_adapter_config(adapter)
    check_targets(adapter, [name.rsplit(".", 2)[0] for name in read_stored_weights(adapter, ADAPTER)])
    head = read_header(folder / HEAD_FILE)
    if config.kind == "decoder":
        shapes = {name: weight.shape for name, weight in head.items()}
        if shapes != {"weight": (1, config.hidden_size), "bias": (1,)}:
            raise ModelError(
                f"{folder / HEAD_FILE} is not a reward head of width {config.hidden_size}: it holds {shapes}",
                hint="run `rlhf train-rm` again",
            )


def save_reward_model(
    reward_model: RewardModel,
    folder: Path,
    *,
    final: Path | None = None,
    depth: int = 1,
    write: Callable[[str, str | None], None] | None = None,
) -> None:
    """Write a reward model; `load_reward_model` restores one with the same rewards.

    Trained in full, it becomes a folder for `AutoModelForSequenceClassification` (for an explicit transformer of
    `model.build`, after `import rlhf_cli.transformer`). As an adapter, it becomes `adapter/` in PEFT's format and
    `head.safetensors`. Both get `reward.json` and the tokenizer.

    Args:
        reward_model: the reward model to write.
        folder: an existing folder.
        final: the folder's final path if it is renamed later; the adapter's base is named relative to it.
        depth: of the folder below the run directory, see `policy_adapter.relative_base`.
        write: writes the weights, or nothing, given path and revision of the base; None writes those of a model that is
            not sharded.

    Raises:
        DivergedError: a weight is not finite.
        DiskError: the disk is full or cannot be written.
    """
    base, revision = reward_model.source.pinned
    base = relative_base(base, final or folder, depth=depth)
    config = RewardModelConfig(
        kind="encoder" if reward_model.is_encoder else "decoder",
        adapter=reward_model.is_adapter,
        base=base,
        base_revision=revision,
        template=reward_model.format.template,
        # A transformers classifier cannot store our bias, so the mean absorbs it.
        mean=reward_model.mean if reward_model.is_adapter else reward_model.mean - float(reward_model.bias),
        std=reward_model.std,
        hidden_size=reward_model.head.in_features,
        template_kwargs=dict(reward_model.format.template_kwargs),
        base_sha256=hash_weights(reward_model.source.path) if reward_model.is_adapter else None,
    )
    text = json.dumps({"format": _FORMAT} | asdict(config), indent=2, ensure_ascii=False)
    with writing("the reward model", folder):
        (folder / _CONFIG).write_text(text + "\n", encoding="utf-8")
        if write is not None:
            write(base, revision)
        elif reward_model.is_adapter:
            save_trained(reward_model, folder, base, revision)
        else:
            _save_classifier(reward_model, folder)


def save_trained(
    reward_model: RewardModel,
    folder: Path,
    base: str,
    revision: str | None,
    *,
    state: Mapping[str, torch.Tensor] | None = None,
    head: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write adapter, head and tokenizer; `state` and `head` are those weights, whole, if the model is sharded."""
    head = head_tensors(reward_model) if head is None else head
    state = adapter_state(reward_model.model) if state is None else state
    require_finite({**head, **state}, what="the reward model")
    save_adapter(reward_model.model, folder / ADAPTER_FOLDER, base=base, revision=revision, state=state)
    save_file(head, folder / HEAD_FILE)
    reward_model.format.tokenizer.save_pretrained(str(folder))


def _save_classifier(reward_model: RewardModel, folder: Path) -> None:
    model, tokenizer = reward_model.model, reward_model.format.tokenizer
    if not reward_model.is_encoder:
        set_padding(model, tokenizer)
    save_model_folder(model, tokenizer, folder, dtype=torch.float32)


def set_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Set the padding token of a decoder's classifier for use in transformers.

    Transformers takes the last token that is not padding as the last token. If the padding token is the end token this
    finds a wrong one. Without a padding token transformers raises for batches in place of scoring wrongly.
    """
    config, pad = model.config.get_text_config(), tokenizer.pad_token_id
    is_usable = isinstance(pad, int) and pad != tokenizer.eos_token_id and pad < config.vocab_size
    config.pad_token_id = pad if is_usable else None


def head_tensors(reward_model: RewardModel) -> dict[str, torch.Tensor]:
    """Return the tensors that are stored beside an adapter: a decoder's head, or those of `head_parameters`.

    Of a sharded model every process calls this.
    """
    if reward_model.is_encoder:
        trained = head_parameters(reward_model.model, is_encoder=True)
        return {name: parameter.detach().float().cpu().contiguous() for name, parameter in trained.items()}
    head = reward_model.head
    weight, own = whole(head.weight), None if head.bias is None else whole(head.bias)
    bias = reward_model.bias if own is None else reward_model.bias + own
    return {"weight": weight.detach().float().cpu().contiguous(), "bias": bias.detach().float().cpu().contiguous()}


def load_reward_head(source: ModelSource, config: RewardModelConfig | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Load a decoder's head in the scale of normalized rewards, ((w h + b) - mean) / std.

    Args:
        source: of the reward model.
        config: its config; None for a classifier of other origin.

    Returns:
        Weight (1, d) and bias (1,).

    Raises:
        ModelError: the file cannot be read, or a classifier has no head.
    """
    if config is None or not config.adapter:
        mean, std = (0.0, 1.0) if config is None else (config.mean, config.std)
        weight, bias = read_head(source)
        return weight / std, (bias - mean) / std
    folder = source.folder
    try:
        head = load_file(folder / HEAD_FILE)
        return head["weight"].float() / config.std, (head["bias"].float() - config.mean) / config.std
    except (OSError, KeyError, SafetensorError) as error:
        raise ModelError(f"cannot read {folder / HEAD_FILE}: {error}", hint="run `rlhf train-rm` again") from error


def load_head(reward_model: RewardModel, folder: Path) -> None:
    """Load the head of a reward model saved as an adapter, in place.

    Raises:
        ModelError: the file cannot be read, or does not fit the base model.
    """
    path = folder / HEAD_FILE
    try:
        tensors = load_file(path)
        with torch.no_grad():
            if reward_model.is_encoder:
                for name, parameter in head_parameters(reward_model.model, is_encoder=True).items():
                    parameter.data = tensors[name].to(reward_model.device)
                return
            head = reward_model.head
            head.weight.data = tensors["weight"].to(reward_model.device).view_as(head.weight)
            reward_model.bias.copy_(tensors["bias"])
            if head.bias is not None:
                head.bias.zero_()
    except (OSError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{path} does not fit its base model: {error}", hint="run `rlhf train-rm` again") from error
