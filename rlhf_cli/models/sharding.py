"""Models whose weights are divided among the processes of a run, by torch's `fully_shard` (`model.sharding: fsdp`).

Each process holds a part of every weight, along its first dimension. The weights of a transformer block are gathered
for its pass and dropped after it, forward and backward; those outside the blocks (embeddings, last norm, head) for a
whole pass. Gradients are summed, not averaged, and each process keeps the part of its weights.

With `model.sharding_size` (hybrid sharding) groups of so many processes divide a model, and every group has a copy of
it: weights are gathered within a group, and gradients are then summed over the groups too.

Gathering is a message to all processes. So all of them must make the same passes in the same order, also one that has
no work left (`equal_passes`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel

from rlhf_cli.distributed.process_group import ProcessGroup, join
from rlhf_cli.distributed.ranks import rank
from rlhf_cli.distributed.watchdog import waiting

Result = TypeVar("Result")
Part = TypeVar("Part")

_COMPUTE = "compute_sharded"
"""Method of a sharded model that calls a function between the hooks that gather and drop its weights."""
_IS_GATHERED = "is_gathered"
"""Attribute of a sharded model: whether it is in the context of `gathered`."""
_STEPS_TOGETHER = "_is_fsdp_managed_module"
"""Attribute that `fully_shard` sets: while it is true, `generate` of transformers exchanges a message for each token.
A process that calls it alone, for a task of lm-eval, would wait for the others forever."""


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` divided the weights of a model, or of the one whose parts it uses (`share_shards`)."""
    return hasattr(model, _COMPUTE)


def share_shards(model: nn.Module, owner: nn.Module) -> None:
    """Let `computing` gather the weights of `owner`, if it is sharded, for a model that uses its parts.

    Other weights of the model must be whole.
    """
    if is_sharded(owner):
        setattr(model, _COMPUTE, getattr(owner, _COMPUTE))


def class_of(model: nn.Module) -> type[nn.Module]:
    """Return the class of a model, of a sharded one that which it had before."""
    return next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))


def is_gathered(model: nn.Module) -> bool:
    """Whether every process holds a sharded model whole at the moment, see `gathered`."""
    return getattr(model, _IS_GATHERED, False)


def shard(
    model: PreTrainedModel,
    device: torch.device,
    *,
    gathered_dtype: torch.dtype | None = None,
    size: int | None = None,
    offloads: bool = False,
    before: Callable[[nn.Module, str], object] = lambda module, prefix: None,
) -> None:
    """Divide the weights of a model among all processes, in place; every process calls this.

    Args:
        model: with adapters, if any; which weights are trained must not change afterwards.
        device: of this process.
        gathered_dtype: in which float32 weights are gathered; None is their own. Gradients are summed in float32.
        size: processes that divide the model among themselves; None is all, else it divides their number.
        offloads: parts of weights, their gradients and so their moments are in host memory, and weights are copied to
            the device to be gathered.
        before: called with each block, and at last with the model, and the prefix of its weights' names, before they
            are divided.
    """
    mesh = _mesh(device, size)
    offload = CPUOffloadPolicy(pin_memory=device.type != "cpu") if offloads else OffloadPolicy()
    policy = MixedPrecisionPolicy(
        param_dtype=gathered_dtype,
        reduce_dtype=None if gathered_dtype is None else torch.float32,
        cast_forward_inputs=False,
    )
    for name, block in blocks_of(model):
        before(block, f"{name}.")
        block.register_forward_hook(lambda _module, _given, result: _without_views(result))
        fully_shard(block, mesh=mesh, mp_policy=policy, offload_policy=offload)
    before(model, "")
    family = type(model).__module__
    fully_shard(model, mesh=mesh, mp_policy=policy, offload_policy=offload)
    type(model).__module__ = family  # not torch's: there its attention and its router loss are looked for
    if offloads:
        compute_on(model, device)
    for module in _parts(model):
        module.set_force_sum_reduction_for_comms(True)
        module.set_gradient_divide_factor(1.0)
    setattr(model, _COMPUTE, MethodType(_call, model))
    if model.get_decoder() is not model:  # a backbone is called itself, which has the same hooks
        register_fsdp_forward_method(model, _COMPUTE)
    with torch.no_grad():  # the first module to compute is the root
        computing(model, lambda: None)


def _call(model: nn.Module, function: Callable[[], Any]) -> Any:
    return _without_views(function())


def _without_views(result: Any) -> Any:
    """Copy views with gradient, such as T5's position bias: a hook on one is lost if it is changed in place."""
    return tree_map_only(Tensor, lambda one: one.clone() if one.requires_grad and one._is_view() else one, result)


def blocks_of(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """Return the transformer blocks of a model with their names; empty if its class does not say what they are."""
    kinds = set(model._no_split_modules or ())
    return [(name, module) for name, module in model.named_modules() if type(module).__name__ in kinds]


def compute_on(model: nn.Module, device: torch.device) -> None:
    """Let models whose weights rest in host memory name the device on which they compute as their own.

    transformers takes it from the first weight.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            kind = type(module)
            own = {"device": device, "__module__": kind.__module__}  # where its attention is looked for
            module.__class__ = type(kind.__name__, (kind,), own)


def _mesh(device: torch.device, size: int | None) -> DeviceMesh:
    """Return the processes in one dimension, or groups of `size` with consecutive ranks: (groups, size)."""
    join()
    count = ProcessGroup().count
    size = size or count
    if (device.type, size) not in _meshes:
        shape, names = ((count,), ("shard",)) if size == count else ((count // size, size), ("replicate", "shard"))
        _meshes[device.type, size] = init_device_mesh(device.type, shape, mesh_dim_names=names)
    return _meshes[device.type, size]


_meshes: dict[tuple[str, int], DeviceMesh] = {}


def _parts(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def computing(model: nn.Module, function: Callable[[], Result]) -> Result:
    """Return what a function computes with a model; where the model is sharded, each process calls this.

    Args:
        model: maybe sharded.
        function: returns tensors, in tuples, lists or dictionaries; backward passes begin from these. It may call the
            model or its parts, and read weights outside the blocks.
    """
    if not is_sharded(model):
        return function()
    compute = getattr(model, _COMPUTE)
    result, owner = compute(function), compute.__self__
    _Passes.made += 1
    if not torch.is_grad_enabled() and not is_gathered(owner):
        owner.reshard()  # no backward pass does it
    return result


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Context in which every process holds a sharded model whole, and may compute with it as often as it likes.

    All processes enter and leave it together. No gradient flows in it.
    """
    if not is_sharded(model):
        yield
        return
    parts = _parts(model)
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    setattr(model, _IS_GATHERED, True)
    setattr(model, _STEPS_TOGETHER, False)
    try:
        with torch.no_grad():
            yield
    finally:
        setattr(model, _IS_GATHERED, False)
        setattr(model, _STEPS_TOGETHER, True)
        for part in parts:
            part.set_reshard_after_forward(part is not model, recurse=False)
            part.reshard()


class _Passes:
    """Passes of sharded models that this process has made."""

    made = 0


@dataclass(frozen=True)
class EqualPasses(Generic[Part]):
    """Parts of a work with their weights, of which every process passes over as many; see `equal_passes`.

    Attributes:
        parts: (part, weight); of sharded models a pass must be made over each, before the next is asked for.
        count: number of parts that the processes agreed on; None if the model is not sharded.
    """

    parts: Sequence[tuple[Part, float]]
    count: int | None

    def __iter__(self) -> Iterator[tuple[Part, float]]:
        """Yield the parts. Passes are counted after the last part: a loop that ends earlier is not checked.

        Raises:
            RuntimeError: this process passed over fewer parts than the others, which would wait for it forever.
        """
        passed = 0
        for part, weight in self.parts:
            before = _Passes.made
            yield part, weight
            passed += _Passes.made > before
        if self.count is not None and passed < self.count:
            raise RuntimeError(
                f"process {rank()} passed over {passed} parts of a sharded model's work, and the others over "
                f"{self.count}: they would wait for it"
            )


def equal_passes(model: nn.Module, own: Sequence[Part], filler: Part, processes: ProcessGroup) -> EqualPasses[Part]:
    """Return this process's parts of a work with weight 1, and then `filler` with weight 0 until every process has as
    many; a model that is not sharded needs no fillers. Every process calls this, before its first pass.

    Args:
        model: that passes over the parts.
        own: possibly none.
        filler: work for a process without; its loss is multiplied by 0.
        processes: the processes of the run.
    """
    count = max(processes.all_gather_object(len(own))) if is_sharded(model) else None
    fillers = [(filler, 0.0)] * ((count or 0) - len(own))
    return EqualPasses([*((part, 1.0) for part in own), *fillers], count)


def sharding_of(model: nn.Module) -> dict[str, Any]:
    """Return how a sharded model is divided, as the fields of a `ModelSource`."""
    weight = next(weight for weight in model.parameters() if isinstance(weight, DTensor))
    mesh = weight.device_mesh
    is_offloaded = weight.device.type != mesh.device_type
    return {"sharding_size": mesh.size(mesh.ndim - 1), "sharding_cpu_offload": is_offloaded}


def is_divided(tensor: Tensor) -> bool:
    """Whether each process holds a part of a tensor."""
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a sharded tensor, in the same memory; other tensors as they are."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor; every process calls this. Other tensors as they are."""
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    with waiting():
        # A part in host memory is gathered on the device, over NCCL.
        return cast(DTensor, tensor.detach().to(tensor.device_mesh.device_type)).full_tensor()


def sum_over_shards(number: Tensor, like: DTensor) -> Tensor:
    """Return the sum of what each process computed from its part of a tensor; every process calls this.

    Where groups of processes have copies, these count once.
    """
    mesh = like.device_mesh
    with waiting():
        torch.distributed.all_reduce(number, group=mesh.get_group(mesh.ndim - 1))
        number.item()  # with NCCL the line above returns at once
    return number


@torch.no_grad()
def assign(weight: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into a weight, or this process's part of it into a sharded one."""
    weight.copy_(divided(value, weight))


def divided(value: Tensor, like: Tensor) -> Tensor:
    """Divide a whole tensor, which every process has, as another one is divided, without a message."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def release(tensor: Tensor) -> None:
    """Free the memory of this process's part of a sharded tensor that nothing uses any more; others stay."""
    if isinstance(tensor, DTensor):
        storage = local(tensor.detach()).untyped_storage()
        if storage.resizable():
            storage.resize_(0)
