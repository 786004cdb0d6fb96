"""Prompts and answers as tensors for the training forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SequenceBatch:
    """B prompts with their answers, padded on the right.

    A causal model reads `[prompt; answer]`: real tokens never attend to padding behind them, so no mask is needed and
    positions are 0, 1, 2, ... An encoder-decoder reads the prompt with its encoder and `[start; answer[:-1]]` with its
    decoder.

    Attributes:
        input_ids: (B, L) what the model, or its decoder, reads.
        response_ids: (B, T) the answers' tokens.
        is_response: (B, T) bool, True on real answer tokens, the end token included.
        predicting: (B, T) index into L of the position that predicts each answer token.
        encoder_ids: (B, S) prompts, for encoder-decoders.
        encoder_mask: (B, S) 1 on real prompt tokens.
    """

    input_ids: Tensor
    response_ids: Tensor
    is_response: Tensor
    predicting: Tensor
    encoder_ids: Tensor | None = None
    encoder_mask: Tensor | None = None

    @staticmethod
    def of(
        prompts: Sequence[list[int]],
        responses: Sequence[list[int]],
        device: torch.device,
        *,
        decoder_start: int | None = None,
    ) -> SequenceBatch:
        """Lay out answers behind their prompts.

        Args:
            prompts: B lists of ids, none empty.
            responses: B lists of ids, none empty, end token included where there is one.
            device: where the tensors go.
            decoder_start: the token an encoder-decoder's decoder starts with; None for a causal model.
        """
        response_ids, lengths = _padded(responses)
        is_response = torch.arange(response_ids.shape[1]) < lengths.unsqueeze(1)
        steps = torch.arange(response_ids.shape[1])
        if decoder_start is not None:
            encoder_ids, prompt_lengths = _padded(prompts)
            mask = (torch.arange(encoder_ids.shape[1]) < prompt_lengths.unsqueeze(1)).long()
            shifted = [[decoder_start, *response[:-1]] for response in responses]
            predicting = steps.expand_as(response_ids).contiguous()
            tensors = (_padded(shifted)[0], response_ids, is_response, predicting, encoder_ids, mask)
        else:
            input_ids, _ = _padded([prompt + answer for prompt, answer in zip(prompts, responses, strict=True)])
            starts = torch.tensor([len(prompt) - 1 for prompt in prompts])
            # On padding the index is clamped into range; what is read there is masked later.
            predicting = (starts.unsqueeze(1) + steps).clamp(max=input_ids.shape[1] - 1)
            tensors = (input_ids, response_ids, is_response, predicting)
        return SequenceBatch(*(tensor.to(device) for tensor in tensors))


def _padded(rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    """Rows padded on the right with 0, and their lengths: (B, L) and (B,)."""
    lengths = torch.tensor([len(row) for row in rows])
    padded = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
    for row, ids in enumerate(rows):
        padded[row, : len(ids)] = torch.tensor(ids)
    return padded, lengths
