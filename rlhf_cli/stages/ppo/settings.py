"""The `ppo` section of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from rlhf_cli.settings.base import (
    Count,
    DataName,
    Effort,
    EffortFlag,
    EffortOnly,
    External,
    ModelName,
    NonNegative,
    Positive,
    Section,
    Share,
    StageSection,
)
from rlhf_cli.settings.detectors import DetectorSettings
from rlhf_cli.settings.rewards import PPORewardSettings
from rlhf_cli.settings.shared import Adapter, LoraSettings, Optimizer, default_rate, rates_depend_on_steps

_KL_HORIZON = 10_000.0


class PTXSettings(Section):
    """PPO-ptx: the supervised loss is added to every update (Ouyang et al. 2022, equation 2)."""

    data: DataName = None
    """Demonstration records; null is `sft.data`. In a conversation, only the last turn is trained on."""
    coef: Positive = 1.0
    """Weight gamma of the supervised loss (mean per completion token), added to the loss of PPO. InstructGPT's 27.8
    uses another normalization."""
    batch_size: Count = 16
    """Demonstrations added to each minibatch."""
    max_length: Count = 1024
    """Maximum demonstration length in tokens; longer ones are skipped and counted."""


class PPOSettings(StageSection):
    """Proximal policy optimization against a reward, with a KL penalty to the SFT model."""

    model: ModelName = None
    """Policy to start from, which is also the reference of the KL penalty; null is the output of `sft`."""
    reward_model: ModelName = None
    """Folder or hub id of the reward model. Null is the output of `train-rm`; in a recipe that has `rewards` but no
    `train_rm` section, it means no reward model."""
    rewards: list[PPORewardSettings] = Field(default=[])
    """Additional rewards: functions, models or HTTP endpoints. They are combined with the reward model, whose weight is
    1."""
    reward_combination: Literal["sum", "mean", "min", "mean-std"] = "sum"
    """How several weighted rewards are combined, including those of the members of an ensemble (`train_rm.members`).
    `sum` is refused for an ensemble. `min` and `mean-std` are conservative where its members disagree (Coste et al.
    2023, arXiv:2310.02743)."""
    reward_std_coef: NonNegative = 1.0
    """Lambda in mean - lambda std, with `reward_combination: mean-std`."""
    prompts: DataName = None
    """Prompt records; null is `data.prompts`."""

    steps: Count = 100
    """Number of PPO steps: one rollout each, followed by `epochs` passes of updates. With `schedule: constant` and
    `warmup_share: 0`, a finished run whose `steps` are raised continues after its last step, and an unfinished one
    continues with more or fewer, but not fewer than are done. Otherwise the learning rates of the steps done would
    change: a finished run starts from the first step, an unfinished one is refused."""
    prompts_per_step: Count = 64
    """Prompts per step, over all processes."""
    samples_per_prompt: Count = 1
    """Completions per prompt."""
    epochs: Count = 4
    """Passes over the completions of a step."""
    minibatches: Count = 1
    """Optimizer steps per pass."""
    micro_batch_size: Effort = 8
    """Completions per forward and backward pass, per process. Affects memory and speed, not the result."""
    micro_batch_tokens: Annotated[int | None, Field(ge=1), EffortOnly()] = None
    """Maximum tokens per forward and backward pass, per process, padding included; replaces `micro_batch_size`. Null
    uses `micro_batch_size`. Either way, a training pass that runs out of memory is repeated with half the tokens."""
    rollout_batch_size: Effort = 64
    """Completions that a process generates at once. Affects memory and speed only."""

    temperature: Positive | None = None
    """Logits are divided by this, in sampling and in all log-probabilities; null inherits (see `sampling`)."""
    max_new_tokens: Count | None = None
    """Maximum completion length in tokens; null inherits (see `sampling`)."""
    stop_tokens: list[str] | None = None
    """Texts of additional stop tokens, each a single token of the policy; null inherits (see `sampling`)."""

    learning_rate: Positive | None = None
    """Peak learning rate of the policy's AdamW (epsilon 1e-5); null is 1e-5 with `adapter: lora` and 1e-6 with
    `adapter: none`."""
    critic_learning_rate: Positive | None = None
    """Peak learning rate of the critic's AdamW; null is `learning_rate`, or 1e-5 if that is null too."""
    optimizer: Optimizer = "adamw"
    """`adamw-8bit` stores the moments of AdamW in 8 bits: a quarter of their memory (Dettmers et al. 2021,
    arXiv:2110.02861). Those of embeddings stay in float32. Needs bitsandbytes."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Learning-rate schedule over the run; `linear` falls to zero."""
    warmup_share: Share = 0.0
    """Share of the run over which the learning rates rise from zero; that of the policy starts after
    `critic_warmup_steps`."""
    max_grad_norm: Positive = 1.0
    """Maximum gradient norm per model: a larger gradient of the policy or of the critic is scaled down to it, without
    regard to the other's."""
    critic_warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Number of initial steps that train only the critic: advantages of an untrained critic are noise."""

    clip_range: Positive = 0.2
    """Epsilon of the clipped surrogate (Schulman et al. 2017, eq. 7)."""
    value_clip_range: Positive | None = 0.2
    """Maximum change of a value from its rollout value, in units of reward, before its loss is clipped; null does not
    clip."""
    value_coef: NonNegative = 0.1
    """Weight of the value loss; 0 does not train the critic. With `critic: head` it weighs the value loss against the
    policy's. Otherwise both train separate weights, and it scales the critic's gradient alone, before
    `max_grad_norm`."""
    entropy_coef: NonNegative = 0.0
    """Weight of the entropy bonus in the loss (mean entropy per token, in nats; Schulman et al. 2017, eq. 9)."""
    gamma: Share = 1.0
    """Discount per token."""
    gae_lambda: Share = 0.95
    """Lambda of generalized advantage estimation (Schulman et al. 2015, eq. 16)."""
    whiten_advantages: bool = True
    """Shift and scale the advantages of a step to mean 0 and standard deviation 1 over its tokens."""
    whiten_rewards: bool = False
    """Scale the per-token rewards of a step to standard deviation 1, keeping their mean. Off by default, as in
    summarize-from-feedback; on its TL;DR data it was harmful (Huang et al. 2024, arXiv:2403.17031)."""
    update_kl_limit: Positive | None = None
    """KL to the sampling policy, in nats per token of a minibatch, above which an update ends early; null never ends
    early."""
    importance_cap: Annotated[float, Field(ge=1.0)] | None = 2.0
    """C of truncated importance sampling: the policy loss of a token is multiplied by min(pi / mu, C). Here pi is the
    token's probability under the policy before the update, and mu under the inference engine that sampled it. Null does
    not correct. Without effect with `generation.engine: torch`, which samples from the policy itself."""
    overlap_rollouts: bool = False
    """With `generation.vllm_server`: sample the completions of the next step during the update of this one. They are
    one step off-policy, which `importance_cap` corrects."""
    ratio_limit: Annotated[float, Field(gt=1.0)] = 10.0
    """A minibatch whose mean probability ratio exceeds this is skipped and counted, and its worst completion
    reported."""

    kl_coef: NonNegative = 0.05
    """Weight of the per-token KL penalty to the SFT model, in reward per nat. With `kl_target`, the initial weight."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Where the KL penalty is applied: to the reward of each token, as in InstructGPT, or to the loss."""
    kl_target: Positive | None = None
    """Target KL in nats per completion of an adaptive `kl_coef` (Ziegler et al. 2019, section 2.2); null keeps it
    fixed."""
    kl_horizon: Positive = _KL_HORIZON
    """Horizon of the adaptive coefficient, in completions; larger adapts more slowly."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Per-token KL estimator of the penalty, with x = log(pi/ref): k1 = x; k2 = x^2 / 2; k3 = exp(-x) - 1 + x. With
    `kl_in: reward` it must be k1, the only one that gives the gradient of the KL there. With `kl_in: loss` it must be
    k2, which has the gradient of the KL of each token, or k3, which approximates it. Metrics, `kl_target`, `kl_stop`
    and `kl_budget` use k1, which is unbiased."""
    kl_stop: Positive | None = None
    """The run ends early after a step whose KL to the SFT model exceeds this, in nats per completion; null never ends
    early."""
    kl_budget: Positive | None = None
    """Maximum KL to the SFT model, in nats per completion, of the policy that the stage writes: of those evaluated
    every `eval_steps`, the one with the highest held-out reward within this budget. Null writes the last policy."""

    reward_scale: Positive | Literal["running"] = 1.0
    """Factor applied to the combined reward; `running` divides by the standard deviation of all rewards so far."""
    reward_clip: Positive | None = None
    """Rewards are clipped to +- this, after scaling and before penalties; null does not clip."""
    missing_eos_reward: float | None = None
    """Replaces the reward of a completion without an end-of-sequence or stop token (the "EOS trick" of
    summarize-from-feedback); null keeps the reward."""
    missing_eos_penalty: NonNegative = 0.0
    """Subtracted from the reward of a completion without an end-of-sequence or stop token."""
    length_penalty: float = 0.0
    """Subtracted from the reward of a completion once per token; a negative value favors long completions."""
    ptx: PTXSettings | None = None
    """Adds the supervised loss (PPO-ptx); null does not."""

    eval_steps: Count | None = None
    """Steps between evaluations on held-out prompts, the first before training; null does not evaluate."""
    eval_prompts: Count = 64
    """Maximum number of held-out prompts (`data.holdout`) to evaluate on; also at most half of them, so that others are
    left for `evaluate`."""
    show_steps: Annotated[Count | None, EffortOnly()] = None
    """Steps between samples for a few fixed prompts, printed and saved in `samples.jsonl`; null shows none."""
    shown_prompts: Effort = 3
    """Number of these fixed prompts."""

    detectors: DetectorSettings = DetectorSettings()
    """Thresholds at which the run warns, or stops, because its completions look as if they exploit the reward."""

    adapter: Adapter = "lora"
    """`lora`: policy, critic and reward model are adapters on one frozen backbone. `none`: separate full models."""
    lora: LoraSettings = LoraSettings()
    """LoRA settings of the policy and the critic, with `adapter: lora`."""
    critic: Literal["auto", "adapter", "head", "separate"] = "auto"
    """`adapter`: an adapter on the policy's backbone. `separate`: its own model, with all weights trained. `head`: a
    value head on the policy's hidden states, as in Ziegler et al. 2019; it needs no forward pass and hardly any memory
    of its own, and the value loss trains the policy's weights too. `auto` is `adapter` with `adapter: lora` and
    `separate` with `adapter: none`."""
    critic_from: Annotated[str, External("critic")] = "auto"
    """Initial weights of the critic: `reward-model`, `policy` (with a value head that predicts 0), or the folder of a
    saved critic (`runs/NAME/ppo/critic`). `auto` is the reward model if it is compatible, else the policy; with
    `critic: head` it is the policy."""
    gradient_checkpointing: EffortFlag = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    offload_frozen: EffortFlag = False
    """On a GPU: keep the weights of the reference and of `reward_model` in host memory while they are not used, if they
    are separate models and not quantized. They are copied to the GPU for each step and evaluation. On a CPU they
    are always mapped from a file, so that the system can free their memory."""
    save_steps: Count | None = None
    """Steps between intermediate policies, written to `ppo/steps/STEP`: model folders that `evaluate`, `chat` and
    transformers read. Null writes only the last policy. To write one, the model is loaded again on the CPU, and written
    and read back in float32."""
    checkpoint_steps: Effort = 10
    """Steps between checkpoints. An interrupted run resumes from the last one; a diverged run rolls back to one."""
    keep_checkpoints: Effort = 2
    """Number of recent checkpoints to keep. With `kl_budget` the best policy is kept as well, and after a detector's
    warning the last checkpoint before it."""

    @property
    def completions_per_step(self) -> int:
        """Completions sampled per step, over all processes."""
        return self.prompts_per_step * self.samples_per_prompt

    @property
    def optimizer_steps_per_step(self) -> int:
        """Optimizer steps per PPO step, unless an update ends early."""
        return self.epochs * self.minibatches

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.steps * self.optimizer_steps_per_step

    @property
    def rates_depend_on_steps(self) -> str | None:
        """The setting by which learning rates depend on `steps`, as a recipe has it; None if they do not."""
        return rates_depend_on_steps(self.schedule, self.warmup_share)

    @property
    def peak_rate(self) -> float:
        """`learning_rate`, or what null stands for."""
        return self.learning_rate or default_rate(self.adapter, lora=1e-5, full=1e-6)

    @property
    def critic_peak_rate(self) -> float:
        """`critic_learning_rate`, or what null stands for."""
        return self.critic_learning_rate or self.learning_rate or 1e-5

    @property
    def critic_is_adapter(self) -> bool:
        """Whether the critic is an adapter on the policy's backbone, not a separate model."""
        return self.critic == "adapter" or (self.critic == "auto" and self.adapter == "lora")

    @property
    def critic_is_head(self) -> bool:
        """Whether the critic is a head on the policy, without passes of its own."""
        return self.critic == "head"

    @property
    def critic_is_separate(self) -> bool:
        """Whether the critic is a model of its own."""
        return self.critic == "separate" or (self.critic == "auto" and self.adapter == "none")

    @model_validator(mode="after")
    def _steps(self) -> Self:
        if self.save_steps is not None and self.save_steps >= self.steps:
            raise ValueError(
                f"`save_steps: {self.save_steps}` has no effect with `steps: {self.steps}`: the last policy is always "
                "written"
            )
        if self.completions_per_step < self.minibatches:
            raise ValueError(
                "`minibatches` exceeds the completions per step (`prompts_per_step` x `samples_per_prompt`)"
            )
        if self.critic_warmup_steps >= self.steps:
            raise ValueError("`critic_warmup_steps` must be less than `steps`: otherwise the policy never trains")
        if self.critic_warmup_steps and not self.value_coef:
            raise ValueError(
                "`critic_warmup_steps` has no effect with `value_coef: 0`, which does not train the critic"
            )
        return self

    @model_validator(mode="after")
    def _kl(self) -> Self:
        if self.kl_target is None and self.kl_horizon != _KL_HORIZON:
            raise ValueError("`kl_horizon` has no effect without `kl_target`")
        if self.kl_target is not None and self.kl_coef == 0.0:
            raise ValueError("`kl_target` has no effect with `kl_coef: 0`, which it multiplies and which stays 0")
        if self.kl_target is not None and self.kl_horizon < self.completions_per_step:
            raise ValueError(
                "`kl_horizon` must be at least the completions per step (`prompts_per_step` x `samples_per_prompt`): "
                "otherwise one step could change `kl_coef` by more than 20 %"
            )
        if self.kl_in == "loss" and self.kl_estimator == "k1":
            raise ValueError("`kl_in: loss` needs `kl_estimator: k2` or `k3`: the gradient of k1 has mean zero")
        if self.kl_in == "reward" and self.kl_estimator != "k1":
            raise ValueError(
                f"`kl_estimator: {self.kl_estimator}` needs `kl_in: loss`: in the reward, only `kl_estimator: k1` "
                "gives the gradient of the KL"
            )
        if self.kl_budget is not None and self.eval_steps is None:
            raise ValueError("`kl_budget` selects among evaluated policies and needs `eval_steps`")
        if self.kl_budget is not None and self.kl_stop is not None and self.kl_stop < self.kl_budget:
            raise ValueError("`kl_stop` must be at least `kl_budget`: otherwise the run ends before it uses the budget")
        return self

    @model_validator(mode="after")
    def _rewards(self) -> Self:
        if self.reward_combination != "mean-std" and self.reward_std_coef != 1.0:
            raise ValueError("`reward_std_coef` has no effect without `reward_combination: mean-std`")
        penalties = self.missing_eos_reward is not None or self.missing_eos_penalty or self.length_penalty
        is_shaped = self.reward_clip is not None or penalties
        if self.kl_budget is not None and self.reward_scale == "running" and is_shaped:
            raise ValueError(
                "`kl_budget` compares rewards across steps, and `reward_scale: running` with a clip or penalties makes "
                "them incomparable: use a fixed `reward_scale`"
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
            raise ValueError(
                "`lora.dropout` must be 0: with dropout, the first probability ratio of an update is not 1"
            )
        if self.adapter == "none" and self.critic == "adapter":
            raise ValueError("`critic: adapter` needs `adapter: lora`: without LoRA there is no shared backbone")
        if self.critic == "head" and self.critic_from == "reward-model":
            raise ValueError(
                "`critic_from: reward-model` needs `critic: adapter` or `critic: separate`: with `critic: head` the "
                "weights under the value head are the policy's"
            )
        return self
