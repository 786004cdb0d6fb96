"""`rlhf attention bench`: measure attention backends against torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from rlhf_cli.cli.options import Json


def bench(
    backend: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Backend to measure; repeatable. Default: all that are available."),
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SHAPE",
            help="Batch x heads x tokens x head size, such as 4x32/8x2048x128 (32 heads, 8 key heads); decode:... "
            "measures one query per sequence over that many keys. Repeatable.",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="float32, bfloat16 or float16. Default: bfloat16 on CUDA, float32 elsewhere."
        ),
    ] = None,
    device: Annotated[str, typer.Option(metavar="NAME", help="auto, cpu or cuda.")] = "auto",
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write a plot (.png, .svg or .pdf).")] = None,
    as_json: Json = False,
) -> None:
    """Measure time and memory of attention backends.

    They are compared with torch's own kernels.
    """
    from rlhf_cli.attention import bench as benchmark
    from rlhf_cli.attention import bench_report
    from rlhf_cli.errors import UsageError
    from rlhf_cli.models.device import resolve_device
    from rlhf_cli.plotting import pyplot

    if plot is not None:
        pyplot()  # fail before measuring if matplotlib is missing
        if not plot.parent.is_dir():
            raise UsageError(f"cannot write a plot to {plot}: the folder {plot.parent} does not exist")
    target = resolve_device(device)
    dtype = dtype or ("bfloat16" if target.type == "cuda" else "float32")
    if dtype not in benchmark.DTYPES:
        raise UsageError(f"`--dtype` must be one of {', '.join(benchmark.DTYPES)}, got `{dtype}`")
    shapes = [benchmark.Shape.parse(text) for text in shape or benchmark.SHAPES[target.type]]
    found = benchmark.measure(shapes, backends=backend or [], device=target, dtype=benchmark.DTYPES[dtype])
    typer.echo(json.dumps(found, indent=2) if as_json else bench_report.as_table(found))
    if plot is not None:  # last, so that the table is printed even if the plot cannot be written
        bench_report.plot(found, plot)
