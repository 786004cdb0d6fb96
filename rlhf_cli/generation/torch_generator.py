"""Sampling answers: seeded per answer, free of a model's own generation settings, on any Hugging Face language model.

A loop of our own because `generate` reads top-k, top-p, penalties and minimum lengths from the model's generation
configuration, which moves the sampling distribution away from the one whose log-probabilities PPO takes (trap 5 of
docs/ppo.md), and because it draws one random stream for a whole batch: here row i depends on its prompt and its
seed alone, so a resumed or differently batched run samples the same answers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutput

from rlhf_cli.distributed.watchdog import beat
from rlhf_cli.errors import DivergedError, ModelError


@dataclass(frozen=True)
class Sample:
    """One sampled answer.

    Attributes:
        ids: token ids, the end token included where there is one.
        ended: the model ended the answer; otherwise it ran into the length limit.
    """

    ids: list[int]
    ended: bool


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that end an answer: the tokenizer's end token and those the model was released with."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    return {token for token in (tokenizer.eos_token_id, *listed) if isinstance(token, int)}


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """An answer as text, without special tokens.

    White space at its ends stays: a reward model trained on answers that begin with a space scores such answers.
    """
    text = tokenizer.decode(list(ids), skip_special_tokens=True)
    assert isinstance(text, str)
    return text


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    seeds: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float,
    eos_ids: set[int],
    top_p: float = 1.0,
    batch_size: int = 64,
    progress: Callable[[int], object] | None = None,
) -> list[Sample]:
    """Draw one answer to each prompt.

    Args:
        model: decoder-only or encoder-decoder.
        prompts: N lists of token ids; encoder-decoder models read them with the encoder.
        seeds: N seeds; answer i is a function of `prompts[i]` and `seeds[i]`.
        max_new_tokens: most tokens of an answer, its end token included.
        temperature: logits are divided by it.
        eos_ids: tokens that end an answer.
        top_p: keep the smallest set of tokens with at least this probability (Holtzman et al. 2019, section 3.1).
        batch_size: answers drawn at once; prompts of like length share a batch.
        progress: called with the number of answers that were finished.

    Returns:
        N samples, in the order of `prompts`.

    Raises:
        ModelError: a prompt is empty.
        DivergedError: the model's logits are not finite.
    """
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise ModelError(
                f"prompt {index} has no tokens, and this tokenizer puts none in front",
                hint='give the model something to start from: `--set data.prompt_template="Question: {prompt}"`',
            )
    # A model that recomputes activations drops its cache in training mode, silently.
    was_training = model.training
    model.eval()
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    samples: dict[int, Sample] = {}
    try:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            drawn = _sample_batch(
                _Decoding(model, [prompts[row] for row in rows]),
                _uniforms([seeds[row] for row in rows], max_new_tokens).to(model.device),
                temperature,
                top_p,
                eos_ids,
            )
            samples.update(zip(rows, drawn, strict=True))
            if progress is not None:
                progress(len(rows))
    finally:
        model.train(was_training)
    return [samples[index] for index in range(len(prompts))]


def _uniforms(seeds: Sequence[int], count: int) -> Tensor:
    """Random numbers in [0, 1), one row of `count` a seed: (B, count) float64 on the CPU, so equal on every device."""
    rows = [torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in seeds]
    return torch.stack(rows)


def _sample_batch(
    decoding: _Decoding, uniforms: Tensor, temperature: float, top_p: float, eos_ids: set[int]
) -> list[Sample]:
    count, limit = uniforms.shape
    answers: list[list[int]] = [[] for _ in range(count)]
    ended = [False] * count
    active = list(range(count))  # which answer each row of the running batch belongs to
    logits = decoding.prefill()
    for step in range(limit):
        tokens = draw(logits, uniforms[active, step], temperature=temperature, top_p=top_p)
        for row, token in zip(active, tokens.tolist(), strict=True):
            answers[row].append(token)
            ended[row] = token in eos_ids
        staying = [index for index, row in enumerate(active) if not ended[row]]
        if not staying or step + 1 == limit:
            break
        if len(staying) < len(active):
            # Finished rows leave at once: their share of every later step would be wasted.
            decoding.keep(staying)
            tokens = tokens[staying]
            active = [active[index] for index in staying]
        logits = decoding.step(tokens)
        beat()
    return [Sample(ids, end) for ids, end in zip(answers, ended, strict=True)]


def draw(logits: Tensor, uniforms: Tensor, *, temperature: float, top_p: float = 1.0) -> Tensor:
    """Sample a token a row by inverting the cumulative distribution: the first token whose cumulative mass exceeds u.

    Args:
        logits: (B, V).
        uniforms: (B,) in [0, 1), float64.
        temperature: divides the logits.
        top_p: nucleus.

    Returns:
        (B,) token ids.
    """
    probabilities = torch.softmax(logits.float() / temperature, dim=-1)
    # NaN compares as not finite in the sum of a row, and one reduction is cheaper than a scan of every entry.
    if not torch.isfinite(probabilities.sum()):
        raise DivergedError(
            "the model's logits are not finite, so nothing can be sampled",
            hint="an earlier stage diverged: lower its learning rate, or try `--set model.precision=float32`",
        )
    if top_p < 1.0:
        descending, indices = probabilities.sort(dim=-1, descending=True)
        # A token is outside once the mass before it already reaches top_p; the first is always inside.
        is_outside = descending.cumsum(dim=-1) - descending >= top_p
        probabilities = probabilities.scatter(-1, indices, descending.masked_fill(is_outside, 0.0))
    cumulative = probabilities.double().cumsum(dim=-1)
    threshold = uniforms.unsqueeze(-1) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1).clamp_(max=logits.shape[-1] - 1)


class _Decoding:
    """A batch being decoded: its key-value cache, masks and positions.

    Decoder-only prompts are padded on the left, so that the newest token of every row is last; positions count real
    tokens only (trap 6 of docs/ppo.md).
    """

    def __init__(self, model: PreTrainedModel, prompts: list[list[int]]) -> None:
        self._model = model
        self._accepts = inspect.signature(model.forward).parameters
        longest = max(len(prompt) for prompt in prompts)
        self._is_encoder_decoder = bool(model.config.is_encoder_decoder)
        ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            place = slice(0, len(prompt)) if self._is_encoder_decoder else slice(longest - len(prompt), longest)
            ids[row, place] = torch.tensor(prompt)
            mask[row, place] = 1
        self._ids, self._mask = ids.to(model.device), mask.to(model.device)
        self._encoded: Tensor | None = None
        self._cache = None

    def prefill(self) -> Tensor:
        """Read the prompts; logits of the first answer token: (B, V)."""
        if self._is_encoder_decoder:
            self._encoded = self._model.get_encoder()(self._ids, attention_mask=self._mask).last_hidden_state
            start = self._model.config.decoder_start_token_id
            return self._forward(torch.full((len(self._ids), 1), start, device=self._ids.device))
        return self._forward(self._ids)

    def step(self, tokens: Tensor) -> Tensor:
        """Append one token (B,) to every row; logits of the next: (B, V)."""
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
        self._cache.batch_select_indices(indices)  # pyright: ignore[reportOptionalMemberAccess]

    def _forward(self, ids: Tensor) -> Tensor:
        arguments: dict[str, object] = {"attention_mask": self._mask, "use_cache": True, "past_key_values": self._cache}
        if self._is_encoder_decoder:
            arguments |= {"decoder_input_ids": ids, "encoder_outputs": BaseModelOutput(self._encoded)}
        else:
            arguments["input_ids"] = ids
            if "position_ids" in self._accepts:
                positions = (self._mask.cumsum(dim=-1) - 1).clamp_(min=0)
                arguments["position_ids"] = positions[:, -ids.shape[1] :]
        if "logits_to_keep" in self._accepts:
            arguments["logits_to_keep"] = 1  # the prompt's own predictions are of no use: B x L x V is never built
        output = self._model(**arguments)
        self._cache = output.past_key_values
        return output.logits[:, -1]
