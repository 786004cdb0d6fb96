"""Proximal policy optimization of a language model against a reward, with a KL penalty to the SFT model.

One step, in the order of `PPOTrainer.step`:
  1. take the next prompts
  2. sample completions from the policy
  3. score them as text
  4. one pass without gradient for policy and reference log-probabilities and values
  5. per-token rewards: -beta KL everywhere, the score on the last token
  6. generalized advantage estimation
  7. epochs of clipped updates of policy and critic
  8. metrics and the KL coefficient

Checkpoints, roll-backs and stops are those of `training.loop`. Sampling, shuffles and learning rates are functions of
seed and step. Several processes share the completions of a step and compute everything else alike.

Ziegler et al. 2019 (arXiv:1909.08593), Stiennon et al. 2020 (arXiv:2009.01325), Ouyang et al. 2022 (arXiv:2203.02155).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from rlhf_cli import progress
from rlhf_cli.distributed.signals import StopRequest
from rlhf_cli.errors import RLHFError
from rlhf_cli.generation.generator import Generator
from rlhf_cli.generation.policy import Policy
from rlhf_cli.generation.torch_generator import TorchGenerator
from rlhf_cli.objectives.advantages import generalized_advantages, token_rewards
from rlhf_cli.objectives.kl import adapted_kl_coef, kl_per_token
from rlhf_cli.objectives.masking import whiten
from rlhf_cli.stages.ppo.best_policy import BestPolicy
from rlhf_cli.stages.ppo.data import PPOData
from rlhf_cli.stages.ppo.detection import observation, stop_error
from rlhf_cli.stages.ppo.evaluation import Evaluation, reward_shape
from rlhf_cli.stages.ppo.forward_passes import Completions, ForwardPasses
from rlhf_cli.stages.ppo.importance import importance_correction
from rlhf_cli.stages.ppo.metrics import all_finite, histograms, note, rollout_metrics, update_metrics
from rlhf_cli.stages.ppo.models import PPOModels
from rlhf_cli.stages.ppo.ptx import SupervisedLoss
from rlhf_cli.stages.ppo.rollout import RewardFunction, Rollouts
from rlhf_cli.stages.ppo.settings import PPOSettings
from rlhf_cli.stages.ppo.state import RunState
from rlhf_cli.stages.ppo.update import Experience, Updater, UpdateStatistics
from rlhf_cli.stages.ppo.work import ALIKE, StepFlops, relative_durations, step_work
from rlhf_cli.training.loop import TrainingLoop
from rlhf_cli.training.monitoring.detectors.detectors import Detectors
from rlhf_cli.training.monitoring.detectors.observation import Observation
from rlhf_cli.training.monitoring.metrics_log import MetricsLog
from rlhf_cli.training.monitoring.run_logger import RunLogger
from rlhf_cli.training.monitoring.samples import warn_of_detection, warn_of_ratio
from rlhf_cli.training.task import StepReport, TrainingTask
from rlhf_cli.training.timing import StepWatch


class PPOTrainer(TrainingTask):
    """Trains policy and critic in place.

    Args:
        models: policy, reference and critic.
        forward_passes: forward passes over them, and the processes that share the work.
        data: what to train and evaluate on.
        reward: scores completions, as text.
        settings: section `ppo` of the recipe.
        policy: samples; its weights are the policy's of `models`.
        generator: draws completions from it; None is `TorchGenerator`.
        detectors: watch the completions; None is those of `settings`, which then know nothing of the rewards.
        seed: of prompt order, sampling and shuffles.
        work: folder of checkpoints, metrics and samples.
        stop: asked after every step.
        log: makes the metrics log, from the arguments of `MetricsLog`.
        peak: operations per second that the device can do; None is not known.
        save_policy: writes the policy after a number of steps, where `ppo.save_steps` asks for it.
        checkpoint_async: see `TrainingLoop`.
    """

    def __init__(
        self,
        models: PPOModels,
        forward_passes: ForwardPasses,
        data: PPOData,
        reward: RewardFunction,
        settings: PPOSettings,
        *,
        policy: Policy,
        generator: Generator | None = None,
        detectors: Detectors | None = None,
        seed: int,
        work: Path,
        stop: StopRequest,
        log: Callable[..., MetricsLog] = MetricsLog,
        peak: float | None = None,
        save_policy: Callable[[int], None] | None = None,
        checkpoint_async: bool = False,
    ) -> None:
        self._save_policy = save_policy
        self.models, self.forward_passes, self.settings, self.data = models, forward_passes, settings, data
        self.state = RunState(settings.kl_coef)
        self.policy = policy
        self.rollouts = Rollouts(
            policy, generator or TorchGenerator(), reward, settings, seed=seed, processes=forward_passes.processes
        )
        self.updater = Updater(models, forward_passes, settings, seed=seed, supervised=self._supervised(seed))
        self.optimizer = self.updater.optimizer
        held_out = data.held_out
        self._evaluation = None if held_out is None else Evaluation(self.rollouts, forward_passes, held_out, settings)
        self._work, self._processes, self._shape = work, forward_passes.processes, reward_shape(settings)
        self._best = BestPolicy(settings.kl_budget, models, work, forward_passes.processes)
        self._flops = StepFlops.of(models)
        self.phases, self.alike = relative_durations(settings, policy, data.prompts), ALIKE
        self._detectors = detectors or Detectors(settings.detectors)
        self._seen: Observation | None = None  # the completions of the step that is running
        self.loop = TrainingLoop(
            self,
            label="ppo",
            steps=settings.steps,
            checkpoint_steps=settings.checkpoint_steps,
            keep_checkpoints=settings.keep_checkpoints,
            seed=seed,
            work=work,
            stop=stop,
            processes=forward_passes.processes,
            hint="lower `ppo.learning_rate` or set `model.precision: float32`; no bad weights were saved",
            shows_samples=settings.show_steps is not None,
            log=log,
            watch=StepWatch(forward_passes.device, self.phases, self.alike),
            peak=peak,
            checkpoint_async=checkpoint_async,
        )

    def _supervised(self, seed: int) -> SupervisedLoss | None:
        demonstrations, ptx = self.data.demonstrations, self.settings.ptx
        if demonstrations is None or ptx is None:
            return None
        return SupervisedLoss(
            self.models, self.forward_passes, demonstrations, coef=ptx.coef, batch_size=ptx.batch_size, seed=seed
        )

    def train(self) -> RunState:
        """Run all steps, see `TrainingLoop.run`; the policy then has the weights to write."""
        self.loop.run()
        self._best.load(self.state.best)
        return self.state

    def step(self, step: int, watch: StepWatch | None = None) -> StepReport:
        """Run the 0-based step `step`."""
        settings, beta, watch = self.settings, self.state.kl_coef, watch or StepWatch()
        completions = self.rollouts.next_step(self.data.prompts, step, watch)
        tokens = sum(map(completions.tokens, range(len(completions))))
        self.forward_passes.count = watch.count
        with watch.phase("passes", "passes", total=self.forward_passes.passing * tokens):
            before = self.forward_passes.rollout_tensors(completions)
        kl = kl_per_token(before.logprobs, before.reference_logprobs)
        scores = self.rewards(completions).to(kl.device)
        metrics = rollout_metrics(completions, before, scores, kl_coef=beta)
        metrics |= {"objective/kl_coef": beta, "episode": float((step + 1) * settings.completions_per_step)}
        self._seen = None
        if not all_finite(scores):
            return self._broken(completions, metrics)
        rewards = token_rewards(scores, kl, before.is_completion, kl_coef=beta if settings.kl_in == "reward" else 0.0)
        if settings.whiten_rewards:
            rewards = whiten(rewards, before.is_completion, keep_mean=True)
        advantages, returns = generalized_advantages(
            rewards, before.values, before.is_completion, gamma=settings.gamma, gae_lambda=settings.gae_lambda
        )
        if settings.whiten_advantages:
            advantages = whiten(advantages, before.is_completion)
        weights, drift = importance_correction(before, completions.sampler_logprobs, cap=settings.importance_cap)
        advantages, metrics = advantages * weights, metrics | drift
        if settings.overlap_rollouts:
            metrics["generation/stale"] = float(completions.is_stale)
        with watch.phase("update", "updating", total=settings.epochs * tokens):
            update = self.updater.update(step, Experience(completions, before, advantages, returns), kl_coef=beta)
        metrics |= update_metrics(before, returns, update)
        metrics["lr"] = self.updater.learning_rate((step + 1) * settings.optimizer_steps_per_step - 1)
        self._warn_of_ratio(step, completions, update)
        self._seen = observation(step + 1, completions, before, metrics)
        if step >= settings.critic_warmup_steps:  # before, the policy cannot move, and its KL says nothing about beta
            self._adapt(metrics["objective/kl"], len(completions))
        return StepReport(
            metrics,
            note(metrics),
            skipped=update.skipped_steps + update.ratio_skips,
            of=settings.optimizer_steps_per_step,
            fault="gradients were not finite, or ratios exceeded `ppo.ratio_limit`",
            histograms=histograms(completions),
            work=step_work(completions, update, self._flops),
            episodes=len(completions),
        )

    def _broken(self, completions: Completions, metrics: dict[str, float]) -> StepReport:
        """Report a step with a reward that is not finite: it must not reach the weights. The reward named the text."""
        count = self.settings.optimizer_steps_per_step
        metrics["skipped_steps"] = float(count)
        return StepReport(
            metrics,
            note(metrics),
            skipped=count,
            of=count,
            fault="; ".join(completions.faults) or "a reward is not finite",
            hint="a reward must be a finite number for every completion; no bad weights were saved",
            histograms=histograms(completions),
        )

    def rewards(self, completions: Completions) -> Tensor:
        """Return the rewards to train on, (N,): scores after scale, clip and penalties."""
        scale = self.settings.reward_scale
        if scale == "running":
            if all_finite(completions.scores):
                self.state.moments = self.state.moments.including(completions.scores.tolist())
            scale = 1.0 / self.state.moments.std
        return self._shape.apply(completions.scores, completions.finished_flags, completions.lengths, scale=scale)

    def _warn_of_ratio(self, step: int, completions: Completions, update: UpdateStatistics) -> None:
        """Warn of the completion with the largest ratio where a minibatch was skipped.

        A large ratio of a single token is not a reason: in most updates of a healthy run a rare token has one.
        """
        worst = update.worst
        if update.ratio_skips:
            warn_of_ratio(
                step=step + 1,
                skipped=update.ratio_skips,
                limit=self.settings.ratio_limit,
                prompt=completions.prompts[worst.completion],
                completion=completions.texts[worst.completion],
                token=str(
                    self.policy.format.tokenizer.decode([completions.completion_ids[worst.completion][worst.token]])
                ),
            )

    def _adapt(self, kl: float, episodes: int) -> None:
        if self.settings.kl_target is not None:
            self.state.kl_coef = adapted_kl_coef(
                self.state.kl_coef,
                kl,
                target=self.settings.kl_target,
                horizon=self.settings.kl_horizon,
                episodes=episodes,
            )

    def scale_learning_rates(self, factor: float) -> None:
        """See `TrainingTask`."""
        self.updater.rate_scale = factor

    def weights(self) -> dict[str, Tensor]:
        """See `TrainingTask`."""
        return self.models.state()

    def load_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """See `TrainingTask`."""
        self.models.load_state(tensors)

    def extra_state(self) -> dict[str, Any]:
        """See `TrainingTask`."""
        ahead = {"ahead": self.rollouts.ahead_state()} if self.settings.overlap_rollouts else {}
        return asdict(self.state) | ahead

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """See `TrainingTask`. The best policy outlives a roll-back, because its file replaced all earlier ones."""
        best, state = self.state.best, dict(state)
        self.rollouts.restore_ahead(state.pop("ahead", None))
        self.state = RunState.of(state)
        if self.has_ended:
            progress.say(f"ppo: {self.state.ended}; there are no further steps")
        if best is not None:
            self.state.best = best
        elif self.state.best is not None:
            self._best.tensors(self.state.best)  # raises while there is still something to do about it

    @property
    def has_ended(self) -> bool:
        """See `TrainingTask`."""
        return bool(self.state.ended)

    def before_first_step(self, log: RunLogger, watch: StepWatch) -> None:
        """Evaluate and show the SFT model."""
        metrics: dict[str, float] = {}
        self._evaluate(0, metrics, log, watch)
        if metrics:
            self._detectors.evaluate_start(metrics, self.state.detectors)
            log.write(0, metrics)

    def after_step(self, step: int, report: StepReport, log: RunLogger, watch: StepWatch) -> None:
        """End the run where the KL is too large, evaluate what is due, and show the step to the detectors."""
        limit, kl = self.settings.kl_stop, report.metrics["objective/kl"]
        if limit is not None and kl > limit and step < self.settings.steps:
            self.state.ended = f"KL {kl:.1f} exceeded `kl_stop: {limit:g}` at step {step}"
            progress.say(f"ppo: {self.state.ended}; the run ends here")
        self._evaluate(step, report.metrics, log, watch)
        self._detect(report.metrics, log)
        every = self.settings.save_steps
        if every is not None and self._save_policy is not None and step % every == 0 and step < self.settings.steps:
            with watch.phase("checkpoint", "saving"):
                if self._processes.is_main or self.forward_passes.is_sharded:  # then all gather the weights
                    self._save_policy(step)
                self._processes.barrier()

    def after_last_step(self, step: int, log: RunLogger, watch: StepWatch) -> dict[str, float]:
        """Evaluate and show, unless that was due after the step anyway."""
        metrics: dict[str, float] = {}
        self._evaluate(step, metrics, log, watch, is_late=True)
        return metrics

    def _detect(self, metrics: dict[str, float], log: RunLogger) -> None:
        """Let the detectors look at the step; a step whose rewards are not finite is not looked at."""
        if self._seen is None:
            return
        seen = dataclasses.replace(self._seen, metrics=metrics)
        measured, found = self._detectors.observe(seen, self.state.detectors, checkpoint=self.loop.state.anchor)
        metrics |= measured
        log.detect(found)
        for detection in found:
            warn_of_detection(detection)

    @property
    def kept_steps(self) -> Collection[int]:
        """See `TrainingTask`: the last checkpoint before a detector warned."""
        safe = self.state.detectors.safe_step
        return () if safe is None else (safe,)

    @property
    def halt(self) -> RLHFError | None:
        """See `TrainingTask`."""
        return stop_error(self._detectors, self.state, self.settings, self._work)

    def _evaluate(
        self, step: int, metrics: dict[str, float], log: RunLogger, watch: StepWatch, *, is_late: bool = False
    ) -> None:
        """Evaluate and show what is due after `step` steps; evaluation metrics are added to `metrics`.

        `is_late`: the step became the last one after it was taken, so that what is due anyway has been done.
        """
        settings, evaluation = self.settings, self._evaluation
        if evaluation is None:
            return
        is_last = step == settings.steps or self.has_ended

        def is_due(every: int | None) -> bool:
            if every is None:
                return False
            is_regular = step % every == 0
            return not is_regular if is_late else is_regular or is_last

        if is_due(settings.eval_steps):
            metrics |= evaluation.metrics(kl_coef=self.state.kl_coef, watch=watch)
            self.state.best = self._best.after(step, metrics, self.state.best, self.loop.writer)
        if is_due(settings.show_steps):
            log.show(step, evaluation.fixed(watch))
