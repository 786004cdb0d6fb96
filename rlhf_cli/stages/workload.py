"""What a stage will do, counted before it runs: optimizer steps, tokens, operations, and bytes that it writes.

A stage's module `workload` has `read(context) -> Reading`. It reads the data as the stage does, with the same readers
and the tokenizer of its model, and loads no weights. How long completions get is not known before they are drawn, so
`Reading.at` takes their mean length; None counts each at its maximum. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from rlhf_cli.models.model_shape import ModelShape
from rlhf_cli.settings.shared import OUR_ATTENTION, ModelSettings

Kind = Literal["train", "forward", "draw"]
"""What the trial measures a rate of: passes with a backward pass, passes without, and tokens that are drawn."""


@dataclass(frozen=True)
class Work:
    """Work of one kind in one phase, over the whole stage.

    Attributes:
        phase: as in `timing.jsonl`: rollout, scoring, passes, update, eval; or save.
        kind: see `Kind`.
        tokens: that the model reads or draws; a prompt that completions share in a pass is read once.
        flops: operations, see `models.resources`.
        calls: how often it is begun: batches of completions that are asked for, optimizer steps, or passes of a model
            over what a step drew.
        rows: sequences at a time: completions that are drawn, or a micro-batch.
        each: sequences per call, which processes share; one process alone does what has 1.
        longest: for `draw`, most tokens of a completion.
        reading: for `draw`, the operations of reading the prompts, which `flops` contains.
        keys: for `draw`, keys that the tokens drawn attend to, summed over them.
        shape: of the model; None where a plan for other machines omits the work.
        trained: for `train`, the weights that have a gradient.
    """

    phase: str
    kind: Kind
    tokens: float
    flops: float
    calls: float = 1
    rows: int = 1
    each: int = 1
    longest: int = 1
    reading: float = 0.0
    keys: float = 0.0
    shape: ModelShape | None = None
    trained: int = 0

    def times(self, count: float) -> Work:
        """Return the work done `count` times."""
        return replace(
            self,
            tokens=count * self.tokens,
            flops=count * self.flops,
            calls=count * self.calls,
            reading=count * self.reading,
            keys=count * self.keys,
        )

    def steps(self, mean: float) -> float:
        """Return the number of decoding steps, with completions of `mean` tokens.

        Rows that end make room for others. The last rows of a call go on to the longest of them, for lengths that are
        exponentially distributed: mean times the harmonic number, at most the limit.
        """
        last = min(float(self.longest), mean * (math.log(min(self.rows, self.each)) + 1.0))
        return self.calls * (mean * max(0.0, self.each / self.rows - 1.0) + max(mean, last))


@dataclass(frozen=True)
class Workload:
    """The work of a stage.

    Attributes:
        records: what it trains on or asks about.
        unit: of the records, for messages.
        optimizer_steps: of its training.
        steps: of PPO; 0 for other stages.
        trained: weights that an optimizer step changes.
        work: by phase and kind.
        loads: models that are read from disk, those that are read back included.
        written: bytes of models and checkpoints that it writes.
        largest: tokens of its largest micro-batch, padding included; None without training.
        prompt: longest prompt in tokens; None where none is known.
        reward: shape of a reward model with a backbone of its own.
        notes: what the counts omit, for people.
    """

    records: int
    unit: str
    work: tuple[Work, ...] = ()
    optimizer_steps: int = 0
    trained: int = 0
    loads: float = 1
    written: float = 0
    largest: int | None = None
    prompt: int | None = None
    reward: ModelShape | None = None
    notes: tuple[str, ...] = ()
    steps: int = 0

    @property
    def flops(self) -> float:
        """Operations of the whole stage."""
        return sum(work.flops for work in self.work)

    def tokens(self, kind: Kind) -> float:
        """Tokens of one kind of work."""
        return sum(work.tokens for work in self.work if work.kind == kind)


Sequences = Sequence[tuple[list[int], list[int]]]
"""Prompts and completions as token ids."""


@dataclass(frozen=True)
class Reading:
    """What a stage reads.

    Attributes:
        at: (mean tokens of a completion that is drawn, or None for the maximum) -> the work of the stage.
        model: folder or hub id of a model with the shape and the tokenizer of the one that the stage computes with.
        shape: of it.
        sample: some of what is trained on, for the trial; prompts have no completion.
        rows: sequences of a micro-batch.
        longest: most tokens of a completion that is drawn; None where none is.
        rank: of the adapter that is trained; None trains all weights.
        trains: whether the stage trains.
        has_logits: whether training computes logits; a reward model does not.
    """

    at: Callable[[float | None], Workload]
    model: str
    shape: ModelShape
    sample: Sequences = field(default_factory=list)
    rows: int = 1
    longest: int | None = None
    rank: int | None = None
    trains: bool = False
    has_logits: bool = True


def reads_shared_prompts(model: ModelSettings, *, is_encoder_decoder: bool) -> bool:
    """Whether passes read a shared prompt once and have no padding, as far as settings say; see `backbone`."""
    is_ours = model.attention in OUR_ATTENTION or ":" in model.attention
    return is_ours and not is_encoder_decoder


def drawing(
    shape: ModelShape,
    phase: str,
    prompts: Sequence[int],
    *,
    per_prompt: int,
    mean: float,
    longest: int,
    rows: int,
    calls: float = 1,
) -> Work:
    """Return the work of drawing completions; each prompt is read once per call.

    Args:
        shape: of the model.
        phase: of the work.
        prompts: tokens of the prompts of all calls together.
        per_prompt: completions of each.
        mean: tokens of a completion.
        longest: most tokens of a completion.
        rows: completions at a time.
        calls: number of calls.
    """
    count = len(prompts) * per_prompt
    keys = per_prompt * sum(mean * (one + mean / 2) for one in prompts)
    pairs = sum(one * one for one in prompts) + keys
    flops = shape.forward_flops(sum(prompts) + count * mean, scored=count * mean, pairs=pairs)
    each = max(1, round(count / max(calls, 1)))
    read = shape.forward_flops(sum(prompts), scored=len(prompts), pairs=sum(one * one for one in prompts))
    return Work(phase, "draw", count * mean, flops, calls, min(rows, each), each, longest, read, keys, shape)


def scoring(
    shape: ModelShape,
    phase: str,
    prompts: Sequence[int],
    *,
    per_prompt: int,
    mean: float,
    logits: bool,
    times: float = 1,
    rows: int = 1,
    calls: float = 1,
) -> Work:
    """Return the work of passes without gradient over completions of prompts; arguments as of `drawing`.

    Args:
        times: passes over each completion, by models of this shape.
        rows: completions of a micro-batch.
        calls: of each pass; a call is shared by the processes.
    """
    count = len(prompts) * per_prompt
    tokens = sum(prompts) + count * mean
    pairs = per_prompt * sum((one + mean) ** 2 for one in prompts)
    flops = shape.forward_flops(tokens, scored=count * mean if logits else 0, pairs=pairs)
    each = max(1, round(count / max(calls, 1)))
    return Work(phase, "forward", times * tokens, times * flops, times * calls, rows, each, shape=shape)


def comparing(shape: ModelShape, *, logits: bool = True) -> Work:
    """Return the passes that compare a model that was written with the one that was trained, over a few sequences."""
    return scoring(shape, "save", [_PROBED] * _PROBES, per_prompt=1, mean=_PROBED, logits=logits, times=2, rows=_PROBES)


_PROBES, _PROBED = 8, 32
"""Sequences, and tokens of a prompt and of a completion; see `generation.policy_saving`."""

_STEPS_COUNTED = 2_000
"""Optimizer steps whose micro-batches are counted; those of a longer run have the same mean."""


@dataclass(frozen=True)
class Passed:
    """What passes over micro-batches read.

    Attributes:
        tokens: padding included, a shared prompt once.
        scored: tokens whose logits are computed.
        pairs: of queries and keys.
        largest: tokens of the largest micro-batch.
        parts: number of micro-batches.
    """

    tokens: float = 0.0
    scored: float = 0.0
    pairs: float = 0.0
    largest: int = 0
    parts: float = 0.0

    def training(self, flops: float, steps: int, batch: int, shape: ModelShape, trained: int) -> Work:
        """Return the work of training on these passes.

        Args:
            flops: of all passes.
            steps: optimizer steps.
            batch: records per step.
            shape: of the model.
            trained: weights that have a gradient.
        """
        rows = max(1, round(batch * steps / max(self.parts, 1)))
        return Work("update", "train", self.tokens, flops, steps, rows, batch, shape=shape, trained=trained)


def count_passes(
    steps: int, parts_of: Callable[[int], Sequence[list[int]]], measure: Callable[[list[int]], tuple[int, int, int]]
) -> Passed:
    """Count what the micro-batches of optimizer steps read.

    Args:
        steps: number of optimizer steps.
        parts_of: 0-based step -> its micro-batches, as numbers of rows.
        measure: rows of a micro-batch -> tokens, scored tokens and pairs.
    """
    counted = min(steps, _STEPS_COUNTED)
    found = [measure(part) for step in range(counted) for part in parts_of(step)]
    scale = steps / counted
    tokens, scored, pairs = (scale * sum(numbers) for numbers in zip(*found, strict=True))
    return Passed(tokens, scored, pairs, max(part[0] for part in found), scale * len(found))


def spread(count: int, most: int) -> list[int]:
    """Return up to `most` of `count` numbers in equal distances: a sample of rows that are sorted by length."""
    chosen = min(count, most)
    return [(2 * number + 1) * count // (2 * chosen) for number in range(chosen)]
