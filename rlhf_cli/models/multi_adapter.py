"""One frozen language model under several adapters, of which one plays at a time, or none: the model as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_cli.errors import ModelError
from rlhf_cli.models.lora import adapter_layers, adapter_state, add_lora, load_adapter, load_adapter_state


class SharedModel:
    """A language model whose weights are frozen, and its adapters.

    Args:
        model: without adapters: with "all adapters off" it would not be what it is now (trap 15 of docs/ppo.md).

    Raises:
        ModelError: it carries adapters.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        if adapter_layers(model):
            raise ModelError(
                "the policy's model carries an adapter already: without it, it would not be the reference it is to be",
                hint="merge the adapter into the model first (`rlhf_cli.models.lora.merge_lora`)",
            )
        self.model = model.requires_grad_(False)
        self._layers: list[LoraLayer] = []
        self._trains: dict[str, bool] = {}
        self._playing: str | None = None

    def add(self, name: str, *, rank: int, alpha: float, target_modules: str | list[str]) -> None:
        """A new adapter, which trains."""
        add_lora(self.model, rank=rank, alpha=alpha, target_modules=target_modules, name=name)
        self._added(name, trains=True)

    def load(self, name: str, folder: Path, *, trains: bool) -> None:
        """A saved adapter."""
        load_adapter(self.model, folder, name=name)
        self._added(name, trains=trains)

    def _added(self, name: str, *, trains: bool) -> None:
        self._layers = [layer for _, layer in adapter_layers(self.model)]
        self._trains[name] = trains
        self.play(None)

    def play(self, name: str | None) -> None:
        """Let one adapter be the active one from now on; None is the model without adapters."""
        for layer in self._layers:
            layer.enable_adapters(name is not None)
            if name is not None:
                layer.set_adapter([name])
        # PEFT ties "active" to "trainable"; here what trains never changes, whoever is active.
        for other, trains in self._trains.items():
            for parameter in self.parameters(other):
                parameter.requires_grad_(trains)
        self._playing = name

    @contextmanager
    def playing(self, name: str | None) -> Iterator[PreTrainedModel]:
        """The model with one adapter, or none, while the context lasts."""
        before = self._playing
        self.play(name)
        try:
            yield self.model
        finally:
            self.play(before)

    def parameters(self, name: str) -> list[nn.Parameter]:
        """A and B of an adapter, in the order of the layers."""
        factors = [factor for layer in self._layers for factor in (layer.lora_A, layer.lora_B) if name in factor]
        return [parameter for factor in factors for parameter in factor[name].parameters()]

    def state(self, name: str) -> dict[str, Tensor]:
        """Weights of an adapter; see `adapter_state`."""
        return adapter_state(self.model, name)

    def load_state(self, name: str, state: dict[str, Tensor]) -> None:
        """Copy weights into an adapter; see `load_adapter_state`."""
        load_adapter_state(self.model, state, name)
