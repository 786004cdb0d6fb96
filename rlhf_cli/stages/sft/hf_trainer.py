"""TRL's and transformers' trainers with our batches, our exact loss, our checkpoints, and no output of their own."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    DefaultFlowCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.distributed.signals import StopRequest
from rlhf_cli.errors import DivergedError
from rlhf_cli.models.loading import quiet_libraries
from rlhf_cli.precision import autocast
from rlhf_cli.progress import Task, warn
from rlhf_cli.stages.sft.data import BatchPlan
from rlhf_cli.stages.sft.loss import Collator, TokenCounts, sft_loss
from rlhf_cli.stages.sft.sharding import SharedPlan
from rlhf_cli.training.checkpoint.store import (
    Checkpoint,
    optimizer_tensors,
    restore_optimizer,
    rng_tensors,
    save_checkpoint,
)
from rlhf_cli.training.distributed import Log, all_reduce_gradients, restore_generators
from rlhf_cli.training.loop import BAD_STEPS_IN_A_ROW
from rlhf_cli.training.random_state import SEED_STRIDE

_TRAINER_STATE = ("global_step", "epoch", "max_steps", "train_batch_size", "logging_steps", "save_steps", "eval_steps")
_NO_TOKENS = torch.zeros(0, dtype=torch.long)


@contextmanager
def quiet_training() -> Iterator[None]:
    """Keep what the trainers and their libraries say about themselves from people, and from the hub."""
    quiet_libraries()
    datasets.disable_progress_bars()
    loggers = [logging.getLogger(name) for name in ("trl", "accelerate", "datasets", "peft")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _as_it_is(model: nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False) -> nn.Module:
    return model


class OurTraining(Trainer):
    """What both trainers share; mixed in front of them.

    Its parts follow the hooks of `transformers.Trainer`; what they do not touch is transformers' own loop.
    """

    # The loss is normalized over the whole step already: it is not to be divided by the number of micro-batches too.
    loss_is_scaled_for_ga = True

    def begin(
        self,
        *,
        plan: SharedPlan,
        collator: Collator,
        lm_coef: float,
        precision: torch.dtype,
        checkpoints: Path,
        resumed: Checkpoint | None,
        processes: ProcessGroup,
    ) -> None:
        """Say how to train; before `train`.

        Args:
            plan: which rows make up each step.
            collator: of rows into batches.
            lm_coef: lambda of L3 = L2 + lambda L1.
            precision: of matrix products.
            checkpoints: folder of step checkpoints.
            resumed: where to go on from.
            processes: those of the run, which share each step's micro-batches.
        """
        self._plan, self._collator, self._lm_coef = plan, collator, lm_coef
        self._processes = processes
        self._precision, self._checkpoints, self._resumed = precision, checkpoints, resumed
        self.bad_steps, self._bad_in_a_row = 0, 0
        self._step_loss = torch.zeros((), device=self.args.device)
        if processes.count > 1:
            # accelerate would wrap the model to average gradients pass by pass, as if every pass had as many tokens.
            self.accelerator.prepare_model = _as_it_is
            torch.manual_seed(self.args.seed + SEED_STRIDE * processes.index)  # dropout in an adapter
        # With a tokenizer at hand the trainer would rewrite the model's special tokens to be the tokenizer's.
        self.processing_class = None

    def resume_folder(self) -> str | None:
        """A folder with the state that transformers reads when it resumes; the rest comes from our checkpoint."""
        if self._resumed is None:
            return None
        folder = self._checkpoints / f"resumed-{self._processes.index}"
        folder.mkdir(parents=True, exist_ok=True)
        state = TrainerState(**self._resumed.state["trainer"])
        state.save_to_json(str(folder / "trainer_state.json"))
        return str(folder)

    def get_train_dataloader(self) -> DataLoader:
        """This process's micro-batches in the order of the plan."""
        return DataLoader(self.train_dataset, batch_sampler=self._plan, collate_fn=self._collated)  # type: ignore[arg-type]

    def _collated(self, rows: list[dict[str, list[int]]]) -> dict[str, Any]:
        return self._collator(rows) if rows else dict.fromkeys(("completions", "texts"), _NO_TOKENS)

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> Any:
        return TokenCounts.of(batch_samples, self._processes)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """This micro-batch's part of the step's loss."""
        assert not return_outputs
        assert isinstance(num_items_in_batch, TokenCounts)
        assert isinstance(model, PreTrainedModel)
        with autocast(self.args.device, self._precision):
            return sft_loss(model, inputs, num_items_in_batch, lm_coef=self._lm_coef)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *arguments: Any, **named: Any) -> Tensor:
        """One micro-batch, forward and backward; its part of the step's loss. Nothing where this process has none."""
        if "input_ids" not in inputs:
            return torch.zeros_like(self._step_loss)
        loss = super().training_step(model, inputs, *arguments, **named)
        self._step_loss = self._step_loss + loss
        # Transformers sums losses from step to step, where one NaN would hide all later ones.
        return torch.nan_to_num(loss, nan=0.0, posinf=0.0, neginf=0.0)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Pass on the loss of the step just done, NaN and all."""
        if "loss" in logs:
            logs["loss"] = float(self._step_loss)
            self._step_loss = torch.zeros_like(self._step_loss)
        Trainer.log(self, logs, start_time)  # TRL's own adds metrics of a loss that is not in use

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Bound the gradient's norm; a step whose gradient is not finite is skipped, and three in a row end the run.

        It is here that the gradients of all passes, this process's and the others', become one.
        """
        all_reduce_gradients((weight for weight in model.parameters() if weight.requires_grad), self._processes)
        self._processes.all_reduce([self._step_loss])
        norm = super()._clip_grad_norm(model)
        if torch.isfinite(torch.as_tensor(norm)):
            self._bad_in_a_row = 0
            return norm
        self.bad_steps += 1
        self._bad_in_a_row += 1
        step = self.state.global_step + 1
        if self._bad_in_a_row == BAD_STEPS_IN_A_ROW:
            raise DivergedError(
                f"the loss was not finite in {BAD_STEPS_IN_A_ROW} steps in a row, steps {step - 2} to {step}",
                hint="lower `sft.learning_rate`, or compute in float32 (`--set model.precision=float32`)",
            )
        warn(f"step {step} is skipped: its gradient is not finite")
        model.zero_grad(set_to_none=True)
        return norm

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        weights = self.model.named_parameters()  # type: ignore[union-attr]
        tensors: dict[str, Tensor] = {f"model/{name}": weight for name, weight in weights if weight.requires_grad}
        tensors |= optimizer_tensors(self.optimizer, "optimizer") | rng_tensors(self._processes)  # type: ignore[arg-type]
        trainer = {name: getattr(self.state, name) for name in _TRAINER_STATE}
        state = {
            "trainer": trainer,
            "scheduler": self.lr_scheduler.state_dict(),  # type: ignore[union-attr]
            "bad_steps": [self.bad_steps, self._bad_in_a_row],
        }
        save_checkpoint(self._checkpoints, self.state.global_step, tensors, state, processes=self._processes)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        assert self._resumed is not None
        weights = dict(self.model.named_parameters())  # type: ignore[union-attr]
        with torch.no_grad():
            for name, tensor in self._resumed.tensors.items():
                if name.startswith("model/"):
                    weights[name.removeprefix("model/")].copy_(tensor)
        self.bad_steps, self._bad_in_a_row = self._resumed.state["bad_steps"]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self._resumed is None:
            return
        optimizer: Any = self.optimizer
        scheduler: Any = self.lr_scheduler
        restore_optimizer(optimizer, self._resumed.tensors, "optimizer")
        scheduler.load_state_dict(self._resumed.state["scheduler"])
        # The scheduler says what the rate is; the optimizer's groups hold it.
        for group, rate in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
            group["lr"] = rate

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self._resumed is not None:
            restore_generators(self._resumed.tensors, self._processes, self.args.seed)


class DecoderSFT(OurTraining, SFTTrainer):
    """TRL's trainer, for decoder-only models."""

    def _send_telemetry(self) -> None:
        """Nothing about a run leaves the machine."""


class Seq2SeqSFT(OurTraining, Seq2SeqTrainer):
    """Transformers' trainer, for encoder-decoder models."""


class Reporting(TrainerCallback):
    """Writes each step's metrics, moves the bar, and turns a signal into a checkpoint and an end."""

    def __init__(self, log: Log, bar: Task, stop: StopRequest, plan: BatchPlan) -> None:
        self._log, self._bar, self._stop, self._plan = log, bar, stop, plan

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Save and leave when asked to."""
        if self._stop.requested:
            control.should_save = control.should_training_stop = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Keep what a step was like; the summary that transformers logs at the end has no loss of a step."""
        if logs is None or "loss" not in logs:
            return
        metrics = {name: float(logs[name]) for name in ("loss", "grad_norm", "learning_rate") if name in logs}
        self._log.write(state.global_step, metrics | {"epoch": self._plan.epoch_at(state.global_step)})
        self._bar.advance(1, note=f"loss {logs['loss']:.3f}")


def make_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: datasets.Dataset,
    reporting: Reporting,
    arguments: dict[str, Any],
) -> OurTraining:
    """The trainer for a model's architecture, with none but our callbacks.

    Args:
        model: trainable parameters have `requires_grad`.
        tokenizer: TRL wants one; it is left as it is.
        dataset: rows.
        reporting: our callback.
        arguments: of `TrainingArguments`.
    """
    common: dict[str, Any] = {"model": model, "train_dataset": dataset, "data_collator": lambda rows: rows}
    if model.config.is_encoder_decoder:
        trainer: OurTraining = Seq2SeqSFT(args=_one_device(Seq2SeqTrainingArguments(**arguments)), **common)
    else:
        # TRL is not to prepare rows that are prepared, nor to cut them.
        settings = SFTConfig(**arguments, max_length=None, dataset_kwargs={"skip_prepare_dataset": True})
        trainer = DecoderSFT(args=_one_device(settings), processing_class=tokenizer, **common)
        # TRL replaces the model's forward by one with its own fused loss; ours needs none.
        model.__dict__.pop("forward", None)
    for callback in list(trainer.callback_handler.callbacks):
        if not isinstance(callback, DefaultFlowCallback):
            trainer.remove_callback(callback)
    trainer.add_callback(reporting)
    return trainer


def _one_device(settings: Any) -> Any:
    """Keep transformers from wrapping the model in `DataParallel` where several GPUs are visible."""
    assert settings.device is not None  # asking makes it count the devices
    settings._n_gpu = min(settings.n_gpu, 1)
    return settings
