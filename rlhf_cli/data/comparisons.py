"""Rows that compare answers, or hold answers to be compared: preferences, rankings, best of n, candidates."""

from __future__ import annotations

from collections.abc import Callable

from rlhf_cli.data.conversations import (
    HUMAN,
    decoded_cell,
    is_conversation,
    is_transcript,
    part_common,
    part_transcript,
    text_of,
)
from rlhf_cli.data.prompts import PromptReader
from rlhf_cli.data.records import Candidates, Prompt, Ranking
from rlhf_cli.data.rows import Row, shown
from rlhf_cli.data.values import (
    ALL_EQUAL,
    EQUAL,
    EQUAL_RANKED,
    GOES_ON,
    NO_ANSWER,
    PROMPTS_DIFFER,
    SkipRecordError,
    annotator_of,
    answer_of,
    margin_of,
    subset_of,
    tiers_of,
)
from rlhf_cli.data.warnings import Remarks

Tiers = tuple[tuple[int, ...], ...]
_PAIR: Tiers = ((0,), (1,))


class ComparisonReader:
    """Reads rankings and candidates from the rows of one source.

    Args:
        prompts: reads what was asked.
        remarks: collects what deserves a warning.
        require: raises `DataError` where a row lacks one of the fields named.
    """

    def __init__(self, prompts: PromptReader, remarks: Remarks, require: Callable[..., None]) -> None:
        self._prompts, self._remarks, self._require = prompts, remarks, require

    def ranking(self, row: Row, *, keep_blank: bool, wanted: tuple[str, ...]) -> Ranking:
        """Answers in tiers.

        Args:
            row: a ranking, a preference or a best of n.
            keep_blank: answers of a ranking may be empty.
            wanted: fields to name where it is none of these.
        """
        if "completions" in row.fields and not has(row, "chosen", "rejected"):
            self._require(row, "prompt", "completions", "ranking")
            prompt, answers = self._listed(row)
            tiers = tiers_of(row, decoded_cell(row, "ranking", row.fields["ranking"]), len(answers))
        else:
            if "chosen" not in row.fields and "rejected" not in row.fields:
                self._require(row, *wanted)
            prompt, answers, tiers = self._chosen(row)
        if not keep_blank:
            _refuse_blank(answers)
        _refuse_equal(answers, tiers)
        return Ranking(prompt, answers, tiers, margin_of(row), annotator_of(row), row.place)

    def candidates(self, row: Row, *, keep_blank: bool) -> Candidates:
        """Answers to be ranked, each once; a row that ranks them says what is known.

        Args:
            row: a prompt with its answers, or any row that `ranking` reads.
            keep_blank: answers may be empty.
        """
        subset = subset_of(row)
        if has(row, "chosen", "rejected") or "completions" not in row.fields or has(row, "ranking"):
            ranking = self.ranking(row, keep_blank=keep_blank, wanted=("prompt", "completions"))
            prompt, answers, known = ranking.prompt, ranking.completions, ranking.tiers
        else:
            self._require(row, "prompt", "completions")
            prompt, answers = self._listed(row)
            known = None
            if not keep_blank:
                _refuse_blank(answers)
        answers, known = self._once(row, answers, known)
        return Candidates(prompt, answers, known, subset, row.place)

    def _once(self, row: Row, answers: tuple[str, ...], known: Tiers | None) -> tuple[tuple[str, ...], Tiers | None]:
        """Answers without those that are there already: nobody can rank two that read the same."""
        place = {answer: index for index, answer in enumerate(dict.fromkeys(answers))}
        if len(place) == len(answers):
            return answers, known
        if len(place) < 2:
            raise SkipRecordError(ALL_EQUAL)
        self._remarks.add("equal answers", row.place)
        if known is not None:  # equal ones share a tier
            known = tuple(tuple(dict.fromkeys(place[answers[index]] for index in tier)) for tier in known)
        return tuple(place), known

    # A list of answers

    def _listed(self, row: Row) -> tuple[Prompt, tuple[str, ...]]:
        prompt = self._prompts.prompt(row)
        completions = decoded_cell(row, "completions", row.fields["completions"])
        if not isinstance(completions, list) or len(completions) < 2:
            raise row.error(
                f"`completions` is {shown(completions)}; a list of at least two answers is expected",
                '`"completions": ["one answer", "another"]`',
            )
        return prompt, tuple(text_of(row, f"completions[{i}]", value) for i, value in enumerate(completions))

    # Chosen and rejected

    def _chosen(self, row: Row) -> tuple[Prompt, tuple[str, ...], Tiers]:
        self._require(row, "chosen", "rejected")
        if not (_is_texts(row.fields["chosen"]) or _is_texts(row.fields["rejected"])):
            return *self._pair(row), _PAIR
        self._require(row, "prompt")
        prompt = self._prompts.prompt(row)
        better, worse = (self._texts(row, name) for name in ("chosen", "rejected"))
        self._remarks.add("best of n", row.place)
        count = len(better)
        return prompt, (*better, *worse), (tuple(range(count)), tuple(range(count, count + len(worse))))

    def _pair(self, row: Row) -> tuple[Prompt, tuple[str, ...]]:
        """The prompt of a preference, and its chosen and rejected answer."""
        chosen, rejected = row.fields["chosen"], row.fields["rejected"]
        if is_conversation(chosen) != is_conversation(rejected):
            raise row.error(
                f"mixed: one of `chosen` ({shown(chosen, 30)}) and `rejected` ({shown(rejected, 30)}) is a string and "
                "the other a list of messages",
                "give both in the same form",
            )
        prompt, replies = self._parted_pair(row)
        _refuse_blank(replies)
        return prompt, replies

    def _texts(self, row: Row, field: str) -> list[str]:
        """One answer, or a list of some."""
        value = row.fields[field]
        if not isinstance(value, list):
            return [text_of(row, field, value)]
        if not value:
            raise row.error(
                f"`{field}` is [], no answers", f"give `{field}` one or more texts, or leave the record out"
            )
        return [text_of(row, f"{field}[{i}]", text) for i, text in enumerate(value)]

    def _parted_pair(self, row: Row) -> tuple[Prompt, tuple[str, str]]:
        chosen, rejected = row.fields["chosen"], row.fields["rejected"]
        whole = is_conversation(chosen) and _is_whole(chosen) and _is_whole(rejected)
        if "prompt" in row.fields and not whole:
            prompt = self._prompts.prompt(row)
            return prompt, (
                self._prompts.reply(row, "chosen", prompt),
                self._prompts.reply(row, "rejected", prompt),
            )
        if is_conversation(chosen):
            return self._parted_conversations(row)
        first, second = text_of(row, "chosen", chosen), text_of(row, "rejected", rejected)
        self._prompts.keep_style(row, "strings")
        if first == second:
            raise SkipRecordError(EQUAL)
        if not is_transcript(first) and not is_transcript(second):
            self._remarks.add("common beginning", row.place)
            better, worse = part_common(first, second)
            return better.prompt, (better.completion, worse.completion)
        if not (is_transcript(first) and is_transcript(second)):
            raise SkipRecordError(PROMPTS_DIFFER)
        better, worse = part_transcript(first), part_transcript(second)
        if better.prompt != worse.prompt:
            raise SkipRecordError(PROMPTS_DIFFER)
        if HUMAN in better.completion or HUMAN in worse.completion:
            raise SkipRecordError(GOES_ON)
        return better.prompt, (better.completion, worse.completion)

    def _parted_conversations(self, row: Row) -> tuple[Prompt, tuple[str, str]]:
        """The prompt of two whole conversations that differ in their last turn alone."""
        (before, better), (before_worse, worse) = (
            self._prompts.parted_conversation(row, field) for field in ("chosen", "rejected")
        )
        if better is None or worse is None:
            raise SkipRecordError(NO_ANSWER)
        if before != before_worse:
            raise SkipRecordError(PROMPTS_DIFFER)
        return before, (better, worse)


def has(row: Row, *names: str) -> bool:
    """Whether all these fields are there and not null: tables of several forms fill the others' columns with null."""
    return all(row.fields.get(name) is not None for name in names)


def _refuse_blank(answers: tuple[str, ...]) -> None:
    for answer in answers:
        answer_of(answer)


def _refuse_equal(answers: tuple[str, ...], tiers: Tiers) -> None:
    """Raise `SkipRecordError` where the same answer is both better and worse."""
    of_tier = [{answers[index] for index in tier} for tier in tiers]
    if sum(map(len, of_tier)) != len(set(answers)):
        raise SkipRecordError(EQUAL if len(answers) == 2 else EQUAL_RANKED)


def _is_texts(value: object) -> bool:
    """Whether a value is a list of answers rather than one of messages."""
    return isinstance(value, list) and any(isinstance(text, str) for text in value)


def _is_whole(value: object) -> bool:
    """Whether a list of messages is a whole conversation rather than the answer alone."""
    return isinstance(value, list) and len(value) > 1
