"""Load a model block by block into its shards: no process ever holds more than its part and one block of it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PretrainedConfig, PreTrainedModel

from rlhf_cli.distributed.agreement import agreed
from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.distributed.watchdog import beat
from rlhf_cli.errors import ModelError
from rlhf_cli.memory import trim_memory
from rlhf_cli.models.attention import is_our_attention, set_attention
from rlhf_cli.models.checkpoint import Checkpoint
from rlhf_cli.models.converted_weights import AnyWeight, NotShardedError, weights_by_name
from rlhf_cli.models.libraries import quiet_libraries
from rlhf_cli.models.lora import merge_layers
from rlhf_cli.models.low_rank import low_rank_update
from rlhf_cli.models.merged_weights import plain_name, separated_layers
from rlhf_cli.models.peft_folder import find_peft_folder
from rlhf_cli.models.policy_adapter import split_off_adapters
from rlhf_cli.models.rotary import pin_rotary_frequencies
from rlhf_cli.models.sharding import blocks_of, class_of, computing, shard
from rlhf_cli.models.weight_loading import (
    IsNew,
    check_weights,
    disable_dropout,
    has_own_code,
    open_weights,
    read_generation_config,
)

if TYPE_CHECKING:
    from rlhf_cli.models.loading import ModelSource


_HINT = "use `--set model.sharding=none`, with which every process holds the whole model"


@dataclass(frozen=True)
class UnreadModel:
    """A model whose weights are not read yet.

    Its weights have shape and dtype but no memory, so adapters can be added. `read` then reads and divides them.

    Attributes:
        model: on the CPU.
        source: where it comes from.
        stored: the stored weights by their names in the model.
    """

    model: PreTrainedModel
    source: ModelSource
    stored: Mapping[str, AnyWeight]

    @torch.no_grad()
    def read(self, *, rounds: bool = False, merges: bool = False) -> PreTrainedModel:
        """Read the weights and divide them among the processes; returns the model in evaluation mode on its device.

        Args:
            rounds: weights are gathered in the precision of matrix products: float32 ones that are trained, and those
                of their reference.
            merges: merge the adapter of the model, block by block before it is divided, and remove it.

        Raises:
            ModelError: one of the processes cannot read a weight, for which all of them end; or see `set_attention`.
        """
        model, source = self.model.eval(), self.source
        processes = ProcessGroup(source.device)
        is_lower = rounds and source.precision != torch.float32
        shard(
            model,
            source.device,
            gathered_dtype=source.precision if is_lower else None,
            size=source.sharding_size,
            offloads=source.sharding_cpu_offload,
            before=lambda module, prefix: agreed(partial(self._fill, module, prefix, merges), processes),
        )
        trim_memory()  # of parts that were read or freed on the way, before the first pass takes more
        pin_rotary_frequencies(model, source.path)
        if is_our_attention(source.attention):
            computing(model, lambda: set_attention(model, source.attention, source.path))
        return model

    def _fill(self, module: nn.Module, prefix: str, merges: bool) -> None:
        """Read the weights of a module that are not divided yet, and merge its adapter if `merges`."""
        separated = separated_layers(module)
        for name, weight in module.named_parameters():
            beat()
            stored = self.stored.get(plain_name(prefix + name))
            if isinstance(weight, DTensor) or stored is None:
                continue
            value = stored[...]
            if (update := low_rank_update(separated.get(id(weight)))) is not None:
                value = value.float() - update
            weight.data = value.to(weight.dtype)
        for name, buffer in module.named_buffers():
            if (stored := self.stored.get(plain_name(prefix + name))) is not None:
                buffer.copy_(stored[...])
        if merges:
            merge_layers(module)


def open_model(
    kind: type,
    source: ModelSource,
    config: PretrainedConfig,
    *,
    dtype: torch.dtype | None = None,
    checkpoint: Checkpoint | None = None,
    is_new: IsNew | None = None,
) -> UnreadModel:
    """Check stored weights by their headers and build their model, as `weight_loading.load_weights` does.

    Raises:
        ModelError: the weights are not those of the model, or it cannot be sharded.
    """
    quiet_libraries()
    disable_dropout(config)
    _check(source, config)
    checkpoint = replace(checkpoint or open_weights(source, config), closes=True)
    if checkpoint.quantization is not None:
        raise NotShardedError(f"`model.sharding: fsdp`: the weights of `{source.path}` are quantized", hint=_HINT)
    empty = check_weights(kind, source, config, shapes=checkpoint.shapes, is_new=is_new)
    stored = weights_by_name(empty, checkpoint, source.path, hint=_HINT)
    if not blocks_of(empty):
        raise NotShardedError(
            f"`model.sharding: fsdp`: {type(empty).__name__} does not say what its blocks are", hint=_HINT
        )
    model = without_memory(type(empty), empty.config, dtype or source.dtype)
    if source.keeps_adapter(dtype):
        held = split_off_adapters(model, source.folder)
        for weight in model.parameters():
            weight.data = no_memory(weight.shape, held)
    _check_ties(model, stored, source.path)
    if model.can_generate():
        model.generation_config = read_generation_config(source, config)
    if not is_our_attention(source.attention):
        model.set_attn_implementation(source.attention)
    return UnreadModel(model, source, stored)


def _check(source: ModelSource, config: PretrainedConfig) -> None:
    problem = None
    if find_peft_folder(source.path, source.revision) is not None:
        problem = f"`{source.path}` is a PEFT adapter, which is merged into a whole model"
    elif has_own_code(config):
        problem = f"`{source.path}` has Python code of its own"
    if problem is not None:
        raise NotShardedError(f"`model.sharding: fsdp`: {problem}", hint=_HINT)


def without_memory(kind: Any, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Build a model whose weights are views of one number; its buffers are computed as usual."""
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = kind(config)
    model.tie_weights()
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            if id(weight) not in made:
                made[id(weight)] = nn.Parameter(no_memory(weight.shape, dtype))
            setattr(module, name, made[id(weight)])
    model.config.dtype = dtype
    return model


def skeleton_of(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model that a sharded one was before its adapters, in float32 and without memory for its weights."""
    skeleton = without_memory(class_of(model), copy.deepcopy(model.config), torch.float32)
    if skeleton.can_generate():
        skeleton.generation_config = copy.deepcopy(model.generation_config)
    return skeleton.eval()


def no_memory(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Return a weight of this shape whose memory is one number."""
    return torch.zeros((), dtype=dtype).expand(shape)


def _check_ties(model: PreTrainedModel, stored: Mapping[str, Any], path: str) -> None:
    """Refuse two stored matrices that differ where config.json ties them."""
    for name, other in model.all_tied_weights_keys.items():
        if name in stored and other in stored and not torch.equal(stored[name][...], stored[other][...]):
            raise ModelError(
                f"`model.sharding: fsdp`: config.json of `{path}` ties `{name}` and `{other}`, and they differ",
                hint="set `tie_word_embeddings` to false in config.json",
            )


def load_sharded_policy(source: ModelSource) -> PreTrainedModel:
    """Load the frozen language model of `loading.load_policy`, divided among the processes, which call this together.

    Raises:
        ModelError: see `open_model` and `UnreadModel.read`; raised in all processes.
    """
    opened: list[UnreadModel] = []
    agreed(lambda: opened.append(open_policy(source)), ProcessGroup(source.device))
    opened[0].model.requires_grad_(False)
    return opened[0].read()


def divide_model(model: PreTrainedModel, source: ModelSource) -> PreTrainedModel:
    """Return a frozen copy of a model, divided among the processes, which call this together.

    Args:
        model: whole, the same in every process.
        source: how the copy is held.

    Raises:
        ModelError: see `UnreadModel.read`.
    """
    divided = without_memory(type(model), model.config, source.dtype).requires_grad_(False)
    if not is_our_attention(source.attention):
        divided.set_attn_implementation(source.attention)
    return UnreadModel(divided, source, model.state_dict()).read()


def open_policy(source: ModelSource, *, dtype: torch.dtype | None = None) -> UnreadModel:
    """Open a language model; see `open_model` and `loading.load_policy`."""
    from rlhf_cli.models.loading import load_config, policy_class

    config = load_config(source)
    return open_model(policy_class(config, source.path), source, config, dtype=dtype)
