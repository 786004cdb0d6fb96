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

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_cli.distributed.watchdog import beat
from rlhf_cli.errors import DivergedError, ModelError
from rlhf_cli.generation.decoding import Decoding, batches
from rlhf_cli.generation.generator import Completion, Progress, Request, ignore
from rlhf_cli.generation.policy import Policy
from rlhf_cli.generation.sampling import Sampling
from rlhf_cli.models.expert_merging import merged_experts


class TorchGenerator:
    """Prefill, then one token per step and row, with a key-value cache; implements `Generator`.

    Requests with prompts of similar length share a batch of `sampling.batch_size`; of equal length if the model has
    layers that carry a state from token to token, which would read padding as text.
    """

    @torch.no_grad()
    def generate(
        self,
        policy: Policy,
        requests: Sequence[Request],
        *,
        progress: Progress = ignore,
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
        stop_ids = policy.stop_ids
        with policy.model() as model, policy.autocast(), merged_experts(model):
            # In training mode a model that recomputes activations drops its cache, without a word.
            was_training = model.training
            model.eval()
            try:
                lengths = [len(requests[row].prompt_ids) for row in order]
                for span in batches(model, lengths, policy.sampling.batch_size):
                    rows = order[span]
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

    progress: Progress
    stop: Callable[[], object]


def _generate_batch(
    model: PreTrainedModel, policy: Policy, requests: Sequence[Request], stop_ids: set[int], told: _Told
) -> list[Completion]:
    uniforms = _uniforms([request.seed for request in requests], policy.sampling.max_new_tokens)
    decoding = Decoding(model, [request.prompt_ids for request in requests])
    rows = _decode(decoding, uniforms.to(model.device), policy.sampling, stop_ids, told)
    return [Completion(ids, policy.decode(ids), ids[-1] in stop_ids) for ids in rows]


def _uniforms(seeds: Sequence[int], count: int) -> Tensor:
    """Return random numbers in [0, 1), `count` per seed: (B, count) float64, drawn on the CPU: equal on all devices."""
    rows = [torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in seeds]
    return torch.stack(rows)


def _decode(
    decoding: Decoding, uniforms: Tensor, sampling: Sampling, stop_ids: set[int], told: _Told
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
            told.progress(len(active), len(drawn))
            break
        told.progress(len(active) - len(staying), len(drawn))
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
