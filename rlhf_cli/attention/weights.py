"""Collect the attention weights of a model over a text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from rlhf_cli.attention import hugging_face, parity
from rlhf_cli.attention.backends.reference import attention_weights
from rlhf_cli.errors import UsageError

# More tokens are not distinguishable in a map; more weights make the page slow to open on a phone.
MAX_TOKENS = 256
MAX_WEIGHTS = 24_000_000
_CROSS = re.compile(r"cross|encdec|encoder_att", re.IGNORECASE)
_ENCODER = re.compile(r"(^|\.)encoder\.")


@dataclass(frozen=True)
class LayerWeights:
    """Attention weights of one layer.

    Attributes:
        part: `encoder`, `decoder` or `cross` in encoder-decoder models, else empty.
        number: index of the layer within its part, from 0.
        weights: (H, Lq, Lk) float32; rows sum to 1, minus the share of a sink.
    """

    part: str
    number: int
    weights: Tensor

    @property
    def label(self) -> str:
        """Name of the layer in titles."""
        return f"{self.part} {self.number}".strip() if self.part else f"layer {self.number}"


@dataclass(frozen=True)
class AttentionWeights:
    """Attention weights of a model over a text.

    Attributes:
        model: name of the model.
        layers: in the order of computation.
        tokens: texts of the tokens (of the encoder, in encoder-decoder models).
        decoder_tokens: texts of the decoder's tokens in encoder-decoder models, else empty.
    """

    model: str
    layers: tuple[LayerWeights, ...]
    tokens: tuple[str, ...]
    decoder_tokens: tuple[str, ...] = ()

    def tokens_of(self, layer: LayerWeights) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the tokens of the queries and of the keys of a layer."""
        queries = self.tokens if layer.part in ("", "encoder") else self.decoder_tokens
        keys = self.decoder_tokens if layer.part == "decoder" else self.tokens
        return queries, keys


def collect_weights(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    name: str,
    decoder_text: str | None = None,
    layer: int | None = None,
    head: int | None = None,
) -> AttentionWeights:
    """Run a model on a text and collect the weights of every attention call.

    Args:
        model: supports transformers' attention interface; in evaluation mode.
        tokenizer: the tokenizer of the model.
        text: input of the model, or of its encoder.
        name: name of the model for messages and titles.
        decoder_text: input of the decoder of an encoder-decoder model; default: `text`.
        layer: collect only this layer of each part, from 0; default: all.
        head: collect only this head of each layer, from 0; default: all.

    Raises:
        ModelError: the model does not support the interface.
        UsageError: the text is empty or too long, or the layer or head does not exist.
    """
    implementation = hugging_face.implementation("reference")
    parity.require(model, name, implementation)
    ids = _tokens(tokenizer, text)
    inputs = {"input_ids": torch.tensor([ids], device=model.device)}
    decoder_ids: list[int] = []
    if model.config.is_encoder_decoder:
        decoder_ids = [_start_token(model.config), *_tokens(tokenizer, text if decoder_text is None else decoder_text)]
        inputs["decoder_input_ids"] = torch.tensor([decoder_ids], device=model.device)
    elif decoder_text is not None:
        raise UsageError(
            f"`{name}` is not an encoder-decoder model, so it takes no decoder text", hint="omit `--decoder-text`"
        )
    _check_size(model, len(ids), len(decoder_ids), one_head=layer is not None and head is not None)
    layers = _layers(model, inputs, implementation)
    return AttentionWeights(
        name,
        _selected(layers, layer, head),
        tuple(_texts(tokenizer, ids)),
        tuple(_texts(tokenizer, decoder_ids)),
    )


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids = tokenizer(text)["input_ids"]
    if not text.strip() or not ids:
        raise UsageError("the text is empty", hint='pass one with `--text "..."`')
    if len(ids) > MAX_TOKENS:
        raise UsageError(f"the text has {len(ids):,} tokens; the maximum is {MAX_TOKENS}", hint="use a shorter text")
    return list(ids)  # pyright: ignore[reportArgumentType]


def _start_token(config: PretrainedConfig) -> int:
    """The first input token of a decoder; T5 uses its padding token."""
    candidates = (getattr(config, name, None) for name in ("decoder_start_token_id", "pad_token_id"))
    return next((token for token in candidates if token is not None), 0)


def _texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """Decode each token; a token that is only part of a character is shown as in the vocabulary."""
    names = tokenizer.convert_ids_to_tokens(list(ids))
    texts = [str(tokenizer.decode([token])) for token in ids]
    return [str(name) if "\ufffd" in text or not text else text for text, name in zip(texts, names, strict=True)]


def _check_size(model: PreTrainedModel, tokens: int, decoder_tokens: int, *, one_head: bool) -> None:
    config = model.config.get_text_config()
    heads = 1 if one_head else config.num_hidden_layers * config.num_attention_heads
    length = max(tokens, decoder_tokens)
    if (total := heads * length**2 * (3 if decoder_tokens else 1)) > MAX_WEIGHTS:
        raise UsageError(
            f"{heads} heads over {length} tokens have {total / 1e6:.0f} million weights; the maximum is "
            f"{MAX_WEIGHTS / 1e6:.0f} million",
            hint="use a shorter text, or select one head with `--layer` and `--head`",
        )


def _layers(model: PreTrainedModel, inputs: dict[str, Tensor], implementation: str) -> list[LayerWeights]:
    names = {id(module): name for name, module in model.named_modules()}
    layers: list[LayerWeights] = []
    counts: dict[str, int] = {}

    def record(module: nn.Module, arguments: dict[str, Any]) -> None:
        arguments = {key: value for key, value in arguments.items() if key != "value"}
        if arguments["scale"] is None:
            arguments["scale"] = arguments["query"].shape[-1] ** -0.5
        weights, _ = attention_weights(
            arguments.pop("query"), arguments.pop("key"), arguments.pop("layout"), **arguments
        )
        part = _part(names.get(id(module), "")) if model.config.is_encoder_decoder else ""
        layers.append(LayerWeights(part, counts.get(part, 0), weights[0].float().cpu()))
        counts[part] = counts.get(part, 0) + 1

    with torch.no_grad(), parity.use_attention(model, implementation), hugging_face.attention_hook(record):
        model(**inputs, use_cache=False) if "decoder_input_ids" in inputs else model(**inputs)
    return layers


def _part(name: str) -> str:
    if _CROSS.search(name.rpartition(".")[2]):
        return "cross"
    return "encoder" if _ENCODER.search(name) else "decoder"


def _selected(layers: list[LayerWeights], number: int | None, head: int | None) -> tuple[LayerWeights, ...]:
    chosen = [layer for layer in layers if number is None or layer.number == number]
    if not chosen:
        raise UsageError(f"layer {number} does not exist; use 0 to {max(each.number for each in layers)}")
    if head is not None:
        if not 0 <= head < (heads := min(len(layer.weights) for layer in chosen)):
            raise UsageError(f"head {head} does not exist; use 0 to {heads - 1}")
        chosen = [LayerWeights(layer.part, layer.number, layer.weights[head : head + 1]) for layer in chosen]
    return tuple(chosen)
