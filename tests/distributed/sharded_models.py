"""Tiny models for the cases of `sharded.py`."""

from __future__ import annotations

from pathlib import Path

from rlhf_cli.models.build import build_model
from rlhf_cli.settings.shared import BuildSettings
from tests.conftest import SENTENCES, byte_level_tokenizer
from tests.families.zoo import ENCODER_DECODERS, save_tiny


def make_model(family: str, folder: Path) -> Path:
    """Write a tiny model with random weights: of a family of the zoo, or an encoder-decoder of `model.build`."""
    if family != "built":
        tokenizer = byte_level_tokenizer(pad=family in ENCODER_DECODERS, chat=True)
        return save_tiny(family, tokenizer, folder)
    sizes = {"hidden_size": 32, "layers": 2, "heads": 4, "feed_forward_size": 48, "context_length": 128}
    build_model(folder, SENTENCES, BuildSettings(architecture="encoder-decoder", vocab_size=320, **sizes), seed=0)
    return folder
