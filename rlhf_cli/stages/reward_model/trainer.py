"""Training a reward model on ranked answers.

The loss of a step is the sum of its groups' losses divided by its number of groups, so neither micro-batches nor
processes change the gradient. Order and learning rate are functions of seed and step: a checkpoint holds weights,
optimizer and random state, and a killed run ends with the weights of an uninterrupted one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from rlhf_cli import progress
from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.distributed.signals import StopRequest
from rlhf_cli.errors import DivergedError
from rlhf_cli.models.reward_model.model import RewardModel
from rlhf_cli.objectives.ranking import pairs_of, pairwise_ranking_loss, plackett_luce_loss
from rlhf_cli.stages.reward_model.data import Batches, RankedGroup, micro_batches
from rlhf_cli.training.checkpoint.store import (
    latest_checkpoint,
    optimizer_tensors,
    restore_optimizer,
    rng_tensors,
    save_checkpoint,
)
from rlhf_cli.training.distributed import DistributedStop, Log, all_reduce_gradients, metrics_log, restore_generators
from rlhf_cli.training.loop import BAD_STEPS_IN_A_ROW
from rlhf_cli.training.monitoring.metrics_log import MetricsLog
from rlhf_cli.training.random_state import SEED_STRIDE
from rlhf_cli.training.schedules import Schedule, rate_factor


@dataclass(frozen=True)
class RewardOptions:
    """See `recipe.schema.RewardModelSettings`, whose names and units these are."""

    learning_rate: float
    batch_size: int
    micro_batch_size: int
    epochs: float
    weight_decay: float
    max_grad_norm: float
    warmup_share: float
    schedule: Schedule
    checkpoint_steps: int
    loss: Literal["pairwise", "plackett-luce"]
    use_margin: bool


@dataclass
class Tally:
    """What one run has been through; part of every checkpoint.

    Attributes:
        skipped_steps: steps left out because a loss or gradient was not finite.
        bad_in_a_row: those that just happened.
        anchor: step of the last regular checkpoint, which a divergence goes back to; one that a signal left behind is
        none.
        rolled_back: whether training went back to a checkpoint, after which it takes half the learning rate.
    """

    skipped_steps: int = 0
    bad_in_a_row: int = 0
    anchor: int = 0
    rolled_back: bool = False


@dataclass
class StepSums:
    """Sums over the groups and pairs of one step."""

    loss: float = 0.0
    groups: int = 0
    right: float = 0.0
    pairs: int = 0
    rewards: float = 0.0
    answers: int = 0


class RewardTrainer:
    """The loop.

    Args:
        scorer: trained in place.
        groups: to train on.
        options: settings.
        seed: of the order and of dropout in an adapter.
        work: folder for checkpoints.
        metrics: file for metrics.
        stop: asked after every step.
        processes: those of the run, all of which train the same; None finds them in the environment.
        log: makes the metrics log, from the arguments of `MetricsLog`.
    """

    def __init__(
        self,
        scorer: RewardModel,
        groups: Sequence[RankedGroup],
        options: RewardOptions,
        *,
        seed: int,
        work: Path,
        metrics: Path,
        stop: StopRequest,
        processes: ProcessGroup | None = None,
        log: Callable[..., Log] = MetricsLog,
    ) -> None:
        self.scorer, self.options, self.tally = scorer, options, Tally()
        self.batches = Batches(len(groups), options.batch_size, options.epochs, seed)
        self.trained = {name: weight for name, weight in scorer.named_parameters() if weight.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.trained.values(), lr=options.learning_rate, weight_decay=options.weight_decay
        )
        self._groups, self._seed, self._work, self._metrics_path, self._make_log = groups, seed, work, metrics, log
        self._processes = processes or ProcessGroup(scorer.device)
        self._stop = DistributedStop(stop, self._processes)

    def train(self) -> Tally:
        """Run all steps, from the newest whole checkpoint if there is one.

        Raises:
            DivergedError: losses or gradients were not finite in three steps in a row, twice.
            Interrupted: a signal came; the step that was running is saved.
        """
        step = self._begin()
        self.scorer.train()
        log = metrics_log(self._metrics_path, self._processes, after_step=step, make=self._make_log)
        with progress.task("reward model", self.batches.steps, "steps", done=step) as bar:
            while step < self.batches.steps:
                metrics = self.step(step)
                step += 1
                if self.tally.bad_in_a_row >= BAD_STEPS_IN_A_ROW:
                    step = self._roll_back(step)
                    log.close()
                    log = metrics_log(self._metrics_path, self._processes, after_step=step, make=self._make_log)
                    continue
                log.write(step, metrics)
                bar.advance(note=f"loss {metrics['loss']:.3f}  accuracy {metrics['accuracy']:.1%}")
                if self._stop.requested or self._is_due(step):
                    log.sync()
                    self._save(step)
                self._stop.check()
        log.close()
        self.scorer.eval()
        return self.tally

    def step(self, step: int) -> dict[str, float]:
        """One optimizer step; `step` is 0-based. Returns its metrics, under the names of TRL's reward trainer."""
        sums = self.accumulate(self.batches.groups(step))
        rate = self._set_learning_rate(step)
        norm = torch.nn.utils.clip_grad_norm_(self.trained.values(), self.options.max_grad_norm)
        is_finite = bool(torch.isfinite(norm)) and math.isfinite(sums.loss)
        if is_finite:
            self.optimizer.step()
            self.tally.bad_in_a_row = 0
        else:
            self.tally.skipped_steps += 1
            self.tally.bad_in_a_row += 1
        self.optimizer.zero_grad(set_to_none=True)
        return {
            "loss": sums.loss / sums.groups,
            "accuracy": sums.right / sums.pairs if sums.pairs else float("nan"),
            "mean_reward": sums.rewards / sums.answers,
            "grad_norm": float(norm),
            "learning_rate": rate,
            "skipped_steps": float(self.tally.skipped_steps),
        }

    def accumulate(self, chosen: Sequence[int]) -> StepSums:
        """Gradient of the mean loss of these groups, into the trained weights, a micro-batch at a time.

        Each process passes its share of the micro-batches, which may be none; all end with the same gradient and sums.
        """
        sums = StepSums()
        for numbers in self._processes.shard(micro_batches(self._groups, chosen, self.options.micro_batch_size)):
            losses = self._losses([self._groups[number] for number in numbers], sums)
            (losses.sum() / len(chosen)).backward()
            sums.loss += float(losses.detach().sum())
            sums.groups += len(numbers)
        return self._across_processes(sums)

    def _losses(self, groups: list[RankedGroup], sums: StepSums) -> Tensor:
        """Loss of each group: (G,), with gradient."""
        scorer = self.scorer
        rewards = scorer(scorer.batch([sequence for group in groups for sequence in group.sequences]))
        levels = torch.tensor([level for group in groups for level in group.levels], device=rewards.device)
        sizes = torch.tensor([len(group.levels) for group in groups], device=rewards.device)
        members = torch.arange(len(groups), device=rewards.device).repeat_interleave(sizes)
        _count(sums, rewards.detach(), levels, members)
        if self.options.loss == "plackett-luce":
            return plackett_luce_loss(rewards, levels, members)
        margins = torch.tensor([group.margin for group in groups], device=rewards.device)
        return pairwise_ranking_loss(rewards, levels, members, margins if self.options.use_margin else None)

    def _across_processes(self, sums: StepSums) -> StepSums:
        if self._processes.count == 1:
            return sums
        all_reduce_gradients(self.trained.values(), self._processes)
        values = torch.tensor(list(asdict(sums).values()), dtype=torch.float64)
        self._processes.all_reduce([values])
        return StepSums(**dict(zip(asdict(sums), values.tolist(), strict=True)))

    def _set_learning_rate(self, step: int) -> float:
        options = self.options
        warmup = round(options.warmup_share * self.batches.steps)
        rate = options.learning_rate * rate_factor(step, self.batches.steps, schedule=options.schedule, warmup=warmup)
        rate *= 0.5 if self.tally.rolled_back else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def _is_due(self, step: int) -> bool:
        """Whether to save: never among bad steps, so that going back goes to before them."""
        is_sound = self.tally.bad_in_a_row == 0 and step % self.options.checkpoint_steps == 0
        return is_sound or step == self.batches.steps

    def _begin(self) -> int:
        checkpoint = latest_checkpoint(self._work, processes=self._processes)
        if checkpoint is None:
            torch.manual_seed(self._seed + SEED_STRIDE * self._processes.index)
            self._save(0)  # what a divergence in the first steps goes back to
            return 0
        self._restore(checkpoint.tensors)
        self.tally = Tally(**checkpoint.state["tally"])
        if checkpoint.step:
            progress.say(f"reward model: going on behind step {checkpoint.step} of {self.batches.steps}")
        return checkpoint.step

    def _roll_back(self, step: int) -> int:
        checkpoint = None
        if not self.tally.rolled_back:
            checkpoint = latest_checkpoint(self._work, up_to=self.tally.anchor, processes=self._processes)
        if checkpoint is None:
            raise DivergedError(
                f"the reward model diverged at step {step} of {self.batches.steps}: losses or gradients are not finite",
                hint="lower `train_rm.learning_rate`, or set `model.precision: float32`; no bad weight was saved",
            )
        progress.warn(
            f"losses or gradients were not finite in steps {step - BAD_STEPS_IN_A_ROW + 1} to {step}: "
            f"going back once, to step {checkpoint.step}, with half the learning rate"
        )
        self._restore(checkpoint.tensors)
        self.tally = Tally(self.tally.skipped_steps, anchor=checkpoint.step, rolled_back=True)
        return checkpoint.step

    def _save(self, step: int) -> None:
        if self._is_due(step):
            self.tally.anchor = step
        weights = {f"weight/{name}": weight for name, weight in self.trained.items()}
        tensors = weights | optimizer_tensors(self.optimizer, "optimizer") | rng_tensors(self._processes)
        state = {"tally": asdict(self.tally)}
        save_checkpoint(self._work, step, tensors, state, protected=self.tally.anchor, processes=self._processes)

    @torch.no_grad()
    def _restore(self, tensors: dict[str, Tensor]) -> None:
        for name, weight in self.trained.items():
            weight.copy_(tensors[f"weight/{name}"])
        restore_optimizer(self.optimizer, tensors, "optimizer")
        restore_generators(tensors, self._processes, self._seed)


def _count(sums: StepSums, rewards: Tensor, levels: Tensor, members: Tensor) -> None:
    """Add the pairs that are ordered as the labels say; an equal reward is half right, a tie no pair."""
    first, second = pairs_of(members)
    agreement = (rewards[first] - rewards[second]).sign() * (levels[second] - levels[first]).sign()
    is_ordered = levels[first] != levels[second]
    sums.right += float(((agreement + 1) / 2)[is_ordered].sum())
    sums.pairs += int(is_ordered.sum())
    sums.rewards += float(rewards.sum())
    sums.answers += len(rewards)
