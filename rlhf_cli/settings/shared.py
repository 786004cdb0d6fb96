"""Settings that several stages share."""

from __future__ import annotations

import difflib
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from rlhf_cli.settings.base import (
    Count,
    DataName,
    Effort,
    EffortFlag,
    EffortOnly,
    ModelName,
    NonNegative,
    OpenShare,
    Positive,
    Section,
    Share,
    StageSection,
)

OUR_ATTENTION = ("auto", "reference", "tiled", "torch", "triton")
"""What `rlhf_cli.attention.registry.names` gives, known here without torch."""
THEIR_ATTENTION = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention")
"""Names that transformers knows, of attention that can train."""


def is_own_function(attention: str) -> bool:
    """Whether a `model.attention` is `package.module:function`; the hub's kernels, `owner/name:function`, are not."""
    return ":" in attention and "/" not in attention.partition(":")[0]


class BuildSettings(Section):
    """A new, randomly initialized transformer with a byte-level BPE tokenizer trained on `sft.data`. The defaults are
    Llama's parts; docs/transformer.md says what each part is."""

    hidden_size: Annotated[int, Field(ge=16, multiple_of=2)] = 128
    """Width of the residual stream."""
    layers: Count = 4
    """Transformer blocks; an encoder-decoder has as many of each kind."""
    heads: Count = 4
    """Attention heads; divides `hidden_size`."""
    key_heads: Count | None = None
    """Heads of keys and values, each shared by as many attention heads; divides `heads`. Null is one for each."""
    feed_forward_size: Count = 384
    """Width inside the feed-forward part."""
    vocab_size: Annotated[int, Field(ge=260)] = 1024
    """Most tokens the tokenizer may hold, special ones included."""
    context_length: Annotated[int, Field(ge=8)] = 256
    """Longest sequence in tokens."""
    architecture: Literal["decoder", "encoder-decoder"] = "decoder"
    """`decoder` reads prompt and answer as one text. `encoder-decoder` reads the prompt both ways; it cannot be a
    reward model, so `train_rm` then needs another `model`. An encoder alone writes no text and is not on offer."""
    positions: Literal["sinusoidal", "learned", "rotary"] = "rotary"
    """`sinusoidal` as in 2017 (embeddings are then multiplied by the root of `hidden_size`), `learned` as in GPT-2, or
    `rotary`."""
    norm: Literal["layer", "rms"] = "rms"
    """LayerNorm, or RMSNorm, which leaves out the mean."""
    norm_placement: Literal["pre", "post"] = "pre"
    """`post`: norm(x + part(x)), as in 2017. `pre`: x + part(norm(x)), as since GPT-2; it bears higher
    learning rates."""
    feed_forward: Literal["relu", "gelu", "gelu-tanh", "swiglu"] = "swiglu"
    """Nonlinearity of the feed-forward part; `swiglu` has a third matrix."""
    biases: Literal["none", "feed-forward", "all"] = "none"
    """Biases of linear maps: `none` as in Llama, `feed-forward` as in 2017 (attention has none), `all` as in GPT-2."""
    head_dim: Count | None = None
    """Size of a head. Null is `hidden_size` / `heads`."""
    rope_base: Positive = 10_000.0
    """Base of rotary frequencies: larger turns slower, for longer contexts. Only with rotary positions."""
    norm_eps: Positive = 1e-6
    """Added to the variance, or to the mean square, by norms."""
    tied_embeddings: bool = False
    """One matrix for embeddings and output."""

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.head_dim is None and self.hidden_size % self.heads:
            raise ValueError(f"`heads` must divide `hidden_size`; got {self.heads} and {self.hidden_size}")
        if self.heads % (self.key_heads or 1):
            raise ValueError(f"`key_heads` must divide `heads`; got {self.key_heads} and {self.heads}")
        if self.positions == "rotary" and (self.head_dim or 0) % 2:
            raise ValueError(f"rotary positions need heads of even size; got `head_dim: {self.head_dim}`")
        if self.positions == "rotary" and self.head_dim is None and self.hidden_size // self.heads % 2:
            raise ValueError(
                f"rotary positions need heads of even size; got {self.hidden_size} / {self.heads} = "
                f"{self.hidden_size // self.heads}"
            )
        if self.positions != "rotary" and self.rope_base != type(self).model_fields["rope_base"].default:
            raise ValueError(f"`rope_base` has no effect with `positions: {self.positions}`")
        return self


class ModelSettings(Section):
    """The base model every stage starts from, and how it is held and computed."""

    path: ModelName = None
    """Folder or hub id of the base model. Exclusive with `build`."""
    build: BuildSettings | None = None
    """Make a small model from nothing instead of loading one."""
    revision: str | None = None
    """Commit, tag or branch on the hub."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Needs a pinned `revision`."""
    quantize: Literal["none", "4bit", "8bit"] = "none"
    """Hold the frozen weights under LoRA adapters in 4 or 8 bits (QLoRA, Dettmers et al. 2023, arXiv:2305.14314). Needs
    bitsandbytes."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of frozen weights; `auto` is that of `precision`. Trained weights are always float32."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of matrix products. `auto`: bfloat16 where the hardware multiplies it natively, else float32."""
    attention: str = "auto"
    """How attention is computed: one of our backends (`reference`, `tiled`, `torch`, `triton`; `rlhf attention list`
    says which run here), `auto` for the fastest that serves, `package.module:function` for your own, or transformers'
    `sdpa` and `eager`, which read padded batches."""
    device: Annotated[str, EffortOnly()] = "auto"
    """`auto` (CUDA where there is one, else the CPU), `cpu` or `cuda`. CUDA_VISIBLE_DEVICES chooses one of several."""
    threads: Annotated[int | None, Field(ge=1), EffortOnly()] = None
    """CPU threads; null leaves it to torch (all cores). Models of a few million weights are about as fast with one, and
    then other work on the machine cannot make the threads wait for one another."""

    @field_validator("attention")
    @classmethod
    def _known_attention(cls, attention: str) -> str:
        known = (*OUR_ATTENTION, *THEIR_ATTENTION)
        if attention in known or ":" in attention or "/" in attention:
            return attention
        near = difflib.get_close_matches(attention.strip().lower(), known, n=1, cutoff=0.6)
        meant = f", did you mean `{near[0]}`?" if near else ""
        raise ValueError(
            f"expected one of {', '.join(known)}, `package.module:function` or a kernel's `owner/name`"
            f"; got `{attention}`{meant}"
        )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.dtype == "bfloat16" and self.precision == "float32":
            raise ValueError("`dtype: bfloat16` computes in bfloat16 and so contradicts `precision: float32`")
        if self.path is not None and self.build is not None:
            raise ValueError("`path` and `build` exclude each other: load a model or make one")
        if self.trust_remote_code and self.revision is None:
            raise ValueError("`trust_remote_code` needs a pinned `revision`: the commit whose code you read")
        return self


class DataSettings(Section):
    """What the stages share about data."""

    prompts: DataName = None
    """Prompt records for `label`, `ppo` and `evaluate`, where those name none: a file, folder or hub data set."""
    holdout: OpenShare = 0.1
    """Share of prompts kept from every training stage. Chosen by a hash of the prompt, so the same in all stages."""
    max_skip: Annotated[Share, EffortOnly()] = 0.01
    """The run fails when a larger share of a file's records has to be skipped."""
    columns: dict[str, str] = Field(default={})
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


class TrackingSettings(Section):
    """Trackers that get every metric beside the `metrics.jsonl` of each stage. What they show changes nothing."""

    trackers: Annotated[list[Literal["tensorboard", "wandb", "trackio"]], EffortOnly()] = Field(default=[])
    """Which; each must be installed. `tensorboard` writes into `RUN/tracking`, the others as their own settings say."""
    project: Annotated[str, EffortOnly()] = "rlhf"
    """Project that the runs are grouped under."""


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


class TrainingSettings(StageSection):
    """Optimization settings that every training stage has."""

    learning_rate: Positive
    """Peak learning rate of AdamW."""
    batch_size: Count
    """Records in one optimizer step, all processes and micro-batches together."""
    micro_batch_size: Effort = 8
    """Records in one forward and backward pass. Changes memory and speed, never the result."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay."""
    max_grad_norm: Positive = 1.0
    """Gradients are scaled down to at most this norm."""
    warmup_share: Share = 0.03
    """Share of the steps over which the learning rate rises from zero."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Course of the learning rate after the warm-up."""
    gradient_checkpointing: EffortFlag = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    checkpoint_steps: Effort = 50
    """Optimizer steps between two checkpoints, from which a killed run goes on."""


class SamplingSettings(Section):
    """How answers are drawn. Logits are divided by the temperature, then cut to the nucleus."""

    temperature: Positive = 1.0
    """1 samples from the model as it is; lower is more greedy."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Smallest set of tokens with at least this probability is kept."""
    max_new_tokens: Count = 128
    """Longest answer in tokens."""
    batch_size: Effort = 32
    """Answers sampled at once. Changes memory and speed only."""
