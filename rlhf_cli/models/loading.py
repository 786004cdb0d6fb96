"""Loading policies and tokenizers: safetensors only, no code of strangers by default, quiet when all is well."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import rlhf_cli.transformer  # noqa: F401  (its models become loadable)
from rlhf_cli.distributed.ranks import world_size
from rlhf_cli.errors import ModelError
from rlhf_cli.models.attention import is_our_attention, set_attention
from rlhf_cli.models.quantize import Quantize, as_ordinary, check_quantize, quantization

Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from and how it is held.

    Attributes:
        path: folder or hub id.
        revision: commit, tag or branch on the hub.
        trust_remote_code: run Python code that comes with the model.
        dtype: of frozen weights; trained weights are float32 whatever this says.
        precision: of matrix products (autocast).
        attention: one of our backends, `auto` for the best of them that serves, `package.module:function` for your own,
            or a name that transformers knows, such as `sdpa` and `eager`.
        device: where it lives.
        quantize: bits of the frozen weights under an adapter; see `models.quantize`.
    """

    path: str
    revision: str | None = None
    trust_remote_code: bool = False
    dtype: torch.dtype = torch.float32
    precision: torch.dtype = torch.float32
    attention: str = "auto"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    quantize: Quantize = "none"

    def at(self, path: str) -> ModelSource:
        """The same way of holding a model, from another place; a revision belongs to its own place alone."""
        if path == self.path:
            return self
        return replace(self, path=path, revision=None, trust_remote_code=False)

    def in_full(self) -> ModelSource:
        """The same model with all its weights in float32, as they are trained and as they are merged."""
        return replace(self, dtype=torch.float32, quantize="none")

    def hub_arguments(self) -> dict[str, object]:
        """Arguments that every `from_pretrained` takes."""
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}


def resolve_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU. Each of several processes has the GPU of its number there.

    MPS has no float64, which sampling draws in, so it is not chosen.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise ModelError(
            f"`model.device: {name}` is none of auto, cpu and cuda",
            hint="choose one of several GPUs by the environment: CUDA_VISIBLE_DEVICES=1 rlhf ...",
        )
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ModelError("`model.device: cuda`: torch finds no CUDA device here", hint="use `auto` or `cpu`")
    return torch.device("cuda") if world_size() == 1 else _own_gpu()


def _own_gpu() -> torch.device:
    """The GPU of one of several processes; they do not share any, which NCCL refuses."""
    number, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= count:
        raise ModelError(
            f"process {number + 1} of this machine finds {count:,} GPUs: each process has one of its own",
            hint=f"use `--processes {count}`, or `--set model.device=cpu`",
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def resolve_precision(name: Precision, device: torch.device) -> torch.dtype:
    """`auto`: bfloat16 where the hardware multiplies it natively (CUDA since Ampere, AVX512-BF16), else float32."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type == "cpu" and _cpu_multiplies_bfloat16():
        return torch.bfloat16
    return torch.float32


def _cpu_multiplies_bfloat16() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))


def quiet_libraries() -> None:
    """Keep the notes libraries print about their own affairs from people who did nothing wrong; errors still show."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def load_config(source: ModelSource) -> PretrainedConfig:
    """The model's configuration; raises `ModelError` where there is none."""
    folder = Path(source.path)
    if (folder / "adapter_config.json").is_file():
        raise _adapted(source.path)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ModelError(
            f"{source.path} is no model folder: it has no config.json",
            hint="give the folder that `save_pretrained` wrote, or a hub id",
        )
    try:
        return AutoConfig.from_pretrained(source.path, **source.hub_arguments())
    except (OSError, ValueError) as error:
        raise ModelError(
            f"cannot load a model from `{source.path}`: {_first_line(error)}",
            hint="give a folder that exists, or a hub id such as HuggingFaceTB/SmolLM2-135M-Instruct",
        ) from error


def _adapted(path: str) -> ModelError:
    """Transformers would load base and adapter; with adapters off the reference would be the base (trap 15)."""
    return ModelError(
        f"`{path}` is an adapter of PEFT's, not a whole model",
        hint="merge it first: `AutoPeftModelForCausalLM.from_pretrained(IT).merge_and_unload().save_pretrained(NEW)`",
    )


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to a model. Padding is never read from its ids: lengths say what is real."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.path, **source.hub_arguments())
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"cannot load a tokenizer from `{source.path}`: {_first_line(error)}") from error
    tokenizer.model_max_length = min(tokenizer.model_max_length, 10**9)
    return tokenizer


def load_policy(source: ModelSource, *, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A language model, decoder-only or encoder-decoder, in evaluation mode on its device.

    Args:
        source: where and how.
        dtype: precision of the weights, which are then not quantized; None is that of `source`.
    """
    config = load_config(source)
    if config.is_encoder_decoder:
        kind = AutoModelForSeq2SeqLM
    else:
        kind = AutoModelForCausalLM
        # Transformers makes a "language model" of a BERT too, which sees the words it is to predict.
        reads_both_ways = type(config) in AutoModelForMaskedLM._model_mapping and not getattr(
            config, "is_decoder", False
        )
        if type(config) not in kind._model_mapping or reads_both_ways:
            raise ModelError(
                f"`{source.path}` is a {config.model_type} model, which writes no text",
                hint="a policy is a decoder-only or encoder-decoder language model; a BERT can only be a reward model",
            )
    return load_weights(kind, source, config, dtype=dtype, complete=True)


def load_weights(
    kind: type,
    source: ModelSource,
    config: PretrainedConfig,
    *,
    dtype: torch.dtype | None = None,
    complete: bool = False,
) -> PreTrainedModel:
    """`kind.from_pretrained` with our defaults: safetensors only, dropout off, clear errors.

    `complete` refuses a folder that lacks weights, which transformers would draw at random. `dtype` is as in
    `load_policy`.
    """
    quiet_libraries()
    disable_dropout(config)
    is_quantized = dtype is None and source.quantize != "none"
    held: dict[str, Any] = {}
    if is_quantized:
        check_quantize(source.quantize, source.device)
        # Quantized weights are made where they live; 8-bit ones cannot move.
        held = {"quantization_config": quantization(source.quantize, source.precision), "device_map": source.device}
    try:
        model, report = kind.from_pretrained(
            source.path,
            output_loading_info=True,
            config=config,
            dtype=dtype or source.dtype,
            use_safetensors=True,
            **held,
            **({} if is_our_attention(source.attention) else {"attn_implementation": source.attention}),
            **source.hub_arguments(),
        )
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"cannot load weights from `{source.path}`: {_first_line(error)}") from error
    if getattr(model, "_hf_peft_config_loaded", False):
        raise _adapted(source.path)
    if complete and (missing := sorted(report["missing_keys"])):
        raise ModelError(
            f"`{source.path}` lacks {len(missing):,} weights of a {config.model_type} model, such as `{missing[0]}`",
            hint="give the folder of a whole language model",
        )
    model = as_ordinary(model).eval() if is_quantized else model.to(source.device).eval()
    if is_our_attention(source.attention):
        set_attention(model, source.attention, source.path)
    return model


def load_any(path: str, device: torch.device) -> PreTrainedModel:
    """A model of any kind in float32, its backbone alone, with transformers' own attention: for looking at it."""
    source = ModelSource(path, attention="eager", device=device)
    return load_weights(AutoModel, source, load_config(source))


def disable_dropout(config: PretrainedConfig) -> None:
    """Set every rate of dropout in a configuration to 0, of layers and of a router's jitter too, nested ones as well.

    Some architectures read the rate from the configuration in `forward`, where `eval()` does not reach it; with dropout
    in one of two passes the ratio of an update that changed nothing is not 1 (trap 4 of docs/ppo.md).
    """
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            disable_dropout(value)
        elif isinstance(value, float) and ("dropout" in name or "jitter" in name or name.endswith("drop")):
            setattr(config, name, 0.0)


def recompute_activations(model: PreTrainedModel) -> None:
    """Keep no activations inside the layers; the backward pass computes them again.

    Transformers recomputes in training mode only, so the model is put into it; with every dropout rate at 0 nothing
    else changes.
    """
    # Renamed in transformers 5.23; the old name goes with version 6.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    model.train()


def context_length(config: PretrainedConfig) -> int:
    """Longest sequence in tokens that the model's positions allow (T5 has no limit of its own)."""
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        if isinstance(value := getattr(config, name, None), int):
            return value
    return 10**9


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
