"""`rlhf label export`: write labels as rankings, preferences, or the format of another tool."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from rlhf_cli.cli.completion import run_directories

if TYPE_CHECKING:
    from rlhf_cli.data.records import Ranking
    from rlhf_cli.labeling.aggregation import Method
    from rlhf_cli.labeling.exports.formats import ExportFormat
    from rlhf_cli.labeling.label_records import LabelRecord

_FORMATS = "rankings, labels, preferences, conversations, rewardbench, label-studio or argilla"
_METHODS = "individual, majority, bradley-terry or plackett-luce"


def export(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="WHERE",
            help="Run directory, label store (*.sqlite), labels.jsonl or rankings file.",
            autocompletion=run_directories,
        ),
    ],
    format_: Annotated[
        str, typer.Option("--format", metavar="FORMAT", help=f"{_FORMATS}; see docs/label-formats.md.")
    ] = "rankings",
    aggregation: Annotated[
        str, typer.Option(metavar="METHOD", help=f"How to combine several annotators' labels of an item: {_METHODS}.")
    ] = "individual",
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Output file. Default: stdout.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="With --out: print counts as one JSON object.")] = False,
) -> None:
    """Export labels as rankings, TRL preferences, or the format of another tool. The output is deterministic."""
    from rlhf_cli.cli.label.output import write_text
    from rlhf_cli.errors import UsageError
    from rlhf_cli.labeling.aggregation import METHODS, aggregate, aggregate_rankings, check_installed
    from rlhf_cli.labeling.exports.formats import FORMATS, export_labels, export_rankings
    from rlhf_cli.plain_text import printable
    from rlhf_cli.progress import say, warn

    name = cast("ExportFormat", _one_of("--format", format_, FORMATS))
    method = cast("Method", _one_of("--aggregation", aggregation, METHODS))
    if as_json and out is None:
        raise UsageError("`--json` needs an output file, because the data goes to stdout", hint="add `--out FILE`")
    if name == "labels" and method != "individual":
        raise UsageError("`--aggregation` has no effect with `--format labels`, which holds individual labels")
    check_installed(method)
    labels, rankings = _load(source, individual=name == "labels", aggregates=method != "individual")
    if name == "labels":
        exported, count = export_labels(labels or ()), len(labels or ())
    else:
        aggregated = aggregate_rankings(rankings, method) if labels is None else aggregate(labels, method)
        if not aggregated:
            warn(f"{source} has no rankings yet; the exported file is empty")
        exported, count = export_rankings(aggregated, name), len(aggregated)
    for sentence in exported.lost:
        warn(f"this format cannot hold everything: {printable(sentence)}")
    write_text(exported.text(), out)
    say(f"{name}: {count:,} {'labels' if name == 'labels' else 'rankings'} in {len(exported.rows):,} records")
    if as_json:
        typer.echo(json.dumps({"path": str(out), "format": name, "labels": count, "records": len(exported.rows)}))
    elif out is not None:
        typer.echo(out)


def _one_of(option: str, value: str, known: tuple[str, ...]) -> str:
    """Return the value; raise `UsageError` with the closest known value if it is unknown."""
    import difflib

    from rlhf_cli.errors import UsageError

    if value in known:
        return value
    near = difflib.get_close_matches(value, known, n=1)
    raise UsageError(
        f"unknown value `{option} {value}`" + (f", did you mean `{near[0]}`?" if near else ""),
        hint=f"valid values: {', '.join(known)}",
    )


def _load(source: Path, *, individual: bool, aggregates: bool) -> tuple[list[LabelRecord] | None, list[Ranking]]:
    """Labels of a run, a store or a labels.jsonl; otherwise the rankings of a run or a file.

    For a finished run these are the rankings its reward model is trained on, unless they are aggregated again.
    """
    from rlhf_cli.data.sources import read_records
    from rlhf_cli.errors import UsageError
    from rlhf_cli.labeling.label_sources import labels_of, store_of
    from rlhf_cli.progress import warn

    rankings = source / "label" / "rankings.jsonl"
    has_labels = (source / "label" / "labels.jsonl").is_file() and (individual or aggregates)
    if store_of(source) is not None or has_labels or _holds_labels(source):
        return labels_of(source), []
    file = rankings if rankings.is_file() else source
    if individual:
        raise UsageError(
            f"{file} holds rankings, but `--format labels` exports individual labels",
            hint="use `--format rankings`, or name a run directory with labels by annotators or judges",
        )
    # Skipped records are reported, not limited: `data.max_skip` matters to whoever trains on them.
    loaded = read_records(str(file), "ranking", keep_blank=True, max_skip=1.0)
    for line in [*loaded.warnings, *loaded.skips.warnings(loaded.total, str(file))]:
        warn(line)
    return None, loaded.records


def _holds_labels(source: Path) -> bool:
    from rlhf_cli.data.formats import labels
    from rlhf_cli.data.readers.resolve import rows_of

    return source.is_file() and labels.matches(next(rows_of(str(source))).fields)
