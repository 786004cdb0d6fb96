"""Log-probabilities from hidden states, in tiles of the vocabulary, forward and backward.

Function:  log softmax(z)[target] and the entropy of softmax(z), where z = softcap(scale (h W^T + b)) / temperature.
Memory:    one tile of logits at a time, 2,048 tokens x 4,096 vocabulary entries; no logits are saved. The backward
           pass computes each tile again, unless W is frozen and the entropy is only reported. Then
               d log softmax(z)[t] / dh = scale / temperature (W_t - sum over v of p_v W_v),
           whose sum the forward pass collects, so that two products per tile remain of three. A p_t near 1 is the
           largest of its tile, and masses are relative to that one: it is exact in bfloat16 too, and the difference
           from W_t, as the product read it, is small.
Precision: the product takes inputs in the precision of matrix products (that of autocast; without it that of h) and
           sums and returns float32. bfloat16 logits of size 25 would be off by 0.06. On a GPU, bfloat16 inputs use
           tensor cores. A CPU product rounds its result to the type of its inputs, so there the inputs are float32.
           Where hidden states and weights were bfloat16 before, oneDNN may take them, and in the backward pass the
           gradient, as bfloat16 again: a third of the time with AMX.
           Softmax, sums over tiles and gradients are float32.
Oracle:    autograd in float64, tests/generation/test_chunked_logprobs.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf_cli.precision import matmul_dtype

VOCABULARY_TILE = 4_096
TOKEN_TILE = 2_048


@dataclass(frozen=True)
class LogitTransform:
    """What happens to logits behind the product with the weights: softcap(scale y) / temperature.

    Attributes:
        scale: factor on the product.
        softcap: c in c tanh(x / c), or None.
        temperature: the result is divided by it.
    """

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def apply_(self, y: Tensor) -> tuple[Tensor, Tensor | float]:
        """Transform a tile in place; return it and its derivative by the input, elementwise or one number."""
        y.mul_(self.scale)
        slope = self.scale / self.temperature
        if self.softcap is None:
            return y.div_(self.temperature), slope
        y.div_(self.softcap).tanh_()
        slopes = (1.0 - y * y) * slope
        return y.mul_(self.softcap / self.temperature), slopes


def operand(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return an input of `product` in the precision `dtype`; float32 on a CPU, see the module's docstring."""
    return tensor.to(dtype) if tensor.is_cuda else tensor.float()


def product(left: Tensor, right: Tensor, *, may_round: bool = False) -> Tensor:
    """Return the matrix product of two operands, summed and returned in float32, whatever autocast says.

    Args:
        left: an operand, see `operand`.
        right: an operand.
        may_round: a CPU may round operands in float32 to bfloat16, since that is what they hold.
    """
    if left.dtype != torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    with torch.autocast(left.device.type, enabled=False), _inputs_in_bfloat16(may_round):
        return left @ right


@contextmanager
def _inputs_in_bfloat16(may_round: bool) -> Iterator[None]:
    """Let oneDNN round the inputs of float32 products on the CPU to bfloat16."""
    products = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
    before = products.fp32_precision
    if may_round:
        products.fp32_precision = "bf16"
    try:
        yield
    finally:
        products.fp32_precision = before


class ChunkedLogprobs(torch.autograd.Function):
    """(hidden, weight, bias, targets, transform, trains_entropy) -> (log-probabilities, entropy), both (N,) nats,
    float32.

    hidden: (N, d); weight: (V, d); bias: (V,) or None; targets: (N,) tokens; transform: a `LogitTransform`;
    trains_entropy: whether a gradient by the entropy is expected. Without it that is right too, but slower. Gradients
    flow to hidden, weight and bias, from both outputs.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        transform: LogitTransform,
        trains_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        """Compute both outputs, tile by tile."""
        ctx.set_materialize_grads(False)  # an entropy that is only reported then costs nothing in the backward pass
        dtype = matmul_dtype(hidden)
        may_round = hidden.dtype == weight.dtype == torch.bfloat16
        inputs = operand(hidden, dtype)
        log_z = inputs.new_full((len(hidden),), -torch.inf, dtype=torch.float32)
        entropy, chosen = torch.zeros_like(log_z), torch.zeros_like(log_z)
        by_hidden, *by_others = ctx.needs_input_grad[:3]
        is_prepared = by_hidden and not any(by_others) and transform.softcap is None and not trains_entropy
        mean = torch.zeros_like(hidden, dtype=torch.float32) if is_prepared else None
        for columns in _tiles(len(weight), VOCABULARY_TILE):
            weights = operand(weight[columns], dtype)
            for rows in _tiles(len(hidden), TOKEN_TILE):
                logits, _ = _logits(product(inputs[rows], weights.T, may_round=may_round), bias, columns, transform)
                column, is_here = _targets_in(targets[rows], columns)
                found = logits.gather(1, column.unsqueeze(1)).squeeze(1)
                chosen[rows] = torch.where(is_here, found, chosen[rows])
                masses, before, now = _include(logits, log_z[rows], entropy[rows])
                if mean is not None:
                    sums = product(operand(masses, dtype), weights, may_round=may_round)
                    mean[rows].mul_(before.unsqueeze(1)).addcmul_(sums, now.unsqueeze(1))
        ctx.save_for_backward(hidden, weight, bias, targets, log_z, entropy, mean)
        ctx.dtype, ctx.transform, ctx.may_round = dtype, transform, may_round
        return chosen - log_z, entropy

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Compute the gradients by hidden, weight and bias, tile by tile."""
        hidden, weight, bias, targets, log_z, entropy, mean = ctx.saved_tensors
        if mean is not None and gradients[1] is None and gradients[0] is not None:
            slope = ctx.transform.scale / ctx.transform.temperature
            chosen = operand(weight[targets], ctx.dtype).float()
            found = (chosen - mean) * (slope * gradients[0].unsqueeze(1))
            return found.to(hidden.dtype), None, None, None, None, None
        inputs = operand(hidden, ctx.dtype)
        by_hidden, by_weight, by_bias = (
            torch.zeros_like(tensor, dtype=torch.float32) if is_needed else None
            for tensor, is_needed in zip((hidden, weight, bias), ctx.needs_input_grad, strict=False)
        )
        for columns in _tiles(len(weight), VOCABULARY_TILE):
            weights = operand(weight[columns], ctx.dtype)
            for rows in _tiles(len(hidden), TOKEN_TILE):
                logits, slope = _logits(
                    product(inputs[rows], weights.T, may_round=ctx.may_round), bias, columns, ctx.transform
                )
                by_logprob, by_entropy = (None if one is None else one[rows] for one in gradients)
                hits = _targets_in(targets[rows], columns)
                by_logits = _gradient(logits, log_z[rows], entropy[rows], hits, by_logprob, by_entropy) * slope
                if by_bias is not None:
                    by_bias[columns] += by_logits.sum(dim=0)
                by_logits = operand(by_logits, ctx.dtype)
                if by_hidden is not None:
                    by_hidden[rows] += product(by_logits, weights, may_round=ctx.may_round)
                if by_weight is not None:
                    by_weight[columns] += product(by_logits.T, inputs[rows], may_round=ctx.may_round)
        found = zip((by_hidden, by_weight, by_bias), (hidden, weight, bias), strict=True)
        return (
            *(None if gradient is None else gradient.to(tensor.dtype) for gradient, tensor in found),
            None,
            None,
            None,
        )


def _tiles(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def _logits(y: Tensor, bias: Tensor | None, columns: slice, transform: LogitTransform) -> tuple[Tensor, Tensor | float]:
    """Turn a tile of the product (n, v) into logits, in place; return them and their derivative by the product."""
    if bias is not None:
        y += bias[columns]
    return transform.apply_(y)


def _targets_in(targets: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Return each target's column in a tile, some column for a target outside it, and whether it is inside.

    No index is made from the comparison: on a GPU, to know its length would be a wait per tile.
    """
    column = targets - columns.start
    width = columns.stop - columns.start
    return column.clamp(0, width - 1), (column >= 0) & (column < width)


def _include(logits: Tensor, log_z: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Include a tile in the running log-sum-exp and in the entropy of the softmax so far, in place, also on the tile.

    With shares w of both parts, H = w1 H1 + w2 H2 - w1 log w1 - w2 log w2: small terms only, where the difference of
    log-sum-exp and mean logit would cancel.

    Returns:
        Masses of the tile (n, v) and factors (n,): the softmax so far is what it was times the first one, and the
        masses times the second.
    """
    top = logits.amax(dim=-1, keepdim=True)
    shifted = logits.sub_(top)
    masses = shifted.exp()
    total = masses.sum(dim=-1)
    of_tile = top.squeeze(-1) + total.log()
    entropy_of_tile = total.log() - shifted.mul_(masses).sum(dim=-1) / total
    new = torch.logaddexp(log_z, of_tile)
    before, now = (log_z - new).exp_(), (of_tile - new).exp_()
    entropy.mul_(before).add_(now * entropy_of_tile + torch.special.entr(before) + torch.special.entr(now))
    log_z.copy_(new)
    return masses, before, now.div_(total)


def _gradient(
    logits: Tensor,
    log_z: Tensor,
    entropy: Tensor,
    hits: tuple[Tensor, Tensor],
    by_logprob: Tensor | None,
    by_entropy: Tensor | None,
) -> Tensor:
    """Return the gradient by a tile of logits: g (1[target] - p) for log-probabilities, -g p (log p + H) for the
    entropy."""
    logp = logits - log_z.unsqueeze(-1)
    factor = torch.zeros_like(log_z).unsqueeze(-1) if by_logprob is None else -by_logprob.unsqueeze(-1)
    if by_entropy is not None:
        factor = factor - by_entropy.unsqueeze(-1) * (logp + entropy.unsqueeze(-1))
    gradient = logp.exp_().mul_(factor)
    if by_logprob is not None:
        column, is_here = hits
        gradient.scatter_add_(1, column.unsqueeze(1), by_logprob.masked_fill(~is_here, 0.0).unsqueeze(1))
    return gradient
