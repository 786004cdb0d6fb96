"""TensorBoard, Weights & Biases and trackio behind one interface; each is imported only where it is used."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rlhf_cli.progress import say

if TYPE_CHECKING:
    from rlhf_cli.training.monitoring.metrics_log import Histogram


@dataclass(frozen=True)
class TrackedRun:
    """How trackers identify the run of a stage.

    Attributes:
        project: project of the run.
        group: name of the recipe, shared by the runs of its stages.
        stage: name of the stage; the run is called GROUP-STAGE.
        folder: folder of TensorBoard's files.
        state: file that holds the id of the run until the stage is finished.
        settings: dotted name -> value, shown with the run.
    """

    project: str
    group: str
    stage: str
    folder: Path
    state: Path
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the run."""
        return f"{self.group}-{self.stage}"


@dataclass(frozen=True)
class Beginning:
    """Where a run starts or resumes.

    Attributes:
        run_id: the same for every attempt at a stage.
        is_resumed: whether there was an earlier attempt.
        done: last step that does not run again, -1 for none.
        told: last step that trackers already have, -1 for none.
    """

    run_id: str
    is_resumed: bool
    done: int
    told: int


class Tracker(Protocol):
    """The run of one tracker; made from a `TrackedRun` and a `Beginning`."""

    def write(self, step: int, metrics: Mapping[str, float], histograms: Mapping[str, Histogram]) -> None:
        """Send the finite metrics of one step."""

    def flush(self) -> None:
        """Protect what was written against a kill, as far as that is fast."""

    def finish(self) -> None:
        """End the run."""


class TensorBoard:
    """Event files, through torch's writer."""

    def __init__(self, run: TrackedRun, beginning: Beginning) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        # Readers drop what earlier files hold of this step and later ones.
        self._writer = SummaryWriter(str(run.folder), purge_step=beginning.done + 1)
        if not beginning.is_resumed:
            rows = "\n".join(f"| {name} | {value} |" for name, value in run.settings.items())
            self._writer.add_text("settings", f"| setting | value |\n|---|---|\n{rows}", 0)
            say(f"tensorboard: `tensorboard --logdir {run.folder.parent}` shows this run")

    def write(self, step: int, metrics: Mapping[str, float], histograms: Mapping[str, Histogram]) -> None:
        """Send the finite metrics of one step."""
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
        """Empty the writer's queue."""
        self._writer.flush()

    def finish(self) -> None:
        """End the run."""
        self._writer.close()


class WandB:
    """Weights & Biases. WANDB_MODE=offline and the like work as everywhere."""

    def __init__(self, run: TrackedRun, beginning: Beginning) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # read on import
        import wandb  # pyright: ignore[reportMissingImports]

        options = {
            "console": "off",  # otherwise it sends what the terminal shows
            "quiet": True,
            "disable_code": True,
            "disable_git": True,
            "save_code": False,
            "x_disable_machine_info": True,
            "x_disable_meta": True,
            "x_disable_stats": True,
            "x_save_requirements": False,
        }
        known = getattr(wandb.Settings, "model_fields", options)  # names with x_ change between versions
        self._wandb = wandb
        self._run = wandb.init(
            project=run.project,
            name=run.name,
            group=run.group,
            job_type=run.stage,
            id=beginning.run_id,
            resume="allow",
            config=dict(run.settings),
            settings=wandb.Settings(**{name: value for name, value in options.items() if name in known}),
        )
        if not getattr(self._run, "offline", True):
            say(f"wandb: {self._run.url} shows this run")
        # Online, W&B knows the steps it has; offline, those sent are on the disk.
        self._next = self._run.step or beginning.told + 1

    def write(self, step: int, metrics: Mapping[str, float], histograms: Mapping[str, Histogram]) -> None:
        """Send the finite metrics of a step that W&B does not have."""
        if step >= self._next:
            self._run.log(dict(metrics) | _binned(self._wandb.Histogram, histograms), step=step)

    def flush(self) -> None:
        """Do nothing: a process of W&B's own already has the metrics."""

    def finish(self) -> None:
        """End the run."""
        self._run.finish()


class Trackio:
    """trackio; TRACKIO_SPACE_ID and the like work as everywhere."""

    def __init__(self, run: TrackedRun, beginning: Beginning) -> None:
        import trackio  # pyright: ignore[reportMissingImports]

        options = {
            "group": run.group,
            "config": dict(run.settings),
            "resume": "allow" if beginning.is_resumed else "never",
            "embed": False,
            "auto_log_gpu": False,
            "auto_log_cpu": False,
        }
        known = inspect.signature(trackio.init).parameters  # early versions have fewer, and collect nothing
        supported = {name: value for name, value in options.items() if name in known}
        self._run = trackio.init(project=run.project, name=run.name, **supported)
        self._histogram = getattr(trackio, "Histogram", None)
        self._told = beginning.told

    def write(self, step: int, metrics: Mapping[str, float], histograms: Mapping[str, Histogram]) -> None:
        """Send the finite metrics of a step that trackio does not have."""
        if step > self._told:
            shown = {} if self._histogram is None else _binned(self._histogram, histograms)
            self._run.log(dict(metrics) | shown, step=step)

    def flush(self) -> None:
        """Do nothing: threads of trackio send continuously."""

    def finish(self) -> None:
        """End the run."""
        self._run.finish()


KINDS: dict[str, Callable[[TrackedRun, Beginning], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "trackio": Trackio,
}
"""Name in a recipe -> class."""


def _binned(kind: Callable[..., Any], histograms: Mapping[str, Histogram]) -> dict[str, Any]:
    """Return histograms as W&B and trackio take them."""
    return {
        f"histograms/{name}": kind(np_histogram=(list(histogram.counts), list(histogram.edges)))
        for name, histogram in histograms.items()
        if histogram.counts
    }
