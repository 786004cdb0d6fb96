"""Labels in the formats of other tools and of `rlhf label`: recognized by their fields, converted to our own rows.

One row of another tool may hold several rankings (a tree, a task with several annotators) or none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from rlhf_cli.data.formats import argilla, comparisons, label_studio, labels, oasst, prodigy
from rlhf_cli.data.formats.common import ImportOptions, Part
from rlhf_cli.data.readers.rows import Row
from rlhf_cli.data.records import Kind
from rlhf_cli.errors import DataError

__all__ = ["ImportOptions", "Part", "convert_row", "format_of"]


@dataclass(frozen=True)
class LabelFormat:
    """How another tool writes labels.

    Attributes:
        name: for messages.
        matches: whether a row's fields are in this format.
        convert: turns a row into our own rows.
    """

    name: str
    matches: Callable[[Mapping[str, object]], bool]
    convert: Callable[[Row, ImportOptions], Iterator[Part]]


_OURS = LabelFormat("labels of `rlhf label`", labels.matches, labels.convert)
_FORMATS = (
    _OURS,
    LabelFormat("an OpenAssistant tree", oasst.is_tree, oasst.convert),
    LabelFormat("a Label Studio task", label_studio.matches, label_studio.convert),
    LabelFormat("an Argilla record", argilla.matches, argilla.convert),
    LabelFormat("a Prodigy choice task", prodigy.matches, prodigy.convert),
)
_COMPARED = frozenset({"chosen", "rejected", "completions", "ranking"})
_DEMONSTRATION = frozenset({"messages", "conversations", "text", "completion", "output"})
"""Fields that make a row a demonstration, whatever else it holds."""


def format_of(row: Row) -> LabelFormat | None:
    """The format of a row; None for our own records.

    Raises:
        DataError: the row matches two formats, or one that cannot be read.
    """
    found = [known for known in _FORMATS if known.matches(row.fields)]
    if len(found) > 1:
        raise row.error(
            f"this may be {' or '.join(known.name for known in found)}", "remove the fields of the one that it is not"
        )
    if not found and oasst.is_message(row.fields):
        raise row.error(
            "this is one message of OpenAssistant, without its replies",
            "use the file of whole trees (`..._trees.jsonl.gz`), where `replies` are nested",
        )
    return found[0] if found else None


def convert_row(row: Row, kind: Kind, options: ImportOptions) -> Iterator[Part]:
    """Yield a row as our own rows; a row that is one already is yielded as it is.

    Args:
        row: in any format.
        kind: of the records to make; every format can become rankings and candidates.
        options: for the formats.

    Raises:
        DataError: the row breaks the rules of its format, or holds no records of this kind.
    """
    if options.comparison is not None and kind != "demonstration":
        described = comparisons.given(row, options.comparison, is_prompt=kind == "prompt")
        if described is not None:
            yield from comparisons.convert(row, described, options)
            return
    found = format_of(row)
    if found is None:
        yield from _comparison_or_row(row, kind, options)
    elif kind in ("preference", "ranking", "candidates"):
        yield from found.convert(row, options)
    elif found is _OURS:
        yield row  # its `prompt` is the same field as in our own records
    else:
        raise _other_kind(row, found.name, kind)


def _comparison_or_row(row: Row, kind: Kind, options: ImportOptions) -> Iterator[Part]:
    is_mapped = not _COMPARED.isdisjoint(options.columns)  # what the user says goes before what is recognized
    is_demonstration = kind == "demonstration" and not _DEMONSTRATION.isdisjoint(row.fields)
    known = None if is_mapped or is_demonstration else comparisons.recognize(row)
    if known is None:
        yield row
    elif kind == "demonstration":
        raise _other_kind(row, f"a comparison ({known.name})", kind)
    else:
        yield from comparisons.convert(row, known, options)


def _other_kind(row: Row, name: str, kind: Kind) -> DataError:
    return row.error(
        f"this is {name}, which holds no {kind}s",
        "`rlhf label import FILE --out rankings.jsonl` converts it to rankings, whose prompts every stage can read",
    )
