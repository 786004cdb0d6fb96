"""Linear layers whose weight is W + B A, with W and B A kept apart.

A product in bfloat16 rounds W + B A to 8 significant bits, which loses an update that is small beside W. Kept apart,
W x and B (A x) are rounded each on its own, as when B A was trained as an adapter on W.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

_A, _B = "low_rank_a", "low_rank_b"


class _LowRank(nn.Module):
    """Adds B A x to the output of a linear layer."""

    low_rank_a: Tensor
    low_rank_b: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """Return W x + bias + B A x."""
        output = super().forward(input)
        update = functional.linear(functional.linear(input.to(self.low_rank_a.dtype), self.low_rank_a), self.low_rank_b)
        return output + update.to(output.dtype)


class LowRankLinear(_LowRank, nn.Linear):
    """`nn.Linear` with a low-rank update."""


class LowRankConv1D(_LowRank, Conv1D):
    """GPT-2's linear layer, whose weight is transposed, with a low-rank update."""


def separate(layer: nn.Linear | Conv1D, a: Tensor, b: Tensor) -> None:
    """Take B A out of a layer's weight, in place; the layer computes as before, but for rounding.

    Args:
        layer: with a weight in float32 that contains B A, or that is read later (`models.sharded_loading`), which
            subtracts B A.
        a: (rank, in) float32.
        b: (out, rank) float32.
    """
    is_transposed = isinstance(layer, Conv1D)
    if not has_no_memory(layer.weight):
        layer.weight.data = layer.weight.data - ((b @ a).T if is_transposed else b @ a)
    _change_class(layer, LowRankConv1D if is_transposed else LowRankLinear)
    for name, factor in ((_A, a), (_B, b)):
        # Buffers, so that they are neither trained nor cast with the weights.
        layer.register_buffer(name, factor.to(layer.weight.device), persistent=False)


def has_no_memory(weight: Tensor) -> bool:
    """Whether a weight is a view of one number."""
    return weight.numel() > 1 and not any(weight.stride())


def _change_class(layer: nn.Module, kind: type[nn.Module]) -> None:
    """Change how a layer computes without replacing it, so that its weight, name and parent stay."""
    layer.__class__ = kind  # pyright: ignore[reportAttributeAccessIssue]


def low_rank_update(layer: nn.Module | None) -> Tensor | None:
    """Return what `separate` took out of a layer's weight, shaped like it; None if it did not change the layer."""
    if not isinstance(layer, LowRankLinear | LowRankConv1D):
        return None
    update = layer.low_rank_b @ layer.low_rank_a
    return update.T if isinstance(layer, Conv1D) else update


def join(layer: nn.Module) -> None:
    """Add B A to the weight of a layer that `separate` changed, in float32 and in place; others stay as they are."""
    update = low_rank_update(layer)
    if update is None:
        return
    assert isinstance(layer, nn.Linear | Conv1D)
    layer.weight.data = layer.weight.data.float() + update
    delattr(layer, _A)
    delattr(layer, _B)
    _change_class(layer, Conv1D if isinstance(layer, Conv1D) else nn.Linear)


def is_separated(model: nn.Module) -> bool:
    """Whether a model has layers that `separate` changed."""
    return any(isinstance(layer, LowRankLinear | LowRankConv1D) for layer in model.modules())
