"""`labels.jsonl` as `rlhf label` writes it: a line a label, with skipped and flagged items, repeats and gold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rlhf_cli.data.formats.common import Part, Wanted, part
from rlhf_cli.data.records import MARGINS
from rlhf_cli.data.rows import Row, shown

_OUTCOMES = ("ranked", "skipped", "flagged")
_PURPOSES = ("label", "repeat", "gold")


def is_it(fields: Mapping[str, object]) -> bool:
    """Whether a row is a label of ours."""
    return {"item", "completions", "annotator", "outcome", "purpose"} <= fields.keys()


def parts(row: Row, wanted: Wanted) -> Iterator[Part]:
    """The ranking of an ordinary label; as candidates, the answers of any."""
    fields = row.fields
    for name, known in (("outcome", _OUTCOMES), ("purpose", _PURPOSES)):
        if fields[name] not in known:
            raise row.error(f"`{name}` is {shown(fields[name])}; one of {', '.join(known)} is expected")
    is_ranking = fields["outcome"] == "ranked"
    if not wanted.unranked and not (is_ranking and fields["purpose"] == "label"):
        wanted.remarks.add("labels not used", row.place)
        return
    kept = {"prompt": fields.get("prompt"), "completions": fields["completions"]}
    if is_ranking:
        margin = _margin(row)
        kept |= {"ranking": fields.get("ranking"), "annotator": fields["annotator"], "margin": margin}
    yield part(row, "", kept, may_be_blank=True)


def _margin(row: Row) -> float | None:
    strength = row.fields.get("strength")
    if strength is None:
        return None
    if not isinstance(strength, int) or isinstance(strength, bool) or not 1 <= strength <= len(MARGINS):
        raise row.error(f"`strength` is {shown(strength)}; 1 to {len(MARGINS)} is expected, or null")
    return MARGINS[strength - 1]
