"""The recipe: one frozen section a stage, plus what the stages share. Imports no torch, so that commands answer at once."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from rlhf_cli.recipe.base import Count, NonNegative, OpenShare, Positive, Section, Share


class BuildSettings(Section):
    """A new, randomly initialised Llama-style model with a byte-level BPE tokenizer trained on `sft.data`."""

    hidden_size: Annotated[int, Field(ge=16, multiple_of=2)] = 128
    """Width of the residual stream."""
    layers: Count = 4
    """Transformer blocks."""
    heads: Count = 4
    """Attention heads; divides `hidden_size`."""
    feed_forward_size: Count = 384
    """Width inside the SwiGLU feed-forward part."""
    vocab_size: Annotated[int, Field(ge=260)] = 1024
    """Most tokens the tokenizer may hold, special ones included."""
    context_length: Annotated[int, Field(ge=8)] = 256
    """Longest sequence in tokens."""

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden_size % self.heads:
            raise ValueError(f"`heads` must divide `hidden_size`; got {self.heads} and {self.hidden_size}")
        return self


class ModelSettings(Section):
    """The base model every stage starts from, and how it is held and computed."""

    path: str | None = None
    """Folder or hub id of the base model. Exclusive with `build`."""
    build: BuildSettings | None = None
    """Make a small model from nothing instead of loading one."""
    revision: str | None = None
    """Commit, tag or branch on the hub."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Needs a pinned `revision`."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of frozen weights; `auto` is that of `precision`. Trained weights are always float32."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of matrix products. `auto`: bfloat16 where the hardware multiplies it natively, else float32."""
    attention: str | None = None
    """Attention implementation by its transformers name, such as `sdpa` or `eager`; null lets transformers choose."""
    device: str = "auto"
    """`auto` (CUDA, then MPS, then CPU), or a torch device such as `cpu` or `cuda:1`."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.path is not None and self.build is not None:
            raise ValueError("`path` and `build` exclude each other: load a model or make one")
        if self.trust_remote_code and self.revision is None:
            raise ValueError("`trust_remote_code` needs a pinned `revision`: the commit whose code you read")
        return self


class DataSettings(Section):
    """What the stages share about data."""

    prompts: str | None = None
    """Prompt records for `label`, `ppo` and `evaluate`, where those name none: a file, folder or hub data set."""
    holdout: OpenShare = 0.1
    """Share of prompts kept from every training stage. Chosen by a hash of the prompt, so the same in all stages."""
    max_skip: Share = 0.01
    """The run fails when a larger share of a file's records has to be skipped."""
    columns: dict[str, str] = {}
    """Fields of your files under other names: `{ours: yours}`, such as `{prompt: question, completion: answer}`."""
    prompt_template: str | None = None
    """How a prompt that is plain text reaches the model: null as it is; `chat` as one user message through the
    tokenizer's chat template; else text around `{prompt}`. Conversations always use the chat template."""
    max_prompt_tokens: Count = 512
    """Records with a longer prompt are skipped and counted."""

    @field_validator("prompt_template")
    @classmethod
    def _has_slot(cls, template: str | None) -> str | None:
        if template is not None and template != "chat" and template.count("{prompt}") != 1:
            raise ValueError("expected `chat` or text that contains `{prompt}` once")
        return template


class LoraSettings(Section):
    """Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685): W + (alpha / rank) B A, only A and B trained."""

    rank: Count = 16
    """Rank of the update."""
    alpha: Positive = 32.0
    """Scale of the update; it is multiplied by alpha / rank."""
    dropout: OpenShare = 0.0
    """Dropout on the adapter's input, in training only. PPO takes none: both of its passes must agree."""
    target_modules: str | list[str] = "all-linear"
    """Which layers are adapted: `all-linear` or names of modules."""


class Training(Section):
    """Optimisation settings that every training stage has."""

    learning_rate: Positive
    """Peak learning rate of AdamW."""
    batch_size: Count
    """Records in one optimiser step, all processes and micro-batches together."""
    micro_batch_size: Count = 8
    """Records in one forward and backward pass. Changes memory and speed, never the result."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay."""
    max_grad_norm: Positive = 1.0
    """Gradients are scaled down to at most this norm."""
    warmup_share: Share = 0.03
    """Share of the steps over which the learning rate rises from zero."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Course of the learning rate after the warm-up."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    checkpoint_steps: Count = 50
    """Optimiser steps between two checkpoints, from which a killed run goes on."""


class SFTSettings(Training):
    """Supervised fine-tuning on demonstrations."""

    data: str
    """Demonstration records: a file, a folder or a hub data set."""
    learning_rate: Positive = 2e-4
    """Peak learning rate of AdamW. LoRA takes about ten times that of full fine-tuning."""
    batch_size: Count = 32
    """Records in one optimiser step (packed sequences, with `packing`)."""
    epochs: Positive = 1.0
    """Passes over the demonstrations."""
    max_length: Count = 1024
    """Longest sequence in tokens; records that are longer are skipped and counted."""
    packing: bool = False
    """Fill sequences of `max_length` tokens with several records each. Decoder-only models."""
    adapter: Literal["lora", "none"] = "lora"
    """`lora` trains an adapter and merges it; `none` trains all weights."""
    lora: LoraSettings = LoraSettings()
    """The adapter."""
    lm_coef: NonNegative = 0.0
    """Weight lambda of the language-modelling loss on the whole sequence in L3 = L2 + lambda L1 (GPT-1, section
    3.2); L2 is the loss on the completion alone."""


class SamplingSettings(Section):
    """How answers are drawn. Logits are divided by the temperature, then cut to the nucleus."""

    temperature: Positive = 1.0
    """1 samples from the model as it is; lower is more greedy."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Smallest set of tokens with at least this probability is kept."""
    max_new_tokens: Count = 128
    """Longest answer in tokens."""
    batch_size: Count = 32
    """Answers sampled at once. Changes memory and speed only."""


class LabelSettings(Section):
    """Sampling K answers a prompt and ranking them, or bringing in rankings that people already made."""

    by: Literal["function", "reward-model", "import"]
    """Who ranks: a Python function, a trained reward model, or people already did (`data`)."""
    model: str | None = None
    """Policy to sample from; null is what `sft` wrote."""
    prompts: str | None = None
    """Prompt records; null is `data.prompts`."""
    data: str | None = None
    """Ranking or preference records to bring in, with `by: import`."""
    function: str | None = None
    """`package.module:function` or `file.py:function`, called with a list of prompts and a list of completions; returns
    one float each, higher is better. It is code that runs with your rights."""
    reward_model: str | None = None
    """Folder or hub id of a reward model, with `by: reward-model`."""
    completions_per_prompt: Annotated[int, Field(ge=2, le=16)] = 4
    """K. InstructGPT used 4 to 9."""
    tie_margin: NonNegative = 0.0
    """Scores that differ by at most this much share a tier."""
    sampling: SamplingSettings = SamplingSettings()
    """How the answers are drawn."""

    @model_validator(mode="after")
    def _source_of_labels(self) -> Self:
        needed = {"function": "function", "reward-model": "reward_model", "import": "data"}[self.by]
        if getattr(self, needed) is None:
            raise ValueError(f"`by: {self.by}` needs `{needed}`")
        for other in {"function", "reward_model", "data"} - {needed}:
            if getattr(self, other) is not None:
                raise ValueError(f"`{other}` has no effect with `by: {self.by}`")
        return self


class TrainRMSettings(Training):
    """A reward model from rankings."""

    model: str | None = None
    """Scorer to start from: folder or hub id, decoder or encoder; null is what `sft` wrote."""
    data: str | None = None
    """Ranking or preference records; null is what `label` wrote."""
    learning_rate: Positive = 1e-4
    """Peak learning rate of AdamW."""
    batch_size: Count = 16
    """Prompts (ranked groups) in one optimiser step; all pairs of a prompt stay together."""
    micro_batch_size: Count = 4
    """Prompts (ranked groups) in one forward and backward pass."""
    epochs: Positive = 1.0
    """Passes over the rankings. More than one overfits quickly (InstructGPT, appendix C.2)."""
    max_length: Count = 1024
    """Longest prompt plus answer in tokens; groups with a longer one are skipped and counted."""
    loss: Literal["pairwise", "plackett-luce"] = "pairwise"
    """`pairwise`: -log sigmoid(r_w - r_l), mean over all pairs of a group (InstructGPT, eq. 1); ties by cross-entropy
    at 1/2. `plackett-luce`: likelihood of the whole order, ties at any order within the tier."""
    use_margin: bool = False
    """Subtract a record's `margin` inside the sigmoid (Llama 2, eq. 2)."""
    adapter: Literal["lora", "none"] = "lora"
    """`lora` trains an adapter, which later stages share with the policy; `none` trains all weights."""
    lora: LoraSettings = LoraSettings()
    """The adapter."""
    normalise: bool = True
    """Shift and scale rewards to mean 0 and standard deviation 1 over answers of the SFT model (the labelled answers of
    training prompts, where no SFT model is at hand)."""


class RewardFunction(Section):
    """A reward computed by Python code."""

    function: str
    """`package.module:function` or `file.py:function`; see `label.function`."""
    weight: float = 1.0
    """Factor in the sum of rewards."""


class PPOSettings(Section):
    """Proximal policy optimisation against a reward, with a KL leash to the SFT model."""

    model: str | None = None
    """Policy to start from and reference of the KL penalty; null is what `sft` wrote."""
    reward_model: str | None = None
    """Folder or hub id of the reward model; null is what `train-rm` wrote, or none if `reward_functions` are given."""
    reward_functions: list[RewardFunction] = []
    """Rewards by Python code, added to the reward model's."""
    prompts: str | None = None
    """Prompt records; null is `data.prompts`."""

    steps: Count = 100
    """Rollouts, each followed by `epochs` of updates."""
    prompts_per_step: Count = 64
    """Prompts sampled in one step."""
    samples_per_prompt: Count = 1
    """Answers to each of them."""
    epochs: Count = 4
    """Passes over one step's answers."""
    minibatches: Count = 1
    """Optimiser steps in one pass."""
    micro_batch_size: Count = 8
    """Answers in one forward and backward pass. Changes memory and speed, never the result."""
    rollout_batch_size: Count = 64
    """Answers generated at once. Changes memory and speed only."""

    temperature: Positive = 1.0
    """Logits are divided by this in sampling and in every log-probability."""
    max_new_tokens: Count = 128
    """Longest answer in tokens."""

    learning_rate: Positive = 1e-5
    """Peak learning rate of the policy's AdamW (epsilon 1e-5)."""
    critic_learning_rate: Positive | None = None
    """Peak learning rate of the critic; null is `learning_rate`."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Course of the learning rate over the run; `linear` falls to zero."""
    max_grad_norm: Positive = 1.0
    """Gradients of policy and critic are each scaled down to at most this norm."""

    clip_range: Positive = 0.2
    """Epsilon of the clipped surrogate (Schulman et al. 2017, eq. 7)."""
    value_clip_range: Positive = 0.2
    """How far a value may move from its rollout value before its loss is clipped, in reward."""
    value_coef: NonNegative = 0.1
    """Weight of the value loss. Separates nothing where critic and policy share no trained weight and have their own
    optimiser step: there it scales the critic's gradient before its norm is bounded."""
    gamma: Share = 1.0
    """Discount per token."""
    gae_lambda: Share = 0.95
    """Lambda of generalised advantage estimation (Schulman et al. 2015, eq. 16)."""
    whiten_advantages: bool = True
    """Shift and scale a step's advantages to mean 0, standard deviation 1 over its tokens."""
    whiten_rewards: bool = False
    """Scale a step's per-token rewards to standard deviation 1, keeping their mean. Harmful on TL;DR."""

    kl_coef: NonNegative = 0.05
    """Weight of the per-token KL penalty to the SFT model, in reward per nat. The start value, with `kl_target`."""
    kl_target: Positive | None = None
    """KL in nats per answer that an adaptive `kl_coef` steers to (Ziegler et al. 2019, section 2.2); null keeps it fixed."""
    kl_horizon: Positive = 10_000
    """Answers over which the adaptive coefficient moves."""
    kl_estimator: Literal["k1", "k3"] = "k1"
    """Per-token estimate in the reward: k1 = log pi/ref, unbiased; k3 = ref/pi - 1 - log ref/pi, never negative."""
    missing_eos_reward: float | None = None
    """Replaces the reward of an answer that did not end with an end-of-text token; null leaves it."""
    reward_clip: Positive | None = None
    """Rewards are cut to +- this before the KL penalty; null does not cut."""

    adapter: Literal["lora", "none"] = "lora"
    """`lora`: one frozen backbone; policy, critic and reward are adapters on it. `none`: separate full models."""
    lora: LoraSettings = LoraSettings()
    """The policy's and the critic's adapter."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    checkpoint_steps: Count = 10
    """Steps between two checkpoints, from which a killed run goes on."""

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.prompts_per_step * self.samples_per_prompt < self.minibatches:
            raise ValueError("`minibatches` exceeds the answers of a step (`prompts_per_step` x `samples_per_prompt`)")
        if self.adapter == "lora" and self.lora.dropout > 0:
            raise ValueError("`lora.dropout` must be 0: with dropout the first ratio of an update is not 1")
        return self


class EvaluateSettings(Section):
    """SFT against PPO on prompts that no stage trained on."""

    baseline: str | None = None
    """Model to compare with; null is what `sft` wrote."""
    policy: str | None = None
    """Model under evaluation; null is what `ppo` wrote."""
    reward_model: str | None = None
    """Reward model whose mean is reported; null is what `train-rm` wrote, where there is one."""
    prompts: str | None = None
    """Prompt records, all of which are used; null is the held-out share of `data.prompts`."""
    judge_function: str | None = None
    """Gold score that decides who wins, `package.module:function` or `file.py:function`; null judges by the reward
    model, which PPO was trained against, so read that as a check of training and not of quality."""
    tie_margin: NonNegative = 0.0
    """Scores that differ by at most this much are a tie, which counts 1/2."""
    max_prompts: Count | None = None
    """Use at most this many prompts; null uses all."""
    samples_per_prompt: Count = 1
    """Answers by each model to each prompt."""
    sampling: SamplingSettings = SamplingSettings()
    """How the answers are drawn. Compare at the temperature PPO trained at."""
    bootstrap: Annotated[int, Field(ge=100)] = 2_000
    """Resamples of prompts for the 95 % intervals."""
    shown_samples: Count = 5
    """Prompts shown side by side in the terminal; all of them are saved."""


class Recipe(Section):
    """A run: the stages whose sections are present, in their order."""

    name: str = "default"
    """Names the run directory, `runs/NAME`."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of everything random."""
    model: ModelSettings = ModelSettings()
    """The base model."""
    data: DataSettings = DataSettings()
    """What the stages share about data."""
    sft: SFTSettings | None = None
    """Supervised fine-tuning."""
    label: LabelSettings | None = None
    """Sampling and labelling."""
    train_rm: TrainRMSettings | None = None
    """Reward model."""
    ppo: PPOSettings | None = None
    """PPO."""
    evaluate: EvaluateSettings | None = None
    """Evaluation."""

    @field_validator("name")
    @classmethod
    def _plain_name(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
            raise ValueError("expected letters, digits, `.`, `_` or `-`, starting with a letter or digit")
        return name

    @model_validator(mode="after")
    def _buildable(self) -> Self:
        if self.model.build is not None and self.sft is None:
            raise ValueError("`model.build` makes an untrained model, which needs an `sft` section")
        return self
