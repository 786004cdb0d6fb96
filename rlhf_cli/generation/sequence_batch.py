"""Prompts and completions as tensors, for forward passes over whole sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_cli.attention.groups import plan_groups
from rlhf_cli.attention.layout import Layout
from rlhf_cli.models.backbone import reads_groups
from rlhf_cli.models.padding import pad


@dataclass(frozen=True, eq=False)
class SequenceBatch:
    """N prompts with their completions, in one of three arrangements.

    Grouped, for causal models with an attention backend of ours: one row of tokens without padding, in which
    completions of the same prompt follow one copy of it. Padded, for other causal models: `[prompt; completion]`,
    padded on the right. Separate, for encoder-decoders: the encoder reads the prompt and the decoder reads
    `[start; completion[:-1]]`.

    Attributes:
        input_ids: (B, L) what the model, or its decoder, reads; B is 1 if grouped, else N.
        completion_ids: (N, T) tokens of the completions.
        is_completion: (N, T) bool, True on real completion tokens, including the stop token.
        predicting: (N, T) row of `input_ids`, counted over its B * L, that predicts each completion token; equal for
            the first tokens of completions that share their prompt.
        positions: (n,) where the n real completion tokens are in the N * T of `completion_ids`, in their order. An
            index made beside the lists of ids: on a GPU, one made from a mask would wait for all work before it.
        layout: which tokens see which, if grouped.
        encoder_ids: (N, S) prompts, for encoder-decoders.
        encoder_mask: (N, S) 1 on real prompt tokens.
    """

    input_ids: Tensor
    completion_ids: Tensor
    is_completion: Tensor
    predicting: Tensor
    positions: Tensor
    layout: Layout | None = None
    encoder_ids: Tensor | None = None
    encoder_mask: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Real completion tokens."""
        return len(self.positions)

    @staticmethod
    def for_model(
        model: PreTrainedModel, prompts: Sequence[list[int]], completions: Sequence[list[int]]
    ) -> SequenceBatch:
        """Arrange completions behind their prompts as the model reads them, on its device; see `of`."""
        start = model.config.decoder_start_token_id if model.config.is_encoder_decoder else None
        return SequenceBatch.of(prompts, completions, model.device, decoder_start=start, grouped=reads_groups(model))

    @staticmethod
    def of(
        prompts: Sequence[list[int]],
        completions: Sequence[list[int]],
        device: torch.device,
        *,
        decoder_start: int | None = None,
        grouped: bool = False,
    ) -> SequenceBatch:
        """Arrange completions behind their prompts.

        Args:
            prompts: N lists of ids, none empty.
            completions: N lists of ids, none empty, including the stop token if there is one.
            device: where the tensors go.
            decoder_start: first token that an encoder-decoder's decoder reads; None for a causal model.
            grouped: read what prompts share once; for causal models with an attention backend of ours.
        """
        completion_ids, is_completion = pad(completions)
        layout = encoder_ids = encoder_mask = None
        if decoder_start is not None:
            encoder_ids, is_prompt = pad(prompts)
            encoder_mask = is_prompt.long()
            input_ids, rows = _padded([[decoder_start, *completion[:-1]] for completion in completions])
        else:
            sequences = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
            if grouped:
                plan = plan_groups(sequences)
                input_ids, layout, rows = plan.input_ids, plan.layout, [path.rows() for path in plan.paths]
            else:
                input_ids, rows = _padded(sequences)
            # A token is predicted by the row before it.
            rows = [row[len(prompt) - 1 : -1] for row, prompt in zip(rows, prompts, strict=True)]
        # Padding points at row 0; what is read there is masked later.
        predicting = torch.zeros_like(completion_ids)
        predicting[is_completion] = torch.cat(rows)
        return SequenceBatch(
            input_ids.to(device),
            completion_ids.to(device),
            is_completion.to(device),
            predicting.to(device),
            is_completion.flatten().nonzero().squeeze(1).to(device),
            layout,
            None if encoder_ids is None else encoder_ids.to(device),
            None if encoder_mask is None else encoder_mask.to(device),
        )


def _padded(sequences: Sequence[list[int]]) -> tuple[Tensor, list[Tensor]]:
    """Padded sequences (N, L), and for each the rows of its tokens, counted over N * L."""
    ids, _ = pad(sequences)
    return ids, [torch.arange(len(sequence)) + number * ids.shape[1] for number, sequence in enumerate(sequences)]
