"""Replace what Python code asks `torch.cuda` and `torch` about devices."""

from __future__ import annotations

import contextlib
import ctypes
import struct
import types
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._device import _device_constructors

from tests.gpu.device import DeviceMode, FakeCudaTensor, is_pinned, ledger, pinned, random_states

MEMORY = 80 << 30
CAPABILITY = (9, 0)
PROPERTIES = types.SimpleNamespace(
    name="fake H100",
    major=CAPABILITY[0],
    minor=CAPABILITY[1],
    multi_processor_count=132,
    shared_memory_per_block_optin=227 * 1024,
    shared_memory_per_multiprocessor=228 * 1024,
    total_memory=MEMORY,
    warp_size=32,
    regs_per_multiprocessor=65536,
    L2_cache_size=50 << 20,
)


def install(library: ctypes.CDLL, devices: int = 1) -> None:
    """Put `devices` fake GPUs in this process, for good.

    Args:
        library: from `guard.load`.
        devices: 1 to 4, see guard.cpp.
    """
    _devices(library, devices)
    _randomness(devices)
    _memory()
    _streams()
    _tensors()
    # A parameter that moves changes its Python type here, so it is exchanged instead of given other data.
    torch.__future__.set_swap_module_params_on_conversion(True)
    DeviceMode().__enter__()


def _replace(**functions: Any) -> None:
    for name, function in functions.items():
        setattr(torch.cuda, name, function)


def _devices(library: ctypes.CDLL, devices: int) -> None:
    class device(contextlib.AbstractContextManager):
        def __init__(self, chosen: Any) -> None:
            self.idx = _index(chosen)

        def __enter__(self) -> None:
            self.before = library.fake_cuda_current_device()
            library.fake_cuda_set_device(self.idx)

        def __exit__(self, *_: object) -> None:
            library.fake_cuda_set_device(self.before)

    def set_device(chosen: Any) -> None:
        if _index(chosen) >= devices:
            raise RuntimeError("CUDA error: invalid device ordinal")
        library.fake_cuda_set_device(_index(chosen))

    _replace(
        _lazy_init=lambda: None,
        init=lambda: None,
        is_available=lambda: True,
        is_initialized=lambda: bool(ledger.peak),  # as torch, once something was on a device
        device_count=lambda: devices,
        current_device=lambda: library.fake_cuda_current_device(),
        set_device=set_device,
        device=device,
        get_device_properties=lambda chosen=None: PROPERTIES,
        get_device_name=lambda chosen=None: PROPERTIES.name,
        get_device_capability=lambda chosen=None: CAPABILITY,
        is_bf16_supported=lambda including_emulation=True: True,
        synchronize=lambda chosen=None: ledger.count("sync", "synchronize"),
        can_device_access_peer=lambda one, other: True,
    )


def _index(chosen: Any) -> int:
    if isinstance(chosen, int):
        return chosen
    found = None if chosen is None else torch.device(chosen).index
    return torch.cuda.current_device() if found is None else found


def _randomness(devices: int) -> None:
    def manual_seed_all(seed: int) -> None:
        random_states.update(dict.fromkeys(range(devices), (seed, 0)))

    def get_rng_state(chosen: Any = "cuda") -> Tensor:
        seed, offset = random_states.get(_index(chosen), (0, 0))
        return torch.frombuffer(bytearray(struct.pack("<QQ", seed % 2**64, offset)), dtype=torch.uint8)

    def set_rng_state(state: Tensor, chosen: Any = "cuda") -> None:
        if isinstance(state, FakeCudaTensor) or state.dtype != torch.uint8:
            raise TypeError("RNG state must be a torch.ByteTensor")
        if state.numel() != 16:
            raise RuntimeError("RNG state is wrong size")
        random_states[_index(chosen)] = struct.unpack("<QQ", bytes(state.tolist()))  # pyright: ignore

    _replace(
        manual_seed=lambda seed: random_states.__setitem__(torch.cuda.current_device(), (seed, 0)),
        manual_seed_all=manual_seed_all,
        get_rng_state=get_rng_state,
        set_rng_state=set_rng_state,
        get_rng_state_all=lambda: [get_rng_state(index) for index in range(devices)],
        set_rng_state_all=lambda states: [set_rng_state(state, index) for index, state in enumerate(states)],
        _is_in_bad_fork=lambda: False,
    )
    manual_seed_all(0)


def _memory() -> None:
    def reset(chosen: Any = None) -> None:
        ledger.peak[_index(chosen)] = ledger.live[_index(chosen)]

    _replace(
        mem_get_info=lambda chosen=None: (MEMORY - ledger.live[_index(chosen)], MEMORY),
        memory_allocated=lambda chosen=None: ledger.live[_index(chosen)],
        memory_reserved=lambda chosen=None: ledger.live[_index(chosen)],
        max_memory_allocated=lambda chosen=None: ledger.peak[_index(chosen)],
        max_memory_reserved=lambda chosen=None: ledger.peak[_index(chosen)],
        reset_peak_memory_stats=reset,
        empty_cache=lambda: None,
        ipc_collect=lambda: None,
    )


def _streams() -> None:
    class Stream(contextlib.nullcontext):
        def __init__(self, *_: Any, **__: Any) -> None:
            super().__init__(self)

        def synchronize(self) -> None:
            ledger.count("sync", "stream.synchronize")

        def wait_stream(self, other: Any) -> None: ...

        def wait_event(self, event: Any) -> None: ...

        def record_event(self, event: Any = None) -> Any:
            return event or Event()

    class Event:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def record(self, stream: Any = None) -> None: ...

        def wait(self, stream: Any = None) -> None: ...

        def query(self) -> bool:
            return True

        def synchronize(self) -> None:
            ledger.count("sync", "event.synchronize")

        def elapsed_time(self, other: Any) -> float:
            return 1.0

    _replace(
        Stream=Stream,
        Event=Event,
        current_stream=lambda chosen=None: Stream(),
        default_stream=lambda chosen=None: Stream(),
        stream=lambda chosen=None: contextlib.nullcontext(),
    )
    Tensor.record_stream = lambda self, stream: None  # pyright: ignore


def _tensors() -> None:
    """Functions of tensors that never reach the dispatcher, or reach it without the device that they name."""
    _transfers()
    _constructors()
    _safetensors()
    _sharding()
    backward = torch.autograd.backward

    def counted(*args: Any, **named: Any) -> None:
        ledger.count("backward", "backward")
        backward(*args, **named)

    torch.autograd.backward = counted


def _indexed(device: Any) -> Any:
    """Return a device with its index; what is not a CUDA device stays as it is."""
    if isinstance(device, int) and not isinstance(device, bool):
        return torch.device("cuda", device)
    found = torch.device(device) if isinstance(device, str) else device
    is_ours = isinstance(found, torch.device) and found.type == "cuda"
    return torch.device("cuda", _index(found)) if is_ours else device


def _transfers() -> None:
    to, tolist, numpy = Tensor.to, Tensor.tolist, Tensor.numpy

    def moved(self: Tensor, *args: Any, **named: Any) -> Tensor:
        args = tuple(_indexed(one) if isinstance(one, (torch.device, str)) else one for one in args)
        if named.get("device") is not None:
            named["device"] = _indexed(named["device"])
        return to(self, *args, **named)

    def listed(self: Tensor) -> Any:
        if not isinstance(self, FakeCudaTensor):
            return tolist(self)
        ledger.count("sync", "tolist")
        return tolist(self.on_host)

    def as_numpy(self: Tensor, *args: Any, **named: Any) -> Any:
        if isinstance(self, FakeCudaTensor):
            raise TypeError(
                f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host "
                "memory first."
            )
        return numpy(self, *args, **named)

    def as_array(self: Tensor, dtype: Any = None, copy: Any = None) -> Any:
        return as_numpy(self) if dtype is None else as_numpy(self).astype(dtype)

    changed = {"to": moved, "tolist": listed, "numpy": as_numpy, "__array__": as_array, "is_pinned": is_pinned}
    changed |= {"cuda": lambda self, device=None, **_: moved(self, _indexed(_index(device)))}
    changed |= {"pin_memory": lambda self, device=None: pinned(self.clone())}
    for name, function in changed.items():
        setattr(Tensor, name, function)


def _constructors() -> None:
    # `with torch.device(...)` remembers which functions make tensors when it first asks: those of torch, not ours.
    _device_constructors()
    tensor, as_tensor = torch.tensor, torch.as_tensor

    def made(data: Any, *, device: Any = None, requires_grad: bool = False, pin_memory: bool = False, **named: Any):
        found = tensor(data, **named)
        found = pinned(found) if pin_memory else found
        found = found if device is None else found.to(device)
        return found.requires_grad_() if requires_grad else found

    def seen(data: Any, dtype: Any = None, device: Any = None) -> Tensor:
        found = as_tensor(data, dtype=dtype)
        return found if device is None else found.to(device)

    torch.tensor, torch.as_tensor = made, seen


def _safetensors() -> None:
    """safetensors looks for shared storages by their addresses, which wrappers do not have."""
    import safetensors.torch as library

    address, size = library.storage_ptr, library.storage_size

    def plain(one: Tensor) -> Tensor:
        return one.on_host if isinstance(one, FakeCudaTensor) else one

    for name, function in (("storage_ptr", address), ("storage_size", size)):
        mock.patch.object(library, name, lambda one, function=function: function(plain(one))).start()


def _sharding() -> None:
    """`fully_shard` gives weights and buffers other data, whose Python type differs here, and resizes storages."""
    from torch.distributed.fsdp._fully_shard import _fsdp_init as fsdp

    data, resize = torch._C.TensorBase.data, torch.UntypedStorage.resize_  # pyright: ignore[reportAttributeAccessIssue]

    def assigned(weight: nn.Parameter, value: Tensor) -> None:
        if isinstance(value, FakeCudaTensor):
            torch.utils.swap_tensors(weight, nn.Parameter(value.detach(), weight.requires_grad))
        else:
            data.__set__(weight, value)  # pyright: ignore[reportAttributeAccessIssue]

    def moved(weights: list[nn.Parameter], buffers: list[Tensor], device: torch.device) -> None:
        for weight in weights:
            weight.data = weight.data.to(device)
        for buffer in buffers:
            if buffer.device != device:
                torch.utils.swap_tensors(buffer, buffer.to(device))

    def resized(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
        found = resize(storage, size)
        ledger.resized(storage)
        return found

    fsdp._move_states_to_device = moved
    nn.Parameter.data = property(data.__get__, assigned)  # pyright: ignore[reportAttributeAccessIssue]
    torch.UntypedStorage.resize_ = resized  # pyright: ignore[reportAttributeAccessIssue]
