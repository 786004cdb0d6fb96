"""Cached decoding of prompts, on any Hugging Face language model.

`Decoding` is a batch that is being decoded. There are two kinds. `slots.SlotDecoding` lets prompts enter while others
are decoded, and takes models whose attention is one of our backends. `BatchDecoding` takes all others: layers with a
recurrent state, encoder-decoders, transformers' own attention and users' functions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from rlhf_cli.cache_names import cache_name, cache_of
from rlhf_cli.errors import ModelError, is_raised_here
from rlhf_cli.generation.logprobs import Projection, check_projection, completion_hidden
from rlhf_cli.generation.sequence_batch import SequenceBatch
from rlhf_cli.generation.slots import SlotDecoding, takes_slots
from rlhf_cli.memory import is_out_of_memory
from rlhf_cli.models.backbone import decoder_of, is_recurrent
from rlhf_cli.models.padding import pad
from rlhf_cli.models.quantize import quantized
from rlhf_cli.precision import exact_products, matmul_dtype


class Decoding(Protocol):
    """A batch of rows that are being decoded. Prompts enter in the order in which they were given."""

    def admit(self) -> Tensor | None:
        """Let prompts that wait enter free rows, behind all others: (rows, V) logits of their first tokens.

        None if nothing enters.
        """
        ...

    def step(self, tokens: Tensor) -> Tensor:
        """Append one token (B,) to every row; return the logits of the next: (B, V)."""
        ...

    def keep(self, rows: Sequence[int]) -> list[int]:
        """Drop all other rows of the batch.

        Args:
            rows: ascending.

        Returns:
            The row that each row was before.
        """
        ...


def decoding_of(model: PreTrainedModel, prompts: Sequence[list[int]], size: int) -> Decoding:
    """Return the fastest decoding that a model supports.

    Args:
        model: a language model in evaluation mode.
        prompts: in the order in which they enter; equal ones follow one another, so that they are read once.
        size: most rows at a time.
    """
    return (SlotDecoding if takes_slots(model) else BatchDecoding)(model, prompts, size)


Choice = tuple[Tensor, Sequence[int]]
"""The next token of every row (B,), and the rows that go on, ascending."""


Choose = Callable[[Tensor, list[int], Tensor, Tensor], Choice]
"""Takes logits (B, V), the number of the prompt of each row, the same as a tensor (B,), and how many tokens each row
has (B,)."""


def decode(decoding: Decoding, choose: Choose, device: torch.device) -> None:
    """Decode all prompts; see `decoding_steps`."""
    for _ in decoding_steps(decoding, choose, device):
        pass


def decoding_steps(decoding: Decoding, choose: Choose, device: torch.device) -> Iterator[None]:
    """Decode all prompts, and yield after each token of the batch.

    Args:
        decoding: of the prompts.
        choose: draws the next tokens.
        device: of the model.
    """
    rows: list[int] = []
    started = 0
    numbers = ages = torch.zeros(0, dtype=torch.long, device=device)
    tokens = numbers
    while True:
        parts = [decoding.step(tokens)] if rows else []
        if (entered := decoding.admit()) is not None:
            parts.append(entered)
            new = torch.arange(started, started + len(entered), device=device)
            numbers, ages = torch.cat([numbers, new]), torch.cat([ages, torch.zeros_like(new)])
            rows += range(started, started + len(entered))
            started += len(entered)
        if not parts:
            return
        tokens, staying = choose(parts[0] if len(parts) == 1 else torch.cat(parts), rows, numbers, ages)
        ages = ages + 1
        if len(staying) < len(rows):
            order = decoding.keep(staying)
            rows = [rows[row] for row in order]
            moved = torch.tensor(order, dtype=torch.long, device=device)
            tokens, numbers, ages = tokens[moved], numbers[moved], ages[moved]
        yield


def _batches(model: PreTrainedModel, prompts: Sequence[list[int]], size: int) -> Iterator[list[list[int]]]:
    """Cut prompts into batches of at most `size`.

    Prompts of a batch have equal lengths if the model has layers that carry a state from token to token: these would
    read the padding before a shorter prompt as text.
    """
    is_equal = is_recurrent(model)
    for _, group in groupby(prompts, key=lambda prompt: len(prompt) if is_equal else 0):
        rows = list(group)
        yield from (rows[start : start + size] for start in range(0, len(rows), size))


class BatchDecoding:
    """Batches one after another: a batch begins when all rows of the one before have ended; implements `Decoding`.

    Decoder-only prompts are padded on the left, so that the newest token of every row is last; positions count real
    tokens only (trap 6 of docs/ppo.md). The cache is transformers' own.
    """

    def __init__(self, model: PreTrainedModel, prompts: Sequence[list[int]], size: int) -> None:
        self._model, self._decoder = model, decoder_of(model)
        self._waiting = _batches(model, prompts, size)
        self._count = 0  # rows of the batch
        self._head: Projection | None = None
        self._accepts = inspect.signature(self._decoder.forward).parameters
        self._cache_name = cache_name(self._decoder.forward)
        # Prompts of a recurrent model have equal lengths. Some such models cannot read a mask longer than their input.
        self._has_mask = not is_recurrent(model)
        self._is_encoder_decoder = bool(model.config.is_encoder_decoder)

    def admit(self) -> Tensor | None:
        """See `Decoding.admit`; prompts enter an empty batch only."""
        prompts = next(self._waiting, None) if not self._count else None
        if prompts is None:
            return None
        distinct = list(dict.fromkeys(map(tuple, prompts)))
        number = {prompt: row for row, prompt in enumerate(distinct)}
        ids, is_real = pad(distinct, side="right" if self._is_encoder_decoder else "left")
        self._ids, self._mask = ids.to(self._model.device), is_real.long().to(self._model.device)
        self._encoded: Tensor | None = None
        self._cache: Cache | None = None
        logits = self._read()
        self._count = len(prompts)
        if len(distinct) == len(prompts):
            return logits
        return logits[self._select([number[tuple(prompt)] for prompt in prompts])]

    def _read(self) -> Tensor:
        """Read the prompts; return the logits of the first new token: (B, V)."""
        if self._is_encoder_decoder:
            self._encoded = self._model.get_encoder()(self._ids, attention_mask=self._mask).last_hidden_state
            start = self._model.config.decoder_start_token_id
            return self._forward(torch.full((len(self._ids), 1), start, device=self._ids.device))
        return self._forward(self._ids)

    def step(self, tokens: Tensor) -> Tensor:
        """See `Decoding.step`."""
        if not self._is_encoder_decoder:
            self._mask = torch.cat([self._mask, torch.ones_like(self._mask[:, :1])], dim=1)
        return self._forward(tokens.unsqueeze(-1))

    def keep(self, rows: Sequence[int]) -> list[int]:
        """See `Decoding.keep`."""
        if rows:
            self._select(rows)
        self._count = len(rows)
        return list(rows)

    def _select(self, rows: Sequence[int]) -> Tensor:
        """Make these the rows of the batch; the same one may be there several times."""
        indices = torch.tensor(rows, device=self._ids.device)
        self._mask = self._mask[indices]
        if self._encoded is not None:
            self._encoded = self._encoded[indices]
        # Not `batch_select_indices`, which layers with a recurrent state do not have.
        self._cache.reorder_cache(indices)  # pyright: ignore
        return indices

    def _forward(self, ids: Tensor) -> Tensor:
        arguments: dict[str, object] = {"use_cache": True, self._cache_name: self._cache}
        if self._is_encoder_decoder:
            arguments |= {"encoder_hidden_states": self._encoded, "encoder_attention_mask": self._mask}
        else:
            if self._has_mask:
                arguments["attention_mask"] = self._mask
            if "position_ids" in self._accepts:
                positions = (self._mask.cumsum(dim=-1) - 1).clamp_(min=0)
                arguments["position_ids"] = positions[:, -ids.shape[1] :]
        output = self._decoder(input_ids=ids, **arguments)
        self._cache = cache_of(output)
        if not isinstance(self._cache, Cache):
            raise ModelError("it keeps its state in a cache of its own type, from which no completion can be removed")
        hidden = output.last_hidden_state[:, -1]  # the last position is enough: B x L x V is never built
        if self._head is None:
            self._head = Projection.of(self._model).as_operand(matmul_dtype(hidden))
        return self._head.logits(hidden)


@torch.no_grad()
@exact_products()
def check_decoding(model: PreTrainedModel, name: str) -> None:
    """Check on a few tokens that a language model can be sampled from and scored; see `check_projection` too.

    Two completions are decoded in one batch. The shorter one leaves first, and a third enters, at once or afterwards.
    Their tokens must have the log-probabilities that scoring finds, in one batch and alone.

    Args:
        model: a language model.
        name: of the model, for messages.

    Raises:
        ModelError: it computes its logits in an unknown way, decoding fails, or log-probabilities differ.
    """
    check_projection(model, name)
    count = Projection.of(model).weight.shape[0]
    tokens = [3 + 7 * step % (count - 3) for step in range(16)]
    prompts = [tokens[:4], tokens[4:8] if is_recurrent(model) else tokens[4:6], tokens[4:8]]
    completions = [tokens[8:10], tokens[10:14], tokens[13:16]]
    label = f"the {model.config.model_type} model `{name}`"
    hint = "choose another base model; this one's family is not supported"
    try:
        with evaluating(model):
            drawn = decoded_logprobs(model, prompts, completions)
        scored = scored_logprobs(model, prompts, completions)
        alone = [scored_logprobs(model, [one], [other])[0] for one, other in zip(prompts, completions, strict=True)]
    except Exception as cause:  # a model's own code may raise anything on arguments it does not expect
        if is_out_of_memory(cause) or (is_raised_here(cause) and not isinstance(cause, ModelError)):
            raise
        reason = cause.message if isinstance(cause, ModelError) else f"{type(cause).__name__}: {cause}"
        raise ModelError(f"{label} cannot be sampled from: {reason}", hint=hint) from cause
    # Rounded products differ with a cache and in another batch; a wrong cache is off by whole nats on a trained model.
    is_rounded = model.dtype != torch.float32 or torch.is_autocast_enabled(model.device.type)
    is_exact = not is_rounded and quantized(model) == "none"
    for what, found in (("in a batch than alone", scored), ("when it is sampled than when it is scored", drawn)):
        off = (torch.cat(found) - torch.cat(alone)).abs()
        largest = float(off.max())
        if not (largest < 1e-2 if is_exact else float(off.mean()) < 0.5):
            raise ModelError(
                f"{label} gives tokens other log-probabilities {what}: they differ by {largest:.2g} nats", hint=hint
            )


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Context with a model in evaluation mode: in training mode, one that recomputes activations drops its cache."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def decoded_logprobs(model: PreTrainedModel, prompts: list[list[int]], completions: list[list[int]]) -> list[Tensor]:
    """Log-probabilities of given tokens as they are drawn, in two rows: one tensor (length,) per completion."""
    found: list[list[Tensor]] = [[] for _ in prompts]

    def choose(logits: Tensor, rows: list[int], *_: Tensor) -> Choice:
        tokens = [completions[row][len(found[row])] for row in rows]
        for row, token, values in zip(rows, tokens, logits.log_softmax(-1), strict=True):
            found[row].append(values[token])
        staying = [index for index, row in enumerate(rows) if len(found[row]) < len(completions[row])]
        return torch.tensor(tokens, device=model.device), staying

    decode(decoding_of(model, prompts, size=2), choose, model.device)
    return [torch.stack(values) for values in found]


def scored_logprobs(model: PreTrainedModel, prompts: list[list[int]], completions: list[list[int]]) -> list[Tensor]:
    """Log-probabilities of given tokens as they are scored: one tensor (length,) per completion."""
    batch = SequenceBatch.for_model(model, prompts, completions)
    scored = Projection.of(model).token_logprobs(completion_hidden(model, batch), batch, temperature=1.0).logprobs
    return [row[: len(completion)] for row, completion in zip(scored, completions, strict=True)]
