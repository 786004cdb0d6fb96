"""Access to matplotlib, an optional dependency needed only for plots, and the style of all plots."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_cli.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, PURPLE, GRAY, MUTED = "#0b62a8", "#b84a00", "#00785a", "#8a4a80", "#5a5f66", "#9aa2ad"
"""Near the colors of Okabe and Ito 2008, which people with any color vision can tell apart, and dark enough for thin
lines and print. The report has the same (`report/assets/report.css`)."""


def pyplot() -> Any:
    """Import `matplotlib.pyplot` with the `agg` backend, which draws to files only.

    Raises:
        UsageError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise UsageError(
            "matplotlib is not installed; it is required for plots", hint="run `pip install 'rlhf-cli[plots]'`"
        ) from error
    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot


def has_matplotlib() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def new_picture(width: float, height: float, title: str) -> Figure:
    """Return an empty picture with a title; it needs no display, and nothing has to be closed.

    Args:
        width: in inches.
        height: in inches.
        title: above all plots, at the left.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    picture = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(picture)
    picture.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold", parse_math=False)
    return picture


def prepare(axes: Axes, title: str, x: str = "", y: str = "", *, pad: float = 6.0) -> None:
    """Give a plot its title, the names of its axes with their units, a grid and no frame.

    Args:
        axes: the plot.
        title: what is seen.
        x: name and unit of the horizontal axis.
        y: name and unit of the vertical axis.
        pad: points between title and plot.
    """
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold", pad=pad)
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def save(picture: Figure, path: Path) -> None:
    """Write a picture in the format of the path's suffix; equal pictures give equal bytes as PNG.

    Raises:
        OSError: the file cannot be written.
    """
    picture.savefig(path, dpi=110, metadata={"Software": None} if path.suffix == ".png" else None)
