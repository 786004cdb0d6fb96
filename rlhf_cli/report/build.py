"""Writes reports: `report.html`, one file that needs nothing else, and `report.json` with its figures."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from rlhf_cli.errors import DiskError, RLHFError
from rlhf_cli.files import WrittenFiles, write_whole
from rlhf_cli.pipeline.comparison_text import comparison_text
from rlhf_cli.pipeline.run_comparison import RunComparison, compare_runs
from rlhf_cli.plotting import has_matplotlib
from rlhf_cli.progress import say, warn
from rlhf_cli.report.gather import RunFiles, read_run
from rlhf_cli.report.model_card import write_cards
from rlhf_cli.report.page import Page, page_of, render

REPORT, PLAIN = "report.html", "report.json"


@dataclasses.dataclass(frozen=True)
class Report:
    """A report that was written.

    Attributes:
        page: what it shows.
        html: the page.
        plain: the same figures as JSON, beside it.
    """

    page: Page
    html: Path
    plain: Path


def write_report(folders: Sequence[Path], output: Path) -> Report:
    """Write the report of a run, or of several that are compared, and the cards of their models.

    Args:
        folders: run directories.
        output: the HTML file; the JSON file beside it has the same name with `.json`.

    Raises:
        UsageError: a folder is not a run directory.
        DataError: an artifact is damaged.
        DiskError: the files cannot be written.
    """
    runs = [read_run(folder) for folder in folders]
    comparison = _comparison(runs) if len(runs) > 1 else None
    page = page_of(runs, comparison, "" if comparison is None else comparison_text(comparison, has_sentences=False))
    plain = output.with_suffix(".json")
    content = {
        "verdict": dataclasses.asdict(page.verdict),
        "made": list(page.made),
        "runs": [_plain(run) for run in runs],
    }
    if comparison is not None:
        content["comparison"] = comparison.to_json()
    try:
        write_whole(output, render(page))
        write_whole(plain, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        for run in runs:
            write_cards(run)
    except OSError as error:
        raise DiskError(
            f"cannot write {output}: {error.strerror or error}", hint="name another file with `--output FILE`"
        ) from error
    return Report(page, output, plain)


def write_charts(report: Report) -> Path | None:
    """Write every chart of a report as a PNG file, into the folder `NAME-charts` beside `NAME.html`.

    Files of an earlier report are removed, as far as they are as it wrote them: `charts.json` there has their hashes.

    Returns:
        The folder; None if there is no chart, or without matplotlib, which a message says.

    Raises:
        DiskError: a file cannot be written.
    """
    charts = [chart for section in report.page.sections for chart in section.charts]
    folder = report.html.with_name(f"{report.html.stem}-charts")
    if charts and not has_matplotlib():
        say(f"no {folder.name}/*.png: matplotlib is not installed (`pip install 'rlhf-cli[plots]'`)")
        return None
    from rlhf_cli.charts.png import write_png

    try:
        written = WrittenFiles(folder / "charts.json")
        if charts:
            folder.mkdir(exist_ok=True)
        for chart in charts:
            write_png(chart, folder / f"{chart.file_name}.png")
        for removed in written.replace([f"{chart.file_name}.png" for chart in charts]):
            say(f"removed {folder / removed}: of the report before, and not in this one")
    except OSError as error:
        raise DiskError(
            f"cannot write to {folder}: {error.strerror or error}", hint="name another file with `--output FILE`"
        ) from error
    return folder if charts else None


def _comparison(runs: Sequence[RunFiles]) -> RunComparison | None:
    """Compare the runs, if they can be; else the report shows them side by side, and a warning says why."""
    try:
        return compare_runs([str(run.folder) for run in runs])
    except RLHFError as error:
        warn(f"the runs are not compared: {error.message}")
        return None


def _plain(run: RunFiles) -> dict[str, object]:
    return {
        "run": run.name,
        "stages": {
            stage: {"metrics": manifest.metrics, "content_sha256": manifest.content_digest, "seconds": manifest.seconds}
            for stage, manifest in run.manifests.items()
        },
        "evaluation": run.evaluation,
        "reward_model": run.quality,
        "best_of_n": run.best_of_n,
        "health": run.health,
        "detections": list(run.detections),
        "label_warnings": {
            stage: [dataclasses.asdict(one) for one in found] for stage, found in run.label_warnings.items() if found
        },
        "settings": run.settings,
    }
