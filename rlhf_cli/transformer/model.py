"""Stacks of blocks, and the transformer of one or two of them (Vaswani et al. 2017, figure 1)."""

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

from rlhf_cli.transformer.blocks import Block
from rlhf_cli.transformer.config import TransformerConfig
from rlhf_cli.transformer.multi_head import MultiHeadAttention
from rlhf_cli.transformer.norms import make_norm
from rlhf_cli.transformer.positions import make_positions, rotation


class TransformerPreTrainedModel(PreTrainedModel):
    """What transformers has to know of all our models. Weights are drawn from N(0, initializer_range^2)."""

    config: TransformerConfig
    config_class = TransformerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012  (names and types of this class are transformers')
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True


class Stack(TransformerPreTrainedModel):
    """Embedding, positions, N blocks and, with pre-norm, a last norm: an encoder or a decoder.

    Args:
        config: of all parts.
        is_causal: a position sees none behind itself.
        has_cross: blocks attend to an encoder's output too.
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
        # Post-norm ends every block with a norm; pre-norm leaves the residual stream as it is, so one comes last.
        self.norm = make_norm(config) if config.norm_placement == "pre" else nn.Identity()
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """Hidden states of a batch.

        Args:
            input_ids: (B, T).
            attention_mask: (B, Tk) 1 on real tokens, those of the cache included; or as the backend wants it.
            position_ids: (B, T); in a decoder, those that start again at 0 begin another sequence of a packed row, if
                there is neither mask nor cache. None counts the mask's real tokens, those of the cache included, or
                without a mask (B, Tk) all of them.
            encoder_hidden_states: (B, S, d), where there is cross-attention.
            encoder_attention_mask: (B, S) 1 on the encoder's real tokens.
            past_key_values: cache.
            inputs_embeds: (B, T, d) in the place of `input_ids`, before scaling and positions.
            use_cache: return a cache.
            kwargs: for the backend of self-attention, such as `attention_layout`.

        Raises:
            ValueError: both or neither of `input_ids` and `inputs_embeds`, or no encoder's output where one is read.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give `input_ids` or `inputs_embeds`, and not both")
        if self.has_cross and encoder_hidden_states is None:
            raise ValueError("a decoder with cross-attention reads `encoder_hidden_states`")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None and self.is_causal:
            past_key_values = self._new_cache()
        if position_ids is None:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = _counted(x, attention_mask, seen)
        masks = self._masks(
            x, attention_mask, position_ids, encoder_hidden_states, encoder_attention_mask, past_key_values
        )
        x = self.positions(x * self.embedding_scale, position_ids)
        angles = rotation(self.config, position_ids)
        for block in self.layers:
            x = block(
                x,
                encoder_hidden_states,
                attention_mask=masks[0],
                memory_mask=masks[1],
                angles=angles,
                past_key_values=past_key_values,
                **kwargs,
            )
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=self.norm(x), past_key_values=past_key_values if use_cache else None
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
        """Masks of self-attention and cross-attention, in the form that the backend reads; None where it needs none."""
        if self.is_causal:
            own_cache = getattr(cache, "self_attention_cache", cache)
            own = create_causal_mask(
                config=self.config,
                inputs_embeds=x,
                attention_mask=attention_mask,
                past_key_values=own_cache,
                position_ids=position_ids,
            )
        else:
            own = create_bidirectional_mask(config=self.config, inputs_embeds=x, attention_mask=attention_mask)
        if not self.has_cross:
            return own, None  # pyright: ignore[reportReturnType]  (flex_attention's block masks)
        across = create_bidirectional_mask(
            config=self.config, inputs_embeds=x, attention_mask=memory_mask, encoder_hidden_states=memory
        )
        return own, across  # pyright: ignore[reportReturnType]


def _counted(x: Tensor, attention_mask: Tensor | None, seen: int) -> Tensor:
    """Positions of `x` (B, T, d) behind `seen` tokens of a cache, (B, T) or (1, T): padding on the left takes none."""
    end = seen + x.shape[1]
    if attention_mask is not None and attention_mask.shape == (x.shape[0], end):
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, seen:]
    return torch.arange(seen, end, device=x.device).unsqueeze(0)


class TransformerModel(TransformerPreTrainedModel):
    """The transformer without a head: a decoder, an encoder, or both.

    Args:
        config: its `architecture` says which.
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
    def writer(self) -> Stack:
        """The stack whose hidden states come out: the decoder, or the only one."""
        return self.encoder if self.config.architecture == "encoder" else self.decoder

    def get_input_embeddings(self) -> nn.Module:
        """The embedding of `writer`."""
        return self.writer.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Inverse of `get_input_embeddings`."""
        assert isinstance(value, nn.Embedding)
        self.writer.embed_tokens = value

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As transformers does, in both stacks."""
        embeddings = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        resize_encoder(self, embeddings)
        return embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple[Tensor, ...] | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPastAndCrossAttentions | Seq2SeqModelOutput:
        """Hidden states; the arguments are those of `Stack.forward`.

        Args:
            input_ids: (B, S) what the encoder reads or, in a decoder alone, (B, T) what that does.
            attention_mask: 1 on its real tokens.
            position_ids: of `input_ids`.
            decoder_input_ids: (B, T), in an encoder-decoder.
            decoder_attention_mask: 1 on its real tokens.
            encoder_outputs: what the encoder gave before; it does not run again.
            past_key_values: cache of the decoder.
            inputs_embeds: in the place of `input_ids`.
            decoder_inputs_embeds: in the place of `decoder_input_ids`.
            use_cache: return a cache.
            kwargs: for the backend: of the decoder's self-attention in an encoder-decoder.

        Raises:
            ValueError: an input is missing; the message names it.
        """
        kwargs.pop("return_dict", None)
        if not self.config.is_encoder_decoder:
            return self.writer(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                **kwargs,
            )
        if decoder_input_ids is None and decoder_inputs_embeds is None:
            raise ValueError("the decoder has nothing to read: give `decoder_input_ids` or `decoder_inputs_embeds`")
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
        written = self.decoder(
            input_ids=decoder_input_ids,
            attention_mask=decoder_attention_mask,
            encoder_hidden_states=encoder_outputs[0],
            encoder_attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        return _both(encoder_outputs, written)


def _both(
    encoded: BaseModelOutput | tuple[Tensor, ...], written: BaseModelOutputWithPastAndCrossAttentions
) -> Seq2SeqModelOutput:
    """The outputs of encoder and decoder as one, under transformers' names."""
    return Seq2SeqModelOutput(
        last_hidden_state=written.last_hidden_state,
        past_key_values=written.past_key_values,  # pyright: ignore[reportArgumentType]
        decoder_hidden_states=written.hidden_states,
        decoder_attentions=written.attentions,
        cross_attentions=written.cross_attentions,
        encoder_last_hidden_state=encoded[0],
        encoder_hidden_states=getattr(encoded, "hidden_states", None),
        encoder_attentions=getattr(encoded, "attentions", None),
    )


def resize_encoder(model: PreTrainedModel, embeddings: nn.Embedding) -> None:
    """Give an encoder whose embedding is its own as many tokens as the decoder's has now."""
    if not model.config.is_encoder_decoder:
        return
    encoder = model.get_encoder()
    assert isinstance(encoder, Stack)
    if encoder.embed_tokens.weight.shape != embeddings.weight.shape:
        encoder.resize_token_embeddings(embeddings.num_embeddings)
    encoder.embed_tokens.num_embeddings = embeddings.num_embeddings
