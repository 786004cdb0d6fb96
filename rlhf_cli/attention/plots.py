"""Matplotlib, which is an extra: without it everything but pictures works."""

from __future__ import annotations

from typing import Any

from rlhf_cli.errors import UsageError


def pyplot() -> Any:
    """`matplotlib.pyplot`, drawing to files.

    Raises:
        UsageError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise UsageError(
            "matplotlib is not installed, and pictures need it", hint="install it by pip install 'rlhf-cli[plots]'"
        ) from error
    matplotlib.use("agg")
    from matplotlib import pyplot as found

    return found
