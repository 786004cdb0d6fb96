"""The work of `sft`, for `rlhf plan`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.generation.prompts import prompt_format, prompt_style
from rlhf_cli.models.model_shape import FLOAT32
from rlhf_cli.stages.common import model_source, split_from
from rlhf_cli.stages.sft.run import HELD_OUT_MEASURED, base_model, fitting_examples
from rlhf_cli.stages.sft.stage import SFTContext
from rlhf_cli.stages.workload import (
    Passed,
    Reading,
    Work,
    Workload,
    comparing,
    count_passes,
    reads_shared_prompts,
    spread,
)

if TYPE_CHECKING:
    from rlhf_cli.data.examples import Example
    from rlhf_cli.models.loading import ModelSource
    from rlhf_cli.stages.sft.settings import SFTSettings


def read(context: SFTContext) -> Reading:
    """Read the demonstrations as the stage does."""
    from rlhf_cli.models.loading import load_config

    recipe, settings = context.recipe, context.settings
    source, train, measured = _examples(context)
    config, shape = load_config(source), context.shape_of(source.folder)
    is_grouped = reads_shared_prompts(recipe.model, is_encoder_decoder=config.is_encoder_decoder)
    passed, steps = _passes(settings, train, seed=recipe.seed, is_grouped=is_grouped)
    rank = settings.lora.rank if settings.adapter == "lora" else None
    held_out = shape.forward_flops(
        sum(map(len, measured)),
        scored=sum(len(one.completion_ids) for one in measured),
        pairs=sum(len(one) ** 2 for one in measured),
    )
    trained = shape.weights if rank is None else shape.adapter(rank)
    flops = shape.training_flops(passed.tokens, scored=passed.scored, pairs=passed.pairs, rank=rank)
    workload = Workload(
        records=len(train),
        unit="demonstrations",
        optimizer_steps=steps,
        trained=trained,
        work=(
            passed.training(flops, steps, settings.batch_size, shape, trained),
            Work("eval", "forward", 2.0 * sum(map(len, measured)), 2.0 * held_out, calls=2,
                 rows=settings.micro_batch_size, each=max(1, len(measured)), shape=shape),
            comparing(shape),
        ),
        loads=2,
        written=FLOAT32 * (shape.weights + 3 * trained * (1 + (steps - 1) // settings.checkpoint_steps)),
        largest=passed.largest,
    )  # fmt: skip
    ordered = sorted(train, key=len)
    sample = [ordered[number] for number in spread(len(ordered), max(settings.micro_batch_size, 8))]
    return Reading(
        at=lambda mean: workload,
        model=source.path,
        shape=shape,
        sample=[(one.prompt_ids, one.completion_ids) for one in sample],
        rows=min(settings.micro_batch_size, settings.batch_size),
        rank=rank,
        trains=True,
    )


def _examples(context: SFTContext) -> tuple[ModelSource, list[Example], list[Example]]:
    """Return the base model, the examples to train on, and those that the loss is measured on."""
    from rlhf_cli.data.sources import read_records
    from rlhf_cli.models.device import resolve_device
    from rlhf_cli.models.loading import load_config, load_tokenizer

    recipe, data = context.recipe, context.inputs.demonstrations.source
    loaded = read_records(data, "demonstration", columns=recipe.data.columns, max_skip=recipe.data.max_skip)
    processes = ProcessGroup(resolve_device(recipe.model.device))
    source = model_source(recipe, base_model(context, loaded.records, processes), quantized=True)
    tokenizer, config = load_tokenizer(source), load_config(source)
    style = prompt_style(recipe.data, source.path, tokenizer, may_differ=True)
    fitting = fitting_examples(context, context.settings, loaded, prompt_format(source, style, tokenizer), config)
    train, held_out = split_from(context, source.path).divide([record for record, _ in fitting])
    examples = {id(record): example for record, example in fitting}
    measured = held_out[:HELD_OUT_MEASURED]
    return source, [examples[id(record)] for record in train], [examples[id(record)] for record in measured]


def _passes(settings: SFTSettings, examples: Sequence[Example], *, seed: int, is_grouped: bool) -> tuple[Passed, int]:
    """Return what the passes over all optimizer steps read, and the number of these steps."""
    from rlhf_cli.stages.sft.data import BatchPlan, pack, pack_groups
    from rlhf_cli.training.micro_batches import MicroBatches

    rows = [[number] for number in range(len(examples))]
    if settings.packing and is_grouped:
        rows = pack_groups(examples, settings.max_length)
    elif settings.packing:
        rows = pack([len(one) for one in examples], settings.max_length)
    plan = BatchPlan(len(rows), settings.epochs, settings.batch_size, seed)
    cuts = MicroBatches(settings.micro_batch_size, settings.micro_batch_tokens)
    lengths = [sum(len(examples[number]) for number in row) for row in rows]

    def padded(part: Sequence[int]) -> int:
        return len(part) * max(lengths[row] for row in part)

    def parts_of(step: int) -> list[list[int]]:
        return cuts.cut(sorted(plan.rows_of(step), key=lambda row: lengths[row]), padded)

    def measure(part: list[int]) -> tuple[int, int, int]:
        members = [examples[number] for row in part for number in rows[row]]
        tokens = sum(map(len, members)) if is_grouped else padded(part)
        return tokens, sum(len(one.completion_ids) for one in members), sum(len(one) ** 2 for one in members)

    return count_passes(plan.steps, parts_of, measure), plan.steps
