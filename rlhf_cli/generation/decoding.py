"""Cached decoding of a batch of prompts, on any Hugging Face language model."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from rlhf_cli.errors import ModelError, is_raised_here
from rlhf_cli.generation.chunked_logprobs import matmul_dtype
from rlhf_cli.generation.logprobs import Projection, check_projection, completion_hidden
from rlhf_cli.generation.sequence_batch import SequenceBatch
from rlhf_cli.memory import is_out_of_memory
from rlhf_cli.models.backbone import decoder_of, is_recurrent
from rlhf_cli.models.padding import pad
from rlhf_cli.models.quantize import quantized
from rlhf_cli.precision import exact_products


def batches(model: PreTrainedModel, lengths: Sequence[int], size: int) -> Iterator[slice]:
    """Cut prompts into batches of at most `size`.

    Prompts of a batch have equal lengths if the model has layers that carry a state from token to token: these would
    read the padding before a shorter prompt as text.

    Args:
        model: that decodes them.
        lengths: of the prompts, ascending.
        size: largest number of prompts in a batch.
    """
    start, is_equal = 0, is_recurrent(model)
    while start < len(lengths):
        end = min(start + size, len(lengths))
        while is_equal and lengths[end - 1] != lengths[start]:
            end -= 1
        yield slice(start, end)
        start = end


class Decoding:
    """A batch being decoded: its key-value cache, masks and positions.

    Decoder-only prompts are padded on the left, so that the newest token of every row is last; positions count real
    tokens only (trap 6 of docs/ppo.md).
    """

    def __init__(self, model: PreTrainedModel, prompts: list[list[int]]) -> None:
        self._model, self._decoder = model, decoder_of(model)
        self._head: Projection | None = None
        self._accepts = inspect.signature(self._decoder.forward).parameters
        # State-space models without attention have a name of their own for it.
        self._cache_name = "cache_params" if "cache_params" in self._accepts else "past_key_values"
        # Prompts of a recurrent model have equal lengths. Some such models cannot read a mask longer than their input.
        self._has_mask = not is_recurrent(model)
        self._is_encoder_decoder = bool(model.config.is_encoder_decoder)
        ids, is_real = pad(prompts, side="right" if self._is_encoder_decoder else "left")
        self._ids, self._mask = ids.to(model.device), is_real.long().to(model.device)
        self._encoded: Tensor | None = None
        self._cache: Cache | None = None

    def prefill(self) -> Tensor:
        """Read the prompts; return the logits of the first new token: (B, V)."""
        if self._is_encoder_decoder:
            self._encoded = self._model.get_encoder()(self._ids, attention_mask=self._mask).last_hidden_state
            start = self._model.config.decoder_start_token_id
            return self._forward(torch.full((len(self._ids), 1), start, device=self._ids.device))
        return self._forward(self._ids)

    def step(self, tokens: Tensor) -> Tensor:
        """Append one token (B,) to every row; return the logits of the next: (B, V)."""
        if not self._is_encoder_decoder:
            self._mask = torch.cat([self._mask, torch.ones_like(self._mask[:, :1])], dim=1)
        return self._forward(tokens.unsqueeze(-1))

    def keep(self, rows: list[int]) -> None:
        """Drop all other rows of the batch."""
        indices = torch.tensor(rows, device=self._ids.device)
        self._mask = self._mask[indices]
        self._ids = self._ids[indices]
        if self._encoded is not None:
            self._encoded = self._encoded[indices]
        # Not `batch_select_indices`, which layers with a recurrent state do not have.
        self._cache.reorder_cache(indices)  # pyright: ignore

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
        self._cache = output.get(self._cache_name)
        if not isinstance(self._cache, Cache):
            raise ModelError("it keeps its state in a form of its own, from which no completion can be removed")
        hidden = output.last_hidden_state[:, -1]  # the last position is enough: B x L x V is never built
        if self._head is None:
            self._head = Projection.of(self._model).as_operand(matmul_dtype(hidden))
        return self._head.logits(hidden)


@torch.no_grad()
@exact_products()
def check_decoding(model: PreTrainedModel, name: str) -> None:
    """Check on a few tokens that a language model can be sampled from and scored; see `check_projection` too.

    Two completions are decoded in one batch, which the shorter one leaves first. Their tokens must have the
    log-probabilities that scoring finds, in one batch and alone.

    Args:
        model: a language model.
        name: of the model, for messages.

    Raises:
        ModelError: it computes its logits in an unknown way, decoding fails, or log-probabilities differ.
    """
    check_projection(model, name)
    count = Projection.of(model).weight.shape[0]
    tokens = [3 + 7 * step % (count - 3) for step in range(16)]
    prompts = [tokens[:4], tokens[4:8] if is_recurrent(model) else tokens[4:6]]
    completions = [tokens[8:10], tokens[10:14]]
    label = f"the {model.config.model_type} model `{name}`"
    hint = "choose another base model; this one's family is not supported"
    try:
        # In training mode a model that recomputes activations drops its cache, without a word.
        with _evaluating(model):
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
            raise ModelError(f"{label} scores tokens otherwise {what}: they differ by {largest:.2g} nats", hint=hint)


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def decoded_logprobs(model: PreTrainedModel, prompts: list[list[int]], completions: list[list[int]]) -> list[Tensor]:
    """Log-probabilities of given tokens as they are drawn: one tensor (length,) per completion."""
    decoding = Decoding(model, prompts)
    rows, logits = list(range(len(prompts))), decoding.prefill()
    found: list[list[Tensor]] = [[] for _ in prompts]
    for step in range(max(map(len, completions))):
        staying = [index for index, row in enumerate(rows) if len(completions[row]) > step]
        if step:
            if len(staying) < len(rows):
                decoding.keep(staying)
                rows = [rows[index] for index in staying]
            logits = decoding.step(torch.tensor([completions[row][step - 1] for row in rows], device=model.device))
        for row, values in zip(rows, logits.log_softmax(-1), strict=True):
            found[row].append(values[completions[row][step]])
    return [torch.stack(values) for values in found]


def scored_logprobs(model: PreTrainedModel, prompts: list[list[int]], completions: list[list[int]]) -> list[Tensor]:
    """Log-probabilities of given tokens as they are scored: one tensor (length,) per completion."""
    batch = SequenceBatch.for_model(model, prompts, completions)
    scored = Projection.of(model).token_logprobs(completion_hidden(model, batch), batch, temperature=1.0).logprobs
    return [row[: len(completion)] for row, completion in zip(scored, completions, strict=True)]
