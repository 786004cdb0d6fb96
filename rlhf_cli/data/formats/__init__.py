"""Labels as other tools and `rlhf label` write them: told by their fields, and turned into rows of our own forms.

One row of theirs may hold several rankings (a tree, a task with several annotators) or none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from rlhf_cli.data.formats import argilla, label_studio, labels, oasst
from rlhf_cli.data.formats.common import Part, Wanted
from rlhf_cli.data.records import Kind
from rlhf_cli.data.rows import Row

__all__ = ["Part", "Wanted", "form_of", "parts_of"]


@dataclass(frozen=True)
class Form:
    """How somebody else writes labels.

    Attributes:
        name: for messages.
        is_it: whether a row's fields are of this form.
        parts: the row as rows of ours.
    """

    name: str
    is_it: Callable[[Mapping[str, object]], bool]
    parts: Callable[[Row, Wanted], Iterator[Part]]


_OURS = Form("labels of `rlhf label`", labels.is_it, labels.parts)
_FORMS = (
    _OURS,
    Form("an OpenAssistant tree", oasst.is_tree, oasst.parts),
    Form("a Label Studio task", label_studio.is_it, label_studio.parts),
    Form("an Argilla record", argilla.is_it, argilla.parts),
)


def form_of(row: Row) -> Form | None:
    """The form that a row has, or None for one of our own.

    Raises:
        DataError: it may be of two forms, or is of one that cannot be read.
    """
    found = [form for form in _FORMS if form.is_it(row.fields)]
    if len(found) > 1:
        raise row.error(
            f"this may be {' or '.join(form.name for form in found)}", "take the fields of the other away from the file"
        )
    if not found and oasst.is_message(row.fields):
        raise row.error(
            "this is one message of OpenAssistant, without its replies",
            "take the file of whole trees (`..._trees.jsonl.gz`), where `replies` are nested",
        )
    return found[0] if found else None


def parts_of(row: Row, kind: Kind, wanted: Wanted) -> Iterator[Part]:
    """Rows of our own forms; a row that is one already stays as it is.

    Args:
        row: of any form.
        kind: what is to be made of it; rankings and candidates are made of every form.
        wanted: what the forms need to know.

    Raises:
        DataError: the row is not as its form has it, or holds no records of this kind.
    """
    form = form_of(row)
    if form is None:
        yield row
    elif kind in ("preference", "ranking", "candidates"):
        yield from form.parts(row, wanted)
    elif form is _OURS:
        yield row  # `prompt` stands there as it does in ours
    else:
        raise row.error(
            f"this is {form.name}, which holds no {kind}s",
            "`rlhf label import FILE --out rankings.jsonl` makes rankings of it, whose prompts are read everywhere",
        )
