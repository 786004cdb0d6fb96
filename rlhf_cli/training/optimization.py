"""One optimizer step as every stage takes it: clipped, at the scheduled rate, and skipped unless it is finite."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_cli.models.split_weights import vocabulary_weights
from rlhf_cli.progress import warn
from rlhf_cli.settings.shared import Optimizer, TrainingSettings
from rlhf_cli.training.adamw import AdamW, EightBitMoments
from rlhf_cli.training.distributed import clip_gradients
from rlhf_cli.training.schedules import rate_factor


def scheduled_rate(settings: TrainingSettings, step: int, steps: int) -> float:
    """Return the learning rate of the 0-based optimizer step `step` of `steps`."""
    warmup = round(settings.warmup_share * steps)
    return settings.peak_rate * rate_factor(step, steps, schedule=settings.schedule, warmup=warmup)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def adamw(
    kind: Optimizer,
    groups: Iterable[Any],
    *models: PreTrainedModel,
    rate: float,
    epsilon: float = 1e-8,
    weight_decay: float = 0.0,
) -> AdamW:
    """Make the optimizer of a stage: one pass over weights, gradients and moments where torch has it for the device.

    Args:
        kind: the setting `optimizer`.
        groups: weights, or parameter groups.
        models: whose weights they are; with 8 bits, moments of their embeddings stay in float32.
        rate: learning rate, until `set_rate`.
        epsilon: added to the root of the second moment.
        weight_decay: of groups that name none.
    """
    options = {"lr": rate, "eps": epsilon, "weight_decay": weight_decay, "fused": True}
    if kind == "adamw":
        return AdamW(groups, **options)
    precise = set[Tensor]().union(*map(vocabulary_weights, models))
    return AdamW(groups, moments=EightBitMoments(), precise=precise, **options)


def clip_and_step(
    optimizer: torch.optim.Optimizer,
    *models: Iterable[nn.Parameter],
    max_grad_norm: float,
    step: int,
    loss: float = 0.0,
) -> tuple[list[float], bool]:
    """Clip the gradient of each model, take the optimizer step and clear the gradients.

    The step is skipped, with a warning, where the loss or a gradient is not finite: one bad batch must not poison the
    weights.

    Args:
        optimizer: holds the weights; its learning rates are set.
        models: the trained weights of each model, whose gradients are already summed over the processes.
        max_grad_norm: the gradient of a model is scaled down to at most this norm, whatever that of another is.
        step: 1-based training step, for the warning.
        loss: of the step.

    Returns:
        The gradient norm of each model before clipping, and whether the step was taken.
    """
    clipped = [clip_gradients(weights, max_grad_norm) for weights in models]
    norms: list[float] = torch.stack([norm.to(clipped[-1].device) for norm in clipped]).tolist()  # one wait for a GPU
    is_finite = math.isfinite(sum(norms)) and math.isfinite(loss)
    if is_finite:
        optimizer.step()
    else:
        what = f"the gradient norm is {sum(norms)}" if math.isfinite(loss) else f"the loss is {loss}"
        warn(f"step {step:,}: an optimizer step is skipped, because {what}")
    optimizer.zero_grad(set_to_none=True)
    return norms, is_finite
