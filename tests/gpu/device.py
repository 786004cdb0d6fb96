"""Tensors that say `cuda:0`, compute on the CPU, refuse what CUDA refuses or cannot do, and report to a `Ledger`.

`guard.load` must have run before torch was imported. What stays invisible: numerics of real kernels, NCCL, streams, and
kernels that torch has for CUDA alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

from tests.gpu.ledger import Ledger

aten = torch.ops.aten

ledger = Ledger()
"""Of this process."""

_MAY_CROSS = {aten._to_copy.default, aten.copy_.default, aten._copy_from.default}
# Index tensors may be on the CPU: CUDA copies them first.
_INDEXING = {
    aten.index.Tensor,
    aten.index_put_.default,
    aten.index_put.default,
    aten._index_put_impl_.default,
    aten._unsafe_index.Tensor,
}
# The size of the result, or the result itself, must reach the host.
_SYNCHRONIZING = {
    aten._local_scalar_dense.default: "item",
    aten.nonzero.default: "nonzero",
    aten.masked_select.default: "masked_select",
    aten._unique2.default: "unique",
    aten.unique_dim.default: "unique",
    aten.unique_consecutive.default: "unique",
    aten.equal.default: "equal",
    aten.bincount.default: "bincount",
    aten.repeat_interleave.Tensor: "repeat_interleave",
}


class FakeCudaTensor(Tensor):
    """A tensor on a fake device; `on_host` holds its values."""

    on_host: Tensor

    @staticmethod
    def __new__(cls, on_host: Tensor, index: int = 0, requires_grad: bool = False) -> FakeCudaTensor:
        """Wrap a CPU tensor, whose storage then counts as memory of device `index`."""
        made = Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls,
            on_host.size(),
            strides=on_host.stride(),
            storage_offset=on_host.storage_offset(),
            dtype=on_host.dtype,
            layout=on_host.layout,
            device=torch.device("cuda", index),
            requires_grad=requires_grad,
        )
        made.on_host = on_host.detach() if on_host.requires_grad else on_host
        if on_host.layout == torch.strided:
            ledger.hold(made.on_host.untyped_storage(), index)
        return made

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __tensor_flatten__(self) -> tuple[list[str], int]:
        return ["on_host"], self.device.index

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], index: int, *_: Any) -> FakeCudaTensor:
        return FakeCudaTensor(inner["on_host"], index)

    @property
    def data(self) -> Tensor:
        """As of any tensor."""
        return torch._C.TensorBase.data.__get__(self)  # pyright: ignore

    @data.setter
    def data(self, value: Tensor) -> None:
        torch._C.TensorBase.data.__set__(self, value)  # pyright: ignore
        self.on_host = value.on_host  # pyright: ignore[reportAttributeAccessIssue]

    def untyped_storage(self) -> torch.UntypedStorage:
        """Return the storage of the values, which can be resized."""
        return self.on_host.untyped_storage()

    def __getitem__(self, index: Any) -> Tensor:
        return super().__getitem__(_uploaded_lists(index, self.device.index))

    def __setitem__(self, index: Any, value: Any) -> None:
        if not isinstance(value, Tensor):  # a fill, which needs no upload
            value = FakeCudaTensor(_tensor(value, dtype=self.dtype), self.device.index)
        super().__setitem__(_uploaded_lists(index, self.device.index), value)

    def __repr__(self, **_: Any) -> str:
        return f"{type(self).__name__}({self.on_host!r}, device={self.device})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        with torch.no_grad():
            copy: Tensor = FakeCudaTensor(self.on_host.clone(), self.device.index, requires_grad=self.requires_grad)
        if getattr(self, "_is_param", False):
            copy = torch.nn.Parameter(copy, requires_grad=self.requires_grad)
        memo[id(self)] = copy
        return copy

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class DeviceMode(TorchDispatchMode):
    """Makes tensors on the fake device where a call names it, and remembers which host memory is pinned."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (device := kwargs.get("device")) is not None and torch.device(device).type == "cuda":
            return _run(func, args, kwargs)
        if kwargs.get("pin_memory"):
            return pinned(func(*args, **{**kwargs, "pin_memory": None}))
        return func(*args, **kwargs)


_PINNED = "_is_fake_pinned"


def pinned(tensor: Tensor) -> Tensor:
    """Mark host memory as pinned: its uploads do not hold the host up."""
    setattr(tensor, _PINNED, True)
    return tensor


def is_pinned(tensor: Tensor) -> bool:
    """Whether `pinned` marked this tensor or the one that it is a view of."""
    return getattr(tensor, _PINNED, False) or getattr(tensor._base, _PINNED, False)


def current_index() -> int:
    """Index of the current device."""
    return torch.cuda.current_device()


def _uploaded_lists(index: Any, device: int) -> Any:
    """Lists among indices become tensors on the device, as torch makes them, at the price of an upload."""

    def one(item: Any) -> Any:
        if not isinstance(item, (list, range)):
            return item
        ledger.count("upload", "list index")
        return FakeCudaTensor(_tensor(list(item)), device)

    return tuple(map(one, index)) if isinstance(index, tuple) else one(index)


_tensor = torch.tensor  # before `library.install` replaces it


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Check the devices of a call, count it, compute it on the CPU, and wrap what it returns."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    on_device = [tensor for tensor in tensors if isinstance(tensor, FakeCudaTensor)]
    named = kwargs.get("device")
    named = None if named is None else torch.device(named)
    if func not in _MAY_CROSS:
        _refuse_mixed(func, args, tensors, on_device)
    _refuse_freed(func, on_device)
    _refuse_generator(kwargs.get("generator"), named, on_device)
    if on_device:
        _count_synchronizations(func, args)
    if func in _MAY_CROSS:
        _count_copy(func, args, named, bool(kwargs.get("non_blocking")))
    target = _target(func, args, named, on_device)
    plain_args, plain = tree_map(_plain, args), tree_map(_plain, kwargs)
    if named is not None:
        plain["device"] = torch.device("cpu")
    plain.pop("pin_memory", None)
    if func.namespace == "c10d":  # collectives work in place
        return func(*plain_args, **plain)
    if func.namespace == "_c10d_functional":  # gloo's threads read what the caller may free
        plain_out = torch.ops._c10d_functional.wait_tensor(func(*plain_args, **plain))
        return plain_out if target is None else _wrapped(plain_out, target)
    if _has_result_dtype(func, plain):
        out = _in_result_dtype(func, plain_args, plain)
    elif target is not None and torch.Tag.nondeterministic_seeded in func.tags:
        with _random_state(target):
            out = func(*plain_args, **plain)
    else:
        out = func(*plain_args, **plain)
    if target is not None:
        out = tree_map(lambda leaf: _wrapped(leaf, target), out)
    if func is aten._to_copy.default or not on_device:
        return out
    return return_and_correct_aliasing(func, args, kwargs, out)


def _plain(leaf: Any) -> Any:
    return leaf.on_host if isinstance(leaf, FakeCudaTensor) else leaf


def _wrapped(leaf: Any, index: int) -> Any:
    is_plain = isinstance(leaf, Tensor) and not isinstance(leaf, FakeCudaTensor)
    return FakeCudaTensor(leaf, index) if is_plain else leaf


def _refuse_mixed(func: Any, args: Any, tensors: Sequence[Tensor], on_device: Sequence[FakeCudaTensor]) -> None:
    """Raise as CUDA does where tensors are on several devices; scalars on the CPU may join any other."""
    if not on_device:
        return
    found = {tensor.device for tensor in tensors if isinstance(tensor, FakeCudaTensor) or tensor.dim()}
    if len(found) < 2:
        return
    if func in _INDEXING and isinstance(args[0], FakeCudaTensor) and len({one.device for one in on_device}) == 1:
        values = [leaf for leaf in tree_leaves(args[2:]) if isinstance(leaf, Tensor) and leaf.dim()]
        if all(isinstance(value, FakeCudaTensor) for value in values):
            ledger.count("upload", "index")
            return
    names = " and ".join(sorted(map(str, found)))
    raise RuntimeError(
        f"Expected all tensors to be on the same device, but found at least two devices, {names}! ({func})"
    )


def _refuse_freed(func: Any, on_device: Sequence[FakeCudaTensor]) -> None:
    """Raise where a tensor's memory is freed, as that of weights that `fully_shard` dropped; CUDA reads what is there.

    Views read nothing.
    """
    if func.is_view:
        return
    for tensor in on_device:
        held = tensor.on_host
        if held.numel() and held.layout == torch.strided and not held.untyped_storage().nbytes():
            raise RuntimeError(f"{func} of a tensor {tuple(held.shape)} on {tensor.device} whose memory is freed")


def _refuse_generator(
    generator: torch.Generator | None, named: torch.device | None, on_device: Sequence[FakeCudaTensor]
) -> None:
    is_device = named.type == "cuda" if named is not None else bool(on_device)
    if generator is not None and is_device and generator.device.type == "cpu":
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")


def _count_synchronizations(func: Any, args: Any) -> None:
    if (what := _SYNCHRONIZING.get(func)) is not None:
        ledger.count("sync", what)
    if func in _INDEXING and any(
        isinstance(leaf, Tensor) and leaf.dtype in (torch.bool, torch.uint8) for leaf in tree_leaves(args[1])
    ):
        ledger.count("sync", "mask index")


def _count_copy(func: Any, args: Any, named: torch.device | None, non_blocking: bool) -> None:
    """Count a copy between host and device; one that neither memory nor caller lets run by itself holds the host up."""
    if func is aten._to_copy.default:
        source, to_device = args[0], named.type == "cuda" if named is not None else isinstance(args[0], FakeCudaTensor)
    else:
        into, source = args[:2] if func is aten.copy_.default else (args[1], args[0])
        to_device = isinstance(into, FakeCudaTensor)
    if isinstance(source, FakeCudaTensor) and not to_device:
        if not non_blocking:
            ledger.count("sync", "copy to host")
    elif to_device and not isinstance(source, FakeCudaTensor) and not is_pinned(source):
        ledger.count("upload", "copy to device")


def _target(func: Any, args: Any, named: torch.device | None, on_device: Sequence[FakeCudaTensor]) -> int | None:
    """Index of the device that the result is on; None for the CPU."""
    if func is aten.copy_.default:
        return args[0].device.index if isinstance(args[0], FakeCudaTensor) else None
    if func is aten._copy_from.default:
        return args[1].device.index if isinstance(args[1], FakeCudaTensor) else None
    if named is not None:
        return (current_index() if named.index is None else named.index) if named.type == "cuda" else None
    return on_device[0].device.index if on_device else None


def _has_result_dtype(func: Any, plain: dict[str, Any]) -> bool:
    """Whether a product names the type of its sums and result, which torch offers on CUDA alone."""
    return "out_dtype" in plain or (func._schema.name in ("aten::mm", "aten::addmm") and "dtype" in str(func))


def _in_result_dtype(func: Any, args: Sequence[Any], plain: dict[str, Any]) -> Tensor:
    operands = [operand for operand in args if not isinstance(operand, torch.dtype)]
    dtype = plain.get("out_dtype") or next(operand for operand in args if isinstance(operand, torch.dtype))
    product = {"aten::mm": torch.mm, "aten::addmm": torch.addmm}[func._schema.name]
    factors = {name: value for name, value in plain.items() if name in ("alpha", "beta")}
    result = product(*(operand.to(dtype) for operand in operands), **factors)
    return result if (out := plain.get("out")) is None else out.copy_(result)


@contextmanager
def _random_state(index: int) -> Iterator[None]:
    """Draw from the device's own numbers: a function of its seed and of how often it was asked, as Philox is."""
    before = torch.get_rng_state()
    seed, offset = random_states.get(index, (0, 0))
    torch.default_generator.manual_seed((seed * 1_000_003 + offset) % 2**63)
    try:
        yield
    finally:
        random_states[index] = (seed, offset + 4)
        torch.set_rng_state(before)


random_states: dict[int, tuple[int, int]] = {}
"""Device index -> seed and offset of its generator."""
