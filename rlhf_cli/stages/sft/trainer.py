"""Supervised fine-tuning of an adapter or of all weights on completions.

The loss of a step is a sum over tokens divided by the tokens of the whole step, so neither micro-batches nor processes
change the gradient.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_cli.data.examples import Example
from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.distributed.signals import StopRequest
from rlhf_cli.distributed.watchdog import beat
from rlhf_cli.errors import UsageError
from rlhf_cli.generation.decoding import check_decoding
from rlhf_cli.memory import free_memory
from rlhf_cli.models.backbone import reads_groups
from rlhf_cli.models.libraries import quiet_libraries
from rlhf_cli.models.loading import recompute_activations, store_activations
from rlhf_cli.models.lora import add_lora
from rlhf_cli.models.router_loss import RouterLoss
from rlhf_cli.models.saving import require_finite
from rlhf_cli.models.seeding import seeded
from rlhf_cli.models.split_weights import join_weights, split_weights, stored
from rlhf_cli.precision import autocast
from rlhf_cli.progress import say, task
from rlhf_cli.stages.sft.data import Batch, BatchPlan, Row, pack, pack_groups
from rlhf_cli.stages.sft.loss import TokenCounts, check_packing, collator_for, mean_completion_nll, on_device, sft_loss
from rlhf_cli.stages.sft.settings import SFTSettings
from rlhf_cli.training.distributed import all_reduce_gradients
from rlhf_cli.training.flops import device_peak, model_size
from rlhf_cli.training.loop import TrainingLoop
from rlhf_cli.training.micro_batches import MicroBatches
from rlhf_cli.training.monitoring.metrics_log import MetricsLog, read_rows
from rlhf_cli.training.monitoring.run_logger import METRICS
from rlhf_cli.training.monitoring.timing_log import Work, append_evaluation
from rlhf_cli.training.optimization import adamw, clip_and_step, scheduled_rate, set_rate
from rlhf_cli.training.task import StepReport, TrainingTask
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
) -> SFTResult:
    """Train a model in place. On return it carries its adapter, if one is trained.

    Args:
        model: as loaded: in any dtype or quantized for an adapter, in float32 to train all weights.
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

    Raises:
        Interrupted: a signal arrived; finished steps are saved.
        DivergedError: training diverged again after a roll-back, or a final weight is not finite.
        ModelError, UsageError: the architecture cannot be trained with these settings.
    """
    _check(model, settings, name)
    processes = processes or ProcessGroup(model.device)
    evaluate = _Evaluation(model, held_out, settings.micro_batch_size, precision, stop, processes)
    watch = StepWatch(model.device, SFTTrainer.phases)
    with watch.phase("eval", "evaluating"):
        before = evaluate("held-out loss before")
    if settings.adapter == "lora":
        with seeded(seed, model.device):
            add_lora(model, settings.lora)
    else:
        model.requires_grad_(True)
        if precision != torch.float32:
            split_weights(model)
    trainer = SFTTrainer(
        model,
        examples,
        settings,
        seed=seed,
        work=work,
        stop=stop,
        precision=precision,
        processes=processes,
        log=log,
        watch=watch,
    )
    skipped_steps, steps, rows = trainer.train(), trainer.plan.steps, len(trainer.rows)
    del trainer  # moments take twice the memory of the weights
    free_memory()
    join_weights(model)
    require_finite(model, what="the trained model")
    with watch.phase("eval", "evaluating"):
        after = evaluate("held-out loss after")
    if processes.is_main:
        append_evaluation(work, steps, watch.end_step())
    losses = [row["loss"] for row in read_rows(work / METRICS) if row["loss"] is not None] if processes.is_main else []
    return SFTResult(
        steps=steps,
        rows=rows,
        train_loss=sum(losses) / max(len(losses), 1),
        eval_loss_before=before,
        eval_loss=after,
        skipped_steps=skipped_steps,
    )


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


class SFTTrainer(TrainingTask):
    """Trains the weights of a model that require gradients.

    Args:
        model: a language model with its adapter, if any.
        examples, settings, seed, work, stop, precision, processes, log: see `train_sft`.
        watch: times the steps.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        examples: Sequence[Example],
        settings: SFTSettings,
        *,
        seed: int,
        work: Path,
        stop: StopRequest,
        precision: torch.dtype,
        processes: ProcessGroup,
        log: Callable[..., MetricsLog] = MetricsLog,
        watch: StepWatch | None = None,
    ) -> None:
        self.rows = _rows(model, examples, settings)
        self.plan = BatchPlan(len(self.rows), settings.epochs, settings.batch_size, seed)
        self._model, self._settings, self._precision, self._processes = model, settings, precision, processes
        self._cuts = MicroBatches(
            settings.micro_batch_size, settings.micro_batch_tokens, setting="sft.micro_batch_tokens"
        )
        self._collate = collator_for(model, packed=settings.packing)
        self._trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self._rate_scale = 1.0
        self._router = router_loss(model, settings)
        self._size = model_size(model, list(self._trained.values()))
        groups = _parameter_groups(self._trained, settings.weight_decay)
        self.optimizer = adamw(settings.optimizer, groups, model, rate=settings.peak_rate)
        self._loop = TrainingLoop(
            self,
            label="fine-tuning",
            steps=self.plan.steps,
            checkpoint_steps=settings.checkpoint_steps,
            seed=seed,
            work=work,
            stop=stop,
            processes=processes,
            hint="lower `sft.learning_rate`, or compute in float32 (`--set model.precision=float32`)",
            log=log,
            watch=watch,
            peak=device_peak(model.device, precision, processes),
        )

    def train(self) -> int:
        """Run all steps, see `TrainingLoop.run`; returns the number of steps that were skipped."""
        quiet_libraries()
        self._model.train()
        if self._settings.gradient_checkpointing:
            recompute_activations(self._model)
        try:
            state = self._loop.run()
        finally:
            if self._settings.gradient_checkpointing:
                store_activations(self._model)
        self._model.eval()
        return state.skipped_steps

    def step(self, step: int, watch: StepWatch | None = None) -> StepReport:
        """Take the 0-based optimizer step."""
        watch = watch or StepWatch()
        rows = self.plan.rows_of(step)
        lengths = [len(example) for number in rows for example in self.rows[number]]
        with watch.phase("update", "training", total=sum(lengths) / self._processes.count):
            loss = self._accumulate(rows, watch)
            rate = scheduled_rate(self._settings, step, self.plan.steps) * self._rate_scale
            set_rate(self.optimizer, rate)
            (norm,), is_taken = clip_and_step(
                self.optimizer,
                self._trained.values(),
                max_grad_norm=self._settings.max_grad_norm,
                step=step + 1,
                loss=loss,
            )
        work = {"update": Work(sum(lengths), None if self._size is None else self._size.training(lengths))}
        metrics = {"loss": loss, "grad_norm": norm, "learning_rate": rate, "epoch": self.plan.epoch_after(step + 1)}
        return StepReport(metrics, f"loss {loss:.3f}", skipped=int(not is_taken), work=work)

    def _accumulate(self, rows: Sequence[int], watch: StepWatch) -> float:
        """Accumulate the gradient of the step's loss over micro-batches and processes; returns the loss."""
        ordered = sorted(rows, key=lambda number: self._tokens([number]))  # little padding
        share = -(-len(ordered) // self._processes.count)  # so that every process gets work
        parts = self._processes.shard(self._cuts.cut(ordered, self._tokens, most=share))
        batches = {tuple(part): self._batch(part) for part in parts}
        counts = TokenCounts.of(list(batches.values()), self._processes)
        total = self._cuts.run(lambda: self._own_gradient(batches, counts, watch), self.optimizer.zero_grad)
        all_reduce_gradients(self._trained.values(), self._processes)
        self._processes.all_reduce([total])
        return float(total)

    def _batch(self, part: Sequence[int]) -> Batch:
        return self._collate([self.rows[number] for number in part])

    def _tokens(self, part: Sequence[int]) -> int:
        """Count the tokens of a pass over some rows, padding included."""
        return len(part) * max(sum(len(example) for example in self.rows[number]) for number in part)

    def _own_gradient(self, batches: Mapping[tuple[int, ...], Batch], counts: TokenCounts, watch: StepWatch) -> Tensor:
        """Accumulate the gradient of this process's micro-batches; returns their part of the loss."""
        device = self._model.device
        total = torch.zeros((), device=device)
        for part in self._cuts.own(batches, self._tokens):
            batch = batches[tuple(part)] if tuple(part) in batches else self._batch(part)
            with autocast(device, self._precision):
                loss = sft_loss(
                    self._model,
                    on_device(batch, device),
                    counts,
                    lm_coef=self._settings.lm_coef,
                    router=self._router,
                )
            loss.backward()
            total += loss.detach()
            beat()
            watch.count(sum(len(example) for number in part for example in self.rows[number]))
        return total

    def scale_learning_rates(self, factor: float) -> None:
        """See `TrainingTask`."""
        self._rate_scale = factor

    def weights(self) -> dict[str, Tensor]:
        """See `TrainingTask`."""
        return stored(self._trained.items())


def router_loss(model: PreTrainedModel, settings: SFTSettings) -> RouterLoss | None:
    """Return the load-balancing loss to train with, and say so; None without."""
    router = RouterLoss.of(model, settings.router_aux_coef)
    if router is not None:
        say(
            f"the loss includes the router's load-balancing loss with weight {router.coef:g} "
            "(`sft.router_aux_coef`; 0 leaves it out)"
        )
    return router


def _rows(model: PreTrainedModel, examples: Sequence[Example], settings: SFTSettings) -> list[Row]:
    if not settings.packing:
        return [[example] for example in examples]
    if reads_groups(model):
        rows = pack_groups(examples, settings.max_length)
    else:
        rows = pack([len(example) for example in examples], settings.max_length)
    say(f"packed {len(examples):,} records into {len(rows):,} rows of up to {settings.max_length:,} tokens")
    return [[examples[number] for number in row] for row in rows]


_UNDECAYED = re.compile("bias|norm")


def _parameter_groups(trained: dict[str, nn.Parameter], weight_decay: float) -> list[dict[str, object]]:
    """Split weights into matrices, which decay, and biases and norms, which do not, as transformers' Trainer does."""
    decays = {name: weight.ndim > 1 and not _UNDECAYED.search(name.lower()) for name, weight in trained.items()}
    return [
        {"params": [trained[name] for name in trained if decays[name] is chosen], "weight_decay": decay}
        for chosen, decay in ((True, weight_decay), (False, 0.0))
    ]


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
        with task(label, own, "records") as bar:

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
