"""Format results of `bench.measure` as a table and as a plot."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlhf_cli.errors import UsageError


def as_table(found: dict[str, Any]) -> str:
    """Format the results as a table of at most 80 columns."""
    versions = [f"torch {found['torch']}", f"triton {found['triton']}" if found["triton"] else "no triton"]
    versions += [f"CUDA {found['cuda']}"] if found["cuda"] else [f"{found['threads']} thread(s)"]
    lines = [f"{found['device']}, {found['dtype']}", ", ".join(versions)]
    reasons: dict[str, str] = {}
    for shape in found["shapes"]:
        lines += ["", *_shape_lines(shape)]
        reasons |= shape["refused"]
    lines += ["", "x torch: speed relative to the fastest sdpa kernel."]
    lines += ["TFLOP/s: 4 Lq Lk D H / 2 operations forward (causal), 2.5 times that backward."]
    lines += ["MiB: peak memory of the forward pass, without inputs."]
    if reasons:
        lines += ["", *(_short(f"not measured: {name}: {reason}") for name, reason in reasons.items())]
    return "\n".join(lines)


def _shape_lines(shape: dict[str, Any]) -> Iterator[str]:
    is_decoding = "gb_per_s" in shape["rows"][0]
    mode = "one query over cached keys" if is_decoding else "causal"
    yield f"{shape['shape']}, {mode}"
    yield f"  torch's sdpa uses its kernel {shape['sdpa_choice']} of {', '.join(shape['sdpa_available'])}"
    if is_decoding:
        yield f"  {'':<15}{'ms':>9}{'GB/s':>9}{'x torch':>9}{'MiB':>10}"
    else:
        yield f"  {'':<15}{'------- forward -------':>25} {'------- backward ------':>25}"
        yield f"  {'':<15}{'ms':>9}{'TFLOP/s':>8}{'x torch':>8} {'ms':>9}{'TFLOP/s':>8}{'x torch':>8}{'MiB':>9}"
    forward, backward = (best_of_torch(shape, key) for key in ("forward_ms", "backward_ms"))
    for row in shape["rows"]:
        memory = row["memory_bytes"] / 2**20
        line = f"  {row['backend'][:14]:<15}{row['forward_ms']:>9.3f}"
        if is_decoding:
            yield f"{line}{row['gb_per_s']:>9.1f} {_share(forward, row['forward_ms'])}{memory:>10.2f}"
            continue
        line += f"{row['forward_tflops']:>8.3f}{_share(forward, row['forward_ms'])} {row['backward_ms']:>9.3f}"
        yield f"{line}{row['backward_tflops']:>8.3f}{_share(backward, row['backward_ms'])}{memory:>9.1f}"


def best_of_torch(shape: dict[str, Any], key: str) -> float | None:
    """Return the shortest time of torch's own kernels; None if none ran."""
    return min((row[key] for row in shape["rows"] if row["backend"].startswith("sdpa") and key in row), default=None)


def _share(best: float | None, mine: float) -> str:
    return f"{'' if best is None else f'{best / mine:.2f}':>8}"


def _short(line: str) -> str:
    return line if len(line) <= 79 else line[:76] + "..."


def plot(found: dict[str, Any], path: Any) -> None:
    """Write a bar chart of speeds, grouped by shape.

    Raises:
        UsageError: matplotlib is not installed, or the file cannot be written.
    """
    from rlhf_cli.plotting import pyplot

    plt = pyplot()
    panels = [
        (title, key, shapes)
        for title, key in (
            ("forward, TFLOP/s", "forward_tflops"),
            ("backward, TFLOP/s", "backward_tflops"),
            ("decoding, GB/s", "gb_per_s"),
        )
        if (shapes := [shape for shape in found["shapes"] if key in shape["rows"][0]])
    ]
    names = list(dict.fromkeys(row["backend"] for shape in found["shapes"] for row in shape["rows"]))
    height = 1.6 + 0.24 * max(sum(len(shape["rows"]) + 1 for shape in shapes) for *_, shapes in panels)
    figure, axes = plt.subplots(1, len(panels), figsize=(5.2 * len(panels), height), squeeze=False)
    for axis, (title, key, shapes) in zip(axes[0], panels, strict=True):
        _bars(axis, shapes, key, names)
        axis.set_title(title, loc="left", fontsize=10)
    figure.suptitle(f"{found['device']}, {found['dtype']}, torch {found['torch']}, {found['date']}", fontsize=9)
    figure.tight_layout()
    try:
        figure.savefig(path, dpi=150)
    except (ValueError, OSError) as error:
        raise UsageError(
            f"cannot write a plot to {path}: {error}",
            hint="use a file name ending in .png, .svg or .pdf, in a writable folder",
        ) from error
    finally:
        plt.close(figure)


def _bars(axis: Any, shapes: list[dict[str, Any]], key: str, names: list[str]) -> None:
    at, ticks = 0.0, []
    for shape in shapes:
        start = at
        for row in shape["rows"]:
            axis.barh(at, row[key], 0.85, color=f"C{names.index(row['backend']) % 10}")
            axis.annotate(
                f"{row['backend']}  {row[key]:.3g}", (row[key], at), (4, 0), textcoords="offset points",
                va="center", fontsize=7,
            )  # fmt: skip
            at += 1
        ticks.append(((start + at - 1) / 2, shape["shape"]))
        at += 1
    axis.set_yticks([where for where, _ in ticks], [label for _, label in ticks], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(right=1.45 * max(row[key] for shape in shapes for row in shape["rows"]))
    axis.spines[["top", "right"]].set_visible(False)
