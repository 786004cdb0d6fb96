"""The critic: V(s_t), the expected remaining reward, predicted from the hidden state before each completion token.

It is a linear head on an adapter on the policy's frozen backbone, on a separate backbone that is trained in full, or on
the policy itself (docs/decisions/0014-critic-head.md). `critic_files` has the files of a saved critic.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

from rlhf_cli.distributed.agreement import agreed, by_main
from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.errors import ModelError
from rlhf_cli.models.adapter_files import save_adapter
from rlhf_cli.models.base_model import hash_weights
from rlhf_cli.models.libraries import quiet_libraries
from rlhf_cli.models.loading import ModelSource, load_config
from rlhf_cli.models.multi_adapter import MultiAdapterModel
from rlhf_cli.models.policy_adapter import relative_base
from rlhf_cli.models.saving import require_finite, writing
from rlhf_cli.models.sharded_loading import open_model
from rlhf_cli.models.sharded_saving import ShardedWeights
from rlhf_cli.models.sharding import is_sharded, local, sharding_of, whole
from rlhf_cli.models.split_weights import join_weights, restore, stored
from rlhf_cli.models.verification import AdapterInMemory, check_tensors
from rlhf_cli.models.weight_loading import has_own_code, load_weights
from rlhf_cli.stages.ppo.critic_files import CriticConfig, Head, check_head, save_head

CRITIC = "critic"


@dataclass(frozen=True)
class AdapterStart:
    """Where the critic's adapter starts: a saved adapter, or by default a new one under a head that predicts 0."""

    folder: Path | None = None
    head: Head | None = None


@dataclass(frozen=True)
class HeadStart:
    """Where a critic that is a head on the policy starts: a saved head, or by default one that predicts 0."""

    head: Head | None = None


class Critic(Protocol):
    """A model and its value head, as `PPOModels` uses them."""

    value_head: nn.Linear

    def active_model(self) -> AbstractContextManager[PreTrainedModel]:
        """Yield the model under the head; inside the context its weights are the active ones."""
        ...

    def parameters(self) -> list[nn.Parameter]:
        """Return the trained weights under the head."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Return the trained weights under the head by name, for a checkpoint."""
        ...

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Copy the weights that `state` returned back into the model."""
        ...

    def save(self, folder: Path) -> None:
        """Write the model and its head to a folder from which another critic can start; read it back and compare."""
        ...


class AdapterCritic:
    """A critic that is an adapter on the policy's backbone.

    Args:
        backbone: the policy's model; it carries the adapter `CRITIC`.
        head: value head to start from; None predicts 0.
        base: where the backbone comes from, recorded in the saved critic.
    """

    def __init__(
        self, backbone: MultiAdapterModel, head: Head | None = None, *, base: ModelSource | None = None
    ) -> None:
        self._backbone, self._base = backbone, base
        self.value_head = value_head(backbone.model, head)

    def active_model(self) -> AbstractContextManager[PreTrainedModel]:
        """Yield the backbone with the critic's adapter."""
        return self._backbone.use_adapter(CRITIC)

    def parameters(self) -> list[nn.Parameter]:
        """Return A and B of the adapter."""
        return self._backbone.parameters(CRITIC)

    def state(self) -> dict[str, Tensor]:
        """Return A and B of the adapter by name."""
        return self._backbone.state(CRITIC)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Copy the weights that `state` returned back into the adapter."""
        self._backbone.load_state(CRITIC, state)

    def save(self, folder: Path) -> None:
        """Write the adapter in PEFT's format, the head and `critic.json`."""
        model = self._backbone.model
        state = {name: whole(weight) for name, weight in self.state().items()}
        if is_sharded(model):
            by_main(lambda: self._write(folder, state), ProcessGroup(model.device))
        else:
            self._write(folder, state)

    def _write(self, folder: Path, state: dict[str, Tensor]) -> None:
        base, revision = (None, None) if self._base is None else self._base.pinned
        base = None if base is None else relative_base(base, folder, depth=2)
        require_finite(state | dict(self.value_head.state_dict()), what="the critic")
        with writing("the critic", folder):
            save_adapter(self._backbone.model, folder, CRITIC, base=base, revision=revision, state=state)
            sha256 = None if self._base is None else hash_weights(self._base.path)
            save_head(folder, self.value_head, CriticConfig("adapter", base, revision, sha256))
        model = self._backbone.model
        AdapterInMemory.of(model, CRITIC, state=state).check(model, folder)
        check_head(folder, self.value_head)


class FullCritic:
    """A critic that is a separate backbone, trained in full.

    Args:
        model: backbone of a language model of any width, in float32.
        head: value head to start from; None predicts 0.
    """

    def __init__(self, model: PreTrainedModel, head: Head | None = None) -> None:
        self._model = model.requires_grad_(True)
        self.value_head = value_head(model, head)

    def active_model(self) -> AbstractContextManager[PreTrainedModel]:
        """Yield the backbone."""
        return nullcontext(self._model)

    def parameters(self) -> list[nn.Parameter]:
        """Return all weights of the backbone."""
        return list(self._model.parameters())

    def state(self) -> dict[str, Tensor]:
        """Return all weights of the backbone by name."""
        return stored(self._model.named_parameters())

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Copy the weights that `state` returned back into the backbone."""
        restore(stored(self._model.named_parameters()), state)

    def save(self, folder: Path) -> None:
        """Write the backbone as an ordinary model folder, the head and `critic.json`."""
        quiet_libraries()
        if is_sharded(self._model):
            self._save_sharded(folder)
            return
        join_weights(self._model)
        require_finite(self.state() | dict(self.value_head.state_dict()), what="the critic")
        with writing("the critic", folder):
            self._model.save_pretrained(folder)
            save_head(folder, self.value_head, CriticConfig("full", None, None))
        check_head(folder, self.value_head)
        # Code of the model's own that runs already may run again: `save_pretrained` wrote a copy of it.
        runs_code = has_own_code(self._model) or has_own_code(self._model.config)
        source = ModelSource(str(folder), trust_remote_code=runs_code, attention="eager")
        written = load_weights(AutoModel, source, load_config(source))
        check_tensors(self.state(), dict(written.named_parameters()), folder)

    def _save_sharded(self, folder: Path) -> None:
        """Write, read back and compare, each process its part; all call this."""
        processes = ProcessGroup(self._model.device)
        ShardedWeights(self._model).write(None, folder, processes)
        by_main(lambda: _write_head(folder, self.value_head, "full"), processes)
        divided = sharding_of(self._model)
        source = ModelSource(str(folder), attention="eager", device=self._model.device, **divided)
        written = dict(open_model(AutoModel, source, load_config(source)).read().named_parameters())
        own, stored = ({name: local(weight) for name, weight in one.items()} for one in (self.state(), written))
        agreed(lambda: check_tensors(own, {name: part.cpu() for name, part in stored.items()}, folder), processes)


class HeadCritic:
    """A critic that is a head on the policy's hidden states: its loss trains the policy's weights too.

    Args:
        policy: returns a context that yields the policy's model.
        head: value head to start from; None predicts 0.
    """

    def __init__(self, policy: Callable[[], AbstractContextManager[PreTrainedModel]], head: Head | None = None) -> None:
        self._policy = policy
        with policy() as model:
            self.value_head = value_head(model, head)

    def active_model(self) -> AbstractContextManager[PreTrainedModel]:
        """Yield the policy."""
        return self._policy()

    def parameters(self) -> list[nn.Parameter]:
        """Return no weights: those under the head are the policy's."""
        return []

    def state(self) -> dict[str, Tensor]:
        """Return no weights: those under the head are the policy's."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Do nothing: the weights under the head are the policy's."""

    def save(self, folder: Path) -> None:
        """Write the head and `critic.json`."""
        with self._policy() as model:
            if is_sharded(model):
                by_main(lambda: _write_head(folder, self.value_head, "head"), ProcessGroup(model.device))
            else:
                _write_head(folder, self.value_head, "head")


def _write_head(folder: Path, head: nn.Linear, kind: Literal["full", "head"]) -> None:
    """Write a head whose model is written elsewhere, with `critic.json`; read it back and compare."""
    require_finite(dict(head.state_dict()), what="the critic")
    with writing("the critic", folder):
        folder.mkdir(parents=True, exist_ok=True)
        save_head(folder, head, CriticConfig(kind, None, None))
    check_head(folder, head)


def value_head(model: PreTrainedModel, start: Head | None = None) -> nn.Linear:
    """Make a linear head on a model's hidden states, in float32.

    Args:
        model: a language model or its backbone, with hidden states of width d.
        start: weight (1, d) and bias (1,); None predicts 0 everywhere (Ziegler et al. 2019).

    Raises:
        ModelError: the weight of `start` has another width than d.
    """
    output = model.get_output_embeddings()
    # In some configurations `hidden_size` is the width of the embeddings, not of the states that reach the head.
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
