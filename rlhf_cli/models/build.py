"""Build a small model from scratch: a transformer with random weights and its own byte-level BPE tokenizer.

It serves to run the whole pipeline without a network or a GPU, and to study parts of the transformer. The result is an
ordinary Hugging Face folder: a Llama by default, or a GPT-2, which any program loads. A transformer of parts that
neither has is saved as the explicit transformer that it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from rlhf_cli.errors import ModelError
from rlhf_cli.models.libraries import quiet_libraries
from rlhf_cli.models.loading import ModelSource, load_config, policy_class
from rlhf_cli.models.random_weights import RandomWeights
from rlhf_cli.models.seeding import seeded
from rlhf_cli.models.sharded_loading import divide_model, without_memory
from rlhf_cli.models.weight_files import WeightFiles
from rlhf_cli.models.weight_loading import disable_dropout, finished, placement
from rlhf_cli.settings.shared import BuildSettings
from rlhf_cli.transformer.config import TransformerConfig
from rlhf_cli.transformer.conversion import as_transformers, counterpart
from rlhf_cli.transformer.conversion_configs import explicit_config
from rlhf_cli.transformer.heads import TransformerForCausalLM, TransformerForSeq2SeqLM

END, PADDING = "<|eos|>", "<|pad|>"


def build_model(folder: Path, texts: Iterable[str], build: BuildSettings, *, seed: int) -> None:
    """Write a new model and its tokenizer to `folder`, weight by weight; equal arguments write equal bytes.

    Weights are drawn with standard deviation 1 / sqrt(hidden_size), so that the first logits have standard deviation 1.
    Llama's 0.02 suits widths of thousands; at a width of a hundred it costs hundreds of steps.

    Args:
        folder: created if it does not exist.
        texts: training texts of the tokenizer.
        build: parts and sizes of the transformer.
        seed: of the random weights.

    Raises:
        ModelError: there is no text.
    """
    quiet_libraries()
    tokenizer = train_tokenizer(texts, vocab_size=build.vocab_size, context_length=build.context_length)
    _write(folder, transformer_config(build), tokenizer, seed)


def transformer_config(build: BuildSettings) -> TransformerConfig:
    """Return the configuration of the transformer that the section describes, without token ids.

    Sinusoidal positions have size 1, so embeddings are then multiplied by sqrt(hidden_size) to have size 1 too.
    """
    return TransformerConfig(
        architecture=build.architecture,
        positions=build.positions,
        norm=build.norm,
        norm_placement=build.norm_placement,
        feed_forward=build.feed_forward,
        hidden_size=build.hidden_size,
        intermediate_size=build.feed_forward_size,
        num_hidden_layers=build.layers,
        num_attention_heads=build.heads,
        num_key_value_heads=build.key_heads,
        max_position_embeddings=build.context_length,
        head_dim=build.head_dim,
        attention_biases=build.biases == "all",
        feed_forward_biases=build.biases != "none",
        rope_base=build.rope_base,
        norm_eps=build.norm_eps,
        scale_embeddings=build.positions == "sinusoidal",
        tie_word_embeddings=build.tied_embeddings,
        initializer_range=build.hidden_size**-0.5,
    )


def _write(folder: Path, config: TransformerConfig, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
    """Draw each weight and write it, and save the tokenizer: the files that `random_model` would save."""
    backend = tokenizer.backend_tokenizer
    end, padding = backend.token_to_id(END), backend.token_to_id(PADDING)
    config.vocab_size = len(tokenizer)
    config.eos_token_id, config.pad_token_id = end, padding
    # As in T5, the decoder of an encoder-decoder starts from the padding token, which never occurs in a completion.
    config.decoder_start_token_id = padding if config.is_encoder_decoder else None
    theirs = counterpart(config)
    drawn = RandomWeights(partial(_explicit, config if theirs is None else explicit_config(theirs.config)), seed)
    model, weights = drawn.model, drawn.items()
    if theirs is not None:
        model, weights = without_memory(theirs.kind, theirs.config, torch.float32), theirs.weights(drawn)
    model.generation_config = GenerationConfig(
        do_sample=True,
        eos_token_id=end,
        pad_token_id=padding,
        decoder_start_token_id=config.decoder_start_token_id,
    )
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, state_dict={})  # configuration alone
    WeightFiles(model, folder).write(weights)
    tokenizer.save_pretrained(folder)


def random_model(config: PretrainedConfig, seed: int) -> PreTrainedModel:
    """Return a model as `build_model` draws it, in float32.

    The weights are those of the explicit transformer of this seed, also for a Llama or GPT-2: initialized by
    transformers, these would have other weights.

    Args:
        config: of an explicit transformer, or of the Llama or GPT-2 that computes the same.
        seed: of the weights.

    Raises:
        ModelError: another architecture.
    """
    with seeded(seed, torch.device("cpu")):
        if not isinstance(config, TransformerConfig):
            return as_transformers(TransformerForCausalLM(explicit_config(config)))
        return _explicit(config)


def untrained_policy(source: ModelSource, seed: int, *, is_sharded: bool = False) -> PreTrainedModel:
    """Return the language model at `source` with the weights of `random_model`, frozen if it is sharded.

    Args:
        source: of a model with the same configuration, and how the weights are held.
        seed: of the weights.
        is_sharded: divide them among the processes, which call this together. Each first draws them whole.

    Raises:
        ModelError: it is not a model that `build_model` makes.
    """
    config = load_config(source)
    disable_dropout(config)
    drawn = random_model(config, seed)
    if is_sharded:
        return divide_model(drawn, source)
    kind: Any = policy_class(config, source.path)
    with torch.random.fork_rng(devices=[]):  # the weights that it draws are replaced
        model = kind.from_config(config, **placement(source, torch.float32, is_quantized=False))
    model.load_state_dict(drawn.state_dict())
    return finished(model.to(dtype=source.dtype), source)


def _explicit(config: TransformerConfig) -> TransformerForCausalLM | TransformerForSeq2SeqLM:
    return TransformerForSeq2SeqLM(config) if config.is_encoder_decoder else TransformerForCausalLM(config)


def train_tokenizer(texts: Iterable[str], *, vocab_size: int, context_length: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer (Radford et al. 2019, section 2.2): it encodes and restores any text exactly.

    Args:
        texts: training texts.
        vocab_size: maximum number of tokens, special tokens included.
        context_length: longest sequence in tokens, for the tokenizer's own checks.

    Raises:
        ModelError: `vocab_size` is too small for the 256 bytes and 2 special tokens, or there is no text.
    """
    smallest = len(pre_tokenizers.ByteLevel.alphabet()) + 2
    if vocab_size < smallest:
        raise ModelError(
            f"`model.build.vocab_size` must be at least {smallest} (bytes and special tokens), got {vocab_size}",
            hint="use 1024 for a small corpus",
        )
    has_text = False

    def checked() -> Iterable[str]:
        nonlocal has_text
        for text in texts:
            has_text = has_text or bool(text)
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
    backend.train_from_iterator(checked(), trainer)
    if not has_text:
        raise ModelError("cannot train a tokenizer: there is no text")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END,
        pad_token=PADDING,
        padding_side="right",
        model_max_length=context_length,
        clean_up_tokenization_spaces=False,
    )
