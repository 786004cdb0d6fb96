"""`rlhf benchmark-rm`: score a reward model on RewardBench, RewardBench 2, RM-Bench and JudgeBench."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlhf_cli.cli.options import Json

if TYPE_CHECKING:
    from rlhf_cli.models.loading import ModelSource
    from rlhf_cli.rewards.benchmarks.scores import BenchmarkReport


def benchmark_rm(
    model: Annotated[
        str,
        typer.Argument(metavar="REWARD_MODEL", help="Output of `train-rm`, or a classifier: a folder or hub id."),
    ],
    data: Annotated[
        list[str],
        typer.Argument(metavar="DATA...", help="Benchmarks: files, folders or hub data sets."),
    ],
    template: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="Prompt template of a model that records none; see `data.prompt_template`."),
    ] = None,
    device: Annotated[str, typer.Option(metavar="NAME", help="auto, cpu or cuda.")] = "auto",
    precision: Annotated[str, typer.Option(metavar="NAME", help="float32 or bfloat16.")] = "float32",
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, help="Completions per forward pass.")] = 32,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write the result, as JSON.")] = None,
    as_json: Json = False,
) -> None:
    """Score a reward model on published benchmarks, by their own rules.

    RewardBench, RewardBench 2 (best of 4, ties), RM-Bench (3 x 3 styles) and JudgeBench are recognized by the columns
    in which they are published.
    """
    from rlhf_cli.files import write_whole
    from rlhf_cli.models.reward_model.loading import load_reward_model
    from rlhf_cli.rewards.benchmarks.formats import read_benchmark
    from rlhf_cli.rewards.benchmarks.run import score_benchmark
    from rlhf_cli.rewards.benchmarks.scores import benchmark_report

    source = _source(model, device, precision)
    benchmarks = [read_benchmark(one) for one in data]
    reward_model = load_reward_model(source, template=template)
    reports = [benchmark_report(one, score_benchmark(reward_model, one, batch_size=batch_size)) for one in benchmarks]
    content: dict[str, Any] = {"reward_model": model, "benchmarks": [report.to_json() for report in reports]}
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    if out is not None:
        write_whole(out, text + "\n")
    if as_json:
        typer.echo(text)
        return
    for report in reports:
        typer.echo("\n".join(_lines(report)))


def _source(model: str, device: str, precision: str) -> ModelSource:
    from rlhf_cli.errors import UsageError
    from rlhf_cli.models.device import resolve_device
    from rlhf_cli.models.loading import DTYPES, ModelSource

    if precision not in DTYPES:
        raise UsageError(f"`--precision {precision}`: {' or '.join(DTYPES)} is expected")
    dtype = DTYPES[precision]
    return ModelSource(model, device=resolve_device(device), dtype=dtype, precision=dtype)


def _lines(report: BenchmarkReport) -> list[str]:
    width = max(map(len, [*report.metrics, "score"]))
    rows = [
        f"  {name:<{width}}  {metric.value:6.1%}  {metric.low:6.1%} to {metric.high:6.1%}  {metric.prompts:,} prompts"
        for name, metric in [("score", report.score), *report.metrics.items()]
    ]
    return [f"{report.source}: {report.format}, {report.rows:,} rows; score: {report.score_is}", *rows]
