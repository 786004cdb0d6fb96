"""Proximal policy optimization of a language model against a reward, with a KL leash to the SFT model.

One step, in the order of `PPOTrainer.step`:
  1. take the next prompts
  2. sample answers from the policy
  3. score them as text
  4. one pass without gradient for policy and reference log-probabilities and values
  5. per-token rewards: -beta KL everywhere, the score on the last token
  6. generalized advantage estimation
  7. epochs of clipped updates of policy and critic
  8. metrics, the KL coefficient, a checkpoint

Sampling, shuffles and learning rates are functions of seed and step, so a checkpoint holds weights, optimizer and a few
numbers, and a killed run ends with the weights of an uninterrupted one. Several processes share the answers of a step
and agree on everything else.

Ziegler et al. 2019 (arXiv:1909.08593), Stiennon et al. 2020 (arXiv:2009.01325), Ouyang et al. 2022 (arXiv:2203.02155).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from rlhf_cli import progress
from rlhf_cli.distributed.signals import StopRequest
from rlhf_cli.errors import DataError, DivergedError
from rlhf_cli.objectives.advantages import generalized_advantages, token_rewards
from rlhf_cli.objectives.kl import adapted_kl_coef, kl_per_token
from rlhf_cli.objectives.masking import whiten
from rlhf_cli.stages.ppo.evaluation import Evaluation
from rlhf_cli.stages.ppo.forward_passes import Answers, ForwardPasses
from rlhf_cli.stages.ppo.metrics import all_finite, histograms, note, rollout_metrics, update_metrics
from rlhf_cli.stages.ppo.models import PPOModels
from rlhf_cli.stages.ppo.options import PPOOptions
from rlhf_cli.stages.ppo.ptx import Demonstrations, SupervisedLoss
from rlhf_cli.stages.ppo.rollout import ProgressCallback, PromptSet, RewardFunction, Rollouts
from rlhf_cli.stages.ppo.run_logger import RunLogger, StepReport
from rlhf_cli.stages.ppo.state import Best, RunState
from rlhf_cli.stages.ppo.update import Experience, Updater
from rlhf_cli.training.checkpoint.store import (
    best_checkpoint,
    latest_checkpoint,
    optimizer_tensors,
    restore_optimizer,
    save_best,
    save_checkpoint,
)
from rlhf_cli.training.distributed import DistributedStop
from rlhf_cli.training.loop import BAD_STEPS_IN_A_ROW
from rlhf_cli.training.monitoring.metrics_log import MetricsLog
from rlhf_cli.training.monitoring.samples import SampleLog, name_spike
from rlhf_cli.training.random_state import random_state, restore_random_state, seed_everything


@dataclass(frozen=True)
class PPOData:
    """What PPO reads.

    Attributes:
        prompts: to train on.
        held_out: to evaluate on and to show; may be None where neither is asked for.
        demonstrations: for PPO-ptx, or None.
    """

    prompts: PromptSet
    held_out: PromptSet | None = None
    demonstrations: Demonstrations | None = None


class PPOTrainer:
    """The loop.

    Args:
        roles: policy, reference and critic.
        engine: forward passes over them, and the processes that share the work.
        data: what to answer.
        reward: scores answers, as text.
        options: settings.
        seed: of prompt order, sampling and shuffles.
        work: folder for checkpoints, metrics and samples.
        stop: asked after every step.
        log: makes the metrics log behind a step, in the process that writes it.
    """

    def __init__(
        self,
        roles: PPOModels,
        engine: ForwardPasses,
        data: PPOData,
        reward: RewardFunction,
        options: PPOOptions,
        *,
        seed: int,
        work: Path,
        stop: StopRequest,
        log: Callable[..., MetricsLog] = MetricsLog,
    ) -> None:
        self.roles, self.engine, self.options = roles, engine, options
        self.state = RunState(options.kl_coef)
        self._data, self._seed, self._work = data, seed, work
        self._processes, self._open_log = engine.processes, log
        self._stop = DistributedStop(stop, engine.processes)
        self._rollouts = Rollouts(roles, engine, reward, options, seed=seed)
        self.updater = Updater(roles, engine, options, seed=seed, supervised=self._supervised())
        held_out = data.held_out
        self._evaluation = None if held_out is None else Evaluation(self._rollouts, engine, held_out, options)
        self._journal: RunLogger = RunLogger()
        self._largest_log_ratio = 0.0  # so far, in this process: what is far beyond it is a spike

    def _supervised(self) -> SupervisedLoss | None:
        if self._data.demonstrations is None:
            return None
        return SupervisedLoss(
            self.roles,
            self.engine,
            self._data.demonstrations,
            coef=self.options.ptx_coef,
            batch_size=self.options.ptx_batch_size,
            seed=self._seed,
        )

    def train(self) -> RunState:
        """Run all steps, from the newest whole checkpoint if there is one; the policy then has its final weights.

        Raises:
            DivergedError: values were not finite, also after going back once.
            Interrupted: a signal came; the step that was running is saved.
        """
        step = self._begin()
        try:
            self._run(step)
        finally:
            self._journal.close()
        self._take_best()
        return self.state

    def _run(self, resumed: int | None) -> None:
        step = resumed or 0
        with progress.task("ppo", self.options.steps, "steps", done=step) as bar:

            def tell(what: str) -> None:
                bar.advance(0, note=what)

            if resumed is None:
                self._look(0, {}, tell)
                self._save(0)  # what a divergence in the first steps goes back to
            while step < self.options.steps and not self.state.ended:
                try:
                    report = self.step(step, tell)
                    self._finish(step + 1, report, tell)
                except DivergedError as error:
                    step = self._roll_back(step + 1, error)
                    continue
                step += 1
                bar.advance(note=note(report.metrics))
                if self._stop.requested:
                    if not self._is_due(step):
                        self._save(step)
                    self._stop.check()

    def _finish(self, step: int, report: StepReport, tell: ProgressCallback) -> None:
        """What comes after the update: is all well, is it far enough, who looks at it, where is it written."""
        self._count_bad(report)
        self._end_early(step, report.metrics)
        self._look(step, report.metrics, tell)
        self._journal.write(step, report)
        if self._is_due(step):
            self._save(step)

    def step(self, step: int, tell: ProgressCallback = lambda _: None) -> StepReport:
        """One step; `step` is 0-based."""
        options, beta = self.options, self.state.kl_coef
        rows = self._rollouts.rows_of(step, len(self._data.prompts))
        numbers = range(step * len(rows), (step + 1) * len(rows))
        answers = self._rollouts.answers(self._data.prompts, rows, numbers, tell)
        tell("passes")
        before = self.engine.passes(answers)
        kl = kl_per_token(before.logprobs, before.reference_logprobs, options.kl_estimator)
        scores = self._rewards(answers).to(kl.device)
        metrics = rollout_metrics(answers, before, scores, kl, kl_coef=beta)
        metrics |= {"objective/kl_coef": beta, "episode": float((step + 1) * options.answers_per_step)}
        if not all_finite(scores):
            # A broken reward must not reach the weights; the reward itself has named the answer.
            metrics["skipped_steps"] = float(options.optimizer_steps_per_step)
            return StepReport(metrics, histograms(answers), "; ".join(answers.faults) or "a reward is not finite")
        rewards = token_rewards(scores, kl, before.is_response, kl_coef=beta if options.kl_in == "reward" else 0.0)
        if options.whiten_rewards:
            rewards = whiten(rewards, before.is_response, keep_mean=True)
        advantages, returns = generalized_advantages(
            rewards, before.values, before.is_response, gamma=options.gamma, gae_lambda=options.gae_lambda
        )
        if options.whiten_advantages:
            advantages = whiten(advantages, before.is_response)
        tell("updating")
        update = self.updater.update(step, Experience(answers, before, advantages, returns), kl_coef=beta)
        metrics |= update_metrics(before, returns, update)
        metrics["lr"] = self.updater.learning_rate((step + 1) * options.optimizer_steps_per_step - 1)
        worst = update.worst
        if update.ratio_skips or worst.log_ratio > max(math.log(options.ratio_limit), 2 * self._largest_log_ratio):
            name_spike(
                step=step + 1,
                prompt=answers.prompts[worst.answer],
                answer=answers.texts[worst.answer],
                token=self._data.prompts.tokenizer.decode([answers.response_ids[worst.answer][worst.place]]),
                log_ratio=worst.log_ratio,
            )
        self._largest_log_ratio = max(self._largest_log_ratio, worst.log_ratio)
        if step >= options.critic_warmup_steps:  # before, the policy cannot move, and says nothing about beta
            self._adapt(metrics["objective/kl"], len(answers))
        return StepReport(metrics, histograms(answers))

    def _rewards(self, answers: Answers) -> Tensor:
        """Rewards to train on, (N,): scores after scale, clip and penalties."""
        scale = self.options.reward_scale
        if scale == "running":
            if all_finite(answers.scores):
                self.state.moments = self.state.moments.including(answers.scores.tolist())
            scale = 1.0 / self.state.moments.std
        return self.options.shape.apply(answers.scores, answers.ended_flags, answers.lengths, scale=scale)

    def _adapt(self, kl: float, episodes: int) -> None:
        if self.options.kl_target is not None:
            self.state.kl_coef = adapted_kl_coef(
                self.state.kl_coef,
                kl,
                target=self.options.kl_target,
                horizon=self.options.kl_horizon,
                episodes=episodes,
            )

    def _look(self, step: int, metrics: dict[str, float], tell: ProgressCallback) -> None:
        """Evaluate and show what is due after `step` steps; figures are added to `metrics`."""
        options, evaluation = self.options, self._evaluation
        if evaluation is None:
            return
        is_last = step == options.steps or bool(self.state.ended)
        if options.eval_steps is not None and (step % options.eval_steps == 0 or is_last):
            metrics |= evaluation.metrics(kl_coef=self.state.kl_coef, tell=tell)
            self._keep_best(step, metrics)
            if step == 0:
                self._journal.write(0, StepReport(metrics, {}))
        if options.show_steps is not None and (step % options.show_steps == 0 or is_last):
            self._journal.show(step, evaluation.fixed(tell))

    def _keep_best(self, step: int, metrics: dict[str, float]) -> None:
        budget = self.options.kl_budget
        reward, kl = metrics["eval/objective/reward"], metrics["eval/objective/kl"]
        if budget is None or not kl <= budget or not math.isfinite(reward):
            return
        if self.state.best is None or reward > self.state.best.reward:
            self.state.best = Best(step, reward, kl)
            save_best(self._work, step, self.roles.state(), asdict(self.state.best), processes=self._processes)

    def _take_best(self) -> None:
        """Where a KL budget chooses, give the policy the weights of the best."""
        if self.options.kl_budget is None:
            return
        kept = self.state.best
        if kept is None:
            progress.warn(
                f"no evaluated policy was within `kl_budget: {self.options.kl_budget:g}`: the last is written"
            )
            return
        self.roles.load_state(self._best_tensors(kept))
        progress.say(
            f"ppo: the best policy within the budget is that of step {kept.step}: "
            f"held-out reward {kept.reward:.2f}, KL {kept.kl:.1f} nats an answer"
        )

    def _best_tensors(self, kept: Best) -> dict[str, Tensor]:
        """Weights of the best policy so far; another one must not silently take its place."""
        best = best_checkpoint(self._work, processes=self._processes)
        if best is None:
            raise DataError(
                f"the best policy within `kl_budget`, that of step {kept.step}, cannot be read from {self._work}",
                hint="run again with `--force` on `ppo`, or without a budget to get the last policy",
            )
        return best.tensors

    def _end_early(self, step: int, metrics: dict[str, float]) -> None:
        limit = self.options.kl_stop
        if limit is not None and metrics["objective/kl"] > limit and step < self.options.steps:
            self.state.ended = f"KL {metrics['objective/kl']:.1f} exceeded `kl_stop: {limit:g}` at step {step}"
            progress.say(f"ppo: {self.state.ended}; the run ends here")

    def _is_due(self, step: int) -> bool:
        """Whether a regular checkpoint is due: never among bad steps, so that going back goes to before them."""
        is_last = step == self.options.steps or bool(self.state.ended)
        return is_last or (self.state.bad_steps == 0 and step % self.options.checkpoint_steps == 0)

    def _count_bad(self, report: StepReport) -> None:
        skipped = report.metrics["skipped_steps"]
        fault = report.fault or "gradients were not finite, or ratios beyond `ppo.ratio_limit`"
        hint = "a reward must be a finite number for every answer; no bad weight was saved" if report.fault else None
        self.state.bad_steps = self.state.bad_steps + 1 if skipped else 0
        self.state.sound_steps += int(skipped < self.options.optimizer_steps_per_step)
        if self.state.bad_steps >= BAD_STEPS_IN_A_ROW:
            raise DivergedError(f"{self.state.bad_steps} steps in a row were left out: {fault}", hint=hint)
        is_last = report.metrics["episode"] == self.options.steps * self.options.answers_per_step
        if is_last and not self.state.sound_steps:
            raise DivergedError(f"nothing was learned in any step: {fault}", hint=hint)

    def _roll_back(self, step: int, error: DivergedError) -> int:
        """Return to the last regular checkpoint, once; the second time, give up with the error being handled."""
        checkpoint = None
        if not self.state.rolled_back:
            checkpoint = latest_checkpoint(self._work, up_to=self.state.anchor, processes=self._processes)
        if checkpoint is None:
            raise DivergedError(
                f"PPO diverged in step {step} of {self.options.steps}: {error.message}",
                hint=error.hint
                or "lower `ppo.learning_rate` or set `model.precision: float32`; no bad weight was saved",
            ) from error
        progress.warn(
            f"step {step}: {error.message}: going back once, to step {checkpoint.step}, with half the learning rate"
        )
        best = self.state.best  # its file took the place of any earlier one, and it stays the best there was
        self._restore(checkpoint.tensors, checkpoint.state)
        self.state.best = best
        self._journal.close()
        self._journal = self._open(checkpoint.step, checkpoint.state["metrics"])
        # The same steps at the same rate would end the same way.
        self.state.rolled_back, self.state.bad_steps = True, 0
        self.updater.rate_scale = 0.5
        return checkpoint.step

    def _save(self, step: int) -> None:
        """Write a checkpoint; all processes are here together before and after."""
        if self._is_due(step):
            self.state.anchor = step
        randomness = self._processes.all_gather_object(random_state())
        tensors = self.roles.state() | optimizer_tensors(self.updater.optimizer, "optimizer")
        state = {"run": asdict(self.state), "random": randomness, "metrics": self._journal.position()}
        keep = self.options.keep_checkpoints
        save_checkpoint(
            self._work, step, tensors, state, keep=keep, protected=self.state.anchor, processes=self._processes
        )

    def _begin(self) -> int | None:
        """Go on from the newest whole checkpoint; returns its step, or None where there is none."""
        checkpoint = latest_checkpoint(self._work, processes=self._processes)
        seed_everything(self._seed, self._processes.index)
        if checkpoint is None:
            self._journal = self._open(-1, None)  # nothing that an earlier attempt wrote stays
            return None
        self._restore(checkpoint.tensors, checkpoint.state)
        if self.state.best is not None:
            self._best_tensors(self.state.best)
        self._journal = self._open(checkpoint.step, checkpoint.state["metrics"])
        if checkpoint.step:
            progress.say(f"ppo: going on behind step {checkpoint.step} of {self.options.steps}")
        return checkpoint.step

    def _restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        self.roles.load_state(tensors)
        restore_optimizer(self.updater.optimizer, tensors, "optimizer")
        self.state = RunState.of(state["run"])
        self.updater.rate_scale = 0.5 if self.state.rolled_back else 1.0
        states = state["random"]
        # On another number of processes there is no state of their own for some; what PPO draws does not depend on it.
        if self._processes.index < len(states):
            restore_random_state(states[self._processes.index])

    def _open(self, step: int, position: dict[str, Any] | None) -> RunLogger:
        if not self._processes.is_main:
            return RunLogger()
        log = self._open_log(self._work / "metrics.jsonl", after_step=step, position=position)
        shows = self.options.show_steps is not None
        return RunLogger(log, SampleLog(self._work / "samples.jsonl", after_step=step) if shows else None)
