"""Weights for products in bfloat16, without a cast in every forward pass.

Under autocast a product rounds its float32 weight to bfloat16 in every forward pass, and keeps the rounded copy for the
backward pass. Here the weights of linear layers are rounded once. A trained weight is stored in two halves of 16 bits
(Kalamkar et al. 2019, arXiv:1905.12322, section 4): the parameter is the bfloat16 number next to the float32 weight,
with which the model computes, and a tensor beside it has the bits that rounding lost. Both together are the float32
weight, which the optimizer reads and writes (`training.adamw`). So a step smaller than what bfloat16 resolves is not
lost, and the weights take no more memory than in float32. Gradients are summed in float32.

Other weights stay in float32: products alone are rounded under autocast. So are embeddings and the projection to the
vocabulary, and the sums between layers keep float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlhf_cli.memory import free_memory
from rlhf_cli.models.sharding import assign

LOW = "low_bits"
"""Suffix of the name of a weight's lower half in a checkpoint, and the attribute of the parameter that holds it."""


def split(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Split float32 numbers into the nearest bfloat16 numbers and the bits between, int16.

    Of two equally near numbers it takes the larger in magnitude. With torch's rule, the even one, both neighbors of an
    even number would leave the same bits.
    """
    bits = weight.view(torch.int32)
    high = bits.add(0x8000).bitwise_right_shift_(16)
    low = (bits - (high << 16)).to(torch.int16)
    return high.to(torch.int16).view(torch.bfloat16), low


def join(high: Tensor, low: Tensor) -> Tensor:
    """Return the float32 numbers that `split` was given."""
    bits = high.view(torch.int16).to(torch.int32).bitwise_left_shift_(16)
    return bits.add_(low).view(torch.float32)


def low_bits(weight: Tensor) -> Tensor | None:
    """Return the lower half of a trained weight; None if the weight is not split."""
    return getattr(weight, LOW, None)


def split_weights(model: PreTrainedModel) -> None:
    """Split the weights of the linear layers of a trained float32 model, in place; see the module's docstring."""
    for weight in _product_weights(model):
        weight.data, low = split(weight.data.contiguous())
        weight.grad_dtype = torch.float32
        setattr(weight, LOW, low)
    free_memory()  # of the float32 weights, whose blocks the halves have only partly filled


def round_weights(model: PreTrainedModel) -> None:
    """Round the weights of the linear layers of a frozen model as `split_weights` does, in place."""
    for weight in _product_weights(model):
        weight.data = split(weight.data)[0]


def join_weights(model: nn.Module) -> None:
    """Put the float32 weights back into the parameters of a model, in place; undoes `split_weights`."""
    for weight in model.parameters():
        if (low := low_bits(weight)) is not None:
            weight.grad = None
            weight.grad_dtype = None
            weight.data = join(weight.data, low)
            delattr(weight, LOW)


@torch.no_grad()
def copy_weights(target: nn.Module, source: nn.Module) -> None:
    """Copy the weights of a model that may be split into a float32 model of the same architecture."""
    weights = dict(target.named_parameters())
    for name, weight in source.named_parameters():
        low = low_bits(weight)
        weights[name].copy_(weight if low is None else join(weight, low))


def stored(weights: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Return named weights for a checkpoint; a weight that is split under two names, without a copy."""
    found: dict[str, Tensor] = {}
    for name, weight in weights:
        found[name] = weight.detach()
        if (low := low_bits(weight)) is not None:
            found[f"{name}.{LOW}"] = low
    return found


@torch.no_grad()
def restore(weights: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Copy what `stored` returned back into the weights, whether they were split then or are now.

    Args:
        weights: what `stored` returns now, which shares the memory of the trained weights.
        state: what it returned then, among others.
    """
    for name, weight in weights.items():
        assign(weight, _saved(name, state, weight.dtype))


def _saved(name: str, state: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """Return a weight or half of one from a state that may hold it in the other form: split or not."""
    low = f"{name}.{LOW}"
    if name not in state:
        return split(state[name.removesuffix(f".{LOW}")])[1]
    if low in state and dtype == torch.float32:
        return join(state[name], state[low])
    is_whole = low not in state and state[name].dtype == torch.float32
    return split(state[name])[0] if is_whole and dtype == torch.bfloat16 else state[name]


def vocabulary_weights(model: PreTrainedModel) -> set[Tensor]:
    """Return the weights of embeddings and of the projection to the vocabulary."""
    embeddings = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    head = model.get_output_embeddings()
    return {*embeddings, *([] if head is None else head.parameters())}


def _product_weights(model: PreTrainedModel) -> Iterator[nn.Parameter]:
    """Yield the float32 weights with which linear layers of the backbone multiply under autocast, each once."""
    seen = vocabulary_weights(model)
    for module in model.base_model.modules():
        if isinstance(module, (nn.Linear, Conv1D)) and (weight := module.weight) not in seen:
            seen.add(weight)
            if weight.dtype == torch.float32:
                yield weight  # type: ignore[misc]
