"""The transformer with one score per text, as used by reward models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from transformers.utils.generic import can_return_tuple

from rlhf_cli.cache_names import cache_argument, cache_of, takes_cache
from rlhf_cli.transformer.config import TransformerConfig
from rlhf_cli.transformer.heads import Headed


class TransformerForSequenceClassification(Headed):
    """A linear head on one vector per text: a decoder's last real token, or the mean of an encoder's real tokens."""

    architectures = ("decoder", "encoder")

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels or 1, bias=False)
        self.post_init()

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:
        """Compute the scores of texts.

        Args:
            input_ids: (B, T); this and the following as in `Stack.forward`.
            attention_mask: (B, T), padding on either side. Without one, attention sees all tokens, and the score is
                read from tokens other than `pad_token_id`, if the configuration has one, as in transformers.
            position_ids: (B, T).
            cache: of keys and values.
            inputs_embeds: (B, T, d).
            labels: (B,).
            use_cache: return a cache.
            kwargs: arguments for the backend and the loss.
        """
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        pooled = self.score(self._pooled(output.last_hidden_state, self._real(input_ids, attention_mask)))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=pooled, labels=labels, pooled_logits=pooled, config=self.config)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=pooled,
            **cache_argument(cache_of(output)),
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )

    def _real(self, input_ids: Tensor | None, attention_mask: Tensor | None) -> Tensor | None:
        """Return (B, T) bool, True on tokens that the score may be read from; None means all tokens."""
        if attention_mask is not None:
            return attention_mask.bool()
        if input_ids is None or self.config.pad_token_id is None:
            return None
        return input_ids != self.config.pad_token_id

    def _pooled(self, hidden: Tensor, is_real: Tensor | None) -> Tensor:
        """Pool hidden states: (B, T, d) -> (B, d)."""
        if is_real is None:
            is_real = hidden.new_ones(hidden.shape[:2], dtype=torch.bool)
        is_real = is_real[:, -hidden.shape[1] :]
        if self.config.architecture == "encoder":
            kept = hidden.masked_fill(~is_real.unsqueeze(-1), 0.0)
            return kept.sum(dim=1) / is_real.sum(dim=1, keepdim=True)
        positions = torch.arange(hidden.shape[1], device=hidden.device)
        last = (positions * is_real).argmax(dim=1)
        return hidden[torch.arange(len(hidden), device=hidden.device), last]
