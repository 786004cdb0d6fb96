"""TensorBoard, Weights & Biases and trackio, each behind three methods and loaded only where it is used."""

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


class TensorBoard:
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
        """Finite figures of one step."""
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
        """Finite figures of a step that W&B has not seen."""
        if step >= self._next:
            self._run.log(dict(metrics) | _binned(self._wandb.Histogram, histograms), step=step)

    def flush(self) -> None:
        """A process of W&B's own has it already."""

    def finish(self) -> None:
        """End the run."""
        self._run.finish()


class Trackio:
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
        """Finite figures of a step it was not told of before."""
        if step > self._told:
            shown = {} if self._histogram is None else _binned(self._histogram, histograms)
            self._run.log(dict(metrics) | shown, step=step)

    def flush(self) -> None:
        """Its threads send as they go."""

    def finish(self) -> None:
        """End the run."""
        self._run.finish()


KINDS: dict[str, Callable[[TrackedRun, Beginning], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "trackio": Trackio,
}
"""Name in a recipe -> what makes it."""


def _binned(kind: Callable[..., Any], histograms: Mapping[str, Histogram]) -> dict[str, Any]:
    """Histograms as W&B and trackio take them."""
    return {
        f"histograms/{name}": kind(np_histogram=(list(histogram.counts), list(histogram.edges)))
        for name, histogram in histograms.items()
        if histogram.counts
    }
