"""Whether vLLM computes the probabilities of a policy, of which a few tokens tell."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_cli.errors import DivergedError, ModelError
from rlhf_cli.generation.generator import Request
from rlhf_cli.generation.logprobs import Projection, completion_hidden
from rlhf_cli.generation.policy import Policy
from rlhf_cli.generation.sampling import Sampling
from rlhf_cli.generation.sequence_batch import SequenceBatch
from rlhf_cli.models.sharding import class_of, computing

TORCH = "use `--set generation.engine=torch` (an unfinished stage then starts again: `--force`)"
"""How to do without vLLM, for hints."""

# Mean difference in nats up to which log-probabilities of both engines are equal but for rounding. Wrong or missing
# weights are off by whole nats.
_ROUNDING = {torch.float32: 0.05, torch.bfloat16: 0.25}
PROBE = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=16)
"""How the requests of a check are drawn."""


def probe_requests(policy: Policy) -> list[Request]:
    """Return the requests of a check; they are drawn with `PROBE`, and nothing ends them early."""
    size = policy.config.get_text_config(decoder=True).vocab_size
    return [Request([3 + 7 * step % (size - 3) for step in range(4 + seed)], seed) for seed in range(2)]


@torch.no_grad()
def check_probabilities(
    policy: Policy, model: PreTrainedModel, requests: Sequence[Request], drawn: Sequence[tuple[list[int], list[float]]]
) -> None:
    """Compare the log-probabilities of a few tokens that an engine drew with those that scoring finds.

    Args:
        policy: whose probabilities they must be.
        model: of the policy, with its weights active.
        requests: `probe_requests`.
        drawn: tokens of each, and their log-probabilities in nats.

    Raises:
        ModelError: they differ by more than rounding.
    """
    prompts, completions = [request.prompt_ids for request in requests], [ids for ids, _ in drawn]
    was_training = model.training
    model.eval()
    batch = SequenceBatch.for_model(model, prompts, completions)

    def compute() -> Tensor:
        with policy.autocast():
            hidden = completion_hidden(model, batch)
            return Projection.of(model).token_logprobs(hidden, batch, temperature=1.0).logprobs

    ours = computing(model, compute)
    model.train(was_training)
    theirs = torch.tensor([value for _, logprobs in drawn for value in logprobs])
    difference = float((ours[batch.is_completion].cpu() - theirs).abs().mean())
    if not difference <= _ROUNDING[policy.source.precision]:
        raise ModelError(
            f"vllm and the policy `{policy.source.path}` itself disagree: log-probabilities differ by "
            f"{difference:.2g} nats on average",
            hint=f"{TORCH}, and please report the architecture, {class_of(model).__name__}",
        )


def sampled_logprobs(output: Any) -> list[float]:
    """Return the log-probability of each token of a `CompletionOutput` of vLLM."""
    return finite([float(row[token].logprob) for token, row in zip(output.token_ids, output.logprobs, strict=True)])


def finite(found: list[float]) -> list[float]:
    """Return log-probabilities of an engine as they are; raises `DivergedError` if one is not finite."""
    if not all(map(math.isfinite, found)):
        raise DivergedError(
            "the policy's log-probabilities are not finite in vllm",
            hint="an earlier stage diverged: lower its learning rate, or try `--set model.precision=float32`",
        )
    return found
