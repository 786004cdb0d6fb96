"""AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101) with weights and moments stored in fewer bits than it computes.

Of a weight that is stored in two halves (`models.split_weights`) it steps the float32 value. With `EightBitMoments` it
keeps both moments in 8 bits between steps (Dettmers et al. 2021, arXiv:2110.02861).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from rlhf_cli.models.split_weights import join, low_bits, split

PIECE = {"cpu": 1 << 18, "cuda": 1 << 26}
"""Numbers that are joined, stepped and split at once: on a CPU few enough to stay in its cache. A multiple of `BLOCK`,
so that the blocks of 8-bit moments are whole."""

BLOCK = 256
"""Numbers of a moment that share a scale, as in bitsandbytes."""

SMALLEST = 4_096
"""Numbers of the smallest weight whose moments are stored in 8 bits, as in bitsandbytes."""


class EightBitMoments:
    """The step of AdamW with moments in 8 bits, by bitsandbytes, on a CPU and on a GPU.

    A moment is stored as one byte per number and one float32 scale per `BLOCK` numbers. The bytes are positions in a
    table of 256 numbers, which is finer near 0; that of the second moment has no negative numbers.
    """

    def __init__(self) -> None:
        from bitsandbytes.functional import create_dynamic_map  # pyright: ignore[reportMissingImports]

        self._tables = create_dynamic_map(signed=True), create_dynamic_map(signed=False)

    def start(self, weight: Tensor) -> dict[str, Tensor]:
        """Return the state of a weight before its first step: both moments are 0."""
        state = {}
        for name, table in zip(("exp_avg", "exp_avg_sq"), self._tables, strict=True):
            zero = int(table.abs().argmin())
            state[name] = torch.full_like(weight, zero, dtype=torch.uint8, memory_format=torch.contiguous_format)
            blocks = -(-weight.numel() // BLOCK)
            state[f"{name}_scale"] = torch.zeros(blocks, dtype=torch.float32, device=weight.device)
        return state

    def step(self, weight: Tensor, gradient: Tensor, state: list[Tensor], group: dict[str, Any], step: int) -> None:
        """Take a step with consecutive numbers of a weight, in place.

        Args:
            weight: (N,) float32.
            gradient: (N,) float32.
            state: of these numbers, in the order of `start`.
            group: parameter group of the weight.
            step: 1-based number of the step.
        """
        from bitsandbytes.functional import optimizer_update_8bit_blockwise  # pyright: ignore[reportMissingImports]

        self._tables = tuple(table.to(weight.device) for table in self._tables)
        mean, mean_scale, square, square_scale = state
        optimizer_update_8bit_blockwise(
            "adam",
            gradient,
            weight,
            mean,
            square,
            *group["betas"],
            beta3=0.0,
            alpha=0.0,
            eps=group["eps"],
            step=step,
            lr=group["lr"],
            qmap1=self._tables[0],
            qmap2=self._tables[1],
            absmax1=mean_scale,
            absmax2=square_scale,
            weight_decay=group["weight_decay"],
        )


class AdamW(torch.optim.AdamW):
    """Torch's AdamW, which takes the step of a weight in pieces where weight or moments are stored in fewer bits.

    Args:
        groups: weights, or parameter groups.
        moments: how the moments are stored; None is float32.
        precise: weights whose moments are float32 in any case.
        options: of torch's AdamW.
    """

    def __init__(
        self,
        groups: Iterable[Any],
        *,
        moments: EightBitMoments | None = None,
        precise: Collection[Tensor] = (),
        **options: Any,
    ) -> None:
        super().__init__(groups, **options)
        self._moments, self._precise = moments, frozenset(precise)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Take a step with all weights that have a gradient; gradients of those stepped in pieces are freed."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None and self._in_pieces(weight):
                    self._step_pieces(weight, group)
                    weight.grad = None
        return super().step(closure)

    def _in_pieces(self, weight: Tensor) -> bool:
        return low_bits(weight) is not None or self._in_8_bits(weight)

    def _in_8_bits(self, weight: Tensor) -> bool:
        return self._moments is not None and weight.numel() >= SMALLEST and weight not in self._precise

    def _step_pieces(self, weight: Tensor, group: dict[str, Any]) -> None:
        """Take the step of a weight, some of its numbers at a time."""
        state = self.state[weight]
        if not state:
            state |= {"step": torch.tensor(0.0), **self._start(weight)}
        state["step"] += 1
        size = PIECE.get(weight.device.type, PIECE["cpu"])
        low, gradient = low_bits(weight), weight.grad
        assert gradient is not None
        numbers = [weight.data, gradient, *([] if low is None else [low])]
        pieces = [list(part.reshape(-1).split(size)) for part in numbers]
        own = [
            list(value.reshape(-1).split(size // BLOCK if name.endswith("_scale") else size))
            for name, value in state.items()
            if name != "step"
        ]
        for (high, by_weight, *below), parts in zip(zip(*pieces, strict=True), zip(*own, strict=True), strict=True):
            whole = join(high, below[0]) if below else high
            if self._in_8_bits(weight):
                assert self._moments is not None
                self._moments.step(whole, by_weight, list(parts), group, int(state["step"]))
            else:
                _float32_step(whole, by_weight, list(parts), group, state["step"] - 1)
            if below:
                new_high, new_low = split(whole)
                high.copy_(new_high)
                below[0].copy_(new_low)

    def _start(self, weight: Tensor) -> dict[str, Tensor]:
        if self._in_8_bits(weight):
            assert self._moments is not None
            return self._moments.start(weight)
        return {name: torch.zeros_like(weight, dtype=torch.float32) for name in ("exp_avg", "exp_avg_sq")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state; torch would convert the moments to the dtype of the parameter."""
        super().load_state_dict(state_dict)
        weights = [weight for group in self.param_groups for weight in group["params"]]
        for number, entries in state_dict["state"].items():
            if self._in_pieces(weight := weights[number]):
                self.state[weight] = {
                    name: value if name == "step" else value.to(weight.device) for name, value in entries.items()
                }


def _float32_step(
    weight: Tensor, gradient: Tensor, moments: list[Tensor], group: dict[str, Any], steps: Tensor
) -> None:
    """Take a step with consecutive numbers of a float32 weight, in place.

    Args:
        weight: (N,).
        gradient: (N,).
        moments: both, (N,) each.
        group: parameter group of the weight.
        steps: taken before this one.
    """
    adamw(
        [weight],
        [gradient],
        [moments[0]],
        [moments[1]],
        [],
        [steps],
        foreach=False,
        fused=weight.device.type == "cpu",  # one pass over the piece
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
