"""Load language models and tokenizers: safetensors only, no remote code by default, and no noise from libraries."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import rlhf_cli.transformer  # noqa: F401  (registers its models with transformers)
from rlhf_cli.errors import ModelError
from rlhf_cli.models.attention import is_our_attention
from rlhf_cli.models.backbone import text_config
from rlhf_cli.models.hub import commit_of, hub_model, local_folder
from rlhf_cli.models.json_files import read_json
from rlhf_cli.models.libraries import quiet_libraries
from rlhf_cli.models.peft_folder import PeftFolder, find_peft_folder
from rlhf_cli.models.policy_adapter import has_policy_adapter
from rlhf_cli.models.prequantized import quantization_of
from rlhf_cli.models.quantize import Quantize
from rlhf_cli.models.rotary import switching_length
from rlhf_cli.models.stored_weights import stored_heads
from rlhf_cli.models.third_party import CONFIG_HINT, reading
from rlhf_cli.models.tokenizer import read_tokenizer
from rlhf_cli.models.weight_loading import base_of, check_weights, language_model_class, load_weights, open_weights

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
        sharding_size: processes that divide a sharded model among themselves; None is all.
        sharding_cpu_offload: weights of a sharded model are in host memory.
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
    sharding_size: int | None = None
    sharding_cpu_offload: bool = False

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

    def on_cpu(self) -> ModelSource:
        """Return this source on the CPU, not quantized, where the attention of a GPU may not run."""
        attention = self.attention if self.device.type == "cpu" else "eager"
        return replace(self, device=torch.device("cpu"), attention=attention, quantize="none")

    def to_compare(self) -> ModelSource:
        """Return this source in float32, with an attention that computes in it: flash kernels take 16 bits only."""
        attention = self.attention if is_our_attention(self.attention) else "eager"
        return replace(self.in_full(), precision=torch.float32, attention=attention)

    def keeps_adapter(self, dtype: torch.dtype | None) -> bool:
        """Whether `load_weights` splits an adapter off the weights into which it was merged."""
        is_rounded = self.precision != torch.float32 and self.quantize == "none"
        return dtype is None and is_rounded and not self.is_merged and has_policy_adapter(self.folder)


def load_config(source: ModelSource) -> PretrainedConfig:
    """Load the configuration of a model; that of a PEFT adapter is its base's.

    Raises:
        ModelError: there is none, or its weights are quantized in a way that is not dequantized here.
    """
    if (adapter := find_peft_folder(source.path, source.revision)) is not None:
        return _base_config(adapter, source)
    folder = source.folder
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{source.path} is not a model folder: it has no config.json",
            hint="give a folder that `save_pretrained` wrote, or a hub id",
        )
    try:
        with reading(f"cannot load a model from `{source.path}`", folder, ("config.json",), hint=CONFIG_HINT):
            config = AutoConfig.from_pretrained(folder, trust_remote_code=source.trust_remote_code)
    except ModelError as error:
        if "trust_remote_code" in str(error.__cause__):
            raise _untrusted(source.path, own_code(folder)) from error
        raise
    quantization_of(config, source.path)  # raises for weights that cannot be loaded
    return config


def says_labels(source: ModelSource) -> bool:
    """Whether the configuration of a model says how many labels it has."""
    if (adapter := find_peft_folder(source.path, source.revision)) is not None:
        source = base_of(adapter, source)
    fields = read_json(source.folder / "config.json")
    return "num_labels" in fields or "id2label" in fields


def own_code(folder: Path) -> str | None:
    """Name the classes of the code that a model folder comes with; None if it comes without."""
    named = read_json(folder / "config.json").get("auto_map")
    return ", ".join(sorted(map(str, named.values()))) if isinstance(named, dict) and named else None


class _UntrustedCodeError(ModelError):
    """A model has a class of its own, whose code may not run."""


def _untrusted(path: str, code: str | None) -> ModelError:
    return _UntrustedCodeError(
        f"`{path}` comes with Python code of its own ({code}), which is not run",
        hint="if you have read and trust it: `--set model.trust_remote_code=true --set model.revision=COMMIT`, with "
        "`model.path` the model that it comes with; models trained from that one need the same settings",
    )


def _base_config(adapter: PeftFolder, source: ModelSource) -> PretrainedConfig:
    try:
        config = load_config(base_of(adapter, source))
    except _UntrustedCodeError as error:
        raise ModelError(
            f"the base of the PEFT adapter {source.path}: {error.message}; the permission is for the code of "
            "`model.path` alone",
            hint="merge the adapter into its base with PEFT (`merge_and_unload`), save that with the base's Python "
            "files, and give it as `model.path` with `--set model.trust_remote_code=true --set model.revision=main`",
        ) from error
    except ModelError as error:
        raise ModelError(
            f"the base of the PEFT adapter {source.path}: {error.message}",
            hint=f"set `base_model_name_or_path` in {adapter.config_file} to the folder or hub id of its base, "
            "unquantized and with all of its files",
        ) from error
    config.dtype = torch.float32  # in which it is merged
    return config


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model; that of a PEFT adapter without one is its base's.

    Raises:
        ModelError: it cannot be loaded.
    """
    quiet_libraries()
    adapter = find_peft_folder(source.path, source.revision)
    if adapter is not None and not adapter.has_tokenizer:
        return load_tokenizer(base_of(adapter, source))
    return read_tokenizer(source.folder, source.path, trust_remote_code=source.trust_remote_code)


def load_policy(source: ModelSource, *, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Load a language model, decoder-only or encoder-decoder, in evaluation mode on its device.

    Args:
        source: where the model comes from.
        dtype: precision of the weights, which are then not quantized; None is that of `source`.

    Raises:
        ModelError: the model cannot be loaded, or is not a language model.
    """
    config = load_config(source)
    _check_generates(source)
    return load_weights(policy_class(config, source.path), source, config, dtype=dtype)


def check_policy(source: ModelSource) -> None:
    """Check that a language model can be loaded, from its configuration and the headers of its weight files.

    Raises:
        ModelError: see `load_policy`.
    """
    config = load_config(source)
    _check_generates(source)
    kind = policy_class(config, source.path)
    check_weights(kind, source, config, shapes=open_weights(source, config).shapes)


def _check_generates(source: ModelSource) -> None:
    adapter = find_peft_folder(source.path, source.revision)
    if adapter is not None and (heads := stored_heads(adapter.shapes)):
        raise ModelError(
            f"`{source.path}` is a PEFT adapter with a reward head (`{heads[0].name}`), which generates no text",
            hint="give a language model, or use this one as a reward model",
        )


def policy_class(config: PretrainedConfig, path: str) -> type:
    """Return the Auto class of a language model.

    Raises:
        ModelError: the architecture generates no text.
    """
    if (kind := language_model_class(config)) is None:
        raise ModelError(
            f"`{path}` is a {config.model_type} model, which cannot generate text",
            hint="use a decoder-only or encoder-decoder language model; a BERT can only be a reward model",
        )
    return kind


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
    """Return the longest sequence in tokens that the model's positions allow; 10**9 if unlimited, as in T5.

    Of a multimodal model, the positions of its text model count. Rotary frequencies that switch with the length end the
    context where they switch, see `models.rotary`.
    """
    text = text_config(config)
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        if isinstance(value := getattr(text, name, None), int):
            return min(value, switching_length(text) or value)
    return 10**9
