"""Tiny explicit transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from rlhf_cli.transformer import (
    TransformerConfig,
    TransformerForCausalLM,
    TransformerForMaskedLM,
    TransformerForSeq2SeqLM,
)

_KINDS = {
    "decoder": TransformerForCausalLM,
    "encoder": TransformerForMaskedLM,
    "encoder-decoder": TransformerForSeq2SeqLM,
}


@pytest.fixture(scope="session")
def tiny() -> Callable[..., PreTrainedModel]:
    """`tiny(architecture="encoder", norm="layer", ...)`: 40 tokens, width 16, two blocks, weights that matter."""

    def make(**parts: Any) -> PreTrainedModel:
        sizes = {
            "vocab_size": 40,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 32,
            "initializer_range": 0.25,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "decoder_start_token_id": 0,
        }
        config = TransformerConfig(**(sizes | parts))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return _KINDS[config.architecture](config).eval()

    return make
