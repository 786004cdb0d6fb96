"""Trackers that get every metric of the `metrics.jsonl`: TensorBoard, Weights & Biases, trackio.

Each is a library of its own, imported only where a recipe names it. Trackers do not affect training: one that fails,
for lack of a network for example, is named once in a warning and dropped, and training continues. They get the run's
settings and metrics, and nothing about the machine: what W&B and trackio would collect by themselves is off.

A resumed stage continues its tracker runs. TensorBoard drops the steps that run again; the others only append, so steps
they already have are not sent a second time.
"""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

from rlhf_cli.errors import UsageError
from rlhf_cli.plain_text import printable
from rlhf_cli.progress import warn
from rlhf_cli.training.monitoring.tracker_backends import KINDS, Beginning, TrackedRun, Tracker

if TYPE_CHECKING:
    from rlhf_cli.training.monitoring.metrics_log import Histogram

__all__ = ["TrackedRun", "Trackers", "check_trackers"]

_PACKAGES = {"tensorboard": "'rlhf-cli[tensorboard]'", "wandb": "wandb", "trackio": "trackio"}
"""Module -> the name that pip installs it by."""


def check_trackers(names: Sequence[str]) -> None:
    """Raise `UsageError` unless the package of every tracker is installed."""
    missing = [name for name in dict.fromkeys(names) if not _is_installed(name)]
    if missing:
        listed = ", ".join(missing)
        packages = " ".join(_PACKAGES[name] for name in missing)
        raise UsageError(
            f"`tracking.trackers` names {listed}, which {'is' if len(missing) == 1 else 'are'} not installed",
            hint=f"`pip install {packages}`, or remove {'it' if len(missing) == 1 else 'them'} from the recipe",
        )


def _is_installed(module: str) -> bool:
    """Whether the module can be imported; the folder `wandb` that W&B makes for its files cannot."""
    found = find_spec(module)
    return found is not None and found.origin is not None


class Trackers:
    """Several trackers as one. A tracker that fails is dropped, with a warning.

    Args:
        names: names of the trackers.
        run: how they identify the run.
    """

    def __init__(self, names: Sequence[str], run: TrackedRun) -> None:
        self._run = run
        self._working = list(dict.fromkeys(names))
        self._open: dict[str, Tracker] = {}

    def begin(self, *, after_step: int, kept_step: int, last_step: int) -> None:
        """Open every tracker that has not failed.

        Args:
            after_step: the step that training resumes from, 0 at the start.
            kept_step: last step whose metrics are in the file, -1 for none.
            last_step: last step whose metrics were in the file before lines were dropped.
        """
        done = max(kept_step, after_step or -1)
        run_id, is_resumed = self._identity()
        beginning = Beginning(run_id, is_resumed, done, max(done, last_step))
        for name in list(self._working):
            self._attempt(name, lambda name=name: self._open.update({name: KINDS[name](self._run, beginning)}))

    def write(self, step: int, metrics: Mapping[str, float], histograms: Mapping[str, Histogram]) -> None:
        """Send the finite metrics of one step."""
        self._each(lambda tracker: tracker.write(step, metrics, histograms))

    def flush(self) -> None:
        """Flush before a checkpoint: the steps up to it do not run again, so their metrics must not be lost."""
        self._each(lambda tracker: tracker.flush())

    def finish(self) -> None:
        """End the runs; `begin` continues them."""
        self._each(lambda tracker: tracker.finish())
        self._open.clear()

    def _each(self, action: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._open.items()):
            self._attempt(name, lambda tracker=tracker: action(tracker))

    def _attempt(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # nothing that a library raises may end hours of training
            self._open.pop(name, None)
            self._working.remove(name)
            warn(f"{name} failed and is dropped, and training continues without it: {_reason(error)}")

    def _identity(self) -> tuple[str, bool]:
        """Return the id of the run, and whether an earlier attempt at the stage used it."""
        path = self._run.state
        try:
            found = json.loads(path.read_text(encoding="utf-8"))["id"]
            if isinstance(found, str) and re.fullmatch(r"[0-9a-f]{12}", found):
                return found, True
            warn(f"{path} is damaged: trackers start a new run")
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError):
            warn(f"{path} cannot be read: trackers start a new run")
        made = uuid.uuid4().hex[:12]
        path.write_text(json.dumps({"id": made}), encoding="utf-8")
        return made, False


_SECRET_NAMES = re.compile(r"TOKEN|KEY|SECRET|PASSWORD", re.IGNORECASE)
_SECRET_PARAMETERS = re.compile(r"((?:token|key|secret|password)=)[^&\s]+", re.IGNORECASE)


def _reason(error: Exception) -> str:
    """Return the first line of an exception, without secrets from the environment."""
    said = printable(str(error)).strip()
    text = f"{type(error).__name__}: {said.splitlines()[0]}" if said else type(error).__name__
    for name, value in os.environ.items():
        if _SECRET_NAMES.search(name) and len(value) >= 8:
            text = text.replace(value, "***")
    return _SECRET_PARAMETERS.sub(r"\1***", text)[:300]
