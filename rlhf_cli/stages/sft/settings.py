"""The `sft` section of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from rlhf_cli.settings.base import (
    Count,
    Names,
    NonNegative,
    Positive,
)
from rlhf_cli.settings.shared import LoraSettings, TrainingSettings


class SFTSettings(TrainingSettings):
    """Supervised fine-tuning on demonstrations."""

    data: Annotated[str, Names("data")]
    """Demonstration records: a file, a folder or a hub data set."""
    learning_rate: Positive = 2e-4
    """Peak learning rate of AdamW. LoRA takes about ten times that of full fine-tuning."""
    batch_size: Count = 32
    """Records in one optimizer step (packed sequences, with `packing`)."""
    epochs: Positive = 1.0
    """Passes over the demonstrations."""
    max_length: Count = 1024
    """Longest sequence in tokens; records that are longer are skipped and counted."""
    packing: bool = False
    """Fill sequences of `max_length` tokens with several records each. Decoder-only models."""
    adapter: Literal["lora", "none"] = "lora"
    """`lora` trains an adapter and merges it; `none` trains all weights."""
    lora: LoraSettings = LoraSettings()
    """The adapter."""
    lm_coef: NonNegative = 0.0
    """Weight lambda of the language-modeling loss on the whole sequence in L3 = L2 + lambda L1 (GPT-1, section
    3.2); L2 is the loss on the completion alone."""
