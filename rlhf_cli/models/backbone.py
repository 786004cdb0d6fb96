"""Hidden states of a causal backbone, for grouped and for padded batches.

A decoder with one of our attention backends reads groups with shared prefixes (`attention.groups`): one row of tokens
without padding. All other models read rows padded on the right: transformers' own attention does not support groups, in
an encoder the prompt would attend to the completions after it, and an encoder-decoder reads prompts separately.
"""

from __future__ import annotations

from torch import Tensor
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from rlhf_cli.attention.hugging_face import has_mask_only_windows, is_ours
from rlhf_cli.attention.layout import Layout


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """Return the configuration of the language model inside a multimodal model; of all others, their own."""
    return config if config.is_encoder_decoder else config.get_text_config(decoder=True)


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """Return the decoder whose last hidden states the vocabulary projection or the reward head reads."""
    decoder = model.get_decoder()
    while not model.config.is_encoder_decoder and decoder.get_output_embeddings() is not None:
        # Llama 4 answers with its language model, projection included.
        inner = decoder.get_decoder()
        is_found = inner is not decoder
        decoder = inner if is_found else next(one for one in decoder.children() if isinstance(one, PreTrainedModel))
    return decoder


def is_recurrent(model: PreTrainedModel) -> bool:
    """Return whether layers carry a state from token to token: state-space models, linear attention, convolutions.

    Such layers read padding and neighbours in a packed row as if they were part of the text, whatever the mask or the
    positions say.
    """
    if model.config.is_encoder_decoder:
        return False
    layers = DynamicCache(config=text_config(model.config)).layers
    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers)


def reads_groups(model: PreTrainedModel) -> bool:
    """Return whether a language model or a causal backbone reads groups with shared prefixes.

    The parity check at loading has shown that such a model keeps the sequences of a group apart. Groups have no mask,
    so a model that defines a window in its mask alone reads padded rows.
    """
    return is_ours(model) and not model.config.is_encoder_decoder and not has_mask_only_windows(model)


def last_hidden(
    backbone: PreTrainedModel,
    input_ids: Tensor,
    layout: Layout | None,
    *,
    position_ids: Tensor | None = None,
    router_logits: list[Tensor] | None = None,
) -> Tensor:
    """Compute the last hidden states of a causal backbone, batch rows concatenated: (B * L, d).

    Args:
        backbone: a model without its vocabulary projection.
        input_ids: (B, L).
        layout: of groups; None for rows padded on the right. Padding on the right needs no mask under causal attention,
            and a mask of ones would join the sequences that `position_ids` separates.
        position_ids: (B, L), only without a layout; they restart at 0 with every packed sequence of a row.
        router_logits: of a mixture-of-experts model; those of every layer, (B * L, experts), are appended.
    """
    arguments: dict[str, object] = {} if router_logits is None else {"output_router_logits": True}
    if layout is not None:
        assert is_ours(backbone), "transformers' own attention would silently ignore a layout"
        arguments |= {"position_ids": layout.positions(input_ids.device), "attention_layout": layout}
        # Without a mask, transformers looks for sequences in the positions, which waits for a GPU. The layout decides.
        arguments["attention_mask"] = input_ids.new_ones(input_ids.shape)
    elif position_ids is not None:
        arguments |= {"position_ids": position_ids}
    output = backbone(input_ids=input_ids, use_cache=False, **arguments)
    if router_logits is not None:
        router_logits += [logits for logits in output.router_logits or () if logits is not None]
    return output.last_hidden_state.flatten(0, 1)


def decoder_hidden(
    model: PreTrainedModel,
    input_ids: Tensor,
    *,
    layout: Layout | None = None,
    position_ids: Tensor | None = None,
    encoder_ids: Tensor | None = None,
    encoder_mask: Tensor | None = None,
    router_logits: list[Tensor] | None = None,
) -> Tensor:
    """Compute the last hidden states of a language model, which its vocabulary projection reads: (B * L, d).

    Args:
        model: causal or encoder-decoder.
        input_ids: (B, L), read by the model or by its decoder.
        layout, position_ids, router_logits: of a causal model, see `last_hidden`.
        encoder_ids: (B, S), of an encoder-decoder, else None.
        encoder_mask: (B, S), 1 on real tokens of the encoder.
    """
    if encoder_ids is None:
        decoder = decoder_of(model)
        return last_hidden(decoder, input_ids, layout, position_ids=position_ids, router_logits=router_logits)
    encoded = model.get_encoder()(encoder_ids, attention_mask=encoder_mask).last_hidden_state
    output = model.get_decoder()(
        input_ids=input_ids, encoder_hidden_states=encoded, encoder_attention_mask=encoder_mask, use_cache=False
    )
    return output.last_hidden_state.flatten(0, 1)
