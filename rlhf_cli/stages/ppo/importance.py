"""The correction for an inference engine that draws from slightly other probabilities than the policy's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from rlhf_cli.objectives.masking import masked_mean
from rlhf_cli.objectives.policy import truncated_importance_weights
from rlhf_cli.progress import warn
from rlhf_cli.stages.ppo.forward_passes import RolloutTensors

LARGE_DRIFT = 0.05
"""Drift in nats per token that is worth a warning."""


def importance_correction(
    before: RolloutTensors, sampler_logprobs: Sequence[list[float]] | None, *, cap: float | None
) -> tuple[Tensor | float, dict[str, float]]:
    """Return the weights of truncated importance sampling (N, T), and the metrics of the difference of both engines.

    Both are trivial, 1 and none, where the generator draws from the policy itself.

    Args:
        before: log-probabilities of a step's tokens under the policy.
        sampler_logprobs: N lists of those under which they were drawn; see `Completions`.
        cap: C; None does not correct.
    """
    if sampler_logprobs is None:
        return 1.0, {}
    is_completion = before.is_completion
    drawn = torch.zeros_like(before.logprobs)
    drawn[is_completion] = torch.tensor(list(chain(*sampler_logprobs)), dtype=drawn.dtype, device=drawn.device)
    drift = (drawn - before.logprobs).masked_fill(~is_completion, 0.0)
    mean = float(masked_mean(drift, is_completion))
    metrics = {"generation/drift_kl": mean, "generation/drift_max": float(drift.abs().max())}
    if abs(mean) > LARGE_DRIFT:
        warn(
            f"the engine that samples and the policy differ by {mean:.2g} nats per token (`generation/drift_kl`; "
            "`ppo.overlap_rollouts` adds one update); `--set generation.engine=torch` samples from the policy itself"
        )
    if cap is None:
        return 1.0, metrics
    weights = truncated_importance_weights(before.logprobs, drawn, is_completion, cap=cap)
    metrics["generation/importance_weight"] = float(masked_mean(weights, is_completion))
    metrics["generation/truncated"] = float(masked_mean((drift < -math.log(cap)).float(), is_completion))
    return weights, metrics
