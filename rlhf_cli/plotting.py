"""Access to matplotlib, an optional dependency needed only for plots."""

from __future__ import annotations

from typing import Any

from rlhf_cli.errors import UsageError


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
