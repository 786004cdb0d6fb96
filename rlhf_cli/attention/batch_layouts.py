"""Batch layouts that a model must handle identically: unpadded, padded, packed, prefix tree and cached decoding.

Each function runs a model on the same sequences in one layout and returns the hidden states of every sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModelForMaskedLM, DynamicCache, EncoderDecoderCache, PreTrainedModel, StaticCache

from rlhf_cli.attention.layout import Layout
from rlhf_cli.cache_names import cache_argument

Architecture = Literal["decoder", "encoder", "encoder-decoder"]


@dataclass(frozen=True)
class ProbeSequences:
    """Token ids for testing a model; all sequences start with the same prefix.

    Attributes:
        ids: (length,) token ids per sequence.
        prefix_length: tokens of the shared prefix.
        sources: (length,) encoder input per sequence; used by encoder-decoder models only.
    """

    ids: tuple[Tensor, ...]
    prefix_length: int
    sources: tuple[Tensor, ...]

    @staticmethod
    def random(
        vocab_size: int, *, prefix_length: int = 5, suffix_lengths: Sequence[int] = (6, 1, 3), seed: int = 0
    ) -> ProbeSequences:
        """Draw random token ids. Ids below 3 are not used: they are often special tokens.

        Args:
            vocab_size: number of token ids.
            prefix_length: tokens of the shared prefix.
            suffix_lengths: tokens of each sequence after the prefix.
            seed: random seed.
        """
        generator = torch.Generator().manual_seed(seed)

        def draw(count: int) -> Tensor:
            return torch.randint(min(3, vocab_size - 1), vocab_size, (count,), generator=generator)

        prefix = draw(prefix_length)
        ids = tuple(torch.cat([prefix, draw(count)]) for count in suffix_lengths)
        sources = tuple(draw(prefix_length + 2 * number) for number in range(len(suffix_lengths)))
        return ProbeSequences(ids, prefix_length, sources)

    @property
    def lengths(self) -> list[int]:
        """Tokens per sequence."""
        return [len(ids) for ids in self.ids]


def architecture_of(model: PreTrainedModel) -> Architecture:
    """Return the architecture of a model."""
    if model.config.is_encoder_decoder:
        return "encoder-decoder"
    is_bidirectional = type(model.config) in AutoModelForMaskedLM._model_mapping
    return "encoder" if is_bidirectional and not getattr(model.config, "is_decoder", False) else "decoder"


def _hidden(model: PreTrainedModel, **inputs: Any) -> Tensor:
    """Run the backbone: hidden states (B, L, d)."""
    device = model.device
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    output = model.base_model(**moved)
    # T5 with a language-model head has no separate backbone, so its logits are compared instead.
    return output.logits if getattr(output, "last_hidden_state", None) is None else output.last_hidden_state


def unbatched(model: PreTrainedModel, sequences: ProbeSequences, number: int) -> Tensor:
    """Run one sequence as a batch of its own: hidden states (tokens, d)."""
    ids = sequences.ids[number].unsqueeze(0)
    if model.config.is_encoder_decoder:
        source = sequences.sources[number].unsqueeze(0)
        return _hidden(model, input_ids=source, decoder_input_ids=ids, use_cache=False)[0]
    cache = {} if architecture_of(model) == "encoder" else {"use_cache": False}
    return _hidden(model, input_ids=ids, **cache)[0]


def _padded(rows: Sequence[Tensor], *, left: bool = False) -> tuple[Tensor, Tensor]:
    """Pad with id 0. Returns ids and mask, (B, L) each."""
    width = max(len(row) for row in rows)
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        columns = slice(width - len(row), width) if left else slice(0, len(row))
        ids[number, columns], mask[number, columns] = row, 1
    return ids, mask


def _without_padding(hidden: Tensor, mask: Tensor) -> list[Tensor]:
    """Hidden states (tokens, d) of each sequence of a padded batch."""
    return [rows[is_real.bool().to(rows.device)] for rows, is_real in zip(hidden, mask, strict=True)]


def _full(model: PreTrainedModel, sequences: ProbeSequences) -> list[Tensor]:
    """Batches without padding: each sequence twice."""
    found = []
    for ids, source in zip(sequences.ids, sequences.sources, strict=True):
        twice = ProbeSequences((ids, ids), sequences.prefix_length, (source, source))
        found.append(_right(model, twice)[1])
    return found


def _left(model: PreTrainedModel, sequences: ProbeSequences) -> list[Tensor]:
    ids, mask = _padded(sequences.ids, left=True)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    hidden = _hidden(model, input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
    return _without_padding(hidden, mask)


def _right(model: PreTrainedModel, sequences: ProbeSequences) -> list[Tensor]:
    ids, mask = _padded(sequences.ids)
    if model.config.is_encoder_decoder:
        sources, source_mask = _padded(sequences.sources)
        inputs = {"input_ids": sources, "attention_mask": source_mask, "use_cache": False}
        return _without_padding(_hidden(model, decoder_input_ids=ids, decoder_attention_mask=mask, **inputs), mask)
    cache = {} if architecture_of(model) == "encoder" else {"use_cache": False}
    return _without_padding(_hidden(model, input_ids=ids, attention_mask=mask, **cache), mask)


def _packed(model: PreTrainedModel, sequences: ProbeSequences) -> list[Tensor]:
    layout = Layout.packed([sequences.lengths])
    hidden = _hidden(
        model,
        input_ids=torch.cat(sequences.ids).unsqueeze(0),
        position_ids=layout.positions(),
        attention_layout=layout,
        use_cache=False,
    )
    return list(hidden[0].split(sequences.lengths))


def _packed_by_boundaries(model: PreTrainedModel, sequences: ProbeSequences) -> list[Tensor]:
    """Packed as by TRL: `cu_seq_lens` instead of a layout."""
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


def _tree(model: PreTrainedModel, sequences: ProbeSequences) -> list[Tensor]:
    """The shared prefix once, followed by the suffix of each sequence."""
    prefix = sequences.prefix_length
    suffix_lengths = [length - prefix for length in sequences.lengths]
    layout = Layout.tree([(prefix, suffix_lengths)])
    ids = torch.cat([sequences.ids[0][:prefix], *(row[prefix:] for row in sequences.ids)])
    hidden = _hidden(
        model,
        input_ids=ids.unsqueeze(0),
        position_ids=layout.positions(),
        attention_layout=layout,
        use_cache=False,
    )[0]
    return [torch.cat([hidden[:prefix], rows]) for rows in hidden[prefix:].split(suffix_lengths)]


def _cached(model: PreTrainedModel, sequences: ProbeSequences) -> list[Tensor]:
    config = model.config.get_text_config(decoder=True)
    return _by_token(model, sequences, lambda max_length: DynamicCache(config=config))


def _static(model: PreTrainedModel, sequences: ProbeSequences) -> list[Tensor]:
    config = model.config.get_text_config(decoder=True)
    return _by_token(model, sequences, lambda max_length: StaticCache(config=config, max_cache_len=max_length))


def _by_token(model: PreTrainedModel, sequences: ProbeSequences, new_cache: Callable[[int], Any]) -> list[Tensor]:
    """Left-padded: all but the last two tokens in one pass, then one token per pass.

    A static cache has three slots more than tokens, so some stay empty.
    """
    ids, mask = _padded(sequences.ids, left=True)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    past, rows, begin = new_cache(ids.shape[1] + 3), [], ids.shape[1] - 2
    for start, end in ((0, begin), (begin, begin + 1), (begin + 1, begin + 2)):
        rows.append(
            _hidden(
                model,
                input_ids=ids[:, start:end],
                attention_mask=mask[:, :end],
                position_ids=positions[:, start:end],
                use_cache=True,
                **cache_argument(past),
            )
        )
    return _without_padding(torch.cat(rows, dim=1), mask)


def _cached_decoder(model: PreTrainedModel, sequences: ProbeSequences) -> list[Tensor]:
    """The decoder of an encoder-decoder one token per pass, over padded encoder states."""
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
            decoder_input_ids=ids[:, column : column + 1],
            use_cache=True,
            **cache_argument(past),
        )
        for column in range(ids.shape[1])
    ]
    return _without_padding(torch.cat(rows, dim=1), mask)


_Runner = Callable[[PreTrainedModel, ProbeSequences], list[Tensor]]
BATCH_LAYOUTS: dict[Architecture, dict[str, tuple[_Runner, bool]]] = {
    "decoder": {
        "full": (_full, True),
        "padded left": (_left, True),
        "padded right": (_right, True),
        "packed": (_packed, True),
        "packed by TRL": (_packed_by_boundaries, True),
        "tree": (_tree, True),
        "cached": (_cached, False),
        "static cache": (_static, False),
    },
    "encoder": {"full": (_full, True), "padded right": (_right, True)},
    "encoder-decoder": {"full": (_full, True), "padded right": (_right, True), "cached": (_cached_decoder, False)},
}
"""Batch layouts per architecture: the function that runs one, and whether gradients are compared too."""
