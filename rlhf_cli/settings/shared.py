"""Settings that several stages share."""

from __future__ import annotations

import difflib
from abc import abstractmethod
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from rlhf_cli.settings.base import (
    Address,
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
from rlhf_cli.settings.comparison import ComparisonSettings

OUR_ATTENTION = ("auto", "reference", "tiled", "torch", "triton")
"""The names in `rlhf_cli.attention.registry`, repeated here to avoid importing torch."""
THEIR_ATTENTION = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention")
"""Attention implementations of transformers that support training."""


def is_own_function(attention: str) -> bool:
    """Whether `model.attention` is `package.module:function`, as opposed to a hub kernel, `owner/name:function`."""
    return ":" in attention and "/" not in attention.partition(":")[0]


class BuildSettings(Section):
    """A new, randomly initialized transformer with a byte-level BPE tokenizer trained on `sft.data`. The defaults
    follow Llama; docs/transformer.md explains each part."""

    hidden_size: Annotated[int, Field(ge=16, multiple_of=2)] = 128
    """Width of the residual stream."""
    layers: Count = 4
    """Number of transformer blocks; an encoder-decoder has this many in the encoder and in the decoder."""
    heads: Count = 4
    """Number of attention heads; must divide `hidden_size` unless `head_dim` is given."""
    key_heads: Count | None = None
    """Number of key/value heads (grouped-query attention); must divide `heads`. Null means as many as `heads`."""
    feed_forward_size: Count = 384
    """Hidden width of the feed-forward network."""
    vocab_size: Annotated[int, Field(ge=260)] = 1024
    """Maximum vocabulary size of the tokenizer, special tokens included."""
    context_length: Annotated[int, Field(ge=8)] = 256
    """Maximum sequence length in tokens."""
    architecture: Literal["decoder", "encoder-decoder"] = "decoder"
    """`decoder` processes prompt and completion as one sequence. `encoder-decoder` encodes the prompt bidirectionally;
    it cannot be a reward model, so `train_rm` then needs another `model`."""
    positions: Literal["sinusoidal", "learned", "rotary"] = "rotary"
    """Position encoding: `sinusoidal` as in Vaswani et al. 2017 (embeddings are then multiplied by the square root of
    `hidden_size`), `learned` as in GPT-2, or `rotary`."""
    norm: Literal["layer", "rms"] = "rms"
    """LayerNorm or RMSNorm (which does not subtract the mean)."""
    norm_placement: Literal["pre", "post"] = "pre"
    """`post`: norm(x + f(x)), as in Vaswani et al. 2017. `pre`: x + f(norm(x)), as in GPT-2; it tolerates higher
    learning rates."""
    feed_forward: Literal["relu", "gelu", "gelu-tanh", "swiglu"] = "swiglu"
    """Activation of the feed-forward network; `swiglu` needs a third weight matrix."""
    biases: Literal["none", "feed-forward", "all"] = "none"
    """Biases of linear layers: `none` as in Llama, `feed-forward` (none in attention) as in Vaswani et al. 2017, `all`
    as in GPT-2."""
    head_dim: Count | None = None
    """Dimension of an attention head. Null is `hidden_size` / `heads`."""
    rope_base: Positive = 10_000.0
    """Base of the rotary frequencies; a larger base suits longer contexts. Only with `positions: rotary`."""
    norm_eps: Positive = 1e-6
    """Epsilon of the norms, added to the variance (LayerNorm) or mean square (RMSNorm)."""
    tied_embeddings: bool = False
    """Use one matrix for the input embeddings and the output layer."""

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.head_dim is None and self.hidden_size % self.heads:
            raise ValueError(f"`heads` must divide `hidden_size`; got {self.heads} and {self.hidden_size}")
        if self.heads % (self.key_heads or 1):
            raise ValueError(f"`key_heads` must divide `heads`; got {self.key_heads} and {self.heads}")
        if self.positions == "rotary" and (self.head_dim or 0) % 2:
            raise ValueError(f"rotary positions need an even head dimension; got `head_dim: {self.head_dim}`")
        if self.positions == "rotary" and self.head_dim is None and self.hidden_size // self.heads % 2:
            raise ValueError(
                f"rotary positions need an even head dimension; got {self.hidden_size} / {self.heads} = "
                f"{self.hidden_size // self.heads}"
            )
        if self.positions != "rotary" and self.rope_base != type(self).model_fields["rope_base"].default:
            raise ValueError(f"`rope_base` has no effect with `positions: {self.positions}`")
        return self


class ModelSettings(Section):
    """The base model that every stage starts from: its weights, precision, attention and device."""

    path: ModelName = None
    """Folder or hub id of the base model, or of a PEFT adapter, which is merged into its base. Mutually exclusive with
    `build`."""
    build: BuildSettings | None = None
    """Create a small, randomly initialized model instead of loading one."""
    revision: str | None = None
    """Commit, tag or branch of the model on the hub; null is `main`."""
    trust_remote_code: bool = False
    """Run the Python code that comes with the model of `path`, and the same code, byte for byte, in models trained
    from it. Needs a pinned `revision`. Such a model cannot be a reward model."""
    quantize: Literal["none", "4bit", "8bit"] = "none"
    """Store the frozen weights under LoRA adapters in 4 or 8 bits (QLoRA, Dettmers et al. 2023, arXiv:2305.14314).
    Needs bitsandbytes, which quantizes linear layers: fused experts of mixture-of-experts models keep `dtype`."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Data type of frozen weights. `auto` uses `precision`; in `label` and `evaluate`, weights that are stored in
    float32 stay in float32. A policy that an earlier stage trained as an adapter keeps the data type of that stage.
    Trained weights are always float32, in memory and on disk; for matrix products in bfloat16 they are cast to
    bfloat16."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Data type of matrix products. `auto` is bfloat16 where the hardware supports it natively and it is at least 1.1
    times as fast as float32, else float32. This is measured when a stage starts, with one layer of the model's width
    (at most 512), trained as the stage trains; a resumed stage keeps the choice."""
    attention: str = "auto"
    """Attention backend: a built-in one (`reference`, `tiled`, `torch`, `triton`; `rlhf attention list` says which run
    on this machine), `package.module:function` for your own, or one of transformers (such as `sdpa` or `eager`), which
    use padded batches. `auto` takes the first built-in one that supports a call; docs/attention.md has the order."""
    device: Annotated[str, EffortOnly()] = "auto"
    """`cpu`, `cuda` or `auto` (CUDA if available, else the CPU). Select a GPU with CUDA_VISIBLE_DEVICES."""
    sharding: Annotated[Literal["none", "fsdp"], EffortOnly()] = "none"
    """`fsdp`: the processes divide weights, gradients and moments among themselves (torch's `fully_shard`), so that a
    model that does not fit on one GPU can be trained, drawn from and evaluated. Needs several processes; see
    docs/processes.md for what it does not support. `none`: every process holds whole models."""
    sharding_size: Annotated[Annotated[int, Field(ge=2)] | Literal["machine"] | None, EffortOnly()] = None
    """Processes that divide a model among themselves with `sharding: fsdp`; null is all of them. `machine`, or a number
    that divides that of all processes, is hybrid sharding (HSDP): every group has a copy of the models, so that weights
    are gathered within a machine, and between machines only gradients are summed."""
    sharding_cpu_offload: Annotated[bool, EffortOnly()] = False
    """With `sharding: fsdp` on GPUs: the parts of weights and gradients, and moments, are in host memory (torch's
    `CPUOffloadPolicy`), and the optimizer steps on the CPU. Less GPU memory, and slower."""
    threads: Annotated[int | None, Field(ge=1), EffortOnly()] = None
    """Number of CPU threads; null is the default of torch (all cores). For models of a few million parameters one
    thread is about as fast, and less sensitive to other load on the machine."""

    @field_validator("attention")
    @classmethod
    def _known_attention(cls, attention: str) -> str:
        known = (*OUR_ATTENTION, *THEIR_ATTENTION)
        if attention in known or ":" in attention or "/" in attention:
            return attention
        near = difflib.get_close_matches(attention.strip().lower(), known, n=1, cutoff=0.6)
        meant = f", did you mean `{near[0]}`?" if near else ""
        raise ValueError(
            f"expected one of {', '.join(known)}, `package.module:function` or a hub kernel, `owner/name`"
            f"; got `{attention}`{meant}"
        )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.dtype == "bfloat16" and self.precision == "float32":
            raise ValueError("`dtype: bfloat16` contradicts `precision: float32`")
        if self.path is not None and self.build is not None:
            raise ValueError("`path` and `build` are mutually exclusive: load a model or create one")
        if self.sharding == "fsdp" and self.quantize != "none":
            raise ValueError(f"`sharding: fsdp` does not support `quantize: {self.quantize}`")
        if self.sharding == "none":
            for name in self.changed("sharding_size", "sharding_cpu_offload"):
                raise ValueError(f"`{name}` has no effect without `sharding: fsdp`")
        if self.sharding_cpu_offload and self.device == "cpu":
            raise ValueError("`sharding_cpu_offload` has no effect with `device: cpu`: weights are in host memory")
        if self.sharding == "fsdp" and self.trust_remote_code:
            raise ValueError("`sharding: fsdp` does not support models with Python code of their own")
        if self.trust_remote_code and self.revision is None:
            raise ValueError("`trust_remote_code` needs a pinned `revision`: the commit whose code you reviewed")
        return self


class DataSettings(Section):
    """Data settings shared by the stages."""

    prompts: DataName = None
    """Default prompt records of `label`, `ppo` and `evaluate`: a file, folder or hub data set."""
    holdout: OpenShare | None = None
    """Share of prompts held out from training, selected by a hash of the first user turn: the same prompts in every
    stage. Null is the share that was held out when the model that the stage starts from was trained, else 0.1."""
    split_seed: Annotated[int, Field(ge=0)] | None = None
    """Seed of the held-out selection. Null is the seed that was used when the model that the stage starts from was
    trained, else 0."""
    max_skip: Annotated[Share, EffortOnly()] = 0.01
    """Maximum share of a file's records that may be skipped; above this share the run fails."""
    columns: dict[str, str | list[str]] = Field(default={})
    """Field names in your files, as `{our name: your name}`, such as `{prompt: question, completion: answer}`. The
    texts of several fields are joined by blank lines: `{prompt: [context, question]}`."""
    comparison: ComparisonSettings | None = None
    """How to read comparisons that your files store as two or more completion columns and a verdict, such as
    `{completions: [left, right], verdict: winner}`. Null reads the published schemas that are recognized; see
    docs/label-formats.md."""
    prompt_template: str | None = "auto"
    """Format of plain-text prompts. `chat` makes a prompt one user message in the tokenizer's chat template; a text
    that contains `{prompt}` once is a template, into which the prompt is inserted; null uses the prompt as it is.
    `auto` is the format that the model was trained with, else `chat` if its tokenizer has a chat template, else null.
    Conversations always use the chat template."""
    template_kwargs: dict[str, bool | int | float | str] | None = None
    """Arguments of the chat template, such as `{enable_thinking: false}`. Null is those that the model was trained
    with, else none."""
    max_prompt_tokens: Count = 512
    """Maximum prompt length in tokens; records with longer prompts are skipped and counted."""

    @field_validator("prompt_template")
    @classmethod
    def _has_slot(cls, template: str | None) -> str | None:
        if template not in (None, "auto", "chat") and template.count("{prompt}") != 1:
            raise ValueError("expected `auto`, `chat`, null or text that contains `{prompt}` once")
        return template


class TrackingSettings(Section):
    """Trackers that receive every metric, in addition to each stage's `metrics.jsonl`."""

    trackers: Annotated[list[Literal["tensorboard", "wandb", "trackio"]], EffortOnly()] = Field(default=[])
    """Names of trackers, each of which must be installed. `tensorboard` writes to `RUN/tracking`; the others use their
    own configuration."""
    project: Annotated[str, EffortOnly()] = "rlhf"
    """Project name under which trackers group the runs."""


class LoraSettings(Section):
    """Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685): W + (alpha / rank) B A, only A and B trained."""

    rank: Count = 16
    """Rank of the update."""
    alpha: Positive = 32.0
    """The update is multiplied by alpha / rank."""
    dropout: OpenShare = 0.0
    """Dropout on the adapter's input during training. Must be 0 in PPO, where rollout and update have to agree, and on
    fused experts, which `all-linear` then skips."""
    target_modules: str | list[str] = "all-linear"
    """Layers that get an adapter: `all-linear`, fused experts of mixture-of-experts models included, or names of
    modules or expert parameters."""


Adapter = Literal["lora", "none"]

Optimizer = Literal["adamw", "adamw-8bit"]
"""AdamW with its moments in float32 or in 8 bits, see `training.adamw`."""


def default_rate(adapter: Adapter, *, lora: float, full: float) -> float:
    """Return the default peak learning rate of LoRA or of full fine-tuning (docs/decisions/0011)."""
    return lora if adapter == "lora" else full


def rates_depend_on_steps(schedule: str, warmup_share: float) -> str | None:
    """Return the setting, as a recipe has it, by which learning rates depend on the number of steps; None if none."""
    if schedule != "constant":
        return f"schedule: {schedule}"
    return f"warmup_share: {warmup_share:g}" if warmup_share else None


class TrainingSettings(StageSection):
    """Optimization settings of the supervised training stages."""

    learning_rate: Positive | None = None
    """Peak learning rate of AdamW; null is derived from `adapter`."""
    batch_size: Count
    """Records per optimizer step, over all processes and micro-batches."""
    micro_batch_size: Effort = 8
    """Records per forward and backward pass, per process. Affects memory and speed, not the result."""
    micro_batch_tokens: Annotated[int | None, Field(ge=1), EffortOnly()] = None
    """Maximum tokens per forward and backward pass, per process, padding included; replaces `micro_batch_size`. Null
    uses `micro_batch_size`. Either way, a training pass that runs out of memory is repeated with half the tokens."""
    optimizer: Optimizer = "adamw"
    """`adamw-8bit` stores the moments of AdamW in 8 bits: a quarter of their memory (Dettmers et al. 2021,
    arXiv:2110.02861). Those of embeddings stay in float32. Needs bitsandbytes."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay of AdamW."""
    max_grad_norm: Positive = 1.0
    """Maximum gradient norm; larger gradients are scaled down to it."""
    warmup_share: Share = 0.03
    """Share of the optimizer steps over which the learning rate rises linearly to its peak."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Learning-rate schedule after the warm-up."""
    gradient_checkpointing: EffortFlag = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    checkpoint_steps: Effort = 50
    """Optimizer steps between checkpoints. An interrupted run resumes from the last checkpoint."""

    @property
    @abstractmethod
    def peak_rate(self) -> float:
        """`learning_rate`, or what null stands for."""

    def fixed_steps(self, section: str) -> str:
        """Return why a training that has begun does not continue with other `epochs`."""
        by = rates_depend_on_steps(self.schedule, self.warmup_share)
        if by is not None:
            return f"with `{section}.{by}` the learning rates of all steps depend on `{section}.epochs`"
        return f"`{section}.epochs` decides which records are in the last step"


class SamplingSettings(Section):
    """How completions are sampled and where they end: temperature first, then nucleus (top-p) sampling. The top-level
    section `sampling` applies to all stages; a stage may set values of its own. Null in a stage means the value of
    the top-level section. Null in the top-level section means the value that was recorded with the model that the
    stage starts from (by `sft` or `ppo`; docs/contract.md), else the default."""

    temperature: Positive | None = None
    """Logits are divided by this; 1, the default, samples from the model's own distribution; lower values are
    greedier."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Sample from the smallest set of tokens whose total probability is at least this; the default is 1. PPO always
    samples from the whole distribution."""
    max_new_tokens: Count | None = None
    """Maximum completion length in tokens; the default is 128."""
    stop_tokens: list[str] | None = None
    """Texts of additional stop tokens, each a single token of the model. A stop token stays in the completion; the
    default is none."""


class GenerationSettings(Section):
    """The engine that samples completions, in all stages that sample. The section `sampling` sets the distribution."""

    engine: Literal["auto", "torch", "vllm"] = "auto"
    """`torch`: the policy itself, on any device. `vllm`: vLLM on the policy's GPU, which receives the policy's weights
    in memory, or `vllm_server`. `auto` is `vllm` if it is installed and can run the model here, else `torch`; with
    `vllm_server` it is `vllm`. The choice is kept when a stage resumes."""
    gpu_memory_utilization: Annotated[float, Field(gt=0.0, lt=1.0), EffortOnly()] = 0.3
    """Share of the GPU's memory for vLLM: its copy of the weights and its key-value cache. Most of it is free again
    while the policy trains."""
    tensor_parallel_size: Annotated[int, Field(ge=1), EffortOnly()] = 1
    """Processes that share one engine of `engine: vllm`, each with a part of every layer on its GPU; it divides the
    number of processes of a machine. 1 gives each process an engine of its own, with the whole policy."""
    vllm_server: Annotated[Address, EffortOnly()] = None
    """URL (`http://HOST:PORT`) of a vLLM server on GPUs of its own, which samples in place of an engine on the policy's
    GPU; docs/generation.md has the command that starts it. It receives the policy's weights over NCCL."""
    server_timeout: Annotated[Positive, EffortOnly()] = 300.0
    """Seconds to wait for `vllm_server` when it does not respond, before the stage ends with an error; also the longest
    time of one request to it, and so of one completion."""

    @model_validator(mode="after")
    def _has_effect(self) -> Self:
        if self.engine == "torch":
            for name in self.changed("gpu_memory_utilization", "tensor_parallel_size", "vllm_server", "server_timeout"):
                raise ValueError(f"`{name}` has no effect with `engine: torch`")
        if self.vllm_server is None:
            for name in self.changed("server_timeout"):
                raise ValueError(f"`{name}` has no effect without `vllm_server`")
            # `auto` may be torch, which then draws as if nothing had been asked for.
            for name in self.changed("tensor_parallel_size") if self.engine == "auto" else ():
                raise ValueError(f"`{name}` needs `engine: vllm`")
        else:
            for name in self.changed("gpu_memory_utilization", "tensor_parallel_size"):
                option = f"--{name.replace('_', '-')}"
                raise ValueError(f"`{name}` has no effect with `vllm_server`: give `vllm serve` the option `{option}`")
        return self


class StageSamplingSettings(SamplingSettings):
    """How the stage's completions are sampled; null inherits (see the section `sampling`)."""

    batch_size: Effort = 32
    """Completions sampled in one batch. Affects memory and speed only."""
