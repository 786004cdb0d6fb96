"""Whether a model computes the same under one of our backends as each sequence alone under transformers' own equation.

Each of the `ways` in which sequences reach a model is one check: what it makes of them must not depend on the way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_cli.attention import batch_layouts as ways
from rlhf_cli.attention import hugging_face
from rlhf_cli.attention.batch_layouts import WAYS, Sequences, kind_of
from rlhf_cli.errors import ModelError, UsageError


@dataclass(frozen=True)
class Parity:
    """How far a model was off.

    Attributes:
        forward: largest difference of a hidden state, as a share of the largest hidden state.
        gradient: likewise of a parameter's gradient; None where the check has no backward pass.
    """

    forward: float
    gradient: float | None


def checks(model: PreTrainedModel) -> tuple[str, ...]:
    """Names of the checks that suit a model."""
    return tuple(WAYS[kind_of(model)])


class Alone:
    """What a model makes of each sequence alone, under transformers' `eager` attention.

    Args:
        model: any Hugging Face model; its attention is put back afterwards.
        sequences: what it reads.
        with_gradients: whether gradients are computed too.
    """

    def __init__(self, model: PreTrainedModel, sequences: Sequences, *, with_gradients: bool) -> None:
        self.sequences = sequences
        with attention_set(model, "eager"), torch.set_grad_enabled(with_gradients):
            hidden = [ways.alone(model, sequences, number) for number in range(len(sequences.ids))]
            self.hidden = [rows.detach() for rows in hidden]
            self.gradients = _gradients(model, hidden) if with_gradients else []


def parity(model: PreTrainedModel, check: str, alone: Alone, implementation: str) -> Parity:
    """Compare one check under one of our backends with every sequence alone.

    Args:
        model: the model.
        check: one of `checks(model)`.
        alone: what is expected.
        implementation: from `hugging_face.implementation`.

    Raises:
        UsageError: the backend does not support what the model asks for.
    """
    run, has_backward = WAYS[kind_of(model)][check]
    with_gradients = has_backward and bool(alone.gradients)
    with attention_set(model, implementation), torch.set_grad_enabled(with_gradients):
        hidden = run(model, alone.sequences)
        gradients = _gradients(model, hidden) if with_gradients else []
    return Parity(
        _difference(hidden, alone.hidden), _difference(gradients, alone.gradients) if with_gradients else None
    )


def require(model: PreTrainedModel, name: str, implementation: str) -> None:
    """Refuse a model that does not honor our attention, by name and before any training.

    Args:
        model: just loaded.
        name: of the model, for the message.
        implementation: from `hugging_face.implementation`.

    Raises:
        ModelError: it never calls our function, or the result is not the one of its own attention.
        UsageError: the backend does not support what the model asks for.
    """
    family = model.config.model_type
    hint = "rerun with `--attention sdpa`, transformers' own; the model then trains on padded batches"
    if not type(model)._can_set_attn_implementation():
        raise ModelError(
            f"the {family} model `{name}` does not let its attention be exchanged: it ignores transformers' interface",
            hint=hint,
        )
    tried = ("tree", "cached") if kind_of(model) == "decoder" else ("padded right",)
    sequences = Sequences.random(model.config.get_text_config(decoder=True).vocab_size, shared=3, own=(3, 1))
    calls: list[int] = []
    try:
        with hugging_face.watching(lambda module, arguments: calls.append(id(module))):
            alone = Alone(model, sequences, with_gradients=False)
            found = max(parity(model, way, alone, implementation).forward for way in tried)
    except (torch.OutOfMemoryError, UsageError):
        raise
    except Exception as error:  # whatever a model's own code does with arguments it does not expect
        raise ModelError(
            f"the {family} model `{name}` does not work with our attention: {type(error).__name__}: {error}", hint=hint
        ) from error
    if not calls:
        raise ModelError(f"the {family} model `{name}` never calls the attention it is given", hint=hint)
    if not found <= tolerance(model.dtype).forward:
        raise ModelError(
            f"the {family} model `{name}` computes something else under our attention: hidden states are off by "
            f"{found:.2g} of the largest",
            hint=hint,
        )


def tolerance(dtype: torch.dtype) -> Parity:
    """Largest differences that rounding explains; a wrong mask is off by several hundredths."""
    if dtype in (torch.float32, torch.float64):
        return Parity(1e-4, 1e-3)
    return Parity(3e-2, 1e-1)


@contextmanager
def attention_set(model: PreTrainedModel, implementation: str):
    """Let a model use an implementation of attention while the context lasts."""
    before = model.config._attn_implementation or "eager"
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest difference as a share of the largest number expected; infinite where anything is not finite."""
    largest = max(float(tensor.detach().abs().max()) for tensor in expected)
    apart = [float((mine - theirs).detach().abs().max()) for mine, theirs in zip(found, expected, strict=True)]
    return max(apart) / largest if all(map(math.isfinite, apart)) else math.inf


def _gradients(model: PreTrainedModel, hidden: Sequence[Tensor]) -> list[Tensor]:
    """Of a fixed random weighting of all hidden states, for every parameter that takes part."""
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(rows.shape, generator=generator).to(rows) for rows in hidden]
    total = sum((rows * weight).sum() for rows, weight in zip(hidden, weights, strict=True))
    assert isinstance(total, Tensor)
    parameters = [parameter for parameter in model.base_model.parameters() if parameter.requires_grad]
    return list(torch.autograd.grad(total, parameters, materialize_grads=True))
