"""What a causal backbone makes of a batch, whichever way the batch is laid out.

Where attention is one of our own backends, batches are groups with shared prefixes (`attention.groups`): one row of
tokens without padding. transformers' own attention knows no such layouts, an encoder's prompt would see the answers
behind it, and an encoder-decoder has no prompt in front of its answers: those read rows padded on the right. So do
models that mix tokens by other means than attention (a convolution, a recurrent state) or do not hand the layout on to
it, which a probe finds out.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_cli.attention.groups import plan_groups
from rlhf_cli.attention.hugging_face import is_ours
from rlhf_cli.attention.layout import Layout
from rlhf_cli.progress import warn

_keeps_apart: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def reads_groups(model: PreTrainedModel) -> bool:
    """Whether a causal or encoder-decoder language model, or a causal backbone, takes groups with shared prefixes.

    The first time a model is asked, a group is compared with its sequences apart; a warning says if they differ.
    """
    if not is_ours(model) or model.config.is_encoder_decoder:
        return False
    backbone = model.get_decoder()
    if backbone not in _keeps_apart:
        _keeps_apart[backbone] = _probe(backbone)
        if not _keeps_apart[backbone]:
            warn(
                f"the {model.config.model_type} model `{model.name_or_path}` does not keep the sequences of a group"
                " apart: its batches are padded, and a prompt is read once an answer"
            )
    return _keeps_apart[backbone]


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


@torch.no_grad()
def _probe(backbone: PreTrainedModel) -> bool:
    """Whether hidden states in a group and a sequence behind it are those of each sequence alone."""
    embedding = backbone.get_input_embeddings().weight
    assert isinstance(embedding, Tensor)
    vocabulary = embedding.shape[0]
    tokens = [3 + 7 * step % (vocabulary - 3) for step in range(12)]
    sequences = [tokens[:7], tokens[:4] + tokens[8:11], tokens[2:6]]
    plan = plan_groups(sequences)
    training = backbone.training
    backbone.eval()
    with torch.autocast(backbone.device.type, enabled=False):
        together = last_hidden(backbone, plan.input_ids.to(backbone.device), plan.layout)
        apart = [last_hidden(backbone, torch.tensor([ids], device=backbone.device), None) for ids in sequences]
    backbone.train(training)
    largest = max(float(hidden.abs().max()) for hidden in apart)
    tolerance = (1e-3 if backbone.dtype == torch.float32 else 0.1) * max(largest, 1.0)
    rows = [path.rows().to(together.device) for path in plan.paths]
    return all(
        float((together[row] - hidden).abs().max()) <= tolerance for row, hidden in zip(rows, apart, strict=True)
    )
