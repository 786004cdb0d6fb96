"""AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101) on float32 weights that may be stored in two halves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from rlhf_cli.models.split_weights import join, low_bits, split

PIECE = {"cpu": 1 << 18, "cuda": 1 << 26}
"""Numbers that are joined, stepped and split at once: on a CPU few enough to stay in its cache."""


class AdamW(torch.optim.AdamW):
    """Torch's AdamW; of a weight from `split_weights` it steps the float32 value, and both moments are float32."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Take a step with all weights that have a gradient. Gradients of split weights are freed on the way."""
        for group in self.param_groups:
            for weight in group["params"]:
                if low_bits(weight) is not None and weight.grad is not None:
                    self._step_halves(weight, group)
                    weight.grad = None
        return super().step(closure)

    def _step_halves(self, weight: Tensor, group: dict[str, Any]) -> None:
        low, gradient = low_bits(weight), weight.grad
        assert low is not None
        assert gradient is not None
        state = self.state[weight]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(weight, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(weight, dtype=torch.float32)
        size = PIECE.get(weight.device.type, PIECE["cpu"])
        parts = (weight.data, low, gradient, state["exp_avg"], state["exp_avg_sq"])
        for high, below, by_weight, mean, square in zip(*(part.reshape(-1).split(size) for part in parts), strict=True):
            whole = join(high, below)
            adamw(
                [whole],
                [by_weight],
                [mean],
                [square],
                [],
                [state["step"].clone()],
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
            new_high, new_low = split(whole)
            high.copy_(new_high)
            below.copy_(new_low)
        state["step"] += 1

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state; torch would round the moments to the dtype of the parameter."""
        super().load_state_dict(state_dict)
        weights = [weight for group in self.param_groups for weight in group["params"]]
        for number, entries in state_dict["state"].items():
            if low_bits(weight := weights[number]) is not None:
                self.state[weight] = {
                    name: value if name == "step" else value.to(weight.device) for name, value in entries.items()
                }
