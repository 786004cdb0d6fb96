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

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from rlhf_cli.distributed.watchdog import beat
from rlhf_cli.errors import DivergedError, ModelError
from rlhf_cli.generation.decoding import Choice, decode, decoding_of, decoding_steps, evaluating
from rlhf_cli.generation.drawing import draw
from rlhf_cli.generation.generator import Completion, Progress, Request, ignore
from rlhf_cli.generation.policy import Policy
from rlhf_cli.models.adapter_merging import merged_adapters


class TorchGenerator:
    """Reads each distinct prompt once, then draws one token per step and row; implements `Generator`.

    At most `sampling.batch_size` completions are drawn at a time. The next ones enter as others end, if the model
    allows that; see `decoding`.
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
        if not requests and not policy.is_sharded:
            return []  # a process that is idle while others draw needs no weights
        _check_prompts(requests)
        order = _order(requests)
        with policy.model() as model, policy.autocast(), merged_adapters(model), evaluating(model):
            drawing = _Drawing(policy, [requests[row].seed for row in order], model.device, progress, stop)
            prompts = [requests[row].prompt_ids for row in order]
            decode(decoding_of(model, prompts, policy.sampling.batch_size), drawing.choose, model.device)
        drawn = dict(zip(order, drawing.completions, strict=True))
        return [_completion(policy, drawn[row]) for row in range(len(requests))]


def stream(policy: Policy, request: Request) -> Generator[Completion]:
    """Yield a completion after each of its tokens; the last one is what `TorchGenerator` draws for the request.

    Between two tokens the caller may draw from other policies. Until the iterator ends or is closed, the weights of
    this one hold its merged adapters, so nothing else may use them.

    Raises:
        ModelError: the prompt is empty.
        DivergedError: the model's logits are not finite.
    """
    _check_prompts([request])
    with ExitStack() as kept:
        model = kept.enter_context(policy.model())
        kept.enter_context(evaluating(model))
        with torch.no_grad(), policy.autocast():  # entered anew for each token: other models compute in between
            kept.enter_context(merged_adapters(model))
            drawing = _Drawing(policy, [request.seed], model.device)
            decoding = decoding_of(model, [request.prompt_ids], 1)
        steps = decoding_steps(decoding, drawing.choose, model.device)
        while True:
            with torch.no_grad(), policy.autocast():
                if next(steps, steps) is steps:
                    return
            yield _completion(policy, list(drawing.completions[0]))


def _completion(policy: Policy, ids: list[int]) -> Completion:
    return Completion(ids, policy.decode(ids), ids[-1] in policy.stop_ids)


class _Drawing:
    """Draws tokens until every completion has a stop token or the limit is reached.

    Args:
        policy: with its sampling settings and stop tokens.
        seeds: of N completions.
        device: of the model.
        progress: see `Generator.generate`.
        stop: likewise.

    Attributes:
        completions: N lists of token ids.
    """

    def __init__(
        self,
        policy: Policy,
        seeds: Sequence[int],
        device: torch.device,
        progress: Progress = ignore,
        stop: Callable[[], object] = lambda: None,
    ) -> None:
        self._sampling, self._stop_ids = policy.sampling, policy.stop_ids
        self._progress, self._stop = progress, stop
        self._uniforms = _uniforms(seeds, policy.sampling.max_new_tokens).to(device)
        self.completions: list[list[int]] = [[] for _ in seeds]

    def choose(self, logits: Tensor, rows: list[int], numbers: Tensor, ages: Tensor) -> Choice:
        """Draw the next token of every row; see `decode`.

        Raises:
            DivergedError: the logits are not finite.
        """
        beat()
        sampling = self._sampling
        uniforms = self._uniforms[numbers, ages]
        tokens = draw(logits, uniforms, temperature=sampling.temperature, top_p=sampling.top_p)
        drawn = tokens.tolist()  # the only wait for the device
        if max(drawn) >= logits.shape[-1]:
            raise DivergedError(
                "the model's logits are not finite, so nothing can be sampled",
                hint="an earlier stage diverged: lower its learning rate, or try `--set model.precision=float32`",
            )
        staying, lengths = [], []
        for index, (row, token) in enumerate(zip(rows, drawn, strict=True)):
            written = self.completions[row]
            written.append(token)
            if token not in self._stop_ids and len(written) < sampling.max_new_tokens:
                staying.append(index)
            else:
                lengths.append(len(written))
        self._progress(len(lengths), len(rows), lengths)
        self._stop()
        return tokens, staying


def _check_prompts(requests: Sequence[Request]) -> None:
    for index, request in enumerate(requests):
        if not request.prompt_ids:
            raise ModelError(
                f"prompt {index} has no tokens, and this tokenizer adds none",
                hint='give the model something to start from: `--set data.prompt_template="Question: {prompt}"`',
            )


def _order(requests: Sequence[Request]) -> list[int]:
    """The longest prompts first, so that what does not fit into memory shows at once; equal ones side by side."""
    return sorted(range(len(requests)), key=lambda row: (-len(requests[row].prompt_ids), requests[row].prompt_ids))


def _uniforms(seeds: Sequence[int], count: int) -> Tensor:
    """Return random numbers in [0, 1), `count` per seed: (N, count) float64, drawn on the CPU: equal on all devices."""
    rows = [torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in seeds]
    return torch.stack(rows) if rows else torch.zeros(0, count, dtype=torch.float64)
