"""The first records of a file as the stages read them: their tokens, which are trained, and why one is skipped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from rlhf_cli.data.chat_format import PromptFormat
from rlhf_cli.data.examples import reason_to_skip, tokenize
from rlhf_cli.data.parsing.fields import NO_COLUMNS, Columns
from rlhf_cli.data.records import Candidates, Demonstration, Kind, Prompt, PromptRecord, Ranking, Record, prompt_text
from rlhf_cli.data.rendering import common_length
from rlhf_cli.data.skips import Skip
from rlhf_cli.data.sources import iter_records
from rlhf_cli.data.warnings import WarningLog
from rlhf_cli.progress import warn
from rlhf_cli.settings.comparison import ComparisonSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Role = Literal["prompt", "trained", "completion", "end", "cut"]
"""prompt: read, not trained. trained: of a completion or an earlier turn in SFT. completion: as a reward model reads
it. end: the token that ends a completion, and what the template writes after it. cut: too long for the reward model."""

_EXCERPT = 80
_INCOMPLETE = "\ufffd"


@dataclass(frozen=True)
class Token:
    """One token, as text, with what it is for; characters of several tokens are shown at the last of them."""

    id: int
    text: str
    role: Role


@dataclass(frozen=True)
class RecordPreview:
    """A record in tokens.

    Attributes:
        location: `file:line`.
        sequences: name ("", or which completion it holds) -> its tokens; empty if the record cannot be read.
        skipped: why the stage skips the record, or None.
        excerpt: beginning of the record.
    """

    location: str
    sequences: Mapping[str, Sequence[Token]]
    skipped: str | None
    excerpt: str

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        sequences = [
            {"name": name, "tokens": [asdict(token) for token in tokens]} for name, tokens in self.sequences.items()
        ]
        return {"location": self.location, "skipped": self.skipped, "sequences": sequences}


@dataclass(frozen=True)
class Limits:
    """Lengths in tokens above which a stage skips a record, or a reward model cuts it.

    Attributes:
        max_prompt_tokens: of a prompt.
        max_length: of a prompt with its completion.
        context: that the model reads.
    """

    max_prompt_tokens: int
    max_length: int
    context: int


def preview_records(
    source: str,
    kind: Kind,
    prompt_format: PromptFormat,
    limits: Limits,
    *,
    count: int,
    all_turns: bool = True,
    columns: Columns = NO_COLUMNS,
    comparison: ComparisonSettings | None = None,
) -> list[RecordPreview]:
    """Tokenize the first records of a source, including skipped ones, as the stage that reads them does.

    Args:
        source: file, folder or hub data set.
        kind: of the records; demonstrations are shown as SFT trains on them, prompts as a policy reads them, all others
            as a reward model reads them.
        prompt_format: of the model.
        limits: of lengths.
        count: number of records.
        all_turns: SFT trains earlier turns of the assistant, too.
        columns: our field -> the file's.
        comparison: completion columns and a verdict.

    Raises:
        DataError: the source cannot be read, or the chat template refuses a record.
    """
    found: list[Record | Skip] = []
    warnings = WarningLog()
    for record in iter_records(
        source, kind, columns=columns, comparison=comparison, on_skip=found.append, warnings=warnings
    ):
        found.append(record)
        if len(found) >= count:
            break
    for line in warnings.lines(source):
        warn(line)
    first = found[0]
    if isinstance(first, Skip) and first.error is not None:
        raise first.error
    builder = _Builder(prompt_format, limits, all_turns)
    return [
        RecordPreview(one.location, {}, _reason(one), one.excerpt) if isinstance(one, Skip) else builder.preview(one)
        for one in found[:count]
    ]


def _reason(skip: Skip) -> str:
    return skip.reason if skip.error is None else f"{skip.reason}: {skip.error.message}"


@dataclass(frozen=True)
class _Builder:
    format: PromptFormat
    limits: Limits
    all_turns: bool

    def preview(self, record: Record) -> RecordPreview:
        sequences: dict[str, list[Token]] = {}
        if isinstance(record, Demonstration):
            sequences[""], skipped = self._demonstration(record)
        elif isinstance(record, PromptRecord):
            ids = self.format.prompt_ids(record.prompt)
            sequences[""] = self._tokens(ids, _roles(("prompt", len(ids))))
            longest = self.limits.max_prompt_tokens
            skipped = f"prompt longer than {longest:,} tokens" if len(ids) > longest else None
        else:
            for name, completion in zip(_names(record), record.completions, strict=True):
                sequences[name] = self._pair(record.prompt, completion)
            longest = max(map(len, sequences.values()))
            limit = self.limits.max_length
            skipped = f"prompt and completion longer than {limit:,} tokens" if longest > limit else None
        return RecordPreview(record.location, sequences, skipped, prompt_text(record.prompt)[:_EXCERPT])

    def _demonstration(self, record: Demonstration) -> tuple[list[Token], str | None]:
        is_pair = self.format.is_encoder_decoder
        example = tokenize(record, self.format, is_encoder_decoder=is_pair, all_turns=self.all_turns)
        ends = {stop - 1 for _, stop in example.earlier_turns} | {len(example) - 1}
        roles: list[Role] = ["trained" if counts else "prompt" for counts in example.is_trained()]
        for at in ends:
            if example.ids[at] in self.format.end_ids:
                roles[at] = "end"
        skipped = reason_to_skip(
            example,
            max_prompt_tokens=self.limits.max_prompt_tokens,
            max_length=self.limits.max_length,
            is_encoder_decoder=is_pair,
        )
        return self._tokens(example.ids, roles), skipped

    def _pair(self, prompt: Prompt, completion: str) -> list[Token]:
        ids = self.format.pair_ids(prompt, completion)
        start = common_length(self.format.prompt_ids(prompt), ids)
        stop = len(ids) if self.format.is_encoder else len(self.format.pair_ids(prompt, completion, ended=False))
        roles = _roles(("prompt", start), ("completion", stop - start), ("end", len(ids) - stop))
        if len(ids) > self.limits.context:
            front = self.format.kept_in_front(prompt, ids, self.limits.context)
            surplus = len(ids) - self.limits.context
            roles[front : front + surplus] = _roles(("cut", surplus))
        return self._tokens(ids, roles)

    def _tokens(self, ids: Sequence[int], roles: Sequence[Role]) -> list[Token]:
        texts = token_texts(self.format.tokenizer, ids)
        return [Token(id, text, role) for id, text, role in zip(ids, texts, roles, strict=True)]


def _roles(*parts: tuple[Role, int]) -> list[Role]:
    """Repeat each role as often as its number says."""
    return [role for role, length in parts for _ in range(length)]


def _names(record: Ranking | Candidates) -> list[str]:
    count = len(record.completions)
    if isinstance(record, Candidates):
        return [f"completion {number} of {count}" for number in range(1, count + 1)]
    return [f"completion {number} of {count}, rank {level + 1}" for number, level in enumerate(record.levels(), 1)]


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """Return the text of each token; the texts add up to that of the sequence.

    A character whose bytes are in several tokens belongs to the last of them.
    """
    texts: list[str] = []
    before: list[int] = []  # the last token that ended with a whole character, which decides about a leading space
    waiting: list[int] = []
    for id in ids:
        waiting.append(id)
        text, context = (tokenizer.decode(part, skip_special_tokens=False) for part in (before + waiting, before))
        assert isinstance(text, str)
        assert isinstance(context, str)
        is_whole = not text.endswith(_INCOMPLETE) or len(waiting) == _LONGEST_CHARACTER
        texts.append(text.removeprefix(context) if is_whole else "")
        if is_whole:
            before, waiting = [id], []
    if waiting:
        texts[-1] = _INCOMPLETE
    return texts


_LONGEST_CHARACTER = 4
"""Bytes, and so tokens, of the longest character in UTF-8."""
