"""The best policy within the KL budget (`ppo.kl_budget`), which the stage writes in place of the last one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.errors import DataError
from rlhf_cli.progress import say, warn
from rlhf_cli.stages.ppo.models import PPOModels
from rlhf_cli.stages.ppo.state import Best
from rlhf_cli.training.checkpoint.background import BackgroundWriter
from rlhf_cli.training.checkpoint.store import best_checkpoint, save_best


class BestPolicy:
    """Keeps the best policy on the disk, beside the checkpoints.

    Args:
        budget: maximum KL to the SFT model, in nats per completion; None keeps nothing.
        models: with the policy that is trained.
        work: folder of checkpoints.
        processes: of the run, all of which call every method.
    """

    def __init__(self, budget: float | None, models: PPOModels, work: Path, processes: ProcessGroup) -> None:
        self._budget, self._models = budget, models
        self._work, self._processes = work, processes

    def after(
        self, step: int, metrics: Mapping[str, float], best: Best | None, writer: BackgroundWriter | None = None
    ) -> Best | None:
        """Keep the policy if it is within the budget and better than `best`; return the better one.

        Args:
            step: number of steps that the policy was trained for.
            metrics: of its evaluation on held-out prompts.
            best: the best policy so far.
            writer: writes it in the background; None writes it before this returns.
        """
        reward, kl = metrics["eval/objective/reward"], metrics["eval/objective/kl"]
        if self._budget is None or not kl <= self._budget or not math.isfinite(reward):
            return best
        if best is not None and reward <= best.reward:
            return best
        found = Best(step, reward, kl)
        save_best(self._work, step, self._models.state(), asdict(found), processes=self._processes, writer=writer)
        return found

    def load(self, best: Best | None) -> None:
        """Give the policy the best weights; without a budget it keeps the last ones."""
        if self._budget is None:
            return
        if best is None:
            warn(f"no evaluated policy was within `kl_budget: {self._budget:g}`: the last one is written")
            return
        self._models.load_state(self.tensors(best))
        say(
            f"ppo: the best policy within the budget is that of step {best.step}: "
            f"held-out reward {best.reward:.2f}, KL {best.kl:.1f} nats per completion"
        )

    def tensors(self, expected: Best) -> Mapping[str, Tensor]:
        """Return the weights of the best policy.

        Raises:
            DataError: they cannot be read; another policy must not silently take their place.
        """
        best = best_checkpoint(self._work, processes=self._processes)
        if best is None:
            raise DataError(
                f"the best policy within `kl_budget`, that of step {expected.step}, cannot be read from {self._work}",
                hint="run again with `--force` (`rlhf run`: `--force ppo`), or without a budget to get the last policy",
            )
        return best.tensors
