"""What heads look at: the attention weights of a model over a text, as a picture and as a page.

The page is one file that fetches nothing and runs nothing but its own script. Weights travel in it as bytes of their
square root, which keeps small weights apart: the error is below 0.004 at weight 1 and below 0.0004 at 0.01.
"""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from rlhf_cli.attention import hugging_face, parity
from rlhf_cli.attention.backends.reference import attention_weights
from rlhf_cli.errors import UsageError

# A map of more tokens shows nothing that an eye could tell apart; a larger page opens slowly on a phone.
MOST_TOKENS = 256
MOST_WEIGHTS = 24_000_000
_CROSS = re.compile(r"cross|encdec|encoder_att", re.IGNORECASE)
_ENCODER = re.compile(r"(^|\.)encoder\.")


@dataclass(frozen=True)
class Layer:
    """The attention of one layer.

    Attributes:
        part: `encoder`, `decoder` or `cross` in models that have these, else empty.
        number: counted from 0 inside its part.
        weights: (H, Lq, Lk) float32; rows sum to 1, less what a sink took.
    """

    part: str
    number: int
    weights: Tensor

    @property
    def label(self) -> str:
        """As people call it."""
        return f"{self.part} {self.number}".strip() if self.part else f"layer {self.number}"


@dataclass(frozen=True)
class Seen:
    """Attention of a model over a text.

    Attributes:
        model: its name.
        layers: in the order in which the model computes them.
        tokens: texts of the tokens; of the encoder's where there are two kinds.
        answer_tokens: of those the decoder reads, in a model that has both; else empty.
    """

    model: str
    layers: tuple[Layer, ...]
    tokens: tuple[str, ...]
    answer_tokens: tuple[str, ...] = ()

    def tokens_of(self, layer: Layer) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Tokens of the queries and of the keys of a layer."""
        queries = self.tokens if layer.part in ("", "encoder") else self.answer_tokens
        keys = self.answer_tokens if layer.part == "decoder" else self.tokens
        return queries, keys


def look(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    name: str,
    answer: str | None = None,
    layer: int | None = None,
    head: int | None = None,
) -> Seen:
    """Read a text and keep the weights.

    Args:
        model: any that honors transformers' attention interface, in evaluation mode.
        tokenizer: its own.
        text: what it reads.
        name: of the model, for messages and titles.
        answer: what the decoder of an encoder-decoder model reads; None is the text once more.
        layer: only this one of each part, counted from 0; None for all.
        head: only this one of each layer; None for all.

    Raises:
        ModelError: the model does not honor the interface.
        UsageError: the text is empty or too long, or there is no such layer or head.
    """
    implementation = hugging_face.implementation("reference")
    parity.require(model, name, implementation)
    ids = _tokens(tokenizer, text)
    inputs = {"input_ids": torch.tensor([ids], device=model.device)}
    answer_ids: list[int] = []
    if model.config.is_encoder_decoder:
        answer_ids = [_start_token(model.config), *_tokens(tokenizer, text if answer is None else answer)]
        inputs["decoder_input_ids"] = torch.tensor([answer_ids], device=model.device)
    elif answer is not None:
        raise UsageError(f"`{name}` has no decoder apart from its encoder, so it reads no second text")
    _check_size(model, len(ids), len(answer_ids), is_one=layer is not None and head is not None)
    layers = _layers(model, inputs, implementation)
    return Seen(
        name,
        _selected(layers, layer, head),
        tuple(_texts(tokenizer, ids)),
        tuple(_texts(tokenizer, answer_ids)),
    )


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids = tokenizer(text)["input_ids"]
    if not text.strip() or not ids:
        raise UsageError("there is no text to look at", hint='give one with `--text "..."`')
    if len(ids) > MOST_TOKENS:
        raise UsageError(
            f"the text has {len(ids):,} tokens, and a map shows at most {MOST_TOKENS}", hint="give a shorter text"
        )
    return list(ids)  # pyright: ignore[reportArgumentType]


def _start_token(config: PretrainedConfig) -> int:
    """What a decoder reads first: T5 begins with its padding."""
    candidates = (getattr(config, name, None) for name in ("decoder_start_token_id", "pad_token_id"))
    return next((token for token in candidates if token is not None), 0)


def _texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """Each token by itself; a part of a character, which is no text, as the vocabulary has it."""
    raw = tokenizer.convert_ids_to_tokens(list(ids))
    texts = [str(tokenizer.decode([token])) for token in ids]
    return [str(name) if "\ufffd" in text or not text else text for text, name in zip(texts, raw, strict=True)]


def _check_size(model: PreTrainedModel, tokens: int, answer: int, *, is_one: bool) -> None:
    config = model.config.get_text_config()
    count = 1 if is_one else config.num_hidden_layers * config.num_attention_heads
    if (total := count * max(tokens, answer) ** 2 * (3 if answer else 1)) > MOST_WEIGHTS:
        raise UsageError(
            f"{count} heads over {max(tokens, answer)} tokens have {total / 1e6:.0f} million weights, more than the "
            f"{MOST_WEIGHTS / 1e6:.0f} million that a page can hold",
            hint="give a shorter text, or choose one with --layer and --head",
        )


def _layers(model: PreTrainedModel, inputs: dict[str, Tensor], implementation: str) -> list[Layer]:
    names = {id(module): name for name, module in model.named_modules()}
    layers: list[Layer] = []
    counts: dict[str, int] = {}

    def watch(module: nn.Module, arguments: dict[str, Any]) -> None:
        arguments = {key: value for key, value in arguments.items() if key != "value"}
        if arguments["scale"] is None:
            arguments["scale"] = arguments["query"].shape[-1] ** -0.5
        weights, _ = attention_weights(
            arguments.pop("query"), arguments.pop("key"), arguments.pop("layout"), **arguments
        )
        part = _part(names.get(id(module), "")) if model.config.is_encoder_decoder else ""
        layers.append(Layer(part, counts.get(part, 0), weights[0].float().cpu()))
        counts[part] = counts.get(part, 0) + 1

    with torch.no_grad(), parity.attention_set(model, implementation), hugging_face.watching(watch):
        model(**inputs, use_cache=False) if "decoder_input_ids" in inputs else model(**inputs)
    return layers


def _part(name: str) -> str:
    if _CROSS.search(name.rpartition(".")[2]):
        return "cross"
    return "encoder" if _ENCODER.search(name) else "decoder"


def _selected(layers: list[Layer], number: int | None, head: int | None) -> tuple[Layer, ...]:
    chosen = [layer for layer in layers if number is None or layer.number == number]
    if not chosen:
        raise UsageError(f"there is no layer {number}: they count from 0 to {max(each.number for each in layers)}")
    if head is not None:
        if not 0 <= head < (heads := min(len(layer.weights) for layer in chosen)):
            raise UsageError(f"there is no head {head}: they count from 0 to {heads - 1}")
        chosen = [Layer(layer.part, layer.number, layer.weights[head : head + 1]) for layer in chosen]
    return tuple(chosen)


def page(seen: Seen, *, head: int | None = None) -> str:
    """A page of HTML that is whole by itself; `head` is the number of the only head in it."""
    parts: dict[str, dict[str, Any]] = {}
    for layer in seen.layers:
        queries, keys = seen.tokens_of(layer)
        part = parts.setdefault(layer.part, {"name": layer.part, "queries": queries, "keys": keys, "layers": []})
        squeezed = (layer.weights.clamp(0, 1).sqrt() * 255).round().to(torch.uint8)
        part["layers"].append(
            {
                "number": layer.number,
                "heads": list(range(len(layer.weights))) if head is None else [head],
                "weights": base64.b64encode(squeezed.numpy().tobytes()).decode(),
            }
        )
    data = json.dumps({"parts": list(parts.values())}).replace("<", "\\u003c")
    template = files("rlhf_cli.attention").joinpath("show.html").read_text(encoding="utf-8")
    # One pass: what is filled in may itself hold the marks.
    fills = {"@NAME@": html.escape(seen.model), "@DATA@": data}
    return re.sub("|".join(fills), lambda mark: fills[mark.group()], template)


def picture(seen: Seen, path: Path, *, head: int | None = None) -> None:
    """One map with its tokens, or many small ones, a row for each layer, to a PNG file.

    Raises:
        UsageError: matplotlib is not installed.
    """
    from rlhf_cli.attention.plots import pyplot

    figures = pyplot()
    if len(seen.layers) == 1 and len(seen.layers[0].weights) == 1:
        figure = _one_map(figures, seen, seen.layers[0], head or 0)
    else:
        figure = _many_maps(figures, seen, head)
    figure.savefig(path, dpi=150)
    figures.close(figure)


def _one_map(figures: Any, seen: Seen, layer: Layer, head: int) -> Any:
    queries, keys = seen.tokens_of(layer)
    size = 0.24 if max(len(queries), len(keys)) <= 60 else 0.12
    width, height = (max(3.0, size * len(tokens)) for tokens in (keys, queries))
    figure, axis = figures.subplots(figsize=(width + 2.6, height + 1.8), layout="constrained")
    image = axis.imshow(
        layer.weights[0].numpy(), cmap="magma_r", norm=_scale(), aspect="equal", interpolation="nearest"
    )
    font = {"fontsize": 8 if size > 0.2 else 5, "parse_math": False}
    axis.set_xticks(range(len(keys)), [_label(token) for token in keys], rotation=90, **font)
    axis.set_yticks(range(len(queries)), [_label(token) for token in queries], **font)
    axis.set_xlabel("key: what is looked at")
    axis.set_ylabel("query: who looks")
    axis.set_title(f"{_tail(seen.model)}, {layer.label}, head {head}", fontsize=9, parse_math=False)
    _color_bar(figure, image, axis)
    return figure


def _many_maps(figures: Any, seen: Seen, head: int | None) -> Any:
    rows, columns = len(seen.layers), max(len(layer.weights) for layer in seen.layers)
    if rows == 1:  # the heads of one layer, as a block
        columns = min(columns, 4)
        rows = -(-len(seen.layers[0].weights) // columns)
    size = 2.6 if rows * columns <= 16 else 1.0
    figure, axes = figures.subplots(
        rows, columns, figsize=(size * columns + 1.6, size * rows + 0.9), squeeze=False, layout="constrained"
    )
    image: Any = None
    for axis in axes.flat:
        axis.set_axis_off()
    for row, layer in enumerate(seen.layers):
        for number, weights in enumerate(layer.weights):
            is_block = len(seen.layers) == 1
            axis = axes[divmod(number, columns)] if is_block else axes[row, number]
            axis.set_axis_on()
            axis.set(xticks=[], yticks=[])
            image = axis.imshow(weights.numpy(), cmap="magma_r", norm=_scale(), aspect="auto", interpolation="nearest")
            if is_block or row == 0:
                axis.set_title(f"head {number if head is None else head}", fontsize=8)
            if not is_block and number == 0:
                axis.set_ylabel(layer.label, fontsize=8, rotation=0, ha="right", va="center")
    _color_bar(figure, image, axes)
    label = f", {seen.layers[0].label}" if len(seen.layers) == 1 else ""
    title = f"{_tail(seen.model)}{label}: each row of a map is a query, each column a key"
    figure.suptitle(title, fontsize=9, parse_math=False)
    return figure


def _scale() -> Any:
    from matplotlib.colors import PowerNorm

    return PowerNorm(0.5, vmin=0, vmax=1)


def _color_bar(figure: Any, image: Any, axes: Any) -> None:
    bar = figure.colorbar(
        image, ax=axes, fraction=0.04, pad=0.02, aspect=30, shrink=0.8 if len(figure.axes) < 40 else 0.3
    )
    bar.set_ticks([0, 0.05, 0.25, 0.5, 1], labels=["0", "0.05", "0.25", "0.5", "1"])
    bar.ax.tick_params(labelsize=7)
    bar.set_label("weight", fontsize=8)


def _label(token: str) -> str:
    """A token as a label: its white space made visible, and cut."""
    shown = "".join({"\n": "⏎", "\t": "⇥"}.get(c, c) for c in token.strip(" ") or "␣" * len(token))
    shown = "".join(c if c.isprintable() else "·" for c in shown)
    return shown if len(shown) <= 14 else shown[:13] + "…"


def _tail(name: str) -> str:
    return name if len(name) <= 40 else "…" + name[-39:]


def write(seen: Seen, folder: Path, *, head: int | None = None) -> tuple[Path, Path]:
    """Both into a folder, which is made: the paths of `attention.png` and `attention.html`."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn, written = folder / "attention.png", folder / "attention.html"
    picture(seen, drawn, head=head)
    written.write_text(page(seen, head=head), encoding="utf-8")
    return drawn, written
