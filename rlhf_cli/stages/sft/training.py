"""Supervised fine-tuning from a model to the trained model: its checks, and the held-out loss before and after."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from rlhf_cli.data.examples import Example
from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.distributed.signals import StopRequest
from rlhf_cli.errors import UsageError
from rlhf_cli.generation.decoding import check_decoding
from rlhf_cli.memory import free_memory
from rlhf_cli.models.lora import add_lora
from rlhf_cli.models.router_loss import RouterLoss
from rlhf_cli.models.saving import require_finite
from rlhf_cli.models.seeding import seeded
from rlhf_cli.models.sharding import computing, is_sharded
from rlhf_cli.models.split_weights import join_weights, split_weights
from rlhf_cli.progress import task
from rlhf_cli.stages.sft.loss import check_packing, mean_completion_nll
from rlhf_cli.stages.sft.settings import SFTSettings
from rlhf_cli.stages.sft.trainer import SFTTrainer
from rlhf_cli.training.monitoring.metrics_log import MetricsLog, read_rows
from rlhf_cli.training.monitoring.run_logger import METRICS
from rlhf_cli.training.monitoring.timing_log import append_evaluation
from rlhf_cli.training.timing import StepWatch


@dataclass(frozen=True)
class SFTResult:
    """What training came to.

    Attributes:
        steps: optimizer steps.
        rows: rows per epoch: records, or packed rows.
        train_loss: mean of the steps' losses, in nats per token; known to rank 0 alone.
        eval_loss_before: mean negative log-likelihood of held-out completions under the base model, in nats per token;
            None without held-out examples.
        eval_loss: the same under the trained model.
        skipped_steps: steps whose gradient was not finite.
    """

    steps: int
    rows: int
    train_loss: float
    eval_loss_before: float | None
    eval_loss: float | None
    skipped_steps: int


def train_sft(
    model: PreTrainedModel,
    examples: Sequence[Example],
    held_out: Sequence[Example],
    settings: SFTSettings,
    *,
    seed: int,
    work: Path,
    stop: StopRequest,
    precision: torch.dtype = torch.float32,
    name: str = "the model",
    processes: ProcessGroup | None = None,
    log: Callable[..., MetricsLog] = MetricsLog,
    checkpoint_async: bool = False,
) -> SFTResult:
    """Train a model in place. On return it carries its adapter, if one is trained.

    Args:
        model: as loaded: in any dtype or quantized for an adapter, in float32 to train all weights. A sharded model
            has been through `make_trainable`.
        examples: to train on.
        held_out: to measure the loss on, before and after.
        settings: section `sft` of the recipe.
        seed: of the adapter's weights, the order and dropout.
        work: folder of checkpoints and metrics, from which a killed run resumes.
        stop: asked after every step.
        precision: of matrix products.
        name: of the model, for messages.
        processes: the processes of the run, all of which call this and end with the same weights; None finds them in
            the environment.
        log: makes the metrics log, from the arguments of `MetricsLog`.
        checkpoint_async: see `TrainingLoop`.

    Raises:
        Interrupted: a signal arrived; finished steps are saved.
        DivergedError: training diverged again after a roll-back, or a final weight is not finite.
        ModelError, UsageError: the architecture cannot be trained with these settings.
    """
    with torch.no_grad():
        computing(model, lambda: _check(model, settings, name))
    processes = processes or ProcessGroup(model.device)
    evaluate = _Evaluation(model, held_out, settings.micro_batch_size, precision, stop, processes)
    watch = StepWatch(model.device, SFTTrainer.phases)
    with watch.phase("eval", "evaluating"):
        before = evaluate("held-out loss before")
    if not is_sharded(model):
        make_trainable(model, settings, seed)
        if settings.adapter == "none" and precision != torch.float32:
            split_weights(model)
    trainer = SFTTrainer(
        model, examples, settings, seed=seed, work=work, stop=stop, precision=precision, processes=processes,
        log=log, watch=watch, checkpoint_async=checkpoint_async,
    )  # fmt: skip
    skipped_steps, steps, rows = trainer.train(), trainer.plan.steps, len(trainer.rows)
    del trainer  # moments take twice the memory of the weights
    free_memory()
    join_weights(model)
    require_finite(model, what="the trained model")
    with watch.phase("eval", "evaluating"):
        after = evaluate("held-out loss after")
    if processes.is_main:
        append_evaluation(work, steps, watch.end_step())
    loss = _mean_loss(work) if processes.is_main else 0.0
    return SFTResult(
        steps=steps, rows=rows, train_loss=loss, eval_loss_before=before, eval_loss=after, skipped_steps=skipped_steps
    )


def _mean_loss(work: Path) -> float:
    """Return the mean of the steps' losses, in nats per token; 0 without any."""
    losses = [row["loss"] for row in read_rows(work / METRICS) if row["loss"] is not None]
    return sum(losses) / max(len(losses), 1)


def make_trainable(model: PreTrainedModel, settings: SFTSettings, seed: int) -> None:
    """Add the adapter, whose weights are drawn from `seed`, or let all weights be trained."""
    if settings.adapter == "lora":
        with seeded(seed, model.device):
            add_lora(model, settings.lora)
    else:
        model.requires_grad_(True)


def _check(model: PreTrainedModel, settings: SFTSettings, name: str) -> None:
    if model.config.is_encoder_decoder and settings.lm_coef > 0:
        raise UsageError(
            f"`sft.lm_coef: {settings.lm_coef:g}` needs a decoder-only model: the decoder of `{name}` writes no prompt",
            hint="drop `lm_coef`, or choose a decoder-only model",
        )
    check_decoding(model, name)
    if settings.router_aux_coef and RouterLoss.of(model, settings.router_aux_coef) is None:
        raise UsageError(
            f"`sft.router_aux_coef: {settings.router_aux_coef:g}`: the {model.config.model_type} model `{name}` has no "
            "load-balancing loss",
            hint="drop `router_aux_coef`; it is for mixture-of-experts models whose family has such a loss",
        )
    if settings.packing:
        check_packing(model, name)


@dataclass(frozen=True)
class _Evaluation:
    """Measures the loss on held-out examples; None without any."""

    model: PreTrainedModel
    held_out: Sequence[Example]
    batch_size: int
    precision: torch.dtype
    stop: StopRequest
    processes: ProcessGroup

    def __call__(self, label: str) -> float | None:
        if not self.held_out:
            return None
        size, own = self.batch_size, len(self.processes.shard(self.held_out))
        with task(label, len(self.held_out), "records", share=own) as bar:

            def progress(done: int) -> None:
                self.stop.check()
                bar.advance(min(size, done) if done else 0)

            nll = mean_completion_nll(
                self.model,
                self.held_out,
                batch_size=size,
                precision=self.precision,
                before_batch=progress,
                processes=self.processes,
            )
            bar.advance(own % size or min(size, own))
        return nll
