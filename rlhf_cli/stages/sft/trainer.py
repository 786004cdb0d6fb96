"""Supervised fine-tuning of an adapter or of all weights on completions.

The loss of a step is a sum over tokens divided by the tokens of the whole step, so neither micro-batches nor processes
change the gradient.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_cli.data.examples import Example
from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.distributed.signals import StopRequest
from rlhf_cli.distributed.watchdog import beat
from rlhf_cli.models.backbone import reads_groups
from rlhf_cli.models.libraries import quiet_libraries
from rlhf_cli.models.loading import recompute_activations, store_activations
from rlhf_cli.models.router_loss import RouterLoss
from rlhf_cli.models.sharding import equal_passes, is_sharded
from rlhf_cli.models.split_weights import stored
from rlhf_cli.precision import autocast
from rlhf_cli.progress import say
from rlhf_cli.stages.sft.data import Batch, BatchPlan, Row, pack, pack_groups
from rlhf_cli.stages.sft.loss import TokenCounts, collator_for, on_device, sft_loss
from rlhf_cli.stages.sft.settings import SFTSettings
from rlhf_cli.training.distributed import all_reduce_gradients
from rlhf_cli.training.flops import device_peak, model_size
from rlhf_cli.training.loop import TrainingLoop
from rlhf_cli.training.micro_batches import MicroBatches
from rlhf_cli.training.monitoring.metrics_log import MetricsLog
from rlhf_cli.training.monitoring.timing_log import Work
from rlhf_cli.training.optimization import adamw, clip_and_step, scheduled_rate, set_rate
from rlhf_cli.training.task import StepReport, TrainingTask
from rlhf_cli.training.timing import StepWatch


class SFTTrainer(TrainingTask):
    """Trains the weights of a model that require gradients.

    Args:
        model: a language model with its adapter, if any.
        examples, settings, seed, work, stop, precision, processes, log: see `training.train_sft`.
        watch: times the steps.
        checkpoint_async: see `TrainingLoop`.
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
        checkpoint_async: bool = False,
    ) -> None:
        self.rows = _rows(model, examples, settings)
        self.plan = BatchPlan(len(self.rows), settings.epochs, settings.batch_size, seed)
        self._model, self._settings, self._precision, self._processes = model, settings, precision, processes
        self._cuts = MicroBatches(
            settings.micro_batch_size,
            settings.micro_batch_tokens,
            setting="sft.micro_batch_tokens",
            repeats=not is_sharded(model),
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
            checkpoint_async=checkpoint_async,
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
        with watch.phase("update", "training", total=sum(lengths)):
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
        passes = equal_passes(self._model, parts, ordered[:1], self._processes)
        total = self._cuts.run(lambda: self._own_gradient(passes, batches, counts, watch), self.optimizer.zero_grad)
        all_reduce_gradients(self._trained.values(), self._processes)
        self._processes.all_reduce([total])
        return float(total)

    def _batch(self, part: Sequence[int]) -> Batch:
        return self._collate([self.rows[number] for number in part])

    def _tokens(self, part: Sequence[int]) -> int:
        """Count the tokens of a pass over some rows, padding included."""
        return len(part) * max(sum(len(example) for example in self.rows[number]) for number in part)

    def _own_gradient(
        self,
        passes: Iterable[tuple[Sequence[int], float]],
        batches: Mapping[tuple[int, ...], Batch],
        counts: TokenCounts,
        watch: StepWatch,
    ) -> Tensor:
        """Accumulate the gradient of this process's micro-batches; returns their part of the loss."""
        device = self._model.device
        total = torch.zeros((), device=device)
        weighted = ((part, weight) for rows, weight in passes for part in self._cuts.own([rows], self._tokens))
        for part, weight in weighted:
            batch = batches[tuple(part)] if tuple(part) in batches else self._batch(part)
            with autocast(device, self._precision):
                loss = sft_loss(
                    self._model,
                    on_device(batch, device),
                    counts,
                    lm_coef=self._settings.lm_coef,
                    router=self._router,
                )
            loss = weight * loss
            loss.backward()
            total += loss.detach()
            beat()
            if weight:
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
