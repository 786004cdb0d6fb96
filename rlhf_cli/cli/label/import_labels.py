"""`rlhf label import`: convert labels of other tools into rankings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from rlhf_cli.cli.options import MaxSkip, Settings


def import_(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="File, folder or hub data set: rankings, preferences, ratings, published comparisons, or exports of "
            "labeling tools; docs/label-formats.md lists all formats.",
        ),
    ],
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Output file. Default: stdout.")] = None,
    settings: Settings = None,
    max_skip: MaxSkip = None,
    as_json: Annotated[bool, typer.Option("--json", help="With --out: print counts as one JSON object.")] = False,
) -> None:
    """Convert labels in any supported format into rankings, and report what is skipped.

    `--set` accepts `data.columns`, `data.comparison` and `data.max_skip`.
    """
    from rlhf_cli.cli.label.output import write_text
    from rlhf_cli.data.sources import read_records
    from rlhf_cli.errors import UsageError
    from rlhf_cli.labeling.exports.formats import export_rankings
    from rlhf_cli.progress import say, warn
    from rlhf_cli.recipe.loader import load_recipe
    from rlhf_cli.recipe.overrides import override

    if as_json and out is None:
        raise UsageError("`--json` needs an output file, because the data goes to stdout", hint="add `--out FILE`")
    for text in settings or ():
        if not text.startswith(("data.columns", "data.comparison", "data.max_skip")):
            raise UsageError(
                f"`--set {text}` has no effect here",
                hint="`label import` accepts `data.columns`, `data.comparison` and `data.max_skip`",
            )
    given = [] if max_skip is None else [override("data.max_skip", max_skip, f"--max-skip {max_skip}")]
    data = load_recipe(None, settings or (), given).recipe.data
    loaded = read_records(source, "ranking", columns=data.columns, comparison=data.comparison, max_skip=data.max_skip)
    for line in [*loaded.warnings, *loaded.skips.warnings(loaded.total, source)]:
        warn(line)
    write_text(export_rankings(loaded.records, "rankings").text(), out)
    completions = sum(len(ranking.completions) for ranking in loaded.records)
    say(f"{len(loaded.records):,} rankings of {completions:,} completions")
    if as_json:
        counts = {"rankings": len(loaded.records), "completions": completions, "skipped": loaded.skips.counts}
        typer.echo(json.dumps({"path": str(out), **counts}))
    elif out is not None:
        typer.echo(out)
