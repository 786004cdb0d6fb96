"""What a causal backbone makes of a batch, whichever way the batch is laid out.

Where attention is one of our own backends, batches are groups with shared prefixes (`attention.groups`): one row of
tokens without padding. transformers' own attention knows no such layouts, an encoder's prompt would see the answers
behind it, and an encoder-decoder has no prompt in front of its answers: those read rows padded on the right.
"""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from rlhf_cli.attention.hugging_face import is_ours
from rlhf_cli.attention.layout import Layout


def reads_groups(model: PreTrainedModel) -> bool:
    """Whether a causal or encoder-decoder language model, or a causal backbone, takes groups with shared prefixes.

    A model whose attention is our own was shown to keep a group's sequences apart when it was loaded.
    """
    return is_ours(model) and not model.config.is_encoder_decoder


def last_hidden(
    backbone: PreTrainedModel, input_ids: Tensor, layout: Layout | None, *, position_ids: Tensor | None = None
) -> Tensor:
    """Last hidden states of a causal backbone, its batch rows on end: (B * L, d).

    Args:
        backbone: without its vocabulary head.
        input_ids: (B, L).
        layout: of groups; None for rows padded on the right. Causal attention never looks ahead and positions count
            from the left, so padding needs no mask; a mask of ones would join what `position_ids` keeps apart.
        position_ids: (B, L), without a layout: they start again where the next sequence of a row does.
    """
    arguments = {}
    if layout is not None:
        assert is_ours(backbone), "transformers' own attention would pass a layout over in silence"
        arguments = {"position_ids": layout.positions(input_ids.device), "attention_layout": layout}
    elif position_ids is not None:
        arguments = {"position_ids": position_ids}
    return backbone(input_ids=input_ids, use_cache=False, **arguments).last_hidden_state.flatten(0, 1)
