"""The critic: V(s_t), the expected remaining reward, predicted from the hidden state before each completion token.

It is a linear head on an adapter on the policy's frozen backbone, on a separate backbone that is trained in full, or on
the policy itself (docs/decisions/0014-critic-head.md). A saved critic is a folder with `value_head.safetensors`,
`critic.json`, and a PEFT adapter or an `AutoModel` folder if it has one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

from rlhf_cli.distributed.agreement import agreed, by_main
from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.errors import ModelError
from rlhf_cli.models.adapter_files import read_adapter, save_adapter
from rlhf_cli.models.base_model import check_base, hash_weights, locate_base
from rlhf_cli.models.libraries import quiet_libraries
from rlhf_cli.models.loading import ModelSource, load_config
from rlhf_cli.models.multi_adapter import MultiAdapterModel
from rlhf_cli.models.policy_adapter import relative_base
from rlhf_cli.models.saving import require_finite, writing
from rlhf_cli.models.sharded_loading import open_model
from rlhf_cli.models.sharded_saving import ShardedWeights
from rlhf_cli.models.sharding import is_sharded, local, sharding_of, whole
from rlhf_cli.models.split_weights import join_weights, restore, stored
from rlhf_cli.models.stored_weights import read_header
from rlhf_cli.models.verification import AdapterInMemory, check_tensors, read_tensors
from rlhf_cli.models.weight_loading import check_weights, empty_model, has_own_code, load_weights, open_weights

Head = tuple[Tensor, Tensor]
"""Weight (1, d) and bias (1,) of a value head."""

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


_HEAD, _CONFIG, _FORMAT = "value_head.safetensors", "critic.json", 1


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
            _save_head(folder, self.value_head, CriticConfig("adapter", base, revision, sha256))
        model = self._backbone.model
        AdapterInMemory.of(model, CRITIC, state=state).check(model, folder)
        _check_head(folder, self.value_head)


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
            _save_head(folder, self.value_head, CriticConfig("full", None, None))
        _check_head(folder, self.value_head)
        # Code of the model's own that runs already may run again: `save_pretrained` wrote a copy of it.
        runs_code = has_own_code(self._model) or has_own_code(self._model.config)
        source = ModelSource(str(folder), trust_remote_code=runs_code, attention="eager")
        written = load_weights(AutoModel, source, load_config(source))
        check_tensors(self.state(), dict(written.named_parameters()), folder)

    def _save_sharded(self, folder: Path) -> None:
        """Write, read back and compare, each process its part; all call this."""
        processes = ProcessGroup(self._model.device)
        ShardedWeights(self._model).write(None, folder, processes)

        def write_head() -> None:
            require_finite(dict(self.value_head.state_dict()), what="the critic")
            with writing("the critic", folder):
                _save_head(folder, self.value_head, CriticConfig("full", None, None))
            _check_head(folder, self.value_head)

        by_main(write_head, processes)
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

        def write() -> None:
            require_finite(dict(self.value_head.state_dict()), what="the critic")
            with writing("the critic", folder):
                folder.mkdir(parents=True, exist_ok=True)
                _save_head(folder, self.value_head, CriticConfig("head", None, None))
            _check_head(folder, self.value_head)

        with self._policy() as model:
            if is_sharded(model):
                by_main(write, ProcessGroup(model.device))
            else:
                write()


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


@dataclass(frozen=True)
class CriticConfig:
    """The content of `critic.json`.

    Attributes:
        kind: "adapter" on a base model, "full" for a whole backbone, or "head" for a head on the policy of its run.
        base: the adapter's base model, as a path relative to the folder or as it was given; else None.
        base_revision: commit of a base model on the hub.
        base_sha256: of the base's weight files, see `base_model.hash_weights`; None if it is on the hub.
    """

    kind: Literal["adapter", "full", "head"]
    base: str | None
    base_revision: str | None
    base_sha256: str | None = None

    def base_path(self, folder: Path) -> str | None:
        """Return the path or hub id of an adapter's base, else None.

        Raises:
            ModelError: the base is a path where no folder is.
        """
        return None if self.base is None else locate_base(self.base, folder / _CONFIG)

    def check_base(self, folder: Path) -> None:
        """Raise `ModelError` if the base's weights are not those on which the adapter was trained."""
        if (base := self.base_path(folder)) is not None:
            check_base(base, self.base_sha256, folder / _CONFIG)


def read_critic_config(folder: Path) -> CriticConfig:
    """Read `critic.json` of a saved critic.

    Raises:
        ModelError: the file is missing, damaged or of a later format.
    """
    try:
        fields: dict[str, Any] = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        if fields.pop("format") != _FORMAT:
            raise ModelError(f"{folder / _CONFIG} has a format that this version cannot read", hint="upgrade rlhf-cli")
        return CriticConfig(**fields)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(
            f"{folder} is not a saved critic: {error}", hint="give the critic of an earlier run, runs/NAME/ppo/critic"
        ) from error


def check_saved_critic(folder: Path) -> None:
    """Check the files of a saved critic: its weights by their headers, its head by its shape, and its base.

    Raises:
        ModelError: a file is missing or damaged, does not fit the others, or the base is not that of its training.
    """
    config, source = read_critic_config(folder), ModelSource(str(folder))
    shapes = {name: weight.shape for name, weight in read_header(folder / _HEAD).items()}
    if set(shapes) != {"weight", "bias"} or shapes["weight"][:-1] != (1,) or shapes["bias"] != (1,):
        raise ModelError(
            f"{folder / _HEAD} is not a value head, a weight (1, d) and a bias (1,): it holds {shapes}",
            hint="give the critic of an earlier run, runs/NAME/ppo/critic",
        )
    if config.kind == "head":
        return
    if config.kind == "full":
        own = load_config(source)
        check_weights(AutoModel, source, own, shapes=open_weights(source, own).shapes)
        return
    if (base := config.base_path(folder)) is None:
        raise ModelError(
            f"the critic in {folder} is an adapter, but its {_CONFIG} names no base model",
            hint="set `base` in it to the folder or hub id of the model that it was trained on",
        )
    config.check_base(folder)
    on = replace(source.at(base), revision=config.base_revision)
    read_adapter(empty_model(AutoModel, on, load_config(on)), folder)


def load_value_head(folder: Path) -> Head:
    """Load weight (1, d) and bias (1,) of a saved critic's head.

    Raises:
        ModelError: the file cannot be read.
    """
    try:
        state = load_file(folder / _HEAD)
        return state["weight"], state["bias"]
    except (OSError, KeyError, SafetensorError) as error:
        raise ModelError(f"cannot read {folder / _HEAD}: {error}") from error


def _save_head(folder: Path, head: nn.Linear, config: CriticConfig) -> None:
    save_file({name: tensor.cpu().contiguous() for name, tensor in head.state_dict().items()}, folder / _HEAD)
    text = json.dumps({"format": _FORMAT} | asdict(config), indent=2, ensure_ascii=False)
    (folder / _CONFIG).write_text(text + "\n", encoding="utf-8")


def _check_head(folder: Path, head: nn.Linear) -> None:
    check_tensors(dict(head.state_dict()), read_tensors(folder / _HEAD), folder)
