"""`TorchGenerator`: draws completions with the policy's own forward pass, on any Hugging Face language model.

Tokens are drawn from the float32 logits of `Projection`, whose log-probabilities PPO takes. A model's own logits are
rounded to bfloat16 under autocast. What remains between sampling and scoring is rounding of the hidden states, which a
key-value cache and another batch compute in another order.

We do not call `generate`: it reads top-k, top-p, penalties and minimum lengths from the model's generation config,
which moves the sampling distribution away from the one whose log-probabilities PPO takes (trap 5 of docs/ppo.md), and
it draws one random stream for a whole batch. Here each completion has its own seed, so a run that is resumed or batched
differently draws the same completions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_cli.distributed.watchdog import beat
from rlhf_cli.errors import DivergedError, ModelError
from rlhf_cli.generation.chunked_logprobs import matmul_dtype
from rlhf_cli.generation.generator import Completion, Request
from rlhf_cli.generation.logprobs import Projection
from rlhf_cli.generation.policy import Policy
from rlhf_cli.generation.sampling import Sampling
from rlhf_cli.models.padding import pad


class TorchGenerator:
    """Prefill, then one token per step and row, with a key-value cache; implements `Generator`.

    Requests with prompts of similar length share a batch of `sampling.batch_size`.
    """

    @torch.no_grad()
    def generate(
        self,
        policy: Policy,
        requests: Sequence[Request],
        *,
        progress: Callable[[int], object] = lambda count: None,
        stop: Callable[[], object] = lambda: None,
    ) -> list[Completion]:
        """Draw one completion per request; see `Generator.generate`.

        Raises:
            ModelError: a prompt is empty.
            DivergedError: the model's logits are not finite.
        """
        for index, request in enumerate(requests):
            if not request.prompt_ids:
                raise ModelError(
                    f"prompt {index} has no tokens, and this tokenizer puts none in front",
                    hint='give the model something to start from: `--set data.prompt_template="Question: {prompt}"`',
                )
        order = sorted(range(len(requests)), key=lambda index: len(requests[index].prompt_ids))
        drawn: dict[int, Completion] = {}
        size, stop_ids = policy.sampling.batch_size, policy.stop_ids
        with policy.model() as model, policy.autocast():
            # In training mode a model that recomputes activations drops its cache, without a word.
            was_training = model.training
            model.eval()
            try:
                for start in range(0, len(order), size):
                    rows = order[start : start + size]
                    told = _Told(progress, stop)
                    batch = _generate_batch(model, policy, [requests[row] for row in rows], stop_ids, told)
                    drawn.update(zip(rows, batch, strict=True))
                    stop()
            finally:
                model.train(was_training)
        return [drawn[index] for index in range(len(requests))]


@dataclass(frozen=True)
class _Told:
    """Who is told of every token; see `Generator.generate`."""

    progress: Callable[[int], object]
    stop: Callable[[], object]


def _generate_batch(
    model: PreTrainedModel, policy: Policy, requests: Sequence[Request], stop_ids: set[int], told: _Told
) -> list[Completion]:
    uniforms = _uniforms([request.seed for request in requests], policy.sampling.max_new_tokens)
    decoding = _Decoding(model, [request.prompt_ids for request in requests])
    rows = _decode(decoding, uniforms.to(model.device), policy.sampling, stop_ids, told)
    return [Completion(ids, policy.decode(ids), ids[-1] in stop_ids) for ids in rows]


def _uniforms(seeds: Sequence[int], count: int) -> Tensor:
    """Return random numbers in [0, 1), `count` per seed: (B, count) float64, drawn on the CPU: equal on all devices."""
    rows = [torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in seeds]
    return torch.stack(rows)


def _decode(
    decoding: _Decoding, uniforms: Tensor, sampling: Sampling, stop_ids: set[int], told: _Told
) -> list[list[int]]:
    """Draw tokens until every row has a stop token or the limit is reached.

    Args:
        decoding: B prompts.
        uniforms: (B, max_new_tokens) random numbers, one per token.
        sampling: temperature and nucleus.
        stop_ids: tokens that end a row; kept at its end.
        told: of rows that ended; may raise to stop.
    """
    count, limit = uniforms.shape
    completions: list[list[int]] = [[] for _ in range(count)]
    active = list(range(count))  # row of `completions` that each row of the running batch belongs to
    logits = decoding.prefill()
    for step in range(limit):
        tokens = draw(logits, uniforms[active, step], temperature=sampling.temperature, top_p=sampling.top_p)
        drawn = tokens.tolist()
        for row, token in zip(active, drawn, strict=True):
            completions[row].append(token)
        staying = [index for index, token in enumerate(drawn) if token not in stop_ids]
        if not staying or step + 1 == limit:
            told.progress(len(active))
            break
        told.progress(len(active) - len(staying))
        told.stop()
        if len(staying) < len(active):
            # Finished rows leave at once: their share of every later step would be wasted.
            decoding.keep(staying)
            tokens = tokens[staying]
            active = [active[index] for index in staying]
        logits = decoding.step(tokens)
        beat()
    return completions


def draw(logits: Tensor, uniforms: Tensor, *, temperature: float, top_p: float = 1.0) -> Tensor:
    """Draw one token per row by inverting the cumulative distribution: the first whose cumulative mass exceeds u.

    Args:
        logits: (B, V) float32.
        uniforms: (B,) in [0, 1), float64.
        temperature: logits are divided by it.
        top_p: keep the smallest set of tokens with at least this probability (Holtzman et al. 2019, section 3.1).

    Returns:
        (B,) token ids.

    Raises:
        DivergedError: the logits are not finite.
    """
    probabilities = torch.softmax(logits / temperature, dim=-1)
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
        self._model, self._decoder = model, model.get_decoder()
        self._head: Projection | None = None
        self._accepts = inspect.signature(self._decoder.forward).parameters
        self._is_encoder_decoder = bool(model.config.is_encoder_decoder)
        ids, is_real = pad(prompts, side="right" if self._is_encoder_decoder else "left")
        self._ids, self._mask = ids.to(model.device), is_real.long().to(model.device)
        self._encoded: Tensor | None = None
        self._cache = None

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
        self._cache.batch_select_indices(indices)  # pyright: ignore[reportOptionalMemberAccess]

    def _forward(self, ids: Tensor) -> Tensor:
        arguments: dict[str, object] = {"use_cache": True, "past_key_values": self._cache}
        if self._is_encoder_decoder:
            arguments |= {"encoder_hidden_states": self._encoded, "encoder_attention_mask": self._mask}
        else:
            arguments["attention_mask"] = self._mask
            if "position_ids" in self._accepts:
                positions = (self._mask.cumsum(dim=-1) - 1).clamp_(min=0)
                arguments["position_ids"] = positions[:, -ids.shape[1] :]
        output = self._decoder(input_ids=ids, **arguments)
        self._cache = output.past_key_values
        hidden = output.last_hidden_state[:, -1]  # the last position is enough: B x L x V is never built
        if self._head is None:
            self._head = Projection.of(self._model).as_operand(matmul_dtype(hidden))
        return self._head.logits(hidden)
