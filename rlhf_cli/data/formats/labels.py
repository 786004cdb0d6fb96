"""`labels.jsonl` as `rlhf label` writes it: one label per line, including skips, flags, repeats and gold items."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rlhf_cli.data.formats.common import ImportOptions, Part, new_row
from rlhf_cli.data.readers.rows import Row, shown
from rlhf_cli.data.records import MARGINS

_OUTCOMES = ("ranked", "skipped", "flagged")
_PURPOSES = ("label", "repeat", "gold")


def matches(fields: Mapping[str, object]) -> bool:
    """Whether a row is a label of `rlhf label`."""
    return {"item", "completions", "annotator", "outcome", "purpose"} <= fields.keys()


def convert(row: Row, options: ImportOptions) -> Iterator[Part]:
    """Yield the ranking of an ordinary label, or the completions of any label if unranked ones are accepted."""
    fields = row.fields
    for name, known in (("outcome", _OUTCOMES), ("purpose", _PURPOSES)):
        if fields[name] not in known:
            raise row.error(f"`{name}` is {shown(fields[name])}; one of {', '.join(known)} is expected")
    is_ranking = fields["outcome"] == "ranked"
    if not options.unranked and not (is_ranking and fields["purpose"] == "label"):
        options.warnings.add("labels not used", row.location)
        return
    kept = {"prompt": fields.get("prompt"), "completions": fields["completions"]}
    if is_ranking:
        margin = _margin(row)
        kept |= {"ranking": fields.get("ranking"), "annotator": fields["annotator"], "margin": margin}
    yield new_row(row, "", kept, may_be_blank=True)


def _margin(row: Row) -> float | None:
    strength = row.fields.get("strength")
    if strength is None:
        return None
    if not isinstance(strength, int) or isinstance(strength, bool) or not 1 <= strength <= len(MARGINS):
        raise row.error(f"`strength` is {shown(strength)}; 1 to {len(MARGINS)} is expected, or null")
    return MARGINS[strength - 1]
