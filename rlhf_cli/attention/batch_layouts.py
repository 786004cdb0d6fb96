"""The ways in which sequences reach a model, each giving back the hidden states of every sequence.

As they are, padded on either side, packed, as a prefix tree, and a token at a time through a cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModelForMaskedLM, DynamicCache, EncoderDecoderCache, PreTrainedModel, StaticCache

from rlhf_cli.attention.layout import Layout

Kind = Literal["decoder", "encoder", "encoder-decoder"]


@dataclass(frozen=True)
class Sequences:
    """Token ids to try a model on. All but the last share a beginning.

    Attributes:
        ids: of each sequence.
        shared: tokens that all sequences begin with.
        sources: what the encoder of an encoder-decoder reads beside each.
    """

    ids: tuple[Tensor, ...]
    shared: int
    sources: tuple[Tensor, ...]

    @staticmethod
    def random(vocabulary: int, *, shared: int = 5, own: Sequence[int] = (6, 1, 3), seed: int = 0) -> Sequences:
        """Random ids from 3 up: the lower ones are often special.

        Args:
            vocabulary: token ids there are.
            shared: tokens of the common beginning.
            own: further tokens of each sequence.
            seed: of the draw.
        """
        generator = torch.Generator().manual_seed(seed)

        def draw(count: int) -> Tensor:
            return torch.randint(min(3, vocabulary - 1), vocabulary, (count,), generator=generator)

        prompt = draw(shared)
        ids = tuple(torch.cat([prompt, draw(count)]) for count in own)
        return Sequences(ids, shared, tuple(draw(shared + 2 * number) for number in range(len(own))))

    @property
    def lengths(self) -> list[int]:
        """Tokens of each."""
        return [len(ids) for ids in self.ids]


def kind_of(model: PreTrainedModel) -> Kind:
    """What the model reads."""
    if model.config.is_encoder_decoder:
        return "encoder-decoder"
    reads_both_ways = type(model.config) in AutoModelForMaskedLM._model_mapping
    return "encoder" if reads_both_ways and not getattr(model.config, "is_decoder", False) else "decoder"


def _hidden(model: PreTrainedModel, **inputs: Any) -> Tensor:
    """What the backbone makes of its inputs: (B, L, d)."""
    device = model.device
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    output = model.base_model(**moved)
    # T5 with its vocabulary head has no backbone inside: there the logits are what is compared.
    return output.logits if getattr(output, "last_hidden_state", None) is None else output.last_hidden_state


def alone(model: PreTrainedModel, sequences: Sequences, number: int) -> Tensor:
    """Hidden states of one sequence read alone: (tokens, d)."""
    ids = sequences.ids[number].unsqueeze(0)
    if model.config.is_encoder_decoder:
        source = sequences.sources[number].unsqueeze(0)
        return _hidden(model, input_ids=source, decoder_input_ids=ids, use_cache=False)[0]
    cache = {} if kind_of(model) == "encoder" else {"use_cache": False}
    return _hidden(model, input_ids=ids, **cache)[0]


def _padded(rows: Sequence[Tensor], *, left: bool = False) -> tuple[Tensor, Tensor]:
    """Ids with 0 as padding, and the mask: (B, L) each."""
    width = max(len(row) for row in rows)
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[number, place], mask[number, place] = row, 1
    return ids, mask


def _real(hidden: Tensor, mask: Tensor) -> list[Tensor]:
    return [rows[is_real.bool().to(rows.device)] for rows, is_real in zip(hidden, mask, strict=True)]


def _full(model: PreTrainedModel, sequences: Sequences) -> list[Tensor]:
    """A batch without padding: each sequence twice."""
    found = []
    for number in range(len(sequences.ids)):
        twice = Sequences(
            tuple(sequences.ids[number : number + 1] * 2), sequences.shared, sequences.sources[number : number + 1] * 2
        )
        found.append(_right(model, twice)[1])
    return found


def _left(model: PreTrainedModel, sequences: Sequences) -> list[Tensor]:
    ids, mask = _padded(sequences.ids, left=True)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return _real(_hidden(model, input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False), mask)


def _right(model: PreTrainedModel, sequences: Sequences) -> list[Tensor]:
    ids, mask = _padded(sequences.ids)
    if model.config.is_encoder_decoder:
        sources, source_mask = _padded(sequences.sources)
        inputs = {"input_ids": sources, "attention_mask": source_mask, "use_cache": False}
        return _real(_hidden(model, decoder_input_ids=ids, decoder_attention_mask=mask, **inputs), mask)
    cache = {} if kind_of(model) == "encoder" else {"use_cache": False}
    return _real(_hidden(model, input_ids=ids, attention_mask=mask, **cache), mask)


def _packed(model: PreTrainedModel, sequences: Sequences) -> list[Tensor]:
    layout = Layout.packed([sequences.lengths])
    hidden = _hidden(
        model,
        input_ids=torch.cat(sequences.ids).unsqueeze(0),
        position_ids=layout.positions(),
        attention_layout=layout,
        use_cache=False,
    )
    return list(hidden[0].split(sequences.lengths))


def _packed_as_trl_does(model: PreTrainedModel, sequences: Sequences) -> list[Tensor]:
    layout = Layout.packed([sequences.lengths])
    bounds = torch.tensor([0, *sequences.lengths]).cumsum(0).int()
    hidden = _hidden(
        model,
        input_ids=torch.cat(sequences.ids).unsqueeze(0),
        position_ids=layout.positions(),
        cu_seq_lens_q=bounds,
        cu_seq_lens_k=bounds,
        max_length_q=max(sequences.lengths),
        max_length_k=max(sequences.lengths),
        use_cache=False,
    )
    return list(hidden[0].split(sequences.lengths))


def _tree(model: PreTrainedModel, sequences: Sequences) -> list[Tensor]:
    """The shared beginning once, and behind it what each sequence adds."""
    shared, own = sequences.shared, [length - sequences.shared for length in sequences.lengths]
    layout = Layout.tree([(shared, own)])
    ids = torch.cat([sequences.ids[0][:shared], *(row[shared:] for row in sequences.ids)])
    hidden = _hidden(
        model,
        input_ids=ids.unsqueeze(0),
        position_ids=layout.positions(),
        attention_layout=layout,
        use_cache=False,
    )[0]
    return [torch.cat([hidden[:shared], rows]) for rows in hidden[shared:].split(own)]


def _cached(model: PreTrainedModel, sequences: Sequences) -> list[Tensor]:
    return _by_token(model, sequences, lambda room: DynamicCache(config=model.config.get_text_config(decoder=True)))


def _static(model: PreTrainedModel, sequences: Sequences) -> list[Tensor]:
    config = model.config.get_text_config(decoder=True)
    return _by_token(model, sequences, lambda room: StaticCache(config=config, max_cache_len=room))


def _by_token(model: PreTrainedModel, sequences: Sequences, cache: Callable[[int], Any]) -> list[Tensor]:
    """The shared beginnings at once, padded on the left, then a token at a time. Slots stay empty to the end."""
    ids, mask = _padded(sequences.ids, left=True)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    past, rows, begin = cache(ids.shape[1] + 3), [], ids.shape[1] - 2
    for start, end in ((0, begin), (begin, begin + 1), (begin + 1, begin + 2)):
        rows.append(
            _hidden(
                model,
                input_ids=ids[:, start:end],
                attention_mask=mask[:, :end],
                position_ids=positions[:, start:end],
                past_key_values=past,
                use_cache=True,
            )
        )
    return _real(torch.cat(rows, dim=1), mask)


def _cached_decoder(model: PreTrainedModel, sequences: Sequences) -> list[Tensor]:
    """The decoder of an encoder-decoder a token at a time, over padded encoder states."""
    sources, source_mask = _padded(sequences.sources)
    ids, mask = _padded(sequences.ids)
    past = EncoderDecoderCache(DynamicCache(), DynamicCache())
    device = model.device
    encoded = model.get_encoder()(sources.to(device), attention_mask=source_mask.to(device))
    rows = [
        _hidden(
            model,
            encoder_outputs=encoded,
            attention_mask=source_mask,
            decoder_input_ids=ids[:, at : at + 1],
            past_key_values=past,
            use_cache=True,
        )
        for at in range(ids.shape[1])
    ]
    return _real(torch.cat(rows, dim=1), mask)


_Run = Callable[[PreTrainedModel, Sequences], list[Tensor]]
WAYS: dict[Kind, dict[str, tuple[_Run, bool]]] = {
    "decoder": {
        "full": (_full, True),
        "padded left": (_left, True),
        "padded right": (_right, True),
        "packed": (_packed, True),
        "packed by TRL": (_packed_as_trl_does, True),
        "tree": (_tree, True),
        "cached": (_cached, False),
        "static cache": (_static, False),
    },
    "encoder": {"full": (_full, True), "padded right": (_right, True)},
    "encoder-decoder": {"full": (_full, True), "padded right": (_right, True), "cached": (_cached_decoder, False)},
}
"""Of every kind of model the ways that suit it: how each is run, and whether it has a backward pass."""
