"""Proximal policy optimisation of a language model against a reward, with a KL leash to the SFT model.

One step, in the order of `PPOTrainer.step`:
  1. take the next prompts
  2. sample answers from the policy
  3. score them as text
  4. one pass without gradient for policy and reference log-probabilities and values
  5. per-token rewards: -beta KL everywhere, the score on the last token
  6. generalised advantage estimation
  7. epochs of clipped updates of policy and critic
  8. metrics, the KL coefficient, a checkpoint

Sampling, shuffles and learning rates are functions of seed and step, so a checkpoint holds weights, optimiser and the
KL coefficient, and a killed run ends with the weights of an uninterrupted one.

Ziegler et al. 2019 (arXiv:1909.08593), Stiennon et al. 2020 (arXiv:2009.01325), Ouyang et al. 2022 (arXiv:2203.02155).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_cli import progress
from rlhf_cli.data.records import Prompt, seed_for
from rlhf_cli.errors import DivergedError
from rlhf_cli.models.roles import Roles
from rlhf_cli.objectives.advantages import generalised_advantages, token_rewards
from rlhf_cli.objectives.kl import adapted_kl_coef, kl_per_token
from rlhf_cli.objectives.masking import whiten
from rlhf_cli.rollout.experience import Answers, Engine, RewardFunction, decode
from rlhf_cli.rollout.sampling import sample
from rlhf_cli.training.checkpoints import (
    latest_checkpoint,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
)
from rlhf_cli.training.control import BAD_STEPS_IN_A_ROW, Stop
from rlhf_cli.training.metrics import MetricsLog
from rlhf_cli.training.ppo_metrics import note, step_metrics
from rlhf_cli.training.ppo_options import PPOOptions
from rlhf_cli.training.ppo_update import Updater


@dataclass(frozen=True)
class PromptSet:
    """Prompts to train on, with what sampling needs to know of their tokenizer.

    Attributes:
        prompts: as text or conversations.
        ids: their token ids.
        tokenizer: decodes the answers.
        eos_ids: tokens that end an answer.
    """

    prompts: Sequence[Prompt]
    ids: Sequence[list[int]]
    tokenizer: Any
    eos_ids: set[int]


class PPOTrainer:
    """The loop.

    Args:
        roles: policy, reference and critic.
        engine: forward passes over them.
        prompts: what to answer.
        reward: scores answers, as text.
        options: settings.
        seed: of prompt order, sampling and shuffles.
        work: folder for checkpoints.
        metrics: file for metrics.
        stop: asked after every step.
    """

    def __init__(
        self,
        roles: Roles,
        engine: Engine,
        prompts: PromptSet,
        reward: RewardFunction,
        options: PPOOptions,
        *,
        seed: int,
        work: Path,
        metrics: Path,
        stop: Stop,
    ) -> None:
        self.roles, self.engine, self.options = roles, engine, options
        self.updater = Updater(roles, engine, options, seed=seed)
        self.kl_coef = options.kl_coef
        self.history: list[dict[str, float]] = []
        self._prompts, self._reward, self._seed = prompts, reward, seed
        self._work, self._metrics_path, self._stop = work, metrics, stop
        self._bad_steps = 0
        self._rolled_back = False

    def train(self) -> list[dict[str, float]]:
        """Run all steps, from the newest whole checkpoint if there is one; returns the metrics of every step."""
        step = self._resume()
        log = MetricsLog(self._metrics_path, after_step=step)
        with progress.task("ppo", self.options.steps, "steps", done=step) as bar:
            while step < self.options.steps:
                try:
                    metrics = self.step(step)
                    self._count_bad(metrics)
                except DivergedError:
                    step = self._roll_back(step)
                    log.close()
                    log = MetricsLog(self._metrics_path, after_step=step)
                    continue
                step += 1
                self.history.append(metrics)
                log.write(step, metrics)
                bar.advance(note=note(metrics))
                if self._stop.requested or self._is_due(step):
                    log.sync()
                    self._save(step)
                self._stop.check()
        log.close()
        return self.history

    def step(self, step: int) -> dict[str, float]:
        """One step; `step` is 0-based. Returns its metrics, under TRL's names."""
        options = self.options
        answers = self._answer(self._prompts_of(step), step)
        before = self.engine.passes(answers)
        kl = kl_per_token(before.logprobs, before.reference_logprobs, options.kl_estimator)
        scores = self._shaped(answers).to(kl.device)
        rewards = token_rewards(scores, kl, before.is_response, kl_coef=self.kl_coef)
        if options.whiten_rewards:
            rewards = whiten(rewards, before.is_response, keep_mean=True)
        advantages, returns = generalised_advantages(
            rewards, before.values, before.is_response, gamma=options.gamma, gae_lambda=options.gae_lambda
        )
        if options.whiten_advantages:
            advantages = whiten(advantages, before.is_response)
        update = self.updater.update(step, answers, before, advantages, returns)
        metrics = step_metrics(answers, before, scores, returns, update, kl_coef=self.kl_coef)
        metrics["lr"] = self.updater.learning_rate((step + 1) * options.epochs * options.minibatches - 1)
        metrics["episode"] = float((step + 1) * options.answers_per_step)
        if options.kl_target is not None:
            self.kl_coef = adapted_kl_coef(
                self.kl_coef,
                metrics["objective/kl"],
                target=options.kl_target,
                horizon=options.kl_horizon,
                episodes=len(answers),
            )
        return metrics

    def _prompts_of(self, step: int) -> list[int]:
        """Prompts of a step: the run walks through one shuffle of all prompts after another."""
        count, wanted = len(self._prompts.prompts), self.options.prompts_per_step
        chosen: list[int] = []
        position = step * wanted
        while len(chosen) < wanted:
            lap, offset = divmod(position, count)
            order = torch.randperm(count, generator=torch.Generator().manual_seed(self._seed + 7_919 * (lap + 1)))
            taken = order[offset : offset + wanted - len(chosen)].tolist()
            chosen += taken
            position += len(taken)
        return [row for row in chosen for _ in range(self.options.samples_per_prompt)]

    def _answer(self, rows: list[int], step: int) -> Answers:
        """Sample an answer to each row, and score it."""
        options, source = self.options, self._prompts
        prompts = [source.prompts[row] for row in rows]
        ids = [source.ids[row] for row in rows]
        # The number of the answer in the run: a prompt that comes back gets a new seed.
        seeds = [seed_for(prompt, self._seed, step * len(rows) + place) for place, prompt in enumerate(prompts)]
        with self.roles.policy() as model, self.engine.autocast():
            samples = sample(
                model,
                ids,
                seeds,
                max_new_tokens=options.max_new_tokens,
                temperature=options.temperature,
                eos_ids=source.eos_ids,
                batch_size=options.rollout_batch_size,
            )
        texts = [decode(source.tokenizer, answer.ids) for answer in samples]
        ended = [answer.ended for answer in samples]
        scores = torch.tensor(self._reward(prompts, texts, ended), dtype=torch.float32)
        return Answers(prompts, ids, [answer.ids for answer in samples], texts, ended, scores)

    def _shaped(self, answers: Answers) -> Tensor:
        """Scores after clipping and the rule for answers without an end: (N,)."""
        scores = answers.scores.clone()
        if self.options.reward_clip is not None:
            scores = scores.clamp(-self.options.reward_clip, self.options.reward_clip)
        if self.options.missing_eos_reward is not None:
            # Replaced, not subtracted: the "EOS trick" of summarize-from-feedback.
            scores[~torch.tensor(answers.ended)] = self.options.missing_eos_reward
        return scores

    def _is_due(self, step: int) -> bool:
        """Whether to save: never among bad steps, so that going back goes to before them."""
        is_sound = self._bad_steps == 0 and step % self.options.checkpoint_steps == 0
        return is_sound or step == self.options.steps

    def _count_bad(self, metrics: dict[str, float]) -> None:
        self._bad_steps = self._bad_steps + 1 if metrics["skipped_steps"] else 0
        if self._bad_steps >= BAD_STEPS_IN_A_ROW:
            raise DivergedError(f"gradients were not finite in {self._bad_steps} steps in a row")

    def _roll_back(self, step: int) -> int:
        """Return to the last checkpoint, once; the second time, give up with the error being handled."""
        checkpoint = None if self._rolled_back else latest_checkpoint(self._work)
        if checkpoint is None:
            raise DivergedError(
                f"PPO diverged at step {step + 1} of {self.options.steps}: values are not finite",
                hint="lower `ppo.learning_rate` or set `model.precision: float32`; no bad weight was saved",
            )
        progress.warn(
            f"values are not finite at step {step + 1}: "
            f"going back once, to step {checkpoint.step}, with half the learning rate"
        )
        self._restore(checkpoint.tensors, checkpoint.state)
        # The same steps at the same rate would end the same way.
        self._rolled_back, self._bad_steps = True, 0
        self.updater.rate_scale = 0.5
        return checkpoint.step

    def _save(self, step: int) -> None:
        tensors = self.roles.state() | optimizer_tensors(self.updater.optimizer, "optimizer")
        state = {"kl_coef": self.kl_coef, "history": self.history, "rolled_back": self._rolled_back}
        save_checkpoint(self._work, step, tensors, state)

    def _resume(self) -> int:
        checkpoint = latest_checkpoint(self._work)
        if checkpoint is None:
            self._save(0)  # what a divergence in the first steps goes back to
            return 0
        self._restore(checkpoint.tensors, checkpoint.state)
        if checkpoint.step:
            progress.say(f"ppo: going on behind step {checkpoint.step} of {self.options.steps}")
        return checkpoint.step

    def _restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        self.roles.load_state(tensors)
        restore_optimizer(self.updater.optimizer, tensors, "optimizer")
        self.kl_coef, self.history = state["kl_coef"], list(state["history"])
        self._rolled_back = state["rolled_back"]
        self.updater.rate_scale = 0.5 if self._rolled_back else 1.0
