"""What `rlhf start` finds out about data before it writes a recipe: records, tokens, and what follows from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from rlhf_cli.data.examples import tokenize
from rlhf_cli.data.records import Demonstration, Prompt, PromptRecord, Ranking, prompt_key, prompt_text
from rlhf_cli.data.skips import Skip
from rlhf_cli.data.sources import LoadedRecords, iter_records, read_records
from rlhf_cli.data.splits import Split
from rlhf_cli.data.template_checks import check_records
from rlhf_cli.errors import DataError, RLHFError
from rlhf_cli.generation.contract import split_of
from rlhf_cli.progress import warn
from rlhf_cli.rewards.base import Columns
from rlhf_cli.settings.shared import DataSettings
from rlhf_cli.start.model_facts import ModelFacts

_SHARES = (0.1, 0.2, 0.3, 0.4, 0.5)
"""Shares of prompts to hold out, the smallest that leaves enough to evaluate on is taken."""
_HELD_OUT = 20
"""Held-out prompts that are enough, where there are many."""
_SHORTEST = 64
"""Tokens that every prompt leaves for its completion, where the model reads so many."""
_EXCERPT = 60
_SAMPLE = 12
"""Prompts at most for which `rlhf start` samples a completion."""


@dataclass(frozen=True)
class PromptFacts:
    """Prompts that the model can read.

    Attributes:
        source: file, folder or hub data set.
        training: number of distinct prompts to train on.
        held_out: number of distinct prompts to evaluate on.
        tokens: shortest, median and longest prompt, in tokens of the model.
        example: the first prompt.
        columns: what is known about a completion of `example`, for reward functions.
        sample: a few prompts, in tokens of the model.
        settings: settings of `data` that differ from the defaults.
        has_completions: whether the records hold completions too, and could be demonstrations.
        has_rankings: whether the records are preferences or rankings.
    """

    source: str
    training: int
    held_out: int
    tokens: tuple[int, int, int]
    example: Prompt
    columns: Columns
    sample: Sequence[Sequence[int]] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    has_completions: bool = False
    has_rankings: bool = False

    @property
    def described(self) -> list[str]:
        """What was found, in lines."""
        low, middle, high = self.tokens
        size = f"{low:,}" if low == high else f"{low:,} to {high:,}"
        text = " ".join(prompt_text(self.example).split())
        text = text if len(text) <= _EXCERPT else f"{text[: _EXCERPT - 1]}…"
        return [
            f"{self.training + self.held_out:,} prompts of {size} tokens (median {middle:,}), such as: {text}",
            f"{self.training:,} to train on, {self.held_out:,} held out to evaluate on",
        ]


def inspect_prompts(source: str, model: ModelFacts, data: DataSettings) -> PromptFacts:
    """Read prompts as the stages do, and choose how many are held out.

    Args:
        source: file, folder or hub data set.
        model: that will complete them.
        data: settings that the user gave.

    Raises:
        DataError: they cannot be read, or there are too few.
    """
    loaded = _loaded(source, "prompt", data)
    records: list[PromptRecord] = loaded.records
    check_records(model.format, records)
    distinct = list({prompt_key(record.prompt): record for record in reversed(records)}.values())[::-1]
    lengths = [len(model.format.prompt_ids(record.prompt)) for record in distinct]
    settings, longest = _longest(max(lengths), model, data)
    reason = f"prompt longer than {longest:,} tokens"
    for record, length in zip(distinct, lengths, strict=True):
        if length > longest:
            loaded.skips.add(Skip(record.location, reason, prompt_text(record.prompt)[:_EXCERPT]))
    loaded.skips.check(loaded.total, data.max_skip, source)
    _warn_of(loaded, source)
    distinct = [record for record, length in zip(distinct, lengths, strict=True) if length <= longest]
    lengths = sorted(length for length in lengths if length <= longest)
    split, share = _split([record.prompt for record in distinct], model, data, source)
    held_out = sum(split.holds_out(record.prompt) for record in distinct)
    first = distinct[0]
    return PromptFacts(
        source=source,
        training=len(distinct) - held_out,
        held_out=held_out,
        tokens=(lengths[0], round(median(lengths)), lengths[-1]),
        example=first.prompt,
        columns={} if first.reference is None else {"references": [first.reference]},
        sample=[model.format.prompt_ids(record.prompt) for record in distinct[:: -(-len(distinct) // _SAMPLE)]],
        settings=settings | share,
        has_completions=_reads_as(source, "demonstration", data),
        has_rankings=_reads_as(source, "ranking", data),
    )


def _longest(length: int, model: ModelFacts, data: DataSettings) -> tuple[dict[str, Any], int]:
    """A larger `max_prompt_tokens` where the longest prompt needs it and the model can read it; and what holds then."""
    longest = data.max_prompt_tokens
    if length > longest and not data.changed("max_prompt_tokens") and 2 * length <= model.context:
        return {"max_prompt_tokens": length}, length
    return {}, min(longest, model.context - min(_SHORTEST, model.context // 2))


def _split(
    prompts: Sequence[Prompt], model: ModelFacts, data: DataSettings, source: str
) -> tuple[Split, dict[str, Any]]:
    """The split of the prompts, and the setting that makes it; the user's, or the model's, where there is one."""
    if data.holdout is not None or model.contract is not None:
        tried = [split_of(data, model.contract)]
    else:
        tried = [split_of(data.model_copy(update={"holdout": share}), None) for share in _SHARES]
    counts = [sum(map(split.holds_out, prompts)) for split in tried]
    enough_held_out = min(_HELD_OUT, max(2, len(prompts) // 6))
    enough = [number for number, count in enumerate(counts) if count >= enough_held_out and count < len(prompts)]
    some = [number for number, count in enumerate(counts) if 0 < count < len(prompts)]
    if not (enough or some):
        raise DataError(
            f"{source}: {len(prompts):,} prompts are too few: none would be left to train on or to evaluate on",
            hint="give 20 prompts or more",
        )
    chosen = tried[enough[0] if enough else max(some, key=counts.__getitem__)]
    is_default = len(tried) == 1 or chosen.holdout == _SHARES[0]
    return chosen, {} if is_default else {"holdout": chosen.holdout}


def _reads_as(source: str, kind: Any, data: DataSettings) -> bool:
    """Whether the first record of a source is one of this kind, with a prompt."""
    skipped: list[object] = []
    try:
        records = iter_records(source, kind, columns=data.columns, comparison=data.comparison, on_skip=skipped.append)
        first = next(records, None)
    except RLHFError:
        return False
    return first is not None and not skipped and bool(first.prompt)


@dataclass(frozen=True)
class RankingFacts:
    """Preferences or rankings of a file.

    Attributes:
        source: file, folder or hub data set.
        count: number of rankings.
        prompts: number of distinct prompts.
        completions: fewest and most completions of a ranking.
        tied: number of rankings in which all completions tie.
    """

    source: str
    count: int
    prompts: int
    completions: tuple[int, int]
    tied: int

    @property
    def described(self) -> str:
        """What was found, in a line."""
        low, high = self.completions
        size = f"{low}" if low == high else f"{low} to {high}"
        ties = f", {self.tied:,} of them ties alone" if self.tied else ""
        return f"{self.count:,} rankings of {size} completions, on {self.prompts:,} prompts{ties}"


def inspect_rankings(source: str, model: ModelFacts, data: DataSettings) -> RankingFacts:
    """Read preferences or rankings as the stages do.

    Raises:
        DataError: they cannot be read, or none of them prefers a completion.
    """
    records: list[Ranking] = _read(source, "ranking", data)
    check_records(model.format, records)
    tied = sum(len(record.tiers) < 2 for record in records)
    if tied == len(records):
        raise DataError(
            f"{source}: all {tied:,} rankings are ties, from which nothing can be learned",
            hint="check that the column of the verdict is the one you meant",
        )
    sizes = [len(record.completions) for record in records]
    prompts = len({prompt_key(record.prompt) for record in records})
    return RankingFacts(source, len(records), prompts, (min(sizes), max(sizes)), tied)


@dataclass(frozen=True)
class DemonstrationFacts:
    """Demonstrations of a file.

    Attributes:
        source: file, folder or hub data set.
        count: number of demonstrations.
        longest: longest of them, in tokens of the model.
        lengths: tokens of each completion.
    """

    source: str
    count: int
    longest: int
    lengths: Sequence[int]

    @property
    def described(self) -> str:
        """What was found, in a line."""
        return f"{self.count:,} demonstrations of up to {self.longest:,} tokens"


def inspect_demonstrations(source: str, model: ModelFacts, data: DataSettings) -> DemonstrationFacts:
    """Read demonstrations as `sft` does.

    Raises:
        DataError: they cannot be read.
    """
    records: list[Demonstration] = _read(source, "demonstration", data)
    check_records(model.format, records)
    is_pair = model.format.is_encoder_decoder
    examples = (tokenize(record, model.format, is_encoder_decoder=is_pair) for record in records)
    sizes = [(len(example), len(example.completion_ids)) for example in examples]
    return DemonstrationFacts(source, len(records), max(whole for whole, _ in sizes), [own for _, own in sizes])


def _read(source: str, kind: Any, data: DataSettings) -> list[Any]:
    loaded = _loaded(source, kind, data)
    _warn_of(loaded, source)
    return loaded.records


def _loaded(source: str, kind: Any, data: DataSettings) -> LoadedRecords:
    return read_records(source, kind, columns=data.columns, comparison=data.comparison, max_skip=data.max_skip)


def _warn_of(loaded: LoadedRecords, source: str) -> None:
    for warning in [*loaded.skips.warnings(loaded.total, source), *loaded.warnings]:
        warn(warning)
