"""The random weights of a new model, drawn one at a time: the same numbers as those of the model that is built whole.

While the model is built its matrices have no memory. The numbers of each are drawn and dropped, so that the generator
goes on as usual, and its state before is kept (5 kB). A matrix is then drawn again when it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from rlhf_cli.models.low_rank import has_no_memory
from rlhf_cli.models.seeding import seeded
from rlhf_cli.models.sharded_loading import no_memory
from rlhf_cli.models.weight_files import stored_state

_FILLS = (torch.ops.aten.uniform_.default, torch.ops.aten.normal_.default)
"""What torch and transformers fill matrices with; any other change of a weight without memory is an error of torch."""


class RandomWeights(Mapping[str, Tensor]):
    """The weights that a model has when it is built, by stored name; matrices are drawn when they are asked for.

    Args:
        build: returns the model.
        seed: of its weights.

    Attributes:
        model: without memory for its matrices.
    """

    def __init__(self, build: Callable[[], PreTrainedModel], seed: int) -> None:
        drawing = _Drawing()
        with seeded(seed, torch.device("cpu")), drawing:
            self.model = build()
        own = self.model.state_dict(keep_vars=True)
        self._weights = {name: own[name] for name in stored_state(self.model)}
        self._fills = drawing.fills

    def __getitem__(self, name: str) -> Tensor:
        """Draw a weight."""
        weight = self._weights[name]
        return self._fills[id(weight)].drawn() if has_no_memory(weight) else weight.detach()

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self._weights)

    def __len__(self) -> int:
        """Return the number of weights."""
        return len(self._weights)


@dataclass(frozen=True)
class _Fill:
    """How a matrix was filled, and the state of the generator before."""

    function: Any
    shape: torch.Size
    dtype: torch.dtype
    arguments: tuple[Any, ...]
    named: Mapping[str, Any]
    state: Tensor

    @torch.no_grad()
    def drawn(self) -> Tensor:
        """Draw the matrix; the generator's state stays."""
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self.state)
            return self.function(torch.empty(self.shape, dtype=self.dtype), *self.arguments, **self.named)


class _Drawing(TorchDispatchMode):
    """Gives new matrices no memory, and notes how each was filled last, by its id."""

    def __init__(self) -> None:
        super().__init__()
        self.fills: dict[int, _Fill] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if func is torch.ops.aten.empty.memory_format and len(args[0]) > 1:
            return no_memory(torch.Size(args[0]), named.get("dtype") or torch.get_default_dtype())
        if func not in _FILLS or not has_no_memory(args[0]):
            return func(*args, **named)
        weight, *arguments = args
        fill = _Fill(func, weight.shape, weight.dtype, tuple(arguments), named, torch.get_rng_state())
        func(torch.empty(weight.shape, dtype=weight.dtype), *arguments, **named)
        self.fills[id(weight)] = fill
        return weight
