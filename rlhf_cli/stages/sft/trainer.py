"""Supervised fine-tuning: an adapter or all weights, trained on completions, merged into an ordinary model.

Resumed equals uninterrupted, bit for bit on one machine: the order of rows is a function of the seed, and a checkpoint
holds the trained weights, AdamW's moments, the schedule and torch's generators.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.distributed.signals import StopRequest
from rlhf_cli.errors import UsageError
from rlhf_cli.generation.logprobs import check_projection
from rlhf_cli.models.backbone import reads_groups
from rlhf_cli.models.loading import ModelSource
from rlhf_cli.models.lora import adapter_state, add_lora, cast_weights, merge_lora
from rlhf_cli.models.merging import merged_policy
from rlhf_cli.models.saving import require_finite
from rlhf_cli.progress import say, task
from rlhf_cli.stages.sft.data import BatchPlan, Example, as_dataset, pack, pack_groups
from rlhf_cli.stages.sft.hf_trainer import Reporting, make_trainer, quiet_training
from rlhf_cli.stages.sft.loss import check_packing, collator_for, mean_completion_nll
from rlhf_cli.stages.sft.sharding import SharedPlan
from rlhf_cli.training.checkpoint.store import latest_checkpoint
from rlhf_cli.training.distributed import DistributedStop, Log, metrics_log
from rlhf_cli.training.monitoring.metrics_log import MetricsLog


@dataclass(frozen=True)
class Lora:
    """An adapter to train: see `models.adapters.add_lora`."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"


@dataclass(frozen=True)
class SFTOptions:
    """Settings of supervised fine-tuning; the recipe's `sft` section explains each.

    Attributes:
        lora: the adapter, or None to train all weights.
        precision: of matrix products.
        dtype: of the finished model's weights.
        packing: fill rows of `max_length` tokens with several examples.
        max_length: of a packed row, in tokens.
    """

    learning_rate: float
    batch_size: int
    epochs: float
    micro_batch_size: int = 8
    max_length: int = 1024
    packing: bool = False
    lm_coef: float = 0.0
    lora: Lora | None = Lora()
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    warmup_share: float = 0.03
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    gradient_checkpointing: bool = False
    checkpoint_steps: int = 50
    precision: torch.dtype = torch.float32
    dtype: torch.dtype = torch.float32
    seed: int = 0


@dataclass(frozen=True)
class SFTResult:
    """What training came to.

    Attributes:
        steps: optimizer steps.
        rows: rows of one pass: records, or packed rows.
        train_loss: mean of the steps' losses, in nats a token; known to rank 0 alone.
        eval_loss_before: mean negative log-likelihood of held-out completions, in nats a token, of the base model; None
            without held-out examples.
        eval_loss: the same of the finished model, merged and in its final precision.
        skipped_steps: steps whose gradient was not finite.
        merged: the finished model, on the CPU, where the one that was trained holds its frozen weights quantized; the
            losses are then of the adapter on those. Only the main process has it.
    """

    steps: int
    rows: int
    train_loss: float
    eval_loss_before: float | None
    eval_loss: float | None
    skipped_steps: int
    merged: PreTrainedModel | None = None


def train_sft(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    held_out: Sequence[Example],
    options: SFTOptions,
    *,
    work: Path,
    stop: StopRequest,
    name: str = "the model",
    source: ModelSource | None = None,
    processes: ProcessGroup | None = None,
    log: Callable[..., Log] = MetricsLog,
) -> SFTResult:
    """Train a model in place; it is merged and cast to `options.dtype` when this returns, unless it is quantized.

    Args:
        model: as loaded: in `options.dtype` or quantized for an adapter, in float32 to train all weights.
        tokenizer: the model's.
        examples: to train on.
        held_out: to measure on, before and after.
        options: settings.
        work: folder for checkpoints and `metrics.jsonl`, from which a killed run goes on.
        stop: asked after every step.
        name: of the model, for messages.
        source: where a model with quantized weights is from: its adapter is merged into the weights on disk.
        processes: those of the run, all of which call this and end with the same weights; None finds them in the
            environment.
        log: makes the metrics log, from the arguments of `MetricsLog`.

    Raises:
        Interrupted: a signal came; everything done so far is saved.
        DivergedError: three steps in a row, or a weight, were not finite.
        ModelError: the architecture cannot be trained so.
    """
    _check_options(model, options, name)
    check_projection(model, name)
    if options.packing:
        check_packing(model, name)
    processes = processes or ProcessGroup(model.device)
    before = _evaluate(model, held_out, options, stop, "held-out loss before", processes)
    set_seed(options.seed)
    if options.lora is None:
        model.requires_grad_(True)
    else:
        lora = options.lora
        add_lora(model, rank=lora.rank, alpha=lora.alpha, dropout=lora.dropout, target_modules=lora.target_modules)
    result = _train(model, tokenizer, examples, options, work, DistributedStop(stop, processes), processes, log)
    if options.lora is None:
        cast_weights(model, options.dtype)
    elif source is None:
        merge_lora(model, dtype=options.dtype)
    require_finite(model, what="the trained model")
    after = _evaluate(model, held_out, options, stop, "held-out loss after", processes)
    merged = None
    if options.lora is not None and source is not None and processes.is_main:
        lora = options.lora
        shape = {"rank": lora.rank, "alpha": lora.alpha, "target_modules": lora.target_modules}
        merged = merged_policy(source, adapter_state(model), **shape)
    return SFTResult(**result, eval_loss_before=before, eval_loss=after, merged=merged)


def _check_options(model: PreTrainedModel, options: SFTOptions, name: str) -> None:
    if model.config.is_encoder_decoder and options.lm_coef > 0:
        raise UsageError(
            f"`sft.lm_coef: {options.lm_coef:g}` needs a decoder-only model: the decoder of `{name}` writes no prompt",
            hint="leave `lm_coef` out, or choose a decoder-only model",
        )


def _evaluate(
    model: PreTrainedModel,
    held_out: Sequence[Example],
    options: SFTOptions,
    stop: StopRequest,
    label: str,
    processes: ProcessGroup,
) -> float | None:
    if not held_out:
        return None
    size, own = max(options.micro_batch_size, 1), len(processes.shard(held_out))
    with task(label, own, "records") as bar:

        def progress(done: int) -> None:
            stop.check()
            bar.advance(min(size, done) if done else 0)

        nll = mean_completion_nll(
            model,
            held_out,
            batch_size=size,
            precision=options.precision,
            before_batch=progress,
            processes=processes,
        )
        bar.advance(own % size or min(size, own))
    return nll


def _train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    options: SFTOptions,
    work: Path,
    stop: StopRequest,
    processes: ProcessGroup,
    make_log: Callable[..., Log],
) -> dict[str, Any]:
    rows = [[number] for number in range(len(examples))]
    if options.packing:
        if reads_groups(model):
            rows = pack_groups(examples, options.max_length)
        else:
            rows = pack([len(example) for example in examples], options.max_length)
        say(f"packed {len(examples):,} records into {len(rows):,} rows of up to {options.max_length:,} tokens")
    plan = BatchPlan(len(rows), options.epochs, options.batch_size, options.micro_batch_size, options.seed)
    checkpoints = work / "checkpoints"
    shared = SharedPlan(plan, processes.index, processes.count)
    resumed = latest_checkpoint(checkpoints, processes=processes)
    done = 0 if resumed is None else resumed.step
    if done:
        say(f"going on from step {done:,} of {plan.steps:,}")
    log = metrics_log(work / "metrics.jsonl", processes, after_step=done, make=make_log)
    use_cache = model.config.use_cache
    with quiet_training(), task("fine-tuning", plan.steps, "steps", done=done) as bar:
        trainer = make_trainer(
            model,
            tokenizer,
            as_dataset(examples, rows),
            Reporting(log, bar, stop, plan),
            _arguments(options, shared, model, work),
        )
        trainer.begin(
            plan=shared,
            collator=collator_for(model, packed=options.packing),
            lm_coef=options.lm_coef,
            precision=options.precision,
            checkpoints=checkpoints,
            resumed=resumed,
            processes=processes,
        )
        try:
            trainer.train(resume_from_checkpoint=trainer.resume_folder())
        finally:
            log.close()
            model.config.use_cache = use_cache
            if options.gradient_checkpointing:
                model.gradient_checkpointing_disable()
    stop.check()
    model.eval()
    finite = _losses(work / "metrics.jsonl") if processes.is_main else []
    return {
        "steps": plan.steps,
        "rows": len(rows),
        "train_loss": sum(finite) / max(len(finite), 1),
        "skipped_steps": trainer.bad_steps,
    }


def _losses(path: Path) -> list[float]:
    rows = map(json.loads, path.read_text().splitlines())
    return [row["loss"] for row in rows if row["loss"] is not None]


def _arguments(options: SFTOptions, plan: SharedPlan, model: PreTrainedModel, work: Path) -> dict[str, Any]:
    """Settings in transformers' names. Autocast is ours, so its `bf16` stays off."""
    schedules = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}
    return {
        "output_dir": str(work / "trainer"),
        "max_steps": plan.plan.steps,
        "per_device_train_batch_size": options.micro_batch_size,
        "gradient_accumulation_steps": plan.micro_batches_per_step,
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": schedules[options.schedule],
        "warmup_steps": round(options.warmup_share * plan.plan.steps),
        "weight_decay": options.weight_decay,
        "max_grad_norm": options.max_grad_norm,
        "optim": "adamw_torch",
        "gradient_checkpointing": options.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if options.gradient_checkpointing else None,
        "bf16": False,
        "use_cpu": model.device.type == "cpu",
        "seed": options.seed,
        "logging_strategy": "steps",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": options.checkpoint_steps,
        "eval_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
    }
