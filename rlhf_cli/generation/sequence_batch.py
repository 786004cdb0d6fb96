"""Prompts and answers as tensors for the training forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_cli.attention.groups import plan_groups
from rlhf_cli.attention.layout import Layout
from rlhf_cli.models.backbone import reads_groups


@dataclass(frozen=True, eq=False)
class SequenceBatch:
    """N prompts with their answers, in one of three arrangements.

    Grouped, for causal models whose attention is our own: all in one row of tokens without padding, answers that share
    a prompt behind one copy of it. Padded, for other causal models: `[prompt; answer]`, padded on the right. Apart, for
    encoder-decoders: the prompt is what the encoder reads, and `[start; answer[:-1]]` what the decoder reads.

    Attributes:
        input_ids: (B, L) what the model, or its decoder, reads; B is 1 where it is grouped, else N.
        response_ids: (N, T) the answers' tokens.
        is_response: (N, T) bool, True on real answer tokens, the end token included.
        predicting: (N, T) row of `input_ids`, counted over its B * L, that predicts each answer token; one and the same
            for the first tokens of answers that share their prompt.
        layout: who sees whom, where it is grouped.
        encoder_ids: (N, S) prompts, for encoder-decoders.
        encoder_mask: (N, S) 1 on real prompt tokens.
    """

    input_ids: Tensor
    response_ids: Tensor
    is_response: Tensor
    predicting: Tensor
    layout: Layout | None = None
    encoder_ids: Tensor | None = None
    encoder_mask: Tensor | None = None

    @staticmethod
    def for_model(
        model: PreTrainedModel, prompts: Sequence[list[int]], responses: Sequence[list[int]]
    ) -> SequenceBatch:
        """Answers behind their prompts, arranged as the model reads them, on its device; see `of`."""
        start = model.config.decoder_start_token_id if model.config.is_encoder_decoder else None
        return SequenceBatch.of(prompts, responses, model.device, decoder_start=start, grouped=reads_groups(model))

    @staticmethod
    def of(
        prompts: Sequence[list[int]],
        responses: Sequence[list[int]],
        device: torch.device,
        *,
        decoder_start: int | None = None,
        grouped: bool = False,
    ) -> SequenceBatch:
        """Answers behind their prompts.

        Args:
            prompts: N lists of ids, none empty.
            responses: N lists of ids, none empty, end token included where there is one.
            device: where the tensors go.
            decoder_start: the token an encoder-decoder's decoder starts with; None for a causal model.
            grouped: what prompts share is read once; for a causal model whose attention is our own.
        """
        response_ids, lengths = _padded(responses)
        is_response = torch.arange(response_ids.shape[1]) < lengths.unsqueeze(1)
        layout = encoder_ids = encoder_mask = None
        if decoder_start is not None:
            encoder_ids, prompt_lengths = _padded(prompts)
            encoder_mask = (torch.arange(encoder_ids.shape[1]) < prompt_lengths.unsqueeze(1)).long()
            input_ids, rows = _rows_padded([[decoder_start, *response[:-1]] for response in responses])
        else:
            sequences = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
            if grouped:
                plan = plan_groups(sequences)
                input_ids, layout, rows = plan.input_ids, plan.layout, [path.rows() for path in plan.paths]
            else:
                input_ids, rows = _rows_padded(sequences)
            # A token is predicted by the row before it.
            rows = [row[len(prompt) - 1 : -1] for row, prompt in zip(rows, prompts, strict=True)]
        # Where there is no answer token stands row 0; what is read there is masked later.
        predicting = torch.zeros_like(response_ids)
        predicting[is_response] = torch.cat(rows)
        return SequenceBatch(
            input_ids.to(device),
            response_ids.to(device),
            is_response.to(device),
            predicting.to(device),
            layout,
            None if encoder_ids is None else encoder_ids.to(device),
            None if encoder_mask is None else encoder_mask.to(device),
        )


def _rows_padded(sequences: Sequence[list[int]]) -> tuple[Tensor, list[Tensor]]:
    """Padded sequences (N, L), and of each the rows of its tokens, counted over N * L."""
    ids, _ = _padded(sequences)
    return ids, [torch.arange(len(sequence)) + number * ids.shape[1] for number, sequence in enumerate(sequences)]


def _padded(rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    """Rows padded on the right with 0, and their lengths: (N, L) and (N,)."""
    lengths = torch.tensor([len(row) for row in rows])
    padded = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
    for row, ids in enumerate(rows):
        padded[row, : len(ids)] = torch.tensor(ids)
    return padded, lengths
