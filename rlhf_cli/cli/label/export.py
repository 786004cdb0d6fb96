"""`rlhf label export`: labels as rankings, preferences, or what other tools read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

if TYPE_CHECKING:
    from rlhf_cli.data.records import Ranking
    from rlhf_cli.labeling.aggregation import How
    from rlhf_cli.labeling.exports.formats import Form
    from rlhf_cli.labeling.label_records import LabelRecord

_FORMS = "rankings, labels, preferences, conversations, rewardbench, label-studio or argilla"
_WAYS = "individual, majority, bradley-terry or plackett-luce"


def export(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="WHERE", help="A run directory, a label store (*.sqlite), labels.jsonl or any rankings."
        ),
    ],
    form: Annotated[str, typer.Option(metavar="FORM", help=f"{_FORMS}; docs/label-formats.md.")] = "rankings",
    merge: Annotated[
        str, typer.Option(metavar="HOW", help=f"Several people's labels of an item: {_WAYS}.")
    ] = "individual",
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Default: stdout.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="With --out: print counts as one JSON object.")] = False,
) -> None:
    """Write labels as rankings, as preferences for TRL, or in the form of another tool; same labels, same bytes."""
    from rlhf_cli.cli.label.output import write_text
    from rlhf_cli.errors import UsageError
    from rlhf_cli.labeling import aggregation as merging
    from rlhf_cli.labeling.exports import formats as exports
    from rlhf_cli.progress import printable, say, warn

    form_ = cast("Form", _one_of("--form", form, exports.FORMS))
    how = cast("How", _one_of("--merge", merge, merging.WAYS))
    if as_json and out is None:
        raise UsageError("`--json` tells of a file, and stdout is the data here", hint="name one with `--out`")
    if form_ == "labels" and how != "individual":
        raise UsageError("`--merge` has no effect with `--form labels`, which holds individual labels")
    merging.require(how)
    labels, rankings = _found(source, individual=form_ == "labels", merges=how != "individual")
    if form_ == "labels":
        exported, count = exports.export_labels(labels or ()), len(labels or ())
    else:
        merged = merging.merge_rankings(rankings, how) if labels is None else merging.merge(labels, how)
        if not merged:
            warn(f"{source}: nothing is ranked there yet; the file holds nothing")
        exported, count = exports.export_rankings(merged, form_), len(merged)
    for sentence in exported.lost:
        warn(f"lost in this form: {printable(sentence)}")
    write_text(exported.text(), out)
    say(f"{form_}: {count:,} {'labels' if form_ == 'labels' else 'rankings'} in {len(exported.rows):,} records")
    if as_json:
        typer.echo(json.dumps({"path": str(out), "form": form_, "labels": count, "records": len(exported.rows)}))
    elif out is not None:
        typer.echo(out)


def _one_of(option: str, value: str, known: tuple[str, ...]) -> str:
    """The value; raises `UsageError` with the nearest one where it is none of those known."""
    import difflib

    from rlhf_cli.errors import UsageError

    if value in known:
        return value
    near = difflib.get_close_matches(value, known, n=1)
    raise UsageError(
        f"`{option} {value}` is not known" + (f", did you mean `{near[0]}`?" if near else ""),
        hint=f"it takes {', '.join(known)}",
    )


def _found(source: Path, *, individual: bool, merges: bool) -> tuple[list[LabelRecord] | None, list[Ranking]]:
    """Labels of a run, a store or a labels.jsonl; or else the rankings that a run or a file has.

    Of a finished run, rankings are those that its reward model learns from, unless they are to be merged anew.
    """
    from rlhf_cli.data.sources import read_records
    from rlhf_cli.errors import UsageError
    from rlhf_cli.labeling.label_sources import labels_of, store_of
    from rlhf_cli.progress import warn

    rankings = source / "label" / "rankings.jsonl"
    has_labels = (source / "label" / "labels.jsonl").is_file() and (individual or merges)
    if store_of(source) is not None or has_labels or _holds_labels(source):
        return labels_of(source), []
    file = rankings if rankings.is_file() else source
    if individual:
        raise UsageError(
            f"{file} holds rankings, and `--form labels` is the record of individual labels",
            hint="export it as rankings, or name a run directory whose `label` is by people or judges",
        )
    # What is skipped is said; how much of it may be is for those to decide who train on it.
    loaded = read_records(str(file), "ranking", keep_blank=True, max_skip=1.0)
    for line in [*loaded.warnings, *loaded.skips.warnings(loaded.total, str(file))]:
        warn(line)
    return None, loaded.records


def _holds_labels(source: Path) -> bool:
    from rlhf_cli.data.formats import labels
    from rlhf_cli.data.readers.resolve import rows_of

    return source.is_file() and labels.matches(next(rows_of(str(source))).fields)
