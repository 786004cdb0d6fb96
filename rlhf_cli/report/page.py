"""The page of a report: tiles, sections, samples and how to repeat it, as plain values that the template prints."""

from __future__ import annotations

import importlib.resources
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jinja2
from markupsafe import Markup, escape

from rlhf_cli.charts.chart import Chart
from rlhf_cli.charts.svg import svg
from rlhf_cli.intervals import percent, percent_span
from rlhf_cli.pipeline.manifest import Manifest
from rlhf_cli.pipeline.record import recipe_of
from rlhf_cli.pipeline.run_comparison import RunComparison
from rlhf_cli.quoting import word
from rlhf_cli.report.curves import reward_against_kl, training_charts
from rlhf_cli.report.gather import RunFiles, differing
from rlhf_cli.report.made import how_it_was_made
from rlhf_cli.report.samples import Sample, samples, samples_note
from rlhf_cli.report.tables import Table, changes, score_tables, text_tables
from rlhf_cli.report.texts import shortened
from rlhf_cli.report.verdict import Verdict, deciding, first_pair, outcomes_of, verdict, verdict_on_comparison
from rlhf_cli.stages.reward_model.quality_charts import quality_charts
from rlhf_cli.training.monitoring.stage_charts import CAPTIONS, COLORS

_AGAINST_KL = (
    "A reward that rises while the judge's score falls is over-optimization. Where `rlhf best-of-n` was run with a "
    "gold function, its score is drawn here too; stop where it is highest."
)


@dataclass(frozen=True)
class Tile:
    """A figure at the top of the page."""

    label: str
    value: str
    note: str


@dataclass(frozen=True)
class Section:
    """Text, tables and charts under one heading."""

    title: str
    text: Sequence[str] = ()
    tables: Sequence[Table] = ()
    charts: Sequence[Chart] = ()


@dataclass(frozen=True)
class Repeat:
    """How to repeat a run."""

    text: Sequence[str]
    commands: str
    stages: Sequence[Sequence[str]]
    settings: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Compared:
    """A comparison of several runs: the table as the terminal shows it."""

    table: str


@dataclass(frozen=True)
class Page:
    """Everything that the template prints."""

    title: str
    subtitle: str
    made: Sequence[str]
    names: Sequence[str]
    verdict: Verdict
    tiles: Sequence[Tile]
    sections: Sequence[Section]
    samples: Sequence[Sample]
    samples_note: str
    repeat: Repeat
    footer: str
    comparison: Compared | None = None
    differing: Sequence[tuple[str, Sequence[str]]] = field(default=())


def page_of(runs: Sequence[RunFiles], comparison: RunComparison | None, table: str) -> Page:
    """Return the page of one run, or of the first of several with a comparison of all.

    Args:
        runs: at least one.
        comparison: of several runs that are evaluated.
        table: the comparison as text.
    """
    runs = _in_colors(runs, comparison)
    run = runs[0]
    last = list(run.manifests.values())[-1]
    versions = last.versions
    return Page(
        title=" and ".join(one.name for one in runs) if len(runs) <= 3 else f"{run.name} and {len(runs) - 1} others",
        subtitle=f"{'RLHF run' if len(runs) == 1 else 'RLHF runs'}, finished {last.finished[:10]}",
        made=_made(runs),
        names=[one.name for one in runs],
        verdict=verdict(run) if comparison is None else verdict_on_comparison(runs, comparison),
        tiles=tiles(run) if len(runs) == 1 else (),
        sections=[section for section in _sections(runs, comparison) if section.charts or section.tables],
        samples=samples(run) if len(runs) == 1 else (),
        samples_note=samples_note(run),
        repeat=repeat(runs),
        footer=f"Written by rlhf {versions['rlhf']} from the files of {run.folder}."
        " This page loads nothing from the network.",
        comparison=None if comparison is None else Compared(table),
        differing=[(name, [_short(value) for value in values]) for name, values in differing(runs)]
        if len(runs) > 1
        else (),
    )


def _made(runs: Sequence[RunFiles]) -> list[str]:
    """Return how the models were made: of several runs by name, unless it is the same for all."""
    found = [(run.name, how_it_was_made(run)) for run in runs]
    if len({text for _, text in found}) == 1:
        return [text for _, text in found[:1] if text]
    return [f"`{name}`: {text}" for name, text in found if text]


def _in_colors(runs: Sequence[RunFiles], comparison: RunComparison | None) -> list[RunFiles]:
    """Give the runs of a group one color, or each its own where they are not compared."""
    if comparison is None:
        return [replace(run, group=number) for number, run in enumerate(runs)]
    groups = {run.folder: number for number, group in enumerate(comparison.groups) for run in group.runs}
    return [replace(run, group=groups[run.folder]) for run in runs]


def render(page: Page) -> str:
    """Return the page as HTML; every value is escaped but our own charts."""
    assets = importlib.resources.files("rlhf_cli.report") / "assets"
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"code": _code, "svg": svg}
    template = environment.from_string((assets / "report.html.j2").read_text(encoding="utf-8"))
    style = (assets / "report.css").read_text(encoding="utf-8")
    return template.render(page=page, style=Markup(style))  # noqa: S704  (our own)


def _code(text: str) -> Markup:
    """Return a text with what stands between backquotes as code."""
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(text))))  # noqa: S704  (escaped)


def tiles(run: RunFiles) -> list[Tile]:
    """Return the figures at the top."""
    found = []
    pair = first_pair(run)
    if pair is not None:
        assert run.evaluation is not None
        rate, models = deciding(pair), run.evaluation["models"]
        note = f"95%: {percent_span(rate['low'], rate['high'])}; 50% means equal{_outcomes(pair)}"
        found.append(Tile("preferred to the baseline", percent(rate["value"]), note))
        for name, label in (("gold", "gold score"), ("reward", "reward")):
            if name in pair["differences"]:
                change = pair["differences"][name]
                sides = " → ".join(f"{models[pair[side]][name]['value']:.2f}" for side in ("baseline", "policy"))
                found.append(Tile(label, f"{_difference(change):+.2f}", f"{sides}; 95%: {_span(change)}"))
        if (kl := pair.get("kl_nats", {}).get("k1")) is not None:
            found.append(Tile("KL to the baseline", f"{kl['value']:.1f} nats", f"per completion; 95%: {_span(kl)}"))
        length = [models[pair[side]]["tokens"]["value"] for side in ("baseline", "policy")]
        found.append(
            Tile("length", f"{length[1] / max(length[0], 1e-9):.2f} times", f"{length[0]:.0f} → {length[1]:.0f} tokens")
        )
    if "train-rm" in run.manifests:
        metrics = run.manifests["train-rm"].metrics
        if (accuracy := metrics.get("rm/accuracy")) is not None:
            span = percent_span(metrics.get("rm/accuracy_low"), metrics.get("rm/accuracy_high"))
            note = f"95%: {span}; 50% is chance"
            found.append(Tile("accuracy of the reward model", percent(accuracy), note))
    return found


def _outcomes(pair: Mapping[str, Any]) -> str:
    return f". {outcomes_of(pair)}" if pair.get("outcomes") else ""


def _difference(change: Mapping[str, Any]) -> float:
    return float(change["value"])


def _span(measure: Mapping[str, Any]) -> str:
    if measure.get("low") is None:
        return "not known"
    return f"{measure['low']:.2f} to {measure['high']:.2f}"


def _sections(runs: Sequence[RunFiles], comparison: RunComparison | None) -> list[Section]:
    run = runs[0]
    own_rewards = comparison is not None and any("reward" not in pair.measures for pair in comparison.pairs)
    apart = ["The runs have different reward models: their rewards are not on one scale."] if own_rewards else []
    found = []
    if len(runs) == 1:
        found.append(Section("Is it better?", _pair_texts(run), score_tables(run)))
        found.append(Section("What changed in the completions", changes(run), text_tables(run)))
    against = reward_against_kl(runs)
    if against is not None:
        found.append(
            Section(
                "Reward against distance from the starting model",
                apart or [_AGAINST_KL],
                charts=[against],
            )
        )
    lines = [
        *apart,
        *(line for one in runs for line in _detections(one)),
        *([f"{COLORS} {CAPTIONS}"] if len(runs) == 1 else []),
    ]
    found.append(Section("PPO", lines, charts=training_charts(runs, "ppo")))
    found.append(Section("Reward model", charts=[*_quality(runs), *training_charts(runs, "train-rm")]))
    found.append(Section("Supervised fine-tuning", charts=training_charts(runs, "sft")))
    if len(runs) == 1:
        found.append(Section("Labels", tables=_summary_table(run.manifests.get("label"))))
    return found


def _pair_texts(run: RunFiles) -> list[str]:
    return [] if run.evaluation is None else [pair["conclusion"] for pair in run.evaluation["pairs"]]


def _quality(runs: Sequence[RunFiles]) -> list[Chart]:
    return quality_charts(runs[0].quality) if len(runs) == 1 and runs[0].quality is not None else []


def _detections(run: RunFiles) -> list[str]:
    found = []
    for row in run.detections:
        quotes = "; ".join(f"“{one['completion']}”" for one in row.get("completions", [])[:2])
        seen = f"step {row['step']:,}, `{row['detector']}`: {row['seen']}{f': {quotes}' if quotes else ''}"
        found.append(f"`{run.name}`, {seen}")
    return found


def _summary_table(manifest: Manifest | None) -> list[Table]:
    return [] if manifest is None or not manifest.summary else [Table((), manifest.summary)]


def repeat(runs: Sequence[RunFiles]) -> Repeat:
    """Return how to repeat the runs; hashes and settings are those of a single one."""
    run = runs[0]
    versions = ", ".join(f"{name} {version}" for name, version in list(run.manifests.values())[-1].versions.items())
    equal = f"With the same data and versions ({versions}) on the same kind of machine, all hashes are the same."
    recorded = [one for one in runs if all(recipe_of(one.folder, stage).is_file() for stage in one.manifests)]
    missing = "The run directory does not hold the recipes of all stages, so no command repeats it."
    is_single = len(runs) == 1
    return Repeat(
        text=[equal if recorded else missing],
        commands="\n".join(f"rlhf reproduce {word(one.folder)}" for one in recorded),
        stages=[
            (stage, manifest.finished, f"{manifest.seconds:,.0f}", manifest.content_digest)
            for stage, manifest in run.manifests.items()
            if is_single
        ],
        settings=[(name, _short(value)) for name, value in run.settings.items() if is_single],
    )


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return shortened(text, 200)[0]
