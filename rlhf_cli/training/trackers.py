"""Trackers that get every metric beside the `metrics.jsonl`: TensorBoard, Weights & Biases, trackio.

Each is its own library behind three methods, loaded only where a recipe names it. Trackers steer nothing: one that
fails, for want of a network say, is named once in a warning, left out from then on, and training goes on. They are told
the run's settings and figures, and nothing of the machine: what W&B and trackio would collect by themselves is off.

A resumed stage goes on in the run it had. TensorBoard is told to forget the steps that are done again; the others only
append, so steps they were told of before are not sent a second time.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rlhf_cli.errors import UsageError
from rlhf_cli.progress import printable, say, warn

if TYPE_CHECKING:
    from rlhf_cli.training.metrics import Histogram

_PACKAGES = {"tensorboard": "'rlhf-cli[tensorboard]'", "wandb": "wandb", "trackio": "trackio"}
"""Module -> what pip installs it by."""


def check_trackers(names: Sequence[str]) -> None:
    """Raise `UsageError` unless the package of every tracker is installed."""
    missing = [name for name in dict.fromkeys(names) if find_spec(name) is None]
    if missing:
        listed = ", ".join(missing)
        packages = " ".join(_PACKAGES[name] for name in missing)
        raise UsageError(
            f"`tracking.trackers` names {listed}, which {'is' if len(missing) == 1 else 'are'} not installed",
            hint=f"`pip install {packages}`, or leave {'it' if len(missing) == 1 else 'them'} out",
        )


@dataclass(frozen=True)
class TrackedRun:
    """What trackers know a stage's run by.

    Attributes:
        project: that the run is in.
        group: the recipe's name, which the runs of its stages share.
        stage: its name; the run is called GROUP-STAGE.
        folder: for TensorBoard's files.
        state: file that keeps the run's id for as long as the stage is unfinished.
        settings: dotted name -> value, shown beside the run.
    """

    project: str
    group: str
    stage: str
    folder: Path
    state: Path
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Of the run."""
        return f"{self.group}-{self.stage}"


@dataclass(frozen=True)
class Beginning:
    """Where a run begins or goes on.

    Attributes:
        run_id: the same for every attempt at a stage.
        is_resumed: an attempt came before.
        done: last step that stays, -1 for none.
        told: last step that trackers were told of, -1 for none.
    """

    run_id: str
    is_resumed: bool
    done: int
    told: int


class Tracker(Protocol):
    """One tracker's run; made from a `TrackedRun` and a `Beginning`."""

    def write(self, step: int, metrics: Mapping[str, float], histograms: Mapping[str, Histogram]) -> None:
        """Finite figures of one step."""

    def flush(self) -> None:
        """Make what was written safe from a kill, as far as that is quickly done."""

    def finish(self) -> None:
        """End the run."""


class Trackers:
    """Several trackers as one, whose failures are theirs alone.

    Args:
        names: of the trackers.
        run: what they know the run by.
    """

    def __init__(self, names: Sequence[str], run: TrackedRun) -> None:
        self._run = run
        self._wanted = list(dict.fromkeys(names))
        self._open: dict[str, Tracker] = {}

    def begin(self, *, after_step: int, kept_step: int, last_step: int) -> None:
        """Open every tracker that has not failed.

        Args:
            after_step: the step that training goes on behind, 0 at the start.
            kept_step: last step whose metrics are on the disk, -1 for none.
            last_step: last step whose metrics were, before those of later steps were dropped.
        """
        done = max(kept_step, after_step or -1)
        run_id, is_resumed = self._identity()
        beginning = Beginning(run_id, is_resumed, done, max(done, last_step))
        for name in list(self._wanted):
            self._attempt(name, lambda name=name: self._open.update({name: _KINDS[name](self._run, beginning)}))

    def write(self, step: int, metrics: Mapping[str, float], histograms: Mapping[str, Histogram]) -> None:
        """Finite figures of one step."""
        self._each(lambda tracker: tracker.write(step, metrics, histograms))

    def flush(self) -> None:
        """Before a checkpoint: what is told of steps up to it must not be lost, for they are not done again."""
        self._each(lambda tracker: tracker.flush())

    def finish(self) -> None:
        """End the runs; `begin` goes on in them."""
        self._each(lambda tracker: tracker.finish())
        self._open.clear()

    def _each(self, action: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._open.items()):
            self._attempt(name, lambda tracker=tracker: action(tracker))

    def _attempt(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # whatever a third party's library raises must not end hours of training
            self._open.pop(name, None)
            self._wanted.remove(name)
            warn(f"{name} is left out from here on, and training goes on without it: {_reason(error)}")

    def _identity(self) -> tuple[str, bool]:
        """The run's id, and whether an earlier attempt at the stage had it."""
        path = self._run.state
        try:
            found = json.loads(path.read_text(encoding="utf-8"))["id"]
            if isinstance(found, str) and re.fullmatch(r"[0-9a-f]{12}", found):
                return found, True
            warn(f"{path} is damaged: trackers begin a new run")
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError):
            warn(f"{path} cannot be read: trackers begin a new run")
        made = uuid.uuid4().hex[:12]
        path.write_text(json.dumps({"id": made}), encoding="utf-8")
        return made, False


class _TensorBoard:
    """Event files, through torch's writer."""

    def __init__(self, run: TrackedRun, beginning: Beginning) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        # Readers drop what earlier files say of this step and later ones.
        self._writer = SummaryWriter(str(run.folder), purge_step=beginning.done + 1)
        if not beginning.is_resumed:
            rows = "\n".join(f"| {name} | {value} |" for name, value in run.settings.items())
            self._writer.add_text("settings", f"| setting | value |\n|---|---|\n{rows}", 0)
            say(f"tensorboard: `tensorboard --logdir {run.folder.parent}` shows this run")

    def write(self, step: int, metrics: Mapping[str, float], histograms: Mapping[str, Histogram]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        for name, histogram in histograms.items():
            if histogram.counts:
                self._writer.add_histogram_raw(
                    f"histograms/{name}",
                    min=histogram.edges[0],
                    max=histogram.edges[-1],
                    num=sum(histogram.counts),
                    sum=histogram.total,
                    sum_squares=histogram.squares,
                    bucket_limits=list(histogram.edges[1:]),
                    bucket_counts=list(histogram.counts),
                    global_step=step,
                )

    def flush(self) -> None:
        self._writer.flush()

    def finish(self) -> None:
        self._writer.close()


class _WandB:
    """Weights & Biases. WANDB_MODE=offline and the like work as everywhere."""

    def __init__(self, run: TrackedRun, beginning: Beginning) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # read when it is imported
        import wandb  # pyright: ignore[reportMissingImports]

        wanted = {
            "console": "off",  # or it would send what the terminal shows
            "quiet": True,
            "disable_code": True,
            "disable_git": True,
            "save_code": False,
            "x_disable_machine_info": True,
            "x_disable_meta": True,
            "x_disable_stats": True,
            "x_save_requirements": False,
        }
        known = getattr(wandb.Settings, "model_fields", wanted)  # names with x_ come and go
        self._wandb = wandb
        self._run = wandb.init(
            project=run.project,
            name=run.name,
            group=run.group,
            job_type=run.stage,
            id=beginning.run_id,
            resume="allow",
            config=dict(run.settings),
            settings=wandb.Settings(**{name: value for name, value in wanted.items() if name in known}),
        )
        if not getattr(self._run, "offline", True):
            say(f"wandb: {self._run.url} shows this run")
        # W&B knows what reached it; offline it cannot, and what was told is on the disk.
        self._next = self._run.step or beginning.told + 1

    def write(self, step: int, metrics: Mapping[str, float], histograms: Mapping[str, Histogram]) -> None:
        if step >= self._next:
            self._run.log(dict(metrics) | _binned(self._wandb.Histogram, histograms), step=step)

    def flush(self) -> None:
        """A process of W&B's own has it already."""

    def finish(self) -> None:
        self._run.finish()


class _Trackio:
    """trackio; TRACKIO_SPACE_ID and the like work as everywhere."""

    def __init__(self, run: TrackedRun, beginning: Beginning) -> None:
        import trackio  # pyright: ignore[reportMissingImports]

        wanted = {
            "group": run.group,
            "config": dict(run.settings),
            "resume": "allow" if beginning.is_resumed else "never",
            "embed": False,
            "auto_log_gpu": False,
            "auto_log_cpu": False,
        }
        known = inspect.signature(trackio.init).parameters  # early versions know fewer, and collect nothing
        known_wanted = {name: value for name, value in wanted.items() if name in known}
        self._run = trackio.init(project=run.project, name=run.name, **known_wanted)
        self._histogram = getattr(trackio, "Histogram", None)
        self._told = beginning.told

    def write(self, step: int, metrics: Mapping[str, float], histograms: Mapping[str, Histogram]) -> None:
        if step > self._told:
            shown = {} if self._histogram is None else _binned(self._histogram, histograms)
            self._run.log(dict(metrics) | shown, step=step)

    def flush(self) -> None:
        """Its threads send as they go."""

    def finish(self) -> None:
        self._run.finish()


_KINDS: dict[str, Callable[[TrackedRun, Beginning], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WandB,
    "trackio": _Trackio,
}


def _binned(kind: Callable[..., Any], histograms: Mapping[str, Histogram]) -> dict[str, Any]:
    """Histograms as W&B and trackio take them."""
    return {
        f"histograms/{name}": kind(np_histogram=(list(histogram.counts), list(histogram.edges)))
        for name, histogram in histograms.items()
        if histogram.counts
    }


_SECRET_NAMES = re.compile(r"TOKEN|KEY|SECRET|PASSWORD", re.IGNORECASE)
_SECRET_PARAMETERS = re.compile(r"((?:token|key|secret|password)=)[^&\s]+", re.IGNORECASE)


def _reason(error: Exception) -> str:
    """The first line of what a library says of its failure, without any secret of the environment."""
    said = printable(str(error)).strip()
    text = f"{type(error).__name__}: {said.splitlines()[0]}" if said else type(error).__name__
    for name, value in os.environ.items():
        if _SECRET_NAMES.search(name) and len(value) >= 8:
            text = text.replace(value, "***")
    return _SECRET_PARAMETERS.sub(r"\1***", text)[:300]
