"""Read the weights of a model from its files, all that it needs and no others, and merge a PEFT adapter into them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from rlhf_cli.errors import ModelError
from rlhf_cli.models.attention import is_our_attention, set_attention
from rlhf_cli.models.backbone import text_config
from rlhf_cli.models.base_model import check_base
from rlhf_cli.models.checkpoint import Checkpoint, open_checkpoint
from rlhf_cli.models.libraries import quiet_libraries
from rlhf_cli.models.lora import cast_weights
from rlhf_cli.models.peft_folder import PeftFolder, find_peft_folder
from rlhf_cli.models.peft_merging import merge
from rlhf_cli.models.policy_adapter import separate_adapters
from rlhf_cli.models.prequantized import drop_quantization, quantization_of
from rlhf_cli.models.quantize import check_quantize, make_trainable, quantization, quantized
from rlhf_cli.models.rotary import pin_rotary_frequencies
from rlhf_cli.models.stored_weights import ADAPTER, read_stored_weights, stored_heads
from rlhf_cli.models.third_party import CONFIG_HINT, reading
from rlhf_cli.models.weight_report import compare, sort_out
from rlhf_cli.progress import say_once

if TYPE_CHECKING:
    from rlhf_cli.models.loading import ModelSource


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
        is_new: weights that the checkpoint need not hold, see `IsNew`; None is none.

    Raises:
        ModelError: the weights cannot be loaded, or are not those of the model.
    """
    quiet_libraries()
    disable_dropout(config)
    if (adapter := find_peft_folder(source.path, source.revision)) is not None:
        model = _load_merged(kind, source, config, adapter, dtype, checkpoint, is_new)
    else:
        checkpoint = checkpoint or open_weights(source, config)
        empty = check_weights(kind, source, config, shapes=checkpoint.shapes, is_new=is_new)
        keeps_adapter = source.keeps_adapter(dtype)
        held = torch.float32 if keeps_adapter else dtype or source.dtype
        arguments = placement(source, held, is_quantized=dtype is None)
        model = _read_weights(type(empty), source, empty.config, checkpoint, arguments, is_new)
        if keeps_adapter:
            separate_adapters(model, source.folder)
    is_quantized = dtype is None and source.quantize != "none"
    return finished(make_trainable(model) if is_quantized else model, source)


def finished(model: PreTrainedModel, source: ModelSource) -> PreTrainedModel:
    """Return a model in evaluation mode on its device, with the rotary frequencies and the attention it computes with.

    Quantized weights are on their device already.
    """
    model = model.eval() if quantized(model) != "none" else model.to(source.device).eval()  # pyright: ignore[reportArgumentType]
    pin_rotary_frequencies(model, source.path)
    if is_our_attention(source.attention):
        set_attention(model, source.attention, source.path)
    return model


def placement(source: ModelSource, dtype: torch.dtype, *, is_quantized: bool) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that say in what precision, where and with which attention."""
    arguments: dict[str, Any] = {"dtype": dtype}
    if is_quantized and source.quantize != "none":
        check_quantize(source.quantize, source.device)
        # Quantized weights are created on their device, because 8-bit weights cannot be moved.
        arguments["quantization_config"] = quantization(source.quantize, source.precision)
        arguments["device_map"] = source.device
    if not is_our_attention(source.attention):
        arguments["attn_implementation"] = source.attention
    return arguments


def _load_merged(
    kind: type,
    source: ModelSource,
    config: PretrainedConfig,
    adapter: PeftFolder,
    dtype: torch.dtype | None,
    checkpoint: Checkpoint | None,
    is_new: IsNew | None,
) -> PreTrainedModel:
    """Load the base of a PEFT adapter and merge the adapter into it, on the CPU.

    An adapter without a reward head was trained on a language model, whose vocabulary projection it may adapt too: it
    is merged there, whatever is made of the weights then. The merged weights stay in float32: rounding them to bfloat16
    would lose a small adapter.
    """
    check_base(adapter.base, adapter.base_sha256, adapter.config_file)
    attention = "eager" if is_our_attention(source.attention) else source.attention  # ours follows after merging
    base = replace(base_of(adapter, source), device=torch.device("cpu"), attention=attention)
    checkpoint = checkpoint or open_weights(source, config)
    trained_as = kind
    if not stored_heads(adapter.shapes) and not stored_heads(checkpoint.shapes):
        trained_as = language_model_class(config) or kind
    new = is_new if trained_as is kind else None
    merged = merge(
        load_weights(trained_as, base, config, dtype=torch.float32, checkpoint=checkpoint, is_new=new), adapter
    )
    say_once(f"{source.path}: a PEFT adapter, merged into {adapter.base} in float32")
    is_quantized = dtype is None and source.quantize != "none"
    if trained_as is not kind or is_quantized:
        held = placement(source, source.dtype if is_quantized else torch.float32, is_quantized=is_quantized)
        merged = _again(kind, source, merged, held, is_new)
    if dtype is not None:
        cast_weights(merged, dtype)  # not its buffers: rotary frequencies stay in float32
    return merged


def _again(
    kind: type, source: ModelSource, model: PreTrainedModel, arguments: dict[str, Any], is_new: IsNew | None
) -> PreTrainedModel:
    """Load the weights of a model in memory as another class of its architecture, or quantized."""
    state = model.state_dict()
    shapes = {name: tuple(weight.shape) for name, weight in state.items()}
    empty = check_weights(kind, source, model.config, shapes=shapes, is_new=is_new)
    loaded = cast(Any, type(empty)).from_pretrained(None, config=empty.config, state_dict=state, **arguments)
    if loaded.can_generate():
        loaded.generation_config = model.generation_config
    return loaded


def language_model_class(config: PretrainedConfig) -> type | None:
    """Return the Auto class of a configuration's language model; None if it generates no text, as an encoder."""
    if config.is_encoder_decoder:
        return AutoModelForSeq2SeqLM
    if type(config) in AutoModelForImageTextToText._model_mapping and text_config(config) is not config:
        return AutoModelForImageTextToText  # whole: what reads images is kept in what is written
    # Transformers loads even a BERT as a causal language model, but a BERT sees the tokens it would predict.
    reads_both_ways = type(config) in AutoModelForMaskedLM._model_mapping and not getattr(config, "is_decoder", False)
    brings_class = has_own_code(config) and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    is_known = type(config) in AutoModelForCausalLM._model_mapping and not reads_both_ways
    return AutoModelForCausalLM if brings_class or is_known else None


def has_own_code(part: PretrainedConfig | PreTrainedModel) -> bool:
    """Whether a configuration or a model is of a class that came with the model."""
    return type(part).__module__.startswith("transformers_modules")


_VOCABULARY_HEAD = "lm_head"
"""Part of a language model that a classifier replaces by its own head."""

IsNew = Callable[[PreTrainedModel], frozenset[str]]
"""Returns the names of weights of an empty model that are drawn at random where the checkpoint lacks them."""


def check_weights(
    kind: type,
    source: ModelSource,
    config: PretrainedConfig,
    *,
    shapes: Mapping[str, tuple[int, ...]],
    is_new: IsNew | None = None,
) -> PreTrainedModel:
    """Check by names and shapes that stored weights are those of a model, and return that on the meta device.

    Args:
        kind: an Auto class or a model class.
        source: where the model comes from.
        config: its configuration.
        shapes: of the stored weights, by names without wrappers.
        is_new: see `load_weights`.

    Raises:
        ModelError: weights are missing, unexpected or of another shape.
    """
    check_layers(config, source.path, len(shapes))
    empty = empty_model(kind, source, config)
    report = compare(empty, shapes).allowing(is_new(empty) if is_new is not None else ())
    report.check(source.path, config.model_type)
    # The backbone of a language model has no head by design, nor has a classifier that is made of one.
    dropped = () if is_new is None else (_VOCABULARY_HEAD,)
    if kind is not AutoModel and (line := report.describe_unused(source.path, but=dropped)) is not None:
        say_once(line)
    return empty


def open_weights(source: ModelSource, config: PretrainedConfig) -> Checkpoint:
    """Open the weight files of a model; those of a PEFT adapter are its base's."""
    if (adapter := find_peft_folder(source.path, source.revision)) is not None:
        read_stored_weights(adapter.folder, ADAPTER)  # raises for damaged files
        return open_weights(base_of(adapter, source), config)
    return open_checkpoint(
        source.path, folder=source.folder_with_weights, quantization=quantization_of(config, source.path)
    )


def check_layers(config: PretrainedConfig, path: str, stored: int) -> None:
    """Refuse a number of layers that could not be built in any time, before it is tried."""
    layers = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    if isinstance(layers, int) and not 0 <= layers <= stored:
        raise ModelError(
            f"`{path}`: `num_hidden_layers` in config.json is {layers:,}, and {stored:,} weights are stored",
            hint=CONFIG_HINT,
        )


def empty_model(kind: type, source: ModelSource, config: PretrainedConfig) -> PreTrainedModel:
    """Build a model on the meta device: its parts, names and shapes without weights."""
    quiet_libraries()
    config = copy.deepcopy(config)  # the caller's says how the weights are stored
    drop_quantization(config)
    what = f"`{source.path}`: cannot build a {config.model_type} model from its config.json"
    with reading(what, source.folder, ("config.json",), hint=CONFIG_HINT), torch.device("meta"):
        if issubclass(kind, PreTrainedModel):
            return kind(config)
        return kind.from_config(config, trust_remote_code=source.trust_remote_code)


def _read_weights(
    kind: Any,
    source: ModelSource,
    config: PretrainedConfig,
    checkpoint: Checkpoint,
    arguments: dict[str, Any],
    is_new: IsNew | None,
) -> PreTrainedModel:
    """Call `from_pretrained`, and check by its own report that it loaded every weight."""
    if kind.can_generate():
        arguments = arguments | {"generation_config": read_generation_config(source, config)}
    if checkpoint.is_plain:
        path = source.folder
        arguments = arguments | {"use_safetensors": True, "trust_remote_code": source.trust_remote_code}
    else:
        path, arguments = None, arguments | {"state_dict": checkpoint.lazy()}
    try:
        with reading(f"cannot load weights from `{source.path}`", source.folder, ("config.json",), hint=CONFIG_HINT):
            model, loaded = kind.from_pretrained(path, output_loading_info=True, config=config, **arguments)
    except ModelError as error:
        if "automatic conversion" not in str(error.__cause__):
            raise
        raise ModelError(
            f"`{source.path}`: stored weights that a {config.model_type} model fuses or splits have other shapes than "
            "its config.json says",
            hint="give the config.json that belongs to the weights",
        ) from error
    report = sort_out(model, loaded["missing_keys"], loaded["unexpected_keys"])
    report.allowing(is_new(model) if is_new is not None else ()).check(source.path, config.model_type)
    _untie(model, source.path)
    return model


def read_generation_config(source: ModelSource, config: PretrainedConfig) -> GenerationConfig:
    """Return the model's own generation config; that of its configuration if it has none.

    Raises:
        ModelError: generation_config.json has values that transformers refuses.
    """
    name = "generation_config.json"
    if not (source.folder / name).is_file():
        return GenerationConfig.from_model_config(config)
    hint = "correct it, or remove the file: stages sample as the recipe says"
    with reading(f"cannot read {name} of `{source.path}`", source.folder, (name,), hint=hint):
        found = GenerationConfig.from_pretrained(source.folder)
        for field in ("eos_token_id", "pad_token_id", "bos_token_id", "decoder_start_token_id"):
            given = getattr(found, field, None)
            ids = given if isinstance(given, list) and field == "eos_token_id" else [given]
            if not all(one is None or (isinstance(one, int) and not isinstance(one, bool)) for one in ids):
                raise ModelError(f"{source.folder / name}: `{field}` cannot be {given!r}", hint=hint)
        return found


def _untie(model: PreTrainedModel, path: str) -> None:
    """Let the configuration say that embeddings are not tied where the checkpoint holds two matrices that differ.

    Transformers loads both then. Without this, the configuration that is written would have other programs tie them.
    """
    output: Any = model.get_output_embeddings()
    embeddings: Any = model.get_input_embeddings()
    parts = [part for part in (model.config, model.config.get_text_config(decoder=True)) if part.tie_word_embeddings]
    if output is None or not parts or output.weight is embeddings.weight:
        return
    for part in parts:
        part.tie_word_embeddings = False
    say_once(
        f"{path}: config.json ties input and output embeddings, but two matrices that differ are stored; both are used "
        "as they are"
    )


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


def base_of(adapter: PeftFolder, source: ModelSource) -> ModelSource:
    """Return the base of an adapter as it is loaded for merging."""
    return replace(source.at(adapter.base).in_full(), revision=adapter.base_revision)
