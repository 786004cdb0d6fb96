"""The critic: V(s_t), the reward still to come, read from the hidden state before each token of an answer.

It is an adapter on the policy's frozen backbone, or a backbone of its own that is trained in full; either way under a
linear head. Saved, it is a folder that this module and other people's tools read: PEFT's adapter, or a model folder for
`AutoModel`, beside `value_head.safetensors` and `critic.json`.
"""

from __future__ import annotations

import json
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_cli.errors import ModelError
from rlhf_cli.models.loading import ModelSource, quiet_libraries
from rlhf_cli.models.lora import save_adapter
from rlhf_cli.models.multi_adapter import SharedModel
from rlhf_cli.models.saving import require_finite, writing

Head = tuple[Tensor, Tensor]
"""Weight (1, d) and bias (1,) of a value head."""

CRITIC = "critic"


@dataclass(frozen=True)
class AdapterStart:
    """An adapter on the policy's backbone to start a critic from; None is a new one under a head that predicts 0."""

    folder: Path | None = None
    head: Head | None = None


_HEAD, _CARD, _FORMAT = "value_head.safetensors", "critic.json", 1


class Critic(Protocol):
    """What PPO's roles need of a critic."""

    value_head: nn.Linear

    def playing(self) -> AbstractContextManager[PreTrainedModel]:
        """The model under the head."""
        ...

    def parameters(self) -> list[nn.Parameter]:
        """Trained weights under the head."""
        ...

    def state(self) -> dict[str, Tensor]:
        """The same by name, for a checkpoint."""
        ...

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Inverse of `state`."""
        ...

    def save(self, folder: Path) -> None:
        """Write it, head included, so that it can be loaded again."""
        ...


class AdapterCritic:
    """An adapter on the policy's backbone.

    Args:
        shared: the backbone; it carries the adapter `CRITIC`.
        head: to start from; None predicts 0.
        base: where the backbone is from, for the saved critic to say what it belongs to.
    """

    def __init__(self, shared: SharedModel, head: Head | None = None, *, base: ModelSource | None = None) -> None:
        self._shared, self._base = shared, base
        self.value_head = value_head(shared.model, head)

    def playing(self) -> AbstractContextManager[PreTrainedModel]:
        """The backbone with the critic's adapter."""
        return self._shared.playing(CRITIC)

    def parameters(self) -> list[nn.Parameter]:
        """A and B."""
        return self._shared.parameters(CRITIC)

    def state(self) -> dict[str, Tensor]:
        """A and B by name."""
        return self._shared.state(CRITIC)

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Inverse of `state`."""
        self._shared.load_state(CRITIC, state)

    def save(self, folder: Path) -> None:
        """The adapter in PEFT's format, its head and card."""
        base = None if self._base is None else _relative(self._base.path, folder)
        require_finite(self.state() | dict(self.value_head.state_dict()), what="the critic")
        with writing("the critic", folder):
            save_adapter(self._shared.model, folder, CRITIC, base=base)
            revision = None if self._base is None else self._base.revision
            _save_head(folder, self.value_head, CriticConfig("adapter", base, revision))


class FullCritic:
    """A backbone of its own, all of whose weights train.

    Args:
        model: a language model's backbone of any width, float32.
        head: to start from; None predicts 0.
    """

    def __init__(self, model: PreTrainedModel, head: Head | None = None) -> None:
        self._model = model.requires_grad_(True)
        self.value_head = value_head(model, head)

    def playing(self) -> AbstractContextManager[PreTrainedModel]:
        """The backbone."""
        return nullcontext(self._model)

    def parameters(self) -> list[nn.Parameter]:
        """All weights of the backbone."""
        return list(self._model.parameters())

    def state(self) -> dict[str, Tensor]:
        """All weights by name."""
        return {name: parameter.detach() for name, parameter in self._model.named_parameters()}

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Inverse of `state`."""
        for name, parameter in self._model.named_parameters():
            parameter.copy_(state[name])

    def save(self, folder: Path) -> None:
        """The backbone as an ordinary model folder, its head and card."""
        quiet_libraries()
        require_finite(self.state() | dict(self.value_head.state_dict()), what="the critic")
        with writing("the critic", folder):
            self._model.save_pretrained(folder)
            _save_head(folder, self.value_head, CriticConfig("full", None, None))


def value_head(model: PreTrainedModel, start: Head | None = None) -> nn.Linear:
    """A linear head on a model's hidden states, in float32.

    Args:
        model: a language model or its backbone.
        start: weights; None predicts 0 everywhere (value heads start at zero: Ziegler et al. 2019).

    Raises:
        ModelError: the weights are of another width.
    """
    output = model.get_output_embeddings()
    # The configuration of some names the width of the embeddings, which is not that of what reaches the head.
    width = model.config.get_text_config(decoder=True).hidden_size if output is None else output.weight.shape[1]  # pyright: ignore[reportIndexIssue]
    head = nn.Linear(int(width), 1, device="meta", dtype=torch.float32).to_empty(device=model.device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    if start is not None:
        if start[0].shape != head.weight.shape:
            raise ModelError(f"a value head of width {start[0].shape[-1]} does not fit hidden states of width {width}")
        with torch.no_grad():
            head.weight.copy_(start[0])
            head.bias.copy_(start[1])
    return head


@dataclass(frozen=True)
class CriticConfig:
    """What `critic.json` says.

    Attributes:
        kind: an adapter on a base, or all weights.
        base: of an adapter: a path relative to the folder, or as it was given.
        base_revision: of a hub id.
    """

    kind: Literal["adapter", "full"]
    base: str | None
    base_revision: str | None

    def base_path(self, folder: Path) -> str | None:
        """The base as it can be loaded."""
        if self.base is None:
            return None
        local = folder / self.base
        return str(local.resolve()) if local.is_dir() else self.base


def read_critic_config(folder: Path) -> CriticConfig:
    """The card of a saved critic; raises `ModelError` where there is none, or a damaged one."""
    try:
        fields: dict[str, Any] = json.loads((folder / _CARD).read_text(encoding="utf-8"))
        if fields.pop("format") != _FORMAT:
            raise ModelError(f"{folder / _CARD} is of another format than this version reads", hint="upgrade rlhf-cli")
        return CriticConfig(**fields)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(
            f"{folder} is no saved critic: {error}", hint="give the critic of an earlier run, runs/NAME/ppo/critic"
        ) from error


def load_value_head(folder: Path) -> Head:
    """Weight (1, d) and bias (1,) of a saved critic; raises `ModelError` where they cannot be read."""
    try:
        state = load_file(folder / _HEAD)
        return state["weight"], state["bias"]
    except (OSError, KeyError, SafetensorError) as error:
        raise ModelError(f"cannot read {folder / _HEAD}: {error}") from error


def _save_head(folder: Path, head: nn.Linear, card: CriticConfig) -> None:
    save_file({name: tensor.cpu().contiguous() for name, tensor in head.state_dict().items()}, folder / _HEAD)
    text = json.dumps({"format": _FORMAT} | asdict(card), indent=2, ensure_ascii=False)
    (folder / _CARD).write_text(text + "\n", encoding="utf-8")


def _relative(base: str, folder: Path) -> str:
    """A base in the same run directory (`sft` beside `ppo/critic`) by a relative path, so that the run can be moved."""
    if not Path(base).is_dir():
        return base
    place, run = Path(base).resolve(), folder.resolve().parent.parent
    return os.path.relpath(place, folder.resolve()) if run in place.parents else str(place)
