"""Load language models and tokenizers: safetensors only, no remote code by default, and no noise from libraries."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)

import rlhf_cli.transformer  # noqa: F401  (registers its models with transformers)
from rlhf_cli.distributed.ranks import world_size
from rlhf_cli.errors import ModelError
from rlhf_cli.models.attention import is_our_attention, set_attention
from rlhf_cli.models.checkpoint import Checkpoint, open_checkpoint
from rlhf_cli.models.hub import commit_of, hub_model, local_folder
from rlhf_cli.models.policy_adapter import has_policy_adapter, separate_adapters
from rlhf_cli.models.prequantized import drop_quantization, quantization_of
from rlhf_cli.models.quantize import Quantize, check_quantize, make_trainable, quantization
from rlhf_cli.models.third_party import read_json, reading
from rlhf_cli.models.tokenizer import load_tokenizer as load_tokenizer  # loads models and tokenizers alike
from rlhf_cli.models.weight_report import compare, sort_out
from rlhf_cli.progress import say_once

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""Values of `model.precision` and `model.dtype` other than `auto`."""


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from, with device and precisions resolved for this machine.

    Attributes:
        path: folder or hub id, which may end with `@revision`.
        revision: commit, tag or branch on the hub; replaces the one in `path`.
        trust_remote_code: run Python code that comes with the model.
        dtype: of frozen weights; trained weights are always float32.
        precision: of matrix products (autocast).
        attention: one of our backends, `auto` for the fastest suitable one, `package.module:function` for your own, or
            a name of transformers, such as `sdpa` or `eager`.
        device: device of the weights.
        quantize: quantization of frozen weights under an adapter; see `models.quantize`.
        is_merged: load the weights of a policy whose adapter is saved beside them as they are, even where products in
            bfloat16 would round the adapter away; see `models.policy_adapter`.
    """

    path: str
    revision: str | None = None
    trust_remote_code: bool = False
    dtype: torch.dtype = torch.float32
    precision: torch.dtype = torch.float32
    attention: str = "auto"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    quantize: Quantize = "none"
    is_merged: bool = False

    @property
    def folder(self) -> Path:
        """The local folder with the model's files, for a model on the hub that of its cache, maybe without weights."""
        return local_folder(self.path, self.revision, with_weights=False)

    @property
    def folder_with_weights(self) -> Path:
        """The same folder; downloads the weights that it lacks."""
        return local_folder(self.path, self.revision)

    @property
    def pinned(self) -> tuple[str, str | None]:
        """What to record of where a model comes from: its hub id and commit; the folder and None for a folder."""
        model = hub_model(self.path, self.revision)
        return (self.path, None) if model is None else (model.id, commit_of(model))

    def at(self, path: str) -> ModelSource:
        """Return this source with another path; revision and remote code apply to the original path only."""
        if path == self.path:
            return self
        return replace(self, path=path, revision=None, trust_remote_code=False)

    def in_full(self) -> ModelSource:
        """Return this source with all weights in float32, merged and not quantized, as needed to train them all."""
        return replace(self, dtype=torch.float32, quantize="none", is_merged=True)

    def keeps_adapter(self, dtype: torch.dtype | None) -> bool:
        """Whether `load_weights` splits an adapter off the weights into which it was merged."""
        is_rounded = self.precision != torch.float32 and self.quantize == "none"
        return dtype is None and is_rounded and not self.is_merged and has_policy_adapter(self.folder)

    def loading_arguments(self) -> dict[str, object]:
        """Return the arguments common to every `from_pretrained`."""
        return {"trust_remote_code": self.trust_remote_code}


def resolve_device(name: str) -> torch.device:
    """Resolve `auto` (CUDA if available, else the CPU), `cpu` or `cuda`. Each process of a group gets its own GPU.

    `auto` never selects MPS: sampling uses float64, which MPS does not support.

    Raises:
        ModelError: the name is unknown, or the GPU is not available.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise ModelError(
            f"`model.device` must be auto, cpu or cuda, got `{name}`",
            hint="to choose one of several GPUs, set CUDA_VISIBLE_DEVICES=1",
        )
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ModelError("`model.device: cuda`: torch finds no CUDA device", hint="use `auto` or `cpu`")
    return torch.device("cuda") if world_size() == 1 else _own_gpu()


def _own_gpu() -> torch.device:
    """Return this process's GPU. NCCL does not allow two processes on one GPU."""
    number, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= count:
        raise ModelError(
            f"process {number + 1} on this machine finds {count:,} GPUs, but each process needs one of its own",
            hint=f"use `--processes {count}`, or `--set model.device=cpu`",
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def quiet_libraries() -> None:
    """Silence the warnings and progress bars of transformers and tokenizers; errors still show."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def load_config(source: ModelSource) -> PretrainedConfig:
    """Load the configuration of a model.

    Raises:
        ModelError: there is none, or the folder holds a PEFT adapter.
    """
    folder = source.folder
    if (folder / "adapter_config.json").is_file():
        raise _is_adapter_error(source.path)
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{source.path} is not a model folder: it has no config.json",
            hint="give a folder that `save_pretrained` wrote, or a hub id",
        )
    hint = _own_code_hint(folder) or _CONFIG_HINT
    with reading(f"cannot load a model from `{source.path}`", folder, ("config.json",), hint=hint):
        config = AutoConfig.from_pretrained(folder, **source.loading_arguments())
    quantization_of(config, source.path)  # raises for weights that cannot be loaded
    return config


def says_labels(source: ModelSource) -> bool:
    """Whether the configuration of a model says how many labels it has."""
    fields = read_json(source.folder / "config.json")
    return "num_labels" in fields or "id2label" in fields


_CONFIG_HINT = "check config.json, or upgrade transformers if the architecture is newer than it"


def _own_code_hint(folder: Path) -> str | None:
    """Return the hint for a model that comes with its own code; None for others."""
    files = own_code(folder)
    return files and (
        f"it comes with its own code ({files}), which stages do not run: use a model whose architecture transformers "
        "knows"
    )


def own_code(folder: Path) -> str | None:
    """Name the classes of the code that a model folder comes with; None if it comes without."""
    config = folder / "config.json"
    named = read_json(config).get("auto_map")
    return ", ".join(sorted(map(str, named.values()))) if isinstance(named, dict) and named else None


def _is_adapter_error(path: str) -> ModelError:
    """Transformers would load base and adapter; with adapters off the reference would be the base (trap 15)."""
    folder = local_folder(path, with_weights=False)
    config = read_json(folder / "adapter_config.json")
    kind, labels = (
        ("SequenceClassification", ", num_labels=1") if config.get("task_type") == "SEQ_CLS" else ("CausalLM", "")
    )
    tokenizer = path if (folder / "tokenizer_config.json").is_file() else config.get("base_model_name_or_path")
    merge = (
        f"import peft, transformers as t; a, b = {path!r}, {path.rstrip('/') + '-merged'!r}; "
        f"peft.AutoPeftModelFor{kind}.from_pretrained(a{labels}).merge_and_unload().save_pretrained(b); "
        f"t.AutoTokenizer.from_pretrained({tokenizer!r}).save_pretrained(b)"
    )
    return ModelError(
        f"`{path}` is a PEFT adapter on `{config.get('base_model_name_or_path')}`, not a whole model",
        hint=f"merge it once, and give the merged folder: python -c {shlex.quote(merge)}",
    )


def load_policy(source: ModelSource, *, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Load a language model, decoder-only or encoder-decoder, in evaluation mode on its device.

    Args:
        source: where the model comes from.
        dtype: precision of the weights, which are then not quantized; None is that of `source`.

    Raises:
        ModelError: the model cannot be loaded, or is not a language model.
    """
    config = load_config(source)
    return load_weights(policy_class(config, source.path), source, config, dtype=dtype)


def check_policy(source: ModelSource) -> None:
    """Check that a language model can be loaded, from its configuration and the headers of its weight files.

    Raises:
        ModelError: see `load_policy`.
    """
    config = load_config(source)
    check_weights(policy_class(config, source.path), source, config)


def policy_class(config: PretrainedConfig, path: str) -> type:
    """Return the Auto class of a language model.

    Raises:
        ModelError: the architecture generates no text.
    """
    if config.is_encoder_decoder:
        return AutoModelForSeq2SeqLM
    # Transformers loads even a BERT as a causal language model, but a BERT sees the tokens it would predict.
    reads_both_ways = type(config) in AutoModelForMaskedLM._model_mapping and not getattr(config, "is_decoder", False)
    if type(config) not in AutoModelForCausalLM._model_mapping or reads_both_ways:
        raise ModelError(
            f"`{path}` is a {config.model_type} model, which cannot generate text",
            hint="use a decoder-only or encoder-decoder language model; a BERT can only be a reward model",
        )
    return AutoModelForCausalLM


def load_weights(
    kind: type,
    source: ModelSource,
    config: PretrainedConfig,
    *,
    dtype: torch.dtype | None = None,
    checkpoint: Checkpoint | None = None,
    is_new: IsNew | None = None,
) -> PreTrainedModel:
    """Load the weights of a checkpoint, all of them and no others, with dropout off.

    Args:
        kind: an Auto class or a model class.
        source: where the model comes from.
        config: its configuration, whose dropout rates are set to 0.
        dtype: see `load_policy`.
        checkpoint: the weights; None opens those at `source`.
        is_new: weights that the checkpoint need not hold, see `IsNew`; None is no weight.

    Raises:
        ModelError: the weights cannot be loaded, or are not those of the model.
    """
    quiet_libraries()
    disable_dropout(config)
    empty, checkpoint = check_weights(kind, source, config, checkpoint=checkpoint, is_new=is_new)
    is_quantized = dtype is None and source.quantize != "none"
    keeps_adapter = source.keeps_adapter(dtype)
    arguments: dict[str, Any] = {"dtype": torch.float32 if keeps_adapter else dtype or source.dtype}
    if is_quantized:
        check_quantize(source.quantize, source.device)
        # Quantized weights are created on their device, because 8-bit weights cannot be moved.
        arguments["quantization_config"] = quantization(source.quantize, source.precision)
        arguments["device_map"] = source.device
    if not is_our_attention(source.attention):
        arguments["attn_implementation"] = source.attention
    model = _read_weights(type(empty), source, empty.config, checkpoint, arguments, is_new)
    if keeps_adapter:
        separate_adapters(model, source.folder)
    model = make_trainable(model).eval() if is_quantized else model.to(source.device).eval()
    if is_our_attention(source.attention):
        set_attention(model, source.attention, source.path)
    return model


IsNew = Callable[[PreTrainedModel], frozenset[str]]
"""Returns the names of weights of an empty model that are drawn at random where the checkpoint lacks them."""


def check_weights(
    kind: type,
    source: ModelSource,
    config: PretrainedConfig,
    *,
    checkpoint: Checkpoint | None = None,
    is_new: IsNew | None = None,
) -> tuple[PreTrainedModel, Checkpoint]:
    """Check by names and shapes that a checkpoint holds the weights of a model; no weight is read.

    Returns:
        The model on the meta device, and the checkpoint.

    Raises:
        ModelError: weights are missing, unexpected or of another shape, or a file is missing or damaged.
    """
    if checkpoint is None:
        checkpoint = open_checkpoint(
            source.path, folder=source.folder_with_weights, quantization=quantization_of(config, source.path)
        )
    check_layers(config, source.path, len(checkpoint.shapes))
    empty = empty_model(kind, source, config)
    report = compare(empty, checkpoint.shapes).allowing(is_new(empty) if is_new is not None else ())
    report.check(source.path, config.model_type)
    if (line := report.describe_unused(source.path)) is not None:
        say_once(line)
    return empty, checkpoint


def check_layers(config: PretrainedConfig, path: str, stored: int) -> None:
    """Refuse a number of layers that could not be built in any time, before it is tried."""
    layers = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    if isinstance(layers, int) and not 0 <= layers <= stored:
        raise ModelError(
            f"`{path}`: `num_hidden_layers` in config.json is {layers:,}, and {stored:,} weights are stored",
            hint=_CONFIG_HINT,
        )


def empty_model(kind: type, source: ModelSource, config: PretrainedConfig) -> PreTrainedModel:
    """Build a model on the meta device: its parts, names and shapes without weights."""
    quiet_libraries()
    drop_quantization(config)
    what = f"`{source.path}`: a {config.model_type} model cannot be built from its config.json"
    with reading(what, source.folder, ("config.json",), hint=_CONFIG_HINT), torch.device("meta"):
        if issubclass(kind, PreTrainedModel):
            return kind(config)
        return kind.from_config(config, trust_remote_code=source.trust_remote_code)


def _read_weights(
    kind: type,
    source: ModelSource,
    config: PretrainedConfig,
    checkpoint: Checkpoint,
    arguments: dict[str, Any],
    is_new: IsNew | None,
) -> PreTrainedModel:
    """Call `from_pretrained`, and check by its own report that it loaded every weight."""
    if checkpoint.is_plain:
        place, arguments = source.folder, arguments | {"use_safetensors": True} | source.loading_arguments()
    else:
        place, arguments = None, arguments | {"state_dict": checkpoint.lazy()}
        if kind.can_generate():
            arguments["generation_config"] = _generation_config(source, config)
    with reading(f"cannot load weights from `{source.path}`", source.folder, ("config.json", "generation_config.json")):
        model, loaded = kind.from_pretrained(place, output_loading_info=True, config=config, **arguments)
    report = sort_out(model, loaded["missing_keys"], loaded["unexpected_keys"])
    report.allowing(is_new(model) if is_new is not None else ()).check(source.path, config.model_type)
    _untie(model, source.path)
    return model


def _generation_config(source: ModelSource, config: PretrainedConfig) -> GenerationConfig:
    if not (source.folder / "generation_config.json").is_file():
        return GenerationConfig.from_model_config(config)
    return GenerationConfig.from_pretrained(source.folder)


def _untie(model: PreTrainedModel, path: str) -> None:
    """Let the configuration say that embeddings are not tied where the checkpoint holds two matrices that differ.

    Transformers loads both then. Without this, the configuration that is written would have other programs tie them.
    """
    output = model.get_output_embeddings()
    parts = [part for part in (model.config, model.config.get_text_config(decoder=True)) if part.tie_word_embeddings]
    if output is None or not parts or output.weight is model.get_input_embeddings().weight:
        return
    for part in parts:
        part.tie_word_embeddings = False
    say_once(
        f"{path}: config.json ties input and output embeddings, but the weights hold two matrices that differ; both "
        "are used as they are stored"
    )


def as_stored(source: ModelSource) -> ModelSource:
    """Return a source whose weights are float32 if they are stored in float32, as a policy trained in full is.

    Products in bfloat16 round the matrices as in training, but embeddings, norms and the sums between layers are not
    rounded, as in training.
    """
    return replace(source, dtype=torch.float32) if load_config(source).dtype == torch.float32 else source


def load_any(path: str, device: torch.device) -> PreTrainedModel:
    """Load the backbone of any model in float32 with transformers' own attention, for inspection."""
    source = ModelSource(path, attention="eager", device=device)
    return load_weights(AutoModel, source, load_config(source))


def disable_dropout(config: PretrainedConfig) -> None:
    """Set all dropout rates and router jitter in a configuration to 0, in nested configurations too.

    Some architectures read the rate in `forward`, so `eval()` does not disable it. With dropout in either pass, the
    probability ratio of an unchanged policy is not 1 (trap 4 of docs/ppo.md).
    """
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            disable_dropout(value)
        elif isinstance(value, float) and ("dropout" in name or "jitter" in name or name.endswith("drop")):
            setattr(config, name, 0.0)


def recompute_activations(model: PreTrainedModel) -> None:
    """Recompute the activations of layers in the backward pass in place of storing them.

    Transformers recomputes in training mode only, so this sets training mode. With all dropout rates at 0, nothing else
    changes.
    """
    # Renamed in transformers 5.23; version 6 removes the old name.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    model.train()


def store_activations(model: PreTrainedModel) -> None:
    """Undo `recompute_activations`."""
    disable = getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable
    disable()


def context_length(config: PretrainedConfig) -> int:
    """Return the longest sequence in tokens that the model's positions allow; 10**9 if unlimited, as in T5."""
    # The decoder's configuration is inside another one in models that read images, too.
    for part in (config, config.get_text_config(decoder=True)):
        for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
            if isinstance(value := getattr(part, name, None), int):
                return value
    return 10**9
