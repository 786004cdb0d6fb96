"""The product of an adapted linear layer, y = W x + s B (A x), in one autograd function.

PEFT's layer computes the same in several passes over the activations: casts of x to float32 and back, the product by
s, the sum with W x, and in the backward pass the sum of both gradients by x. Here each sum is part of a matrix product.
The layer stays PEFT's in every other respect: names, weights, saving, merging, and which adapter is active.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rlhf_cli.precision import matmul_dtype


class FusedLoraLinear(PeftLinear):
    """PEFT's adapted `nn.Linear`, with the forward pass of this module where it applies, else with PEFT's.

    It applies to one active adapter without dropout, on a frozen weight in the precision of matrix products.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return W x + bias + s B (A x) with the active adapter, W x + bias without."""
        if self._disable_adapters and not self.merged:
            return self.base_layer(x)
        names = self.active_adapters
        name = names[0] if len(names) == 1 else ""
        base = self.base_layer
        if name not in self.lora_A:
            return super().forward(x, *args, **kwargs) if name == "" or self.merged else base(x)
        is_plain = isinstance(self.lora_dropout[name], nn.Identity) and not (args or kwargs or self.merged)
        if not is_plain or base.weight.requires_grad or base.weight.dtype != matmul_dtype(x):
            return super().forward(x, *args, **kwargs)
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        y = LowRankProduct.apply(x.reshape(-1, x.shape[-1]), base.weight, base.bias, a, b, self.scaling[name])
        return y.view(*x.shape[:-1], y.shape[-1])


def fuse_products(layers: Iterable[LoraLayer]) -> None:
    """Give PEFT's adapted linear layers the forward pass of this module, in place; other layers stay as they are."""
    for layer in layers:
        if type(layer) is PeftLinear and type(layer.base_layer) is nn.Linear and not layer.lora_variant:
            layer.__class__ = FusedLoraLinear


class LowRankProduct(torch.autograd.Function):
    """(x, W, bias, A, B, s) -> W x + bias + s B (A x), in the precision of W.

    x: (N, in); W: (out, in), frozen; bias: (out,) or None, frozen; A: (rank, in); B: (out, rank). Gradients flow to
    x, A and B.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        """Compute the output; A x is kept for the backward pass, and x."""
        rows = x.to(weight.dtype)
        inner = rows @ a.to(weight.dtype).T
        y = rows @ weight.T if bias is None else torch.addmm(bias, rows, weight.T)
        y.addmm_(inner, b.to(weight.dtype).T, alpha=scaling)
        ctx.save_for_backward(rows, weight, a, b, inner)
        ctx.scaling, ctx.dtype = scaling, x.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_y: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Compute the gradients by x, A and B."""
        rows, weight, a, b, inner = ctx.saved_tensors
        needs_x, _, _, needs_a, needs_b, _ = ctx.needs_input_grad
        by_y = by_y.to(weight.dtype)
        by_inner = (by_y @ b.to(weight.dtype)).mul_(ctx.scaling)
        by_x = by_a = by_b = None
        if needs_x:
            by_x = by_y @ weight
            by_x = by_x.addmm_(by_inner, a.to(weight.dtype)).to(ctx.dtype)
        if needs_a:
            by_a = (by_inner.T @ rows).to(a.dtype)
        if needs_b:
            by_b = (by_y.T @ inner).mul_(ctx.scaling).to(b.dtype)
        return by_x, None, None, by_a, by_b, None
