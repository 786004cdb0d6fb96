"""PPO's section."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from rlhf_cli.settings.base import (
    Count,
    DataName,
    Effort,
    EffortFlag,
    EffortOnly,
    ModelName,
    Names,
    NonNegative,
    Positive,
    Section,
    Share,
    StageSection,
)
from rlhf_cli.settings.rewards import PPORewardSettings
from rlhf_cli.settings.shared import LoraSettings

_KL_HORIZON = 10_000.0


class PTXSettings(Section):
    """PPO-ptx: a share of the supervised loss mixed into every update (Ouyang et al. 2022, equation 2)."""

    data: DataName = None
    """Demonstration records; null is `sft.data`."""
    coef: Positive = 1.0
    """Weight gamma of the mean loss of a completion token beside PPO's loss. (InstructGPT's 27.8 weighs sums that are
    normalized in another way.)"""
    batch_size: Count = 16
    """Demonstrations beside each minibatch."""
    max_length: Count = 1024
    """Longest demonstration in tokens; longer ones are skipped and counted."""


class PPOSettings(StageSection):
    """Proximal policy optimization against a reward, with a KL leash to the SFT model."""

    model: ModelName = None
    """Policy to start from and reference of the KL penalty; null is what `sft` wrote."""
    reward_model: ModelName = None
    """Folder or hub id of the reward model; null is what `train-rm` writes, or, in a recipe without that stage that
    gives `rewards`, none."""
    rewards: list[PPORewardSettings] = Field(default=[])
    """Further rewards, combined with the reward model's, whose weight is 1: functions, models, HTTP endpoints."""
    reward_combination: Literal["sum", "mean", "min", "mean-std"] = "sum"
    """How several weighted rewards become one. `min` and `mean-std` distrust what the members of an ensemble disagree
    on (Coste et al. 2023, arXiv:2310.02743)."""
    reward_std_coef: NonNegative = 1.0
    """Lambda in mean - lambda std, with `reward_combination: mean-std`."""
    prompts: DataName = None
    """Prompt records; null is `data.prompts`."""

    steps: Count = 100
    """Rollouts, each followed by `epochs` of updates."""
    prompts_per_step: Count = 64
    """Prompts sampled in one step, all processes together."""
    samples_per_prompt: Count = 1
    """Answers to each of them."""
    epochs: Count = 4
    """Passes over one step's answers."""
    minibatches: Count = 1
    """Optimizer steps in one pass."""
    micro_batch_size: Effort = 8
    """Answers in one forward and backward pass of a process. Changes memory and speed, never the result."""
    rollout_batch_size: Effort = 64
    """Answers a process generates at once. Changes memory and speed only."""

    temperature: Positive = 1.0
    """Logits are divided by this in sampling and in every log-probability."""
    max_new_tokens: Count = 128
    """Longest answer in tokens."""
    stop_tokens: list[str] = Field(default=[])
    """Further tokens, as text, that end an answer and stay in it. Each must be one token of the policy's."""

    learning_rate: Positive = 1e-5
    """Peak learning rate of the policy's AdamW (epsilon 1e-5)."""
    critic_learning_rate: Positive | None = None
    """Peak learning rate of the critic; null is `learning_rate`."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Course of the learning rate over the run; `linear` falls to zero."""
    warmup_share: Share = 0.0
    """Share of the run over which the learning rates rise from zero; the policy's begins behind
    `critic_warmup_steps`."""
    max_grad_norm: Positive = 1.0
    """The gradient of policy and critic together is scaled down to at most this norm."""
    critic_warmup_steps: Annotated[int, Field(ge=0)] = 0
    """First steps in which only the critic learns: advantages of a critic that knows nothing are noise."""

    clip_range: Positive = 0.2
    """Epsilon of the clipped surrogate (Schulman et al. 2017, eq. 7)."""
    value_clip_range: Positive | None = 0.2
    """How far a value may move from its rollout value before its loss is clipped, in reward; null does not clip."""
    value_coef: NonNegative = 0.1
    """Weight of the value loss beside the policy's; it decides the critic's part of the gradient norm."""
    entropy_coef: NonNegative = 0.0
    """Weight of the mean entropy of a token's distribution, in reward per nat, as a bonus in the loss (Schulman et al.
    2017, eq. 9)."""
    gamma: Share = 1.0
    """Discount per token."""
    gae_lambda: Share = 0.95
    """Lambda of generalized advantage estimation (Schulman et al. 2015, eq. 16)."""
    whiten_advantages: bool = True
    """Shift and scale a step's advantages to mean 0, standard deviation 1 over its tokens."""
    whiten_rewards: bool = False
    """Scale a step's per-token rewards to standard deviation 1, keeping their mean. Harmful on TL;DR."""
    update_kl_limit: Positive | None = None
    """An update ends early once a minibatch is this far from the policy that sampled, in nats per token; null never."""
    ratio_limit: Annotated[float, Field(gt=1.0)] = 10.0
    """A minibatch whose mean probability ratio exceeds this is left out, counted, and its worst answer named."""

    kl_coef: NonNegative = 0.05
    """Weight of the per-token KL penalty to the SFT model, in reward per nat. The start value, with `kl_target`."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Where the penalty goes: into each token's reward, as in InstructGPT, or into the loss beside the surrogate."""
    kl_target: Positive | None = None
    """KL in nats per answer that an adaptive `kl_coef` steers to (Ziegler et al. 2019, section 2.2); null: fixed."""
    kl_horizon: Positive = _KL_HORIZON
    """Answers over which the adaptive coefficient moves."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Per-token estimate, with x = log pi/ref: k1 = x, unbiased; k2 = x^2 / 2; k3 = exp(-x) - 1 + x, never negative. As
    a loss, k2 has the gradient of the KL, k3 one close to it, and k1 one of mean zero, which is refused."""
    kl_stop: Positive | None = None
    """The run ends early after a step whose answers are farther than this from the SFT model, in nats per answer."""
    kl_budget: Positive | None = None
    """Of the policies evaluated every `eval_steps`, the best within this many nats per answer is what the stage writes;
    null writes the last."""

    reward_scale: Positive | Literal["running"] = 1.0
    """Factor on the combined reward; `running` divides by the standard deviation of all rewards so far."""
    reward_clip: Positive | None = None
    """Rewards are cut to +- this, after the scale and before all penalties; null does not cut."""
    missing_eos_reward: float | None = None
    """Replaces the reward of an answer that did not end with an end-of-text or stop token (the "EOS trick" of
    summarize-from-feedback); null leaves it."""
    missing_eos_penalty: NonNegative = 0.0
    """Subtracted from the reward of such an answer."""
    length_penalty: float = 0.0
    """Subtracted from the reward for each token of an answer; negative favors long ones."""
    ptx: PTXSettings | None = None
    """Mix in the supervised loss; null does not."""

    eval_steps: Count | None = None
    """Steps between two evaluations on held-out prompts, the first before training; null does not evaluate."""
    eval_prompts: Count = 64
    """Held-out prompts (`data.holdout`) to evaluate on, at most."""
    show_steps: Annotated[Count | None, EffortOnly()] = None
    """Steps between two looks at answers to a few fixed prompts, printed and kept in `samples.jsonl`; null never."""
    shown_prompts: Effort = 3
    """How many fixed prompts are looked at."""

    adapter: Literal["lora", "none"] = "lora"
    """`lora`: one frozen backbone; policy, critic and reward are adapters on it. `none`: separate full models."""
    lora: LoraSettings = LoraSettings()
    """The policy's and the critic's adapter."""
    critic: Literal["auto", "adapter", "separate"] = "auto"
    """`adapter` on the policy's backbone, or `separate`: a model of its own, trained in full. `auto` is `adapter`
    beside a LoRA policy and `separate` beside one trained in full."""
    critic_from: Annotated[str, Names("critic")] = "auto"
    """What the critic starts from: `reward-model`, `policy` (with a head that predicts 0), or the folder of a saved
    critic (`runs/NAME/ppo/critic`). `auto` is the reward model where there is one that fits."""
    gradient_checkpointing: EffortFlag = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    checkpoint_steps: Effort = 10
    """Steps between two checkpoints, from which a killed run goes on, and to which one that diverged goes back."""
    keep_checkpoints: Effort = 2
    """Newest step checkpoints that are kept; the best under `kl_budget` is kept besides."""

    @property
    def completions_per_step(self) -> int:
        """Completions sampled per step, all processes together."""
        return self.prompts_per_step * self.samples_per_prompt

    @property
    def optimizer_steps_per_step(self) -> int:
        """Optimizer steps per step, unless its update ends early."""
        return self.epochs * self.minibatches

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.steps * self.optimizer_steps_per_step

    @property
    def critic_is_adapter(self) -> bool:
        """Whether the critic is an adapter on the policy's backbone, not a separate model."""
        return self.critic == "adapter" or (self.critic == "auto" and self.adapter == "lora")

    @model_validator(mode="after")
    def _sizes(self) -> Self:
        if self.completions_per_step < self.minibatches:
            raise ValueError("`minibatches` exceeds the answers of a step (`prompts_per_step` x `samples_per_prompt`)")
        if self.critic_warmup_steps >= self.steps:
            raise ValueError("`critic_warmup_steps` leaves no step in which the policy learns (`steps`)")
        if self.critic_warmup_steps and not self.value_coef:
            raise ValueError("`critic_warmup_steps` has no effect with `value_coef: 0`: nothing would learn in them")
        return self

    @model_validator(mode="after")
    def _kl(self) -> Self:
        if self.kl_target is None and self.kl_horizon != _KL_HORIZON:
            raise ValueError("`kl_horizon` has no effect without `kl_target`")
        if self.kl_target is not None and self.kl_coef == 0.0:
            raise ValueError("`kl_target` has no effect with `kl_coef: 0`: the coefficient is multiplied, and stays 0")
        if self.kl_target is not None and self.kl_horizon < self.completions_per_step:
            raise ValueError(
                "`kl_horizon` is below the answers of one step (`prompts_per_step` x `samples_per_prompt`): one step "
                "could turn `kl_coef` around"
            )
        if self.kl_in == "loss" and self.kl_estimator == "k1":
            raise ValueError("`kl_in: loss` needs `kl_estimator: k2` or `k3`: as a loss, k1's gradient has mean zero")
        if self.kl_budget is not None and self.eval_steps is None:
            raise ValueError("`kl_budget` chooses among evaluated policies, so it needs `eval_steps`")
        if self.kl_budget is not None and self.kl_stop is not None and self.kl_stop < self.kl_budget:
            raise ValueError("`kl_stop` is below `kl_budget`: the run would end before the budget is used")
        return self

    @model_validator(mode="after")
    def _rewards(self) -> Self:
        if self.reward_combination != "mean-std" and self.reward_std_coef != 1.0:
            raise ValueError("`reward_std_coef` has no effect without `reward_combination: mean-std`")
        if not self.rewards and self.reward_combination != "sum":
            raise ValueError(f"`reward_combination: {self.reward_combination}` has no effect without `rewards`")
        penalties = self.missing_eos_reward is not None or self.missing_eos_penalty or self.length_penalty
        is_shaped = self.reward_clip is not None or penalties
        if self.kl_budget is not None and self.reward_scale == "running" and is_shaped:
            raise ValueError(
                "`kl_budget` compares policies of different steps, which `reward_scale: running` puts on different "
                "scales beside a clip or penalties: give a fixed `reward_scale`"
            )
        if self.missing_eos_reward is not None and self.missing_eos_penalty:
            raise ValueError("`missing_eos_penalty` has no effect with `missing_eos_reward`, which replaces the reward")
        return self

    @model_validator(mode="after")
    def _looks(self) -> Self:
        for name, switch in (("eval_prompts", "eval_steps"), ("shown_prompts", "show_steps")):
            if getattr(self, switch) is None and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"`{name}` has no effect without `{switch}`")
        return self

    @model_validator(mode="after")
    def _models(self) -> Self:
        if self.adapter == "none" and self.lora != LoraSettings():
            raise ValueError("`lora` has no effect with `adapter: none`")
        if self.adapter == "lora" and self.lora.dropout > 0:
            raise ValueError("`lora.dropout` must be 0: with dropout the first ratio of an update is not 1")
        if self.adapter == "none" and self.critic == "adapter":
            raise ValueError("`critic: adapter` needs `adapter: lora`: a policy trained in full shares no backbone")
        return self
