"""Training of a reward model on ranked completions.

The loss of a step is the sum of its groups' losses divided by its number of groups, so neither micro-batches nor
processes change the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.distributed.signals import StopRequest
from rlhf_cli.models.reward_model.model import RewardModel
from rlhf_cli.models.sharding import equal_passes, is_sharded
from rlhf_cli.models.split_weights import join_weights, split_weights, stored
from rlhf_cli.objectives.ranking import (
    batch_mean_penalty,
    centering_penalty,
    pairs_of,
    pairwise_ranking_loss,
    plackett_luce_loss,
)
from rlhf_cli.stages.reward_model.best_weights import BestWeights
from rlhf_cli.stages.reward_model.data import Batches, RankedGroup, by_length, padded_tokens
from rlhf_cli.stages.reward_model.settings import RewardModelSettings
from rlhf_cli.training.distributed import all_reduce_gradients
from rlhf_cli.training.flops import model_size
from rlhf_cli.training.loop import LoopState, TrainingLoop
from rlhf_cli.training.micro_batches import MicroBatches
from rlhf_cli.training.monitoring.metrics_log import MetricsLog
from rlhf_cli.training.monitoring.run_logger import RunLogger
from rlhf_cli.training.monitoring.timing_log import Work
from rlhf_cli.training.optimization import adamw, clip_and_step, scheduled_rate, set_rate
from rlhf_cli.training.task import StepReport, TrainingTask
from rlhf_cli.training.timing import StepWatch


@dataclass(frozen=True)
class Step:
    """What the loss of one group of a step depends on besides the group.

    Attributes:
        groups: number of groups of the step.
        completions: number of completions of the step.
        mean_reward: mean of their rewards, if `batch_sum_coef` needs it, else 0.
    """

    groups: int
    completions: int
    mean_reward: float


@dataclass
class StepSums:
    """Sums over the groups and pairs of one step."""

    loss: float = 0.0
    groups: int = 0
    right: float = 0.0
    pairs: int = 0
    rewards: float = 0.0
    completions: int = 0


class RewardTrainer(TrainingTask):
    """Trains a reward model in place.

    Args:
        model: the reward model.
        groups: ranked groups to train on.
        held_out: ranked groups to evaluate on while training, with `eval_steps`.
        settings: section `train_rm` of the recipe.
        seed: of the order, and of dropout in an adapter.
        work: folder of checkpoints and metrics.
        stop: asked after every step.
        processes: the processes of the run, all of which train the same; None finds them in the environment.
        log: makes the metrics log, from the arguments of `MetricsLog`.
        peak: operations per second that the device can do; None is not known.

    Attributes:
        best: the weights that were best on `held_out` so far.
    """

    def __init__(
        self,
        model: RewardModel,
        groups: Sequence[RankedGroup],
        settings: RewardModelSettings,
        *,
        held_out: Sequence[RankedGroup] = (),
        seed: int,
        work: Path,
        stop: StopRequest,
        processes: ProcessGroup | None = None,
        log: Callable[..., MetricsLog] = MetricsLog,
        peak: float | None = None,
        checkpoint_async: bool = False,
    ) -> None:
        self.model, self.settings = model, settings
        self.batches = Batches(len(groups), settings.batch_size, settings.epochs, seed)
        self._is_sharded = is_sharded(model.model)
        if settings.adapter == "none" and model.source.precision != torch.float32 and not self._is_sharded:
            split_weights(model.backbone)
        self.trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self.optimizer = adamw(
            settings.optimizer,
            self.trained.values(),
            model.backbone,
            rate=settings.peak_rate,
            weight_decay=settings.weight_decay,
        )
        self._groups, self._held_out, self._rate_scale = groups, held_out, 1.0
        self._processes = processes or ProcessGroup(model.device)
        self._cuts = MicroBatches(
            settings.micro_batch_size,
            settings.micro_batch_tokens,
            setting="train_rm.micro_batch_tokens",
            repeats=not self._is_sharded,
        )
        self._size = model_size(model.backbone, list(self.trained.values()), has_vocabulary=False)
        self.best = BestWeights(settings.keep_best if settings.eval_steps else "none", work, self._processes)
        self.loop = TrainingLoop(
            self,
            label="reward model",
            steps=self.batches.steps,
            checkpoint_steps=settings.checkpoint_steps,
            seed=seed,
            work=work,
            stop=stop,
            processes=self._processes,
            hint="lower `train_rm.learning_rate`, or set `model.precision: float32`; no bad weights were saved",
            log=log,
            watch=StepWatch(model.device, self.phases),
            peak=peak,
            checkpoint_async=checkpoint_async,
        )

    def train(self) -> LoopState:
        """Run all steps, see `TrainingLoop.run`; the model then has the best weights, where they are kept."""
        self.model.train()
        self.best.resume()
        state = self.loop.run()
        if (tensors := self.best.tensors()) is not None:
            self.load_weights(tensors)
        join_weights(self.model)
        self.model.eval()
        return state

    def step(self, step: int, watch: StepWatch | None = None) -> StepReport:
        """Take the 0-based optimizer step; metrics have the names of TRL's reward trainer."""
        watch, chosen = watch or StepWatch(), self.batches.groups(step)
        lengths = [len(sequence.ids) for number in chosen for sequence in self._groups[number].sequences]
        with watch.phase("update", "training", total=sum(lengths)):
            sums = self.accumulate(chosen, watch.count)
            rate = scheduled_rate(self.settings, step, self.batches.steps) * self._rate_scale
            set_rate(self.optimizer, rate)
            (norm,), is_taken = clip_and_step(
                self.optimizer,
                self.trained.values(),
                max_grad_norm=self.settings.max_grad_norm,
                step=step + 1,
                loss=sums.loss,
            )
        work = {"update": Work(sum(lengths), None if self._size is None else self._size.training(lengths))}
        metrics = {
            "loss": sums.loss / sums.groups,
            "accuracy": sums.right / sums.pairs if sums.pairs else float("nan"),
            "mean_reward": sums.rewards / sums.completions,
            "grad_norm": norm,
            "learning_rate": rate,
            "skipped_steps": float(self.loop.state.skipped_steps + (not is_taken)),
        }
        note = f"loss {metrics['loss']:.3f}  accuracy {metrics['accuracy']:.1%}"
        return StepReport(metrics, note, skipped=int(not is_taken), work=work)

    def after_step(self, step: int, report: StepReport, log: RunLogger, watch: StepWatch) -> None:
        """Evaluate on held-out groups if that is due, and keep the weights if they are the best."""
        every = self.settings.eval_steps
        if every is None or (step % every and step != self.batches.steps):
            return
        with watch.phase("eval", "evaluating"):
            found = self.evaluate()
            report.metrics.update(found)
            self.best.offer(step, found["eval/loss"], found["eval/accuracy"], self.weights, self.loop.writer)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Return ranking loss and accuracy on the held-out groups; dropout is off and no random number is drawn."""
        self.model.eval()
        sums = self._passes(self._held_out, range(len(self._held_out)))
        self.model.train()
        accuracy = sums.right / sums.pairs if sums.pairs else float("nan")
        return {"eval/loss": sums.loss / sums.groups, "eval/accuracy": accuracy}

    def scale_learning_rates(self, factor: float) -> None:
        """See `TrainingTask`."""
        self._rate_scale = factor

    def weights(self) -> dict[str, Tensor]:
        """See `TrainingTask`."""
        return stored(self.trained.items())

    def accumulate(self, chosen: Sequence[int], count: Callable[[int], object] = lambda tokens: None) -> StepSums:
        """Accumulate the gradient of the mean loss of these groups, one micro-batch at a time.

        Each process computes its share of the micro-batches, possibly none; all end with the same gradient and sums.

        Args:
            chosen: numbers of the groups.
            count: called with the tokens of each micro-batch after its work.
        """
        step = Step(len(chosen), sum(len(self._groups[number].levels) for number in chosen), self._mean_reward(chosen))
        return self._passes(self._groups, chosen, step, count)

    def _mean_reward(self, chosen: Sequence[int]) -> float:
        """Mean reward of a step before its update, without dropout; 0 if nothing depends on it."""
        if not self.settings.batch_sum_coef:
            return 0.0
        self.model.eval()
        with torch.no_grad():
            sums = self._passes(self._groups, chosen)
        self.model.train()
        return sums.rewards / sums.completions

    def _passes(
        self,
        groups: Sequence[RankedGroup],
        chosen: Sequence[int],
        step: Step | None = None,
        count: Callable[[int], object] = lambda tokens: None,
    ) -> StepSums:
        """Pass over chosen groups, shared by the processes, all of which get the sums over all of the groups.

        Args:
            groups: those that `chosen` numbers.
            chosen: numbers of groups.
            step: accumulate its gradient; None computes ranking losses without one.
            count: called with the tokens of each micro-batch after its work.
        """
        tokens = partial(_tokens, groups)
        share = -(-len(chosen) // self._processes.count)  # so that every process gets work
        ordered = by_length(groups, chosen)
        own = self._processes.shard(self._cuts.cut(ordered, tokens, most=share))
        passes = equal_passes(self.model.model, own, ordered[:1], self._processes)

        def work() -> StepSums:
            sums, loss = StepSums(), torch.zeros((), dtype=torch.float64, device=self.model.device)
            counts = torch.zeros(3, dtype=torch.float64, device=self.model.device)
            weighted = ((rows, weight) for part, weight in passes for rows in self._cuts.own([part], tokens))
            for numbers, weight in weighted:
                chosen_groups = [groups[number] for number in numbers]
                if not weight:
                    self._pass_without_work(chosen_groups, step)
                    continue
                losses = self._losses(chosen_groups, sums, counts, step)
                if step is not None:
                    (losses.sum() / step.groups).backward()
                loss += losses.detach().sum()
                sums.groups += len(numbers)
                count(sum(len(one.ids) for number in numbers for one in groups[number].sequences))
            sums.loss, sums.right, pairs, sums.rewards = torch.cat([loss.unsqueeze(0), counts]).tolist()
            sums.pairs = int(pairs)
            return sums

        sums = self._cuts.run(work, self.optimizer.zero_grad if step is not None else lambda: None)
        return self._over_processes(sums, has_gradient=step is not None)

    def _pass_without_work(self, groups: list[RankedGroup], step: Step | None) -> None:
        """Make the passes that other processes make, without a gradient of their own; see `models.sharding`."""
        losses = self._losses(groups, StepSums(), torch.zeros(3, dtype=torch.float64, device=self.model.device), step)
        if step is not None:
            (0.0 * losses.sum()).backward()

    def _losses(self, groups: list[RankedGroup], sums: StepSums, counts: Tensor, step: Step | None) -> Tensor:
        """Return the loss of each group: (G,), with gradient; adds to both sums, see `_count`."""
        model, settings = self.model, self.settings
        rewards = model(model.batch([sequence for group in groups for sequence in group.sequences]))
        # Labels stay on the host, see `objectives.ranking`.
        levels = torch.tensor([level for group in groups for level in group.levels])
        members = torch.arange(len(groups)).repeat_interleave(torch.tensor([len(group.levels) for group in groups]))
        counts += _count(rewards.detach(), levels, members)
        sums.completions += len(rewards)
        if settings.loss == "plackett-luce":
            losses = plackett_luce_loss(rewards, levels, members)
        else:
            margins = torch.tensor([group.margin for group in groups])
            losses = pairwise_ranking_loss(rewards, levels, members, margins if settings.use_margin else None)
        if step is not None and settings.center_coef:
            losses = losses + settings.center_coef * centering_penalty(rewards, members)
        if step is not None and settings.batch_sum_coef:
            penalty = batch_mean_penalty(
                rewards, members, mean=step.mean_reward, completions=step.completions, count=step.groups
            )
            losses = losses + settings.batch_sum_coef * penalty
        return losses

    def _over_processes(self, sums: StepSums, *, has_gradient: bool) -> StepSums:
        if self._processes.count == 1:
            return sums
        if has_gradient:
            all_reduce_gradients(self.trained.values(), self._processes)
        values = torch.tensor(list(asdict(sums).values()), dtype=torch.float64)
        self._processes.all_reduce([values])
        return StepSums(**dict(zip(asdict(sums), values.tolist(), strict=True)))


def _tokens(groups: Sequence[RankedGroup], numbers: Sequence[int]) -> int:
    return padded_tokens([groups[number] for number in numbers])


def _count(rewards: Tensor, levels: Tensor, members: Tensor) -> Tensor:
    """Count pairs whose order agrees with the labels, and pairs, and sum the rewards: (3,), on the device.

    An equal reward counts half, and a tie is not a pair.
    """
    first, second = pairs_of(members)
    order, device = (levels[second] - levels[first]).sign(), rewards.device
    agreement = (rewards[first.to(device)] - rewards[second.to(device)]).sign() * order.to(device)
    is_ordered = (order != 0).to(device)
    right = ((agreement + 1) / 2).masked_fill(~is_ordered, 0.0).sum()
    return torch.stack([right.double(), is_ordered.sum().double(), rewards.sum().double()])
