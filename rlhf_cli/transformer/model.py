"""Stacks of blocks, and the transformer made of one or two stacks (Vaswani et al. 2017, figure 1)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
    Seq2SeqModelOutput,
)
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from rlhf_cli.cache_names import CACHE, cache_argument, cache_of, takes_cache
from rlhf_cli.transformer.blocks import Block
from rlhf_cli.transformer.config import TransformerConfig
from rlhf_cli.transformer.multi_head import MultiHeadAttention
from rlhf_cli.transformer.norms import make_norm
from rlhf_cli.transformer.positions import make_positions, rotation


class TransformerPreTrainedModel(PreTrainedModel):
    """The base of all our models for transformers. Weights are drawn from N(0, initializer_range^2)."""

    config: TransformerConfig
    config_class = TransformerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012  (transformers defines names and types)
    _skip_keys_device_placement = [CACHE]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True


class Stack(TransformerPreTrainedModel):
    """An encoder or a decoder: embedding, positions, N blocks and, with pre-norm, a final norm.

    Args:
        config: parts and sizes.
        is_causal: a position does not see later ones.
        has_cross: blocks also attend to an encoder's output.
    """

    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": Block,
        "attentions": OutputRecorder(MultiHeadAttention, index=1, layer_name="self_attention"),
        "cross_attentions": OutputRecorder(MultiHeadAttention, index=1, layer_name="cross_attention"),
    }

    def __init__(self, config: TransformerConfig, *, is_causal: bool, has_cross: bool) -> None:
        super().__init__(config)
        self.is_causal = is_causal
        self.has_cross = has_cross
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embedding_scale = math.sqrt(config.hidden_size) if config.scale_embeddings else 1.0
        self.positions = make_positions(config)
        blocks = [
            Block(config, layer, is_causal=is_causal, has_cross=has_cross) for layer in range(config.num_hidden_layers)
        ]
        self.layers = nn.ModuleList(blocks)
        # With post-norm every block ends with a norm; with pre-norm the residual stream needs a final one.
        self.norm = make_norm(config) if config.norm_placement == "pre" else nn.Identity()
        self.gradient_checkpointing = False
        self.post_init()

    @takes_cache
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """Compute the hidden states of a batch.

        Args:
            input_ids: (B, T).
            attention_mask: (B, Tk) 1 on real tokens, cached ones included; or in the backend's own form.
            position_ids: (B, T). In a decoder without mask and cache, a restart at 0 begins a new sequence of a packed
                row. None counts the real tokens of the mask, cached ones included, or all tokens without a mask.
            encoder_hidden_states: (B, S, d), for cross-attention.
            encoder_attention_mask: (B, S) 1 on the encoder's real tokens.
            cache: of keys and values.
            inputs_embeds: (B, T, d) in place of `input_ids`, before scaling and positions.
            use_cache: return a cache.
            kwargs: arguments for the backend of self-attention, such as `attention_layout`.

        Raises:
            ValueError: both or neither of `input_ids` and `inputs_embeds`, or cross-attention without encoder output.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either `input_ids` or `inputs_embeds`")
        if self.has_cross and encoder_hidden_states is None:
            raise ValueError("a decoder with cross-attention needs `encoder_hidden_states`")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and cache is None and self.is_causal:
            cache = self._new_cache()
        if position_ids is None:
            seen = 0 if cache is None else cache.get_seq_length()
            position_ids = _count_positions(x, attention_mask, seen)
        masks = self._masks(x, attention_mask, position_ids, encoder_hidden_states, encoder_attention_mask, cache)
        x = self.positions(x * self.embedding_scale, position_ids)
        angles = rotation(self.config, position_ids)
        for block in self.layers:
            x = block(
                x,
                encoder_hidden_states,
                attention_mask=masks[0],
                memory_mask=masks[1],
                angles=angles,
                **cache_argument(cache),  # a layer that is recomputed drops it by this name
                **kwargs,
            )
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=self.norm(x), **cache_argument(cache if use_cache else None)
        )

    def _new_cache(self) -> Cache:
        own = DynamicCache(config=self.config)
        return EncoderDecoderCache(own, DynamicCache(config=self.config)) if self.has_cross else own

    def _masks(
        self,
        x: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        memory: Tensor | None,
        memory_mask: Tensor | None,
        cache: Cache | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Make the masks of self-attention and cross-attention in the backend's form; None if it needs none."""
        if self.is_causal:
            own_cache = getattr(cache, "self_attention_cache", cache)
            own = create_causal_mask(
                config=self.config,
                inputs_embeds=x,
                attention_mask=attention_mask,
                position_ids=position_ids,
                **cache_argument(own_cache),
            )
        else:
            own = create_bidirectional_mask(config=self.config, inputs_embeds=x, attention_mask=attention_mask)
        if not self.has_cross:
            return own, None  # pyright: ignore[reportReturnType]  (flex_attention's block masks)
        across = create_bidirectional_mask(
            config=self.config, inputs_embeds=x, attention_mask=memory_mask, encoder_hidden_states=memory
        )
        return own, across  # pyright: ignore[reportReturnType]


def _count_positions(x: Tensor, attention_mask: Tensor | None, seen: int) -> Tensor:
    """Count the positions of `x` (B, T, d) after `seen` cached tokens, without padding: (B, T) or (1, T)."""
    end = seen + x.shape[1]
    if attention_mask is not None and attention_mask.shape == (x.shape[0], end):
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, seen:]
    return torch.arange(seen, end, device=x.device).unsqueeze(0)


class TransformerModel(TransformerPreTrainedModel):
    """The transformer without a head: a decoder, an encoder, or both.

    Args:
        config: `architecture` selects the stacks.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        if config.architecture != "decoder":
            self.encoder = Stack(config, is_causal=False, has_cross=False)
        if config.architecture != "encoder":
            self.decoder = Stack(config, is_causal=True, has_cross=config.is_encoder_decoder)
        if config.is_encoder_decoder:
            self._tied_weights_keys = {"encoder.embed_tokens.weight": "decoder.embed_tokens.weight"}
        self.post_init()

    @property
    def output_stack(self) -> Stack:
        """The stack that computes the output: the decoder, or the only stack."""
        return self.encoder if self.config.architecture == "encoder" else self.decoder

    def get_input_embeddings(self) -> nn.Module:
        """Return the input embedding of `output_stack`."""
        return self.output_stack.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Set the input embedding of `output_stack`."""
        assert isinstance(value, nn.Embedding)
        self.output_stack.embed_tokens = value

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Resize embeddings as transformers does, in encoder and decoder."""
        embeddings = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        resize_encoder(self, embeddings)
        return embeddings

    @takes_cache
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple[Tensor, ...] | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPastAndCrossAttentions | Seq2SeqModelOutput:
        """Compute hidden states; the arguments are those of `Stack.forward`.

        Args:
            input_ids: (B, S) input of the encoder or, in a lone decoder, (B, T) its input.
            attention_mask: 1 on real tokens of `input_ids`.
            position_ids: positions of `input_ids`.
            decoder_input_ids: (B, T), input of the decoder in an encoder-decoder.
            decoder_attention_mask: 1 on real tokens of `decoder_input_ids`.
            encoder_outputs: encoder outputs of an earlier call; the encoder does not run again.
            cache: of the decoder.
            inputs_embeds: in place of `input_ids`.
            decoder_inputs_embeds: in place of `decoder_input_ids`.
            use_cache: return a cache.
            kwargs: arguments for the backend of self-attention, in an encoder-decoder that of the decoder.

        Raises:
            ValueError: an input is missing; the message names it.
        """
        kwargs.pop("return_dict", None)
        if not self.config.is_encoder_decoder:
            return self.output_stack(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                cache=cache,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                **kwargs,
            )
        if decoder_input_ids is None and decoder_inputs_embeds is None:
            raise ValueError("the decoder has no input: give `decoder_input_ids` or `decoder_inputs_embeds`")
        if encoder_outputs is None:
            recorded = {name: kwargs[name] for name in ("output_hidden_states", "output_attentions") if name in kwargs}
            encoder_outputs = self.encoder(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                **recorded,
            )
        assert encoder_outputs is not None
        decoded = self.decoder(
            input_ids=decoder_input_ids,
            attention_mask=decoder_attention_mask,
            encoder_hidden_states=encoder_outputs[0],
            encoder_attention_mask=attention_mask,
            cache=cache,
            inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        return _both(encoder_outputs, decoded)


def _both(
    encoded: BaseModelOutput | tuple[Tensor, ...], decoded: BaseModelOutputWithPastAndCrossAttentions
) -> Seq2SeqModelOutput:
    """Join the outputs of encoder and decoder under transformers' names."""
    return Seq2SeqModelOutput(
        last_hidden_state=decoded.last_hidden_state,
        **cache_argument(cache_of(decoded)),
        decoder_hidden_states=decoded.hidden_states,
        decoder_attentions=decoded.attentions,
        cross_attentions=decoded.cross_attentions,
        encoder_last_hidden_state=encoded[0],
        encoder_hidden_states=getattr(encoded, "hidden_states", None),
        encoder_attentions=getattr(encoded, "attentions", None),
    )


def resize_encoder(model: PreTrainedModel, embeddings: nn.Embedding) -> None:
    """Resize the encoder's embedding, if it is not tied, to the size of the decoder's."""
    if not model.config.is_encoder_decoder:
        return
    encoder = model.get_encoder()
    assert isinstance(encoder, Stack)
    if encoder.embed_tokens.weight.shape != embeddings.weight.shape:
        encoder.resize_token_embeddings(embeddings.num_embeddings)
    encoder.embed_tokens.num_embeddings = embeddings.num_embeddings
