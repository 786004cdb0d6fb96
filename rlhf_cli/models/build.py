"""A small model from nothing: an explicit transformer with random weights and a byte-level BPE tokenizer of its own.

For trying the whole pipeline without a network or a GPU, and for trying what a part of the transformer does. It writes
an ordinary Hugging Face folder, so every later stage treats it as any other model.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from rlhf_cli.errors import ModelError
from rlhf_cli.models.loading import quiet_libraries
from rlhf_cli.transformer.config import FeedForwardKind, Norm, NormPlacement, Positions, TransformerConfig
from rlhf_cli.transformer.heads import TransformerForCausalLM, TransformerForSeq2SeqLM

END, PADDING = "<|eos|>", "<|pad|>"


def build_model(
    folder: Path,
    texts: Iterable[str],
    *,
    hidden_size: int,
    layers: int,
    heads: int,
    feed_forward_size: int,
    vocab_size: int,
    context_length: int,
    seed: int,
    architecture: Literal["decoder", "encoder-decoder"] = "decoder",
    positions: Positions = "rotary",
    norm: Norm = "rms",
    norm_placement: NormPlacement = "pre",
    feed_forward: FeedForwardKind = "swiglu",
    key_heads: int | None = None,
    biases: Literal["none", "feed-forward", "all"] = "none",
    head_dim: int | None = None,
    rope_base: float = 10_000.0,
    norm_eps: float = 1e-6,
    tied_embeddings: bool = False,
) -> None:
    """Write a new model with its tokenizer to `folder`; the same arguments write the same bytes.

    The defaults are Llama's parts. Weights are drawn with deviation 1/sqrt(hidden_size), so that the first logits have
    deviation 1: Llama's 0.02 is made for widths of thousands, and at a hundred it costs the first hundreds of steps.

    Args:
        folder: made if absent.
        texts: what the tokenizer learns its merges from.
        hidden_size: width of the residual stream.
        layers: transformer blocks, in an encoder-decoder of each kind.
        heads: attention heads; divides `hidden_size`, with rotary positions into parts of even size.
        feed_forward_size: width inside the feed-forward part.
        vocab_size: most tokens the tokenizer may hold, the 256 bytes and the 2 special ones included.
        context_length: longest sequence in tokens.
        seed: of the random weights.
        architecture, positions, norm, norm_placement, feed_forward: see `TransformerConfig`. Sinusoids, of size 1, go
            with embeddings multiplied by sqrt(hidden_size), to size 1 too.
        key_heads: heads of keys and values; None is `heads`.
        biases: of the linear layers of the blocks: of none, of those of the feed-forward parts, or of all.
        head_dim: size of a head; None is hidden_size / heads.
        rope_base, norm_eps: see `TransformerConfig`.
        tied_embeddings: one matrix for embeddings and output.

    Raises:
        ModelError: sizes that make no transformer, or no text.
    """
    quiet_libraries()
    try:
        config = TransformerConfig(
            architecture=architecture,
            positions=positions,
            norm=norm,
            norm_placement=norm_placement,
            feed_forward=feed_forward,
            hidden_size=hidden_size,
            intermediate_size=feed_forward_size,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=key_heads,
            max_position_embeddings=context_length,
            head_dim=head_dim,
            attention_biases=biases == "all",
            feed_forward_biases=biases != "none",
            rope_base=rope_base,
            norm_eps=norm_eps,
            scale_embeddings=positions == "sinusoidal",
            tie_word_embeddings=tied_embeddings,
            initializer_range=hidden_size**-0.5,
        )
    except ValueError as error:
        raise ModelError(
            f"`model.build`: {error}",
            hint="heads must divide the hidden size into parts of even size, such as 4 heads for 128"
            ", and key heads must divide the heads",
        ) from error
    tokenizer = train_tokenizer(texts, vocab_size=vocab_size, context_length=context_length)
    _write(folder, config, tokenizer, seed)


def _write(folder: Path, config: TransformerConfig, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
    """Draw the weights and save the model beside its tokenizer."""
    backend = tokenizer.backend_tokenizer
    end, padding = backend.token_to_id(END), backend.token_to_id(PADDING)
    config.vocab_size = len(tokenizer)
    config.eos_token_id, config.pad_token_id = end, padding
    # As in T5, the decoder of an encoder-decoder begins with the padding token, which no answer contains.
    config.decoder_start_token_id = padding if config.is_encoder_decoder else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = TransformerForSeq2SeqLM(config) if config.is_encoder_decoder else TransformerForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=True,
        eos_token_id=end,
        pad_token_id=padding,
        decoder_start_token_id=config.decoder_start_token_id,
    )
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train_tokenizer(texts: Iterable[str], *, vocab_size: int, context_length: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE (Radford et al. 2019, section 2.2): no text is unknown, and decoding gives back every byte.

    Args:
        texts: what the merges are learned from.
        vocab_size: most tokens, special ones included.
        context_length: longest sequence, for the tokenizer's own checks.

    Raises:
        ModelError: `vocab_size` has no room for the bytes, or there is no text.
    """
    smallest = len(pre_tokenizers.ByteLevel.alphabet()) + 2
    if vocab_size < smallest:
        raise ModelError(
            f"`model.build.vocab_size: {vocab_size}` is too small: bytes and special tokens alone are {smallest}",
            hint="1024 suits a small corpus",
        )
    seen = 0

    def counted() -> Iterable[str]:
        nonlocal seen
        for text in texts:
            seen += bool(text)
            yield text

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(counted(), trainer)
    if not seen:
        raise ModelError("cannot build a tokenizer: there is no text to learn it from")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END,
        pad_token=PADDING,
        padding_side="right",
        model_max_length=context_length,
        clean_up_tokenization_spaces=False,
    )
