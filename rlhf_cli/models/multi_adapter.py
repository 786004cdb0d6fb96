"""One frozen language model that carries several LoRA adapters, at most one of them active at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_cli.errors import ModelError
from rlhf_cli.models.adapter_files import load_adapter
from rlhf_cli.models.adapter_layers import adapter_layers, adapter_state, load_adapter_state
from rlhf_cli.models.lora import add_lora
from rlhf_cli.settings.shared import LoraSettings


class MultiAdapterModel:
    """A language model with frozen weights and named adapters.

    With no adapter active it computes exactly what the model computed before (trap 15 of docs/ppo.md).

    Args:
        model: a language model without adapters.

    Raises:
        ModelError: the model carries adapters already.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        if adapter_layers(model):
            raise ModelError(
                "the policy's model already carries an adapter, so disabling adapters would not restore the reference",
                hint="merge the adapter into the model first (`rlhf_cli.models.lora.merge_lora`)",
            )
        self.model = model.requires_grad_(False)
        self._layers: list[LoraLayer] = []
        self._is_trained: dict[str, bool] = {}
        self._active: str | None = None

    def add(self, name: str, lora: LoraSettings) -> None:
        """Add a new, trainable adapter; all adapters are inactive afterwards."""
        add_lora(self.model, lora, name=name)
        self._register(name, is_trained=True)

    def load(self, name: str, folder: Path, *, is_trained: bool) -> None:
        """Load an adapter from a folder; all adapters are inactive afterwards."""
        load_adapter(self.model, folder, name=name)
        self._register(name, is_trained=is_trained)

    def _register(self, name: str, *, is_trained: bool) -> None:
        self._layers = [layer for _, layer in adapter_layers(self.model)]
        self._is_trained[name] = is_trained
        # PEFT makes the active adapter the trainable one. Here what trains does not depend on what is active.
        for other, trains in self._is_trained.items():
            for parameter in self.parameters(other):
                parameter.requires_grad_(trains)
        self.activate(None)

    def activate(self, name: str | None) -> None:
        """Make one adapter the active one; None disables all adapters.

        Sets what PEFT's layers read, and not by PEFT's methods: they also visit every weight to set `requires_grad`,
        which takes as long as a forward pass of a small model.
        """
        is_disabled, names = name is None, [name]
        for layer in self._layers:
            own = vars(layer)
            own["_disable_adapters"] = is_disabled
            if not is_disabled:
                own["_active_adapter"] = names
        self._active = name

    @contextmanager
    def use_adapter(self, name: str | None) -> Iterator[PreTrainedModel]:
        """Activate one adapter (None: no adapter) inside the context, and the previous one again afterwards."""
        before = self._active
        self.activate(name)
        try:
            yield self.model
        finally:
            self.activate(before)

    def parameters(self, name: str) -> list[nn.Parameter]:
        """Return A and B of an adapter, in the order of the layers."""
        factors = [factor for layer in self._layers for factor in (layer.lora_A, layer.lora_B) if name in factor]
        return [parameter for factor in factors for parameter in factor[name].parameters()]

    def state(self, name: str) -> dict[str, Tensor]:
        """Return the weights of an adapter; see `adapter_state`."""
        return adapter_state(self.model, name)

    def load_state(self, name: str, state: Mapping[str, Tensor]) -> None:
        """Copy weights into an adapter; see `load_adapter_state`."""
        load_adapter_state(self.model, state, name)
