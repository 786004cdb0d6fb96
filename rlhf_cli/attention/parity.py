"""Numerical parity of attention backends: a model computes the same under ours as under transformers' `eager`.

The baseline is every sequence on its own under `eager`. Each layout of `batch_layouts` must reproduce its hidden states
and gradients. Products are exact in all comparisons: rounding to TF32, which users may allow, is not a fault.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_cli.attention import hugging_face, registry
from rlhf_cli.attention.batch_layouts import BATCH_LAYOUTS, ProbeSequences, architecture_of, unbatched
from rlhf_cli.attention.layout import Layout
from rlhf_cli.errors import ModelError, UsageError
from rlhf_cli.memory import is_out_of_memory
from rlhf_cli.precision import exact_products

# Longer than the longest tile of a kernel, 128 tokens, each.
_PREFIX_LENGTH, _SUFFIX_LENGTHS = 160, (140, 9)


@dataclass(frozen=True)
class Deviation:
    """Largest differences from the baseline.

    Attributes:
        forward: of hidden states, relative to the largest hidden state.
        gradient: of parameter gradients, relative to the largest gradient; None without a backward pass.
    """

    forward: float
    gradient: float | None


def batch_layouts_for(model: PreTrainedModel) -> tuple[str, ...]:
    """Return the names of the batch layouts that apply to a model."""
    return tuple(BATCH_LAYOUTS[architecture_of(model)])


class Baseline:
    """Hidden states and gradients of each sequence on its own under transformers' `eager` attention.

    Args:
        model: any Hugging Face model; its attention implementation is restored afterwards.
        sequences: the inputs.
        with_gradients: compute gradients too.

    Attributes:
        hidden: (tokens, d) per sequence.
        gradients: one per trainable parameter of the backbone; empty without gradients.
    """

    def __init__(self, model: PreTrainedModel, sequences: ProbeSequences, *, with_gradients: bool) -> None:
        self.sequences = sequences
        with use_attention(model, "eager"), torch.set_grad_enabled(with_gradients), exact_products():
            hidden = [unbatched(model, sequences, number) for number in range(len(sequences.ids))]
            self.hidden = [rows.detach() for rows in hidden]
            self.gradients = _gradients(model, hidden) if with_gradients else []


def compare(model: PreTrainedModel, batch_layout: str, baseline: Baseline, implementation: str) -> Deviation:
    """Run a model on one batch layout under one of our backends and compare it with the baseline.

    Args:
        model: the model of the baseline.
        batch_layout: one of `batch_layouts_for(model)`.
        baseline: the expected values.
        implementation: from `hugging_face.implementation`.

    Raises:
        UsageError: the backend does not support a feature that the model uses.
    """
    run, has_backward = BATCH_LAYOUTS[architecture_of(model)][batch_layout]
    with_gradients = has_backward and bool(baseline.gradients)
    with use_attention(model, implementation), torch.set_grad_enabled(with_gradients), exact_products():
        hidden = run(model, baseline.sequences)
        gradients = _gradients(model, hidden) if with_gradients else []
    return Deviation(
        relative_error(hidden, baseline.hidden),
        relative_error(gradients, baseline.gradients) if with_gradients else None,
    )


def require(model: PreTrainedModel, name: str, implementation: str) -> None:
    """Refuse a model whose results change under our attention. Runs a few tokens, before any training.

    These tokens are one tile of a kernel. So the gradients of one attention call with the model's heads and rules, but
    with several tiles of random numbers, are compared with those of the equation.

    Args:
        model: as loaded.
        name: name of the model for messages.
        implementation: from `hugging_face.implementation`.

    Raises:
        ModelError: the model never calls our function, or computes other hidden states or gradients with it.
        UsageError: the backend does not support a feature that the model uses.
    """
    label = f"the {model.config.model_type} model `{name}`"
    hint = "rerun with `--attention sdpa`; batches are then padded"
    if not type(model)._can_set_attn_implementation():
        raise ModelError(f"{label} does not support custom attention: it ignores transformers' interface", hint=hint)
    tested = ("tree", "cached") if architecture_of(model) == "decoder" else ("padded right",)
    vocab_size = model.config.get_text_config(decoder=True).vocab_size
    sequences = ProbeSequences.random(vocab_size, prefix_length=3, suffix_lengths=(3, 1))
    calls: list[dict[str, Any]] = []
    try:
        with hugging_face.attention_hook(lambda module, arguments: calls.append(arguments)):
            baseline = Baseline(model, sequences, with_gradients=False)
            error = max(compare(model, layout, baseline, implementation).forward for layout in tested)
        by_input = gradient_deviation(calls[0], hugging_face.backend_of(implementation)) if calls else 0.0
    except Exception as cause:  # a model's own code may raise anything on arguments it does not expect
        if isinstance(cause, UsageError) or is_out_of_memory(cause):
            raise
        raise ModelError(f"{label} failed under our attention: {type(cause).__name__}: {cause}", hint=hint) from cause
    if not calls:
        raise ModelError(f"{label} never calls the attention function it is given", hint=hint)
    if not error <= tolerance(model.dtype).forward:
        raise ModelError(
            f"{label} computes different values under our attention: hidden states differ by {error:.2g} of the "
            "largest",
            hint=hint,
        )
    limit = tolerance(calls[0]["query"].dtype).gradient
    if limit is None or not by_input <= limit:
        raise ModelError(
            f"{label} gets other gradients under our attention: they differ by {by_input:.2g} of the largest", hint=hint
        )


def gradient_deviation(call: Mapping[str, Any], backend: str) -> float:
    """Return by how much a backend's gradients by query, key and value differ from the equation's, in one of its calls.

    Args:
        call: arguments of the call, as `hugging_face.attention_hook` gets them. Of the heads, those of one key head are
            enough; a bias is skipped, since it has the length of the call.
        backend: name of the backend.
    """
    query, key, value = call["query"], call["key"], call["value"]
    heads = query.shape[1] // key.shape[1]
    layout = Layout.tree([(_PREFIX_LENGTH, list(_SUFFIX_LENGTHS))])
    length = _PREFIX_LENGTH + sum(_SUFFIX_LENGTHS)
    generator = torch.Generator().manual_seed(2)
    shapes = [(1, heads, length, query.shape[-1]), (1, 1, length, key.shape[-1]), (1, 1, length, value.shape[-1])]
    inputs = [torch.randn(shape, generator=generator).to(query) for shape in shapes]
    weights = torch.randn((1, heads, length, value.shape[-1]), generator=generator).to(query)
    sinks = call["sinks"]
    rules = {name: call[name] for name in ("scale", "window", "softcap")} | {
        "causal": True,
        "sinks": None if sinks is None else sinks.detach()[:heads],
    }

    def gradients(name: str) -> list[Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        with torch.enable_grad(), exact_products():
            output = registry.attention(*leaves, layout, backend=name, **rules).output  # pyright: ignore[reportCallIssue]
            return list(torch.autograd.grad((output * weights).sum(), leaves, materialize_grads=True))

    return relative_error(gradients(backend), gradients("reference"))


def tolerance(dtype: torch.dtype) -> Deviation:
    """Return the largest deviation that rounding explains. A wrong mask deviates by several hundredths."""
    if dtype in (torch.float32, torch.float64):
        return Deviation(1e-4, 1e-3)
    return Deviation(3e-2, 1e-1)


@contextmanager
def use_attention(model: PreTrainedModel, implementation: str):
    """Set a model's attention implementation inside the context; restore it afterwards."""
    before = model.config._attn_implementation or "eager"
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def relative_error(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest difference divided by the largest expected value; infinite if any value is not finite."""
    largest = max(float(tensor.detach().abs().max()) for tensor in expected)
    errors = [float((ours - theirs).detach().abs().max()) for ours, theirs in zip(actual, expected, strict=True)]
    return max(errors) / largest if all(map(math.isfinite, errors)) else math.inf


def _gradients(model: PreTrainedModel, hidden: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of a fixed random weighted sum of all hidden states, one per trainable parameter of the backbone."""
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(rows.shape, generator=generator).to(rows) for rows in hidden]
    total = sum((rows * weight).sum() for rows, weight in zip(hidden, weights, strict=True))
    assert isinstance(total, Tensor)
    parameters = [parameter for parameter in model.base_model.parameters() if parameter.requires_grad]
    return list(torch.autograd.grad(total, parameters, materialize_grads=True))
