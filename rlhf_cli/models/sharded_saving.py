"""Write a sharded model tensor by tensor, and copy it into float32 shards: no process ever holds it whole.

What is written are the files that `save_pretrained` would write for the whole model. Process 0 writes each tensor when
it is gathered; the others take part. What is in memory is then a part of every weight, and the largest weight whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from rlhf_cli.distributed.agreement import agreed
from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.memory import free_memory
from rlhf_cli.models.adapter_layers import adapter_state, load_adapter_state
from rlhf_cli.models.attention import is_our_attention
from rlhf_cli.models.gathering import Gathering
from rlhf_cli.models.loading import ModelSource
from rlhf_cli.models.lora import add_lora
from rlhf_cli.models.low_rank import low_rank_update
from rlhf_cli.models.merged_weights import adapted_weights, as_stored, plain_weights, separated_layers, updated
from rlhf_cli.models.saving import finish_folder, generation_config, require_finite, writing
from rlhf_cli.models.sharded_loading import UnreadModel, skeleton_of
from rlhf_cli.models.sharding import local, release, whole
from rlhf_cli.models.weight_files import WeightFiles, stored_state
from rlhf_cli.settings.shared import LoraSettings


class ShardedWeights:
    """The weights of a sharded model, without its adapters; every process makes one and calls the same methods.

    Args:
        model: sharded.
        lora: settings of the adapter that was trained, which is merged into what is written; None if there is none.
        name: of that adapter.

    Attributes:
        adapter: A and B of the adapter, whole, on the CPU.
    """

    def __init__(self, model: PreTrainedModel, lora: LoraSettings | None = None, name: str = "default") -> None:
        self._model, self._lora, self._name = model, lora, name
        state = {} if lora is None else adapter_state(model, name)
        self.adapter = {key: whole(weight).cpu() for key, weight in state.items()}
        self._weights, self._separated = plain_weights(model), separated_layers(model)

    def write(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        folder: Path,
        processes: ProcessGroup,
        generation: GenerationConfig | None = None,
    ) -> None:
        """Write a model folder in float32 as `save_model_folder` does, the adapter merged; process 0 writes.

        Args:
            tokenizer: of the model; None writes the weights and their configuration alone.
            folder: created if it does not exist.
            processes: of the run.
            generation: see `save_model_folder`.

        Raises:
            DivergedError: a weight is NaN or infinite.
            DiskError: the disk is full or cannot be written.
        """
        what, skeleton = f"the model for {folder}", skeleton_of(self._model)
        own = {name: local(weight) for name, weight in self._weights.items()} | self.adapter
        agreed(lambda: require_finite(own, what=what), processes)
        names = list(stored_state(skeleton))
        gathering = Gathering(self._weights, names)
        if skeleton.can_generate() and tokenizer is not None:
            skeleton.generation_config = generation or generation_config(skeleton, tokenizer)

        def write() -> None:
            folder.mkdir(parents=True, exist_ok=True)
            skeleton.save_pretrained(folder, state_dict={})  # configuration alone
            if tokenizer is not None:
                finish_folder(skeleton, tokenizer, folder)
            WeightFiles(skeleton, folder).write(self._merged(skeleton, names, gathering, what))

        def written() -> None:
            try:
                if processes.is_main:
                    with writing("the model", folder):
                        write()
            finally:
                gathering.finish()

        agreed(written, processes)

    @torch.no_grad()
    def _merged(
        self, skeleton: PreTrainedModel, names: list[str], gathering: Gathering, what: str
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield stored names and values, the sums in the order of `merge_lora`, so that they are rounded as there."""
        adapted = skeleton_of(self._model)
        self._add_adapter(adapted)
        layers, own = adapted_weights(adapted), plain_weights(adapted)

        def value(name: str) -> Tensor:
            updates = [layer.get_delta_weight(self._name) for layer in layers.get(id(own[name]), ())]  # type: ignore[operator]
            found = updated(gathering.take(name).cpu(), *updates, self._separated_from(self._weights[name]))
            require_finite({name: found}, what=what)
            return found

        yield from as_stored(skeleton, names, value)

    def _separated_from(self, weight: Tensor) -> Tensor | None:
        """Return what `models.low_rank` keeps apart of a weight."""
        return low_rank_update(self._separated.get(id(weight)))

    def _add_adapter(self, model: PreTrainedModel) -> None:
        if self._lora is None:
            return
        with torch.random.fork_rng(devices=[]):  # a new adapter is initialized at random
            add_lora(model, self._lora, name=self._name)
        load_adapter_state(model, self.adapter, self._name)

    def copied(self, source: ModelSource, *, keeps: bool) -> PreTrainedModel:
        """Return a sharded copy that computes in float32, with the adapter beside its weights.

        Args:
            source: of the model; gives device and attention of the copy, see `ModelSource.to_compare`.
            keeps: keep the weights of the model; otherwise the parts of each are freed when it is copied, and the model
                cannot be used any more.
        """
        source, model = source.to_compare(), skeleton_of(self._model)
        if not is_our_attention(source.attention):  # `read` sets ours
            model.set_attn_implementation(source.attention)
        self._add_adapter(model)
        stored: Any = {name: _Live(self, weight, keeps) for name, weight in self._weights.items()}
        copy = UnreadModel(model, source, stored).read()
        free_memory()
        return copy.requires_grad_(False)


class _Live:
    """A weight of a sharded model, which is gathered when it is indexed; see `checkpoint.LazyWeight`."""

    def __init__(self, weights: ShardedWeights, weight: Tensor, keeps: bool) -> None:
        self._weights, self._weight, self._keeps = weights, weight, keeps

    def __getitem__(self, index: Any) -> Tensor:
        """Return the weight in float32, or a part of it; every process calls this."""
        value = updated(whole(self._weight), self._weights._separated_from(self._weight))
        if not self._keeps:
            release(self._weight)
        return (value.float() if value.is_floating_point() else value)[index]
