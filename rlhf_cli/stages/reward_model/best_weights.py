"""The weights that were best on held-out rankings during training, which the stage writes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.errors import DataError
from rlhf_cli.progress import say, warn
from rlhf_cli.training.checkpoint.background import BackgroundWriter
from rlhf_cli.training.checkpoint.store import best_checkpoint, save_best

KeepBest = Literal["none", "loss", "accuracy"]


@dataclass(frozen=True)
class Best:
    """An evaluation on held-out rankings.

    Attributes:
        step: steps done.
        loss: mean ranking loss of a group, in nats.
        accuracy: share of pairs in the right order.
    """

    step: int
    loss: float
    accuracy: float


class BestWeights:
    """Keeps the best weights on the disk, beside the checkpoints.

    A later evaluation must be better, not equal. The file outlives a kill and a roll-back: it says how good its weights
    are, and they were reached by this run.

    Args:
        by: which figure decides; "none" keeps nothing.
        work: folder of checkpoints.
        processes: of the run, all of which call every method.
    """

    def __init__(self, by: KeepBest, work: Path, processes: ProcessGroup) -> None:
        self._by: KeepBest = by
        self._work, self._processes = work, processes
        self.found: Best | None = None

    def resume(self) -> None:
        """Find what an interrupted attempt kept."""
        if self._by == "none":
            return
        kept = best_checkpoint(self._work, processes=self._processes)
        self.found = None if kept is None else Best(**kept.state)

    def offer(
        self,
        step: int,
        loss: float,
        accuracy: float,
        weights: Callable[[], dict[str, Tensor]],
        writer: BackgroundWriter | None = None,
    ) -> None:
        """Keep the weights if they are better than those that are kept; `writer` writes them in the background."""
        is_known = math.isfinite(loss) and (self._by != "accuracy" or math.isfinite(accuracy))
        if self._by == "none" or not is_known or not self._is_better(loss, accuracy):
            return
        self.found = Best(step, loss, accuracy)
        save_best(self._work, step, weights(), asdict(self.found), processes=self._processes, writer=writer)

    def _is_better(self, loss: float, accuracy: float) -> bool:
        if self.found is None:
            return True
        return loss < self.found.loss if self._by == "loss" else accuracy > self.found.accuracy

    def tensors(self) -> Mapping[str, Tensor] | None:
        """Return the best weights; None if none are kept.

        Raises:
            DataError: they were kept and cannot be read.
        """
        if self._by == "none":
            return None
        if self.found is None:
            warn("no evaluation on held-out rankings was finite: the last weights are written")
            return None
        kept = best_checkpoint(self._work, processes=self._processes)
        if kept is None or kept.step != self.found.step:
            raise DataError(
                f"the best weights, those of step {self.found.step}, cannot be read from {self._work}",
                hint="run again with `--force` (`rlhf run`: `--force train-rm`), or with `train_rm.keep_best: none`",
            )
        say(
            f"reward model: the weights with the best held-out {self._by} are those of step {self.found.step}: "
            f"loss {self.found.loss:.3f}, accuracy {self.found.accuracy:.1%}"
        )
        return kept.tensors
