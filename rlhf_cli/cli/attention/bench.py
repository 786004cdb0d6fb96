"""`rlhf attention bench`: time attention backends against torch's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from rlhf_cli.cli.options import Json


def bench(
    backend: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Backend to time; repeatable. Default: all that run here."),
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SHAPE",
            help="batch x heads x tokens x head size, as in 4x32/8x2048x128 (32 heads, 8 key heads), or decode:... "
            "for one query over so many keys; repeatable.",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="float32, bfloat16 or float16. Default: bfloat16 on CUDA, else float32."),
    ] = None,
    device: Annotated[str, typer.Option(metavar="NAME", help="auto, cpu or cuda.")] = "auto",
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a plot too: .png, .svg or .pdf.")] = None,
    as_json: Json = False,
) -> None:
    """Measure time, speed and memory of attention backends against torch's best."""
    from rlhf_cli.attention import bench as work
    from rlhf_cli.attention import bench_report
    from rlhf_cli.attention.plots import pyplot
    from rlhf_cli.errors import UsageError
    from rlhf_cli.models.loading import resolve_device

    if plot is not None:
        pyplot()  # say now, not after the measuring, that it is missing
        if not plot.parent.is_dir():
            raise UsageError(f"cannot write a plot to {plot}: {plot.parent} is no folder")
    where = resolve_device(device)
    dtype = dtype or ("bfloat16" if where.type == "cuda" else "float32")
    if dtype not in work.DTYPES:
        raise UsageError(f"`--dtype {dtype}` is none of {', '.join(work.DTYPES)}")
    shapes = [work.Shape.parse(text) for text in shape or work.SHAPES[where.type]]
    found = work.measure(shapes, backends=backend or [], device=where, dtype=work.DTYPES[dtype])
    typer.echo(json.dumps(found, indent=2) if as_json else bench_report.as_table(found))
    if plot is not None:  # last, so that figures are not lost with a plot that cannot be written
        bench_report.plot(found, plot)
