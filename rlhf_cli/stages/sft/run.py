"""The `sft` stage: from demonstrations and a base model to an ordinary model folder."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.errors import DataError
from rlhf_cli.generation.prompts import prompt_format, prompt_style, token_ids
from rlhf_cli.generation.sampling import Sampling
from rlhf_cli.stages.base import StageOutcome
from rlhf_cli.stages.common import (
    inherited_sampling,
    metrics_log,
    model_source,
    split_from,
    warn_of_trained,
    write_contract,
)
from rlhf_cli.stages.precision import decide_precision
from rlhf_cli.stages.sft.stage import SFTContext
from rlhf_cli.stages.sharding import require_processes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rlhf_cli.data.chat_format import PromptFormat
    from rlhf_cli.data.examples import Example
    from rlhf_cli.data.records import Demonstration
    from rlhf_cli.data.skips import SkipLog
    from rlhf_cli.data.sources import LoadedRecords
    from rlhf_cli.models.loading import ModelSource
    from rlhf_cli.stages.sft.settings import SFTSettings
    from rlhf_cli.stages.sft.training import SFTResult

HELD_OUT_MEASURED = 500
"""Held-out demonstrations whose loss is measured: enough for two digits, before and after."""


def run(context: SFTContext) -> StageOutcome:
    """Fine-tune on demonstrations whose prompts are not held out; write the merged model."""
    from rlhf_cli.data.sources import read_records
    from rlhf_cli.data.template_checks import check_records
    from rlhf_cli.generation.policy import own_stop_ids
    from rlhf_cli.generation.policy_saving import TrainedAdapter, probe_examples, save_policy
    from rlhf_cli.models.device import resolve_device
    from rlhf_cli.models.loading import load_tokenizer
    from rlhf_cli.models.sharding import is_sharded
    from rlhf_cli.stages.sft.training import train_sft

    require_processes(context.recipe)
    context = decide_precision(context)
    recipe, settings = context.recipe, context.settings
    demonstrations = context.inputs.demonstrations.source
    loaded = read_records(demonstrations, "demonstration", columns=recipe.data.columns, max_skip=recipe.data.max_skip)
    processes = ProcessGroup(resolve_device(recipe.model.device))
    source = model_source(recipe, base_model(context, loaded.records, processes), quantized=True)
    tokenizer = load_tokenizer(source)
    style = prompt_style(recipe.data, source.path, tokenizer, may_differ=True)
    chat_format = prompt_format(source, style, tokenizer)
    check_records(chat_format, loaded.records)
    sampling = inherited_sampling(recipe, source.path)
    chosen_stops = token_ids(sampling.stop_tokens or (), chat_format)  # a wrong one must not end a finished training
    model = _load(context, source)
    data = _divide(context, source.path, fitting_examples(context, settings, loaded, chat_format, model.config))
    result = train_sft(
        model, data.train, data.held_out[:HELD_OUT_MEASURED], settings,
        seed=recipe.seed, work=context.work, stop=context.stop, precision=source.precision, name=source.path,
        processes=processes, log=metrics_log(context), checkpoint_async=recipe.checkpoint_async,
    )  # fmt: skip
    if not is_sharded(model) and not processes.is_main:
        return StageOutcome()
    has_base = recipe.model.build is None
    adapter = TrainedAdapter("default", settings.lora, has_base) if settings.adapter == "lora" else None
    own_stops = own_stop_ids(model, chat_format, source.path)
    written_kl = save_policy(
        model,
        tokenizer,
        context.output,
        source=source,
        probe=probe_examples(data.held_out or data.train),
        adapter=adapter,
        generation=Sampling.resolve(sampling).generation(model, tokenizer, {*own_stops, *chosen_stops}),
    )
    if not processes.is_main:
        return StageOutcome()
    write_contract(context, source.path, style, sampling, data.trained)
    return _recorded(context, result, data, loaded.skips, written_kl)


@dataclass(frozen=True)
class _Data:
    """The demonstrations of a run, as token ids.

    Attributes:
        trained: the records of `train`.
        train: to train on.
        held_out: to measure the loss on.
    """

    trained: list[Demonstration]
    train: list[Example]
    held_out: list[Example]


def _divide(context: SFTContext, path: str, fitting: list[tuple[Demonstration, Example]]) -> _Data:
    """Divide demonstrations into those to train on and those that are held out; `path` is the base model's."""
    train, held_out = split_from(context, path).divide([record for record, _ in fitting])
    warn_of_trained(held_out, path, "the held-out loss")
    examples = {id(record): example for record, example in fitting}
    return _Data(train, [examples[id(record)] for record in train], [examples[id(record)] for record in held_out])


def _load(context: SFTContext, source: ModelSource) -> PreTrainedModel:
    """Load the model to train; one that is sharded is made trainable first."""
    import torch

    from rlhf_cli.models.loading import load_policy
    from rlhf_cli.models.sharded_loading import open_policy
    from rlhf_cli.stages.sft.training import make_trainable

    is_full = context.settings.adapter == "none"
    dtype = torch.float32 if is_full else None
    if context.recipe.model.sharding == "none":
        return load_policy(source, dtype=dtype)
    unread = open_policy(source, dtype=dtype)
    make_trainable(unread.model, context.settings, context.recipe.seed)
    return unread.read(rounds=is_full)


def base_model(context: SFTContext, records: list[Demonstration], processes: ProcessGroup) -> str:
    """The base model's folder or hub id; with `model.build`, it is made first, from the demonstrations' text."""
    build = context.recipe.model.build
    if build is None:
        assert context.inputs.base is not None
        return context.inputs.base.source
    from rlhf_cli.data.records import prompt_text
    from rlhf_cli.models.build import build_model

    folder = context.work / "base"
    if processes.is_main:
        shutil.rmtree(folder, ignore_errors=True)  # what a kill left may be torn; the same bytes are made again
        texts = (text for record in records for text in (prompt_text(record.prompt), record.completion))
        build_model(folder, texts, build, seed=context.recipe.seed)
    processes.barrier()
    return str(folder)


def fitting_examples(
    context: SFTContext, settings: SFTSettings, loaded: LoadedRecords, prompt_format: PromptFormat, config
) -> list[tuple[Demonstration, Example]]:
    """Records that fit the model, with their ids; the others are skipped and counted."""
    from rlhf_cli.data.examples import reason_to_skip, tokenize
    from rlhf_cli.data.records import prompt_text
    from rlhf_cli.data.skips import Skip
    from rlhf_cli.models.loading import context_length
    from rlhf_cli.progress import say, task
    from rlhf_cli.stages.sft.data import describe_turns

    data, source = context.recipe.data, context.inputs.demonstrations.source
    max_length = min(settings.max_length, context_length(config))
    fitting: list[tuple[Demonstration, Example]] = []
    with task("tokenizing demonstrations", len(loaded.records), "records", saves=False) as bar:
        for record in loaded.records:
            example = tokenize(
                record,
                prompt_format,
                is_encoder_decoder=config.is_encoder_decoder,
                all_turns=settings.assistant_turns == "all",
            )
            bar.advance()
            reason = reason_to_skip(
                example,
                max_prompt_tokens=data.max_prompt_tokens,
                max_length=max_length,
                is_encoder_decoder=config.is_encoder_decoder,
            )
            if reason is None:
                fitting.append((record, example))
            else:
                excerpt = (prompt_text(record.prompt) or record.completion)[:80]
                loaded.skips.add(Skip(record.location or source, reason, excerpt))
    loaded.skips.check(loaded.total, data.max_skip, source)
    if not fitting:
        raise DataError(f"{source}: holds no demonstrations", hint="give records with `prompt` and `completion`")
    if (turns := describe_turns([example for _, example in fitting])) is not None:
        say(turns)
    return fitting


def _recorded(context: SFTContext, result: SFTResult, data: _Data, skips: SkipLog, written_kl: float) -> StageOutcome:
    """Write logs and skipped records beside the model; return what the stage came to."""
    from rlhf_cli.stages.sft.loss import perplexity
    from rlhf_cli.training.monitoring.run_logger import METRICS, TIMING
    from rlhf_cli.training.monitoring.timing_log import read_totals

    for name in (METRICS, TIMING):
        shutil.copyfile(context.work / name, context.output / name)
    if skips.total:
        skips.write(context.output / "skips.jsonl")
    records, tokens = len(data.train), sum(map(len, data.train))
    metrics = {
        "records": float(records),
        "tokens": float(tokens),
        "held_out_records": float(len(data.held_out)),
        "steps": float(result.steps),
        "train_loss": result.train_loss,
        "skipped_steps": float(result.skipped_steps),
    }
    summary = [("trained on", f"{records:,} demonstrations, {tokens:,} tokens, {result.steps:,} steps")]
    if result.eval_loss is not None and result.eval_loss_before is not None:
        before, after = perplexity(result.eval_loss_before), perplexity(result.eval_loss)
        metrics |= {
            "eval_loss_before": result.eval_loss_before,
            "eval_loss": result.eval_loss,
            "eval_perplexity_before": before,
            "eval_perplexity": after,
        }
        summary.append(("held-out perplexity", f"{before:,.2f} -> {after:,.2f}"))
    metrics["written_kl"] = written_kl
    return StageOutcome(metrics=metrics, skipped=dict(skips.counts), summary=summary, timing=read_totals(context.work))
