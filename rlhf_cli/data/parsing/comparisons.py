"""Reads rows with several completions: preferences, rankings, best of n, candidates."""

from __future__ import annotations

from collections.abc import Callable

from rlhf_cli.data.parsing.cells import decoded_cell, refuse_notation
from rlhf_cli.data.parsing.conversations import (
    HUMAN,
    is_conversation,
    is_transcript,
    split_common_beginning,
    split_transcript,
    text_of,
)
from rlhf_cli.data.parsing.prompts import PromptReader
from rlhf_cli.data.parsing.values import (
    ALL_EQUAL,
    EQUAL,
    EQUAL_RANKED,
    GOES_ON,
    NO_COMPLETION,
    PROMPTS_DIFFER,
    annotator_of,
    check_completion,
    margin_of,
    subset_of,
    tiers_of,
)
from rlhf_cli.data.readers.rows import Row, shown
from rlhf_cli.data.records import Candidates, Prompt, Ranking
from rlhf_cli.data.skips import SkipRecordError
from rlhf_cli.data.warnings import WarningLog

Tiers = tuple[tuple[int, ...], ...]
_PAIR: Tiers = ((0,), (1,))


class ComparisonReader:
    """Reads rankings and candidates from the rows of one source.

    Args:
        prompts: reads the prompts.
        warnings: collects the warnings.
        require: raises `DataError` if a row lacks one of the named fields.
    """

    def __init__(self, prompts: PromptReader, warnings: WarningLog, require: Callable[..., None]) -> None:
        self._prompts, self._warnings, self._require = prompts, warnings, require

    def ranking(self, row: Row, *, keep_blank: bool, expected: tuple[str, ...]) -> Ranking:
        """Read completions in tiers.

        Args:
            row: a ranking, a preference or a best of n.
            keep_blank: completions of a ranking may be empty.
            expected: fields that the error names if it is none of these.
        """
        if "completions" in row.fields and not has(row, "chosen", "rejected"):
            self._require(row, *_prompt_of(row), "completions", "ranking")
            prompt, completions = self._listed(row)
            tiers = tiers_of(row, decoded_cell(row, "ranking", row.fields["ranking"]), len(completions))
        else:
            if "chosen" not in row.fields and "rejected" not in row.fields:
                self._require(row, *expected)
            prompt, completions, tiers = self._chosen(row)
        if not keep_blank:
            _refuse_blank(completions)
        _refuse_equal(completions, tiers)
        return Ranking(prompt, completions, tiers, margin_of(row), annotator_of(row), row.location)

    def candidates(self, row: Row, *, keep_blank: bool) -> Candidates:
        """Read completions to be ranked, each once; the ranking of a row that has one becomes the known order.

        Args:
            row: a prompt with its completions, or any row that `ranking` reads.
            keep_blank: completions may be empty.
        """
        subset = subset_of(row)
        if has(row, "chosen", "rejected") or "completions" not in row.fields or has(row, "ranking"):
            ranking = self.ranking(row, keep_blank=keep_blank, expected=("prompt", "completions"))
            prompt, completions, known = ranking.prompt, ranking.completions, ranking.tiers
        else:
            self._require(row, *_prompt_of(row), "completions")
            prompt, completions = self._listed(row)
            known = None
            if not keep_blank:
                _refuse_blank(completions)
        completions, known = self._once(row, completions, known)
        return Candidates(prompt, completions, known, subset, row.location)

    def _once(
        self, row: Row, completions: tuple[str, ...], known: Tiers | None
    ) -> tuple[tuple[str, ...], Tiers | None]:
        """Drop repeated completions: annotators cannot rank two equal texts."""
        location = {completion: index for index, completion in enumerate(dict.fromkeys(completions))}
        if len(location) == len(completions):
            return completions, known
        if len(location) < 2:
            raise SkipRecordError(ALL_EQUAL)
        self._warnings.add("equal completions", row.location)
        if known is not None:  # equal completions share a tier
            known = tuple(tuple(dict.fromkeys(location[completions[index]] for index in tier)) for tier in known)
        return tuple(location), known

    # A list of completions

    def _listed(self, row: Row) -> tuple[Prompt, tuple[str, ...]]:
        completions = decoded_cell(row, "completions", row.fields["completions"])
        if not isinstance(completions, list) or len(completions) < 2:
            raise row.error(
                f"`completions` is {shown(completions)}; a list of at least two completions is expected",
                '`"completions": ["one completion", "another"]`',
            )
        named = [(f"completions[{i}]", value) for i, value in enumerate(completions)]
        if not any(_is_whole(value) for value in completions):
            prompt = self._prompts.prompt(row)
            return prompt, tuple(self._prompts.reply(row, name, value, prompt) for name, value in named)
        prompts: set[Prompt] = set()
        replies: dict[str, str] = {}
        for name, value in named:
            if not _is_whole(value):
                continue
            before, reply = self._prompts.split_conversation(row, name, value)
            if reply is None:
                raise SkipRecordError(NO_COMPLETION)
            prompts.add(before)
            replies[name] = reply
        if len(prompts) > 1:
            raise SkipRecordError(PROMPTS_DIFFER)
        [prompt] = prompts
        for name, value in named:
            if name not in replies:
                replies[name] = self._prompts.reply(row, name, value, prompt)
        return prompt, tuple(replies[name] for name, _ in named)

    # Chosen and rejected

    def _chosen(self, row: Row) -> tuple[Prompt, tuple[str, ...], Tiers]:
        self._require(row, "chosen", "rejected")
        if not (_is_texts(row.fields["chosen"]) or _is_texts(row.fields["rejected"])):
            return *self._pair(row), _PAIR
        self._require(row, "prompt")
        prompt = self._prompts.prompt(row)
        better, worse = (self._texts(row, name) for name in ("chosen", "rejected"))
        self._warnings.add("best of n", row.location)
        count = len(better)
        return prompt, (*better, *worse), (tuple(range(count)), tuple(range(count, count + len(worse))))

    def _pair(self, row: Row) -> tuple[Prompt, tuple[str, ...]]:
        """The prompt of a preference, and its chosen and rejected completion."""
        chosen, rejected = row.fields["chosen"], row.fields["rejected"]
        if is_conversation(chosen) != is_conversation(rejected):
            for name, value in (("chosen", chosen), ("rejected", rejected)):
                if isinstance(value, str):
                    refuse_notation(row, name, value)
            raise row.error(
                f"mixed: one of `chosen` ({shown(chosen, 30)}) and `rejected` ({shown(rejected, 30)}) is a string and "
                "the other a list of messages",
                "give both in the same style",
            )
        prompt, replies = self._split_pair(row)
        _refuse_blank(replies)
        return prompt, replies

    def _texts(self, row: Row, field: str) -> list[str]:
        """One completion, or several in a list."""
        value = row.fields[field]
        if not isinstance(value, list):
            return [text_of(row, field, value)]
        if not value:
            raise row.error(f"`{field}` is an empty list", f"give `{field}` one or more texts, or remove the record")
        return [text_of(row, f"{field}[{i}]", text) for i, text in enumerate(value)]

    def _split_pair(self, row: Row) -> tuple[Prompt, tuple[str, str]]:
        chosen, rejected = row.fields["chosen"], row.fields["rejected"]
        whole = is_conversation(chosen) and _is_whole(chosen) and _is_whole(rejected)
        if "prompt" in row.fields and not whole:
            prompt = self._prompts.prompt(row)
            return prompt, (
                self._prompts.reply(row, "chosen", chosen, prompt),
                self._prompts.reply(row, "rejected", rejected, prompt),
            )
        if is_conversation(chosen):
            return self._split_conversations(row)
        first, second = text_of(row, "chosen", chosen), text_of(row, "rejected", rejected)
        self._prompts.check_style(row, "strings")
        if first == second:
            raise SkipRecordError(EQUAL)
        if not is_transcript(first) and not is_transcript(second):
            self._warnings.add("common beginning", row.location)
            better, worse = split_common_beginning(first, second)
            return better.prompt, (better.completion, worse.completion)
        if not (is_transcript(first) and is_transcript(second)):
            raise SkipRecordError(PROMPTS_DIFFER)
        better, worse = split_transcript(first), split_transcript(second)
        if better.prompt != worse.prompt:
            raise SkipRecordError(PROMPTS_DIFFER)
        if HUMAN in better.completion or HUMAN in worse.completion:
            raise SkipRecordError(GOES_ON)
        return better.prompt, (better.completion, worse.completion)

    def _split_conversations(self, row: Row) -> tuple[Prompt, tuple[str, str]]:
        """Split two whole conversations that differ only in their last turn."""
        (before, better), (before_worse, worse) = (
            self._prompts.split_conversation(row, field) for field in ("chosen", "rejected")
        )
        if better is None or worse is None:
            raise SkipRecordError(NO_COMPLETION)
        if before != before_worse:
            raise SkipRecordError(PROMPTS_DIFFER)
        return before, (better, worse)


def has(row: Row, *names: str) -> bool:
    """Whether a row has all these fields, not null: tables with several formats fill unused columns with null."""
    return all(row.fields.get(name) is not None for name in names)


def _prompt_of(row: Row) -> tuple[str, ...]:
    """The field of the prompt, unless the completions are whole conversations, which begin with it."""
    completions = row.fields.get("completions")
    return () if isinstance(completions, list) and any(map(_is_whole, completions)) else ("prompt",)


def _refuse_blank(completions: tuple[str, ...]) -> None:
    for completion in completions:
        check_completion(completion)


def _refuse_equal(completions: tuple[str, ...], tiers: Tiers) -> None:
    """Raise `SkipRecordError` if the same completion is both better and worse."""
    of_tier = [{completions[index] for index in tier} for tier in tiers]
    if sum(map(len, of_tier)) != len(set(completions)):
        raise SkipRecordError(EQUAL if len(completions) == 2 else EQUAL_RANKED)


def _is_texts(value: object) -> bool:
    """Whether a value is a list of completions rather than one of messages."""
    return isinstance(value, list) and any(isinstance(text, str) for text in value)


def _is_whole(value: object) -> bool:
    """Whether a value is a whole conversation rather than the completion alone."""
    return isinstance(value, list) and len(value) > 1 and isinstance(value[0], dict)
