"""Transformers that predict tokens: the next token, a masked token, or an output sequence from the encoder's input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.cache_utils import Cache
from transformers.modeling_outputs import (
    BaseModelOutput,
    CausalLMOutputWithPast,
    MaskedLMOutput,
    Seq2SeqLMOutput,
)
from transformers.utils.generic import can_return_tuple

from rlhf_cli.cache_names import cache_argument, cache_of, takes_cache
from rlhf_cli.transformer.config import TransformerConfig
from rlhf_cli.transformer.model import TransformerModel, TransformerPreTrainedModel, resize_encoder


class Headed(TransformerPreTrainedModel):
    """A model with a head: its backbone is `model`, of one of the architectures that the head supports."""

    architectures: tuple[str, ...] = ()

    def __init__(self, config: TransformerConfig) -> None:
        if config.architecture not in self.architectures:
            raise ValueError(
                f"{type(self).__name__} needs `architecture: {' or '.join(self.architectures)}`, "
                f"got {config.architecture}"
            )
        super().__init__(config)
        self.model = TransformerModel(config)

    def get_input_embeddings(self) -> nn.Module:
        """Return the input embedding of the backbone."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Set the input embedding of the backbone."""
        self.model.set_input_embeddings(value)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Resize embeddings as transformers does, in encoder and decoder."""
        embeddings = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        resize_encoder(self, embeddings)
        return embeddings


class _LanguageModel(Headed):
    """A backbone with a projection to the vocabulary, logits = h W^T (Vaswani et al. 2017, section 3.4)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _logits(self, hidden: Tensor, logits_to_keep: int | Tensor) -> Tensor:
        if isinstance(logits_to_keep, int):
            return self.lm_head(hidden[:, -logits_to_keep:] if logits_to_keep else hidden)
        return self.lm_head(hidden[:, logits_to_keep])


class TransformerForCausalLM(_LanguageModel, GenerationMixin):
    """A decoder that predicts the next token: p(x_t | x_<t) (GPT; Radford et al. 2018)."""

    architectures = ("decoder",)
    _tied_weights_keys = {"lm_head.weight": "model.decoder.embed_tokens.weight"}  # noqa: RUF012

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
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Compute the logits of each next token.

        Args:
            input_ids: (B, T); this and the following as in `Stack.forward`.
            attention_mask: (B, Tk).
            position_ids: (B, T).
            cache: of keys and values.
            inputs_embeds: (B, T, d).
            labels: (B, T), unshifted `input_ids`, with -100 on positions without a loss.
            use_cache: return a cache.
            logits_to_keep: number of last positions, or their indices, to compute logits for; 0 is all.
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
        logits = self._logits(output.last_hidden_state, logits_to_keep)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **cache_argument(cache_of(output)),
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )


class TransformerForSeq2SeqLM(_LanguageModel, GenerationMixin):
    """An encoder-decoder that predicts an output sequence from an input: p(y_t | y_<t, x) (Vaswani et al. 2017)."""

    architectures = ("encoder-decoder",)
    _tied_weights_keys = {"lm_head.weight": "model.decoder.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.loss_type = "ForMaskedLM"  # transformers' name of a cross-entropy without a shift

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """Shift labels (B, T), -100 on padding, to the decoder's input [start; y_1 ... y_(T-1)], (B, T)."""
        start = self.config.decoder_start_token_id
        if start is None:
            raise ValueError("`decoder_start_token_id` must be set, got None")
        shifted = torch.cat([labels.new_full((len(labels), 1), start), labels[:, :-1]], dim=1)
        return shifted.masked_fill(
            shifted == -100, start if self.config.pad_token_id is None else self.config.pad_token_id
        )

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple[Tensor, ...] | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Seq2SeqLMOutput:
        """Compute the logits of the output tokens.

        Args:
            input_ids: (B, S) input of the encoder; this and the following as in `TransformerModel.forward`.
            attention_mask: (B, S).
            decoder_input_ids: (B, T), start token first; None derives them from `labels`.
            decoder_attention_mask: (B, T).
            encoder_outputs: encoder outputs of an earlier call.
            cache: of keys and values.
            inputs_embeds: (B, S, d).
            decoder_inputs_embeds: (B, T, d).
            labels: (B, T) output tokens, -100 on padding.
            use_cache: return a cache.
            logits_to_keep: number of last positions, or their indices, to compute logits for; 0 is all.
            kwargs: arguments for the backend and the loss.
        """
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            encoder_outputs=encoder_outputs,
            cache=cache,
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self._logits(output.last_hidden_state, logits_to_keep)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        carried = {key: value for key, value in output.items() if key != "last_hidden_state"}
        return Seq2SeqLMOutput(loss=loss, logits=logits, **carried)


class TransformerForMaskedLM(_LanguageModel):
    """An encoder that predicts masked tokens (BERT; Devlin et al. 2018, arXiv:1810.04805, section 3.1)."""

    architectures = ("encoder",)
    _tied_weights_keys = {"lm_head.weight": "model.encoder.embed_tokens.weight"}  # noqa: RUF012

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        """Compute the logits of the token at each position.

        Args:
            input_ids: (B, T); this and the following as in `Stack.forward`.
            attention_mask: (B, T).
            position_ids: (B, T).
            inputs_embeds: (B, T, d).
            labels: (B, T), -100 on tokens that were not masked.
            kwargs: arguments for the backend and the loss.
        """
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=False,
            **kwargs,
        )
        logits = self.lm_head(output.last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=output.hidden_states, attentions=output.attentions
        )
