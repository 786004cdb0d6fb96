"""Choice tasks of Prodigy: a text, `options`, and in `accept` the ids of those that the annotator chose.

The chosen options are above the others. `{"accept": {...}, "reject": {...}}` is a comparison, see `comparisons`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rlhf_cli.data.formats.common import ImportOptions, Part, new_row, objects_of, prompt_name
from rlhf_cli.data.parsing.conversations import text_of
from rlhf_cli.data.readers.rows import Row, listed, shown
from rlhf_cli.data.skips import OmitRecordError

_OWN = ("options", "accept", "answer", "_view_id", "_annotator_id", "_session_id", "config")


def matches(fields: Mapping[str, object]) -> bool:
    """Whether a row is a task with options to choose from."""
    options = fields.get("options")
    return (
        isinstance(options, list)
        and "accept" in fields
        and all(isinstance(one, dict) and "id" in one for one in options)
    )


def convert(row: Row, options: ImportOptions) -> Iterator[Part]:
    """Yield the ranking of a task; the completions alone if nobody chose and unranked ones are accepted."""
    options.warnings.add("prodigy", row.location)
    texts: dict[str, object] = {}
    for where, option in objects_of(row, "options", row.fields["options"]):
        identifier = str(option["id"])
        if identifier in texts:
            raise row.error(f"`options` has the id {shown(identifier)} twice", "give each option its own id")
        texts[identifier] = text_of(row, f"{where}.text", option.get("text"))
    ours = {"prompt": _prompt(row, options), "completions": list(texts.values())}
    accepted = row.fields["accept"]
    chosen = {str(one) for one in accepted} if isinstance(accepted, list) else None
    if chosen is None or not chosen <= texts.keys():
        raise row.error(
            f"`accept` is {shown(accepted)}; a list of ids is expected, of {listed(list(texts))}",
            "list the ids of the chosen options: `[]` if none was chosen",
        )
    tiers = [[index for index, one in enumerate(texts) if (one in chosen) == is_best] for is_best in (True, False)]
    is_accepted = row.fields.get("answer", "accept") == "accept"
    if is_accepted and all(tiers):
        annotator = row.fields.get("_annotator_id") or row.fields.get("_session_id")
        yield new_row(row, "", {**ours, "ranking": tiers, "annotator": annotator})
    elif options.unranked:
        yield new_row(row, "", ours)
    else:
        raise OmitRecordError("no verdict" if is_accepted else "not accepted")


def _prompt(row: Row, options: ImportOptions) -> object:
    """The prompt: a field of the task, or the text in its `input`."""
    given = row.fields.get("input")
    if isinstance(given, dict) and isinstance(given.get("text"), str) and "prompt" not in options.columns:
        return given["text"]
    fields = {name: value for name, value in row.fields.items() if name not in _OWN and not name.startswith("_")}
    return fields[prompt_name(row, fields, (), options)]
