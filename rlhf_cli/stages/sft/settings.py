"""The `sft` section of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from rlhf_cli.settings.base import (
    Count,
    External,
    NonNegative,
    Positive,
)
from rlhf_cli.settings.shared import Adapter, LoraSettings, TrainingSettings, default_rate


class SFTSettings(TrainingSettings):
    """Supervised fine-tuning on demonstrations."""

    data: Annotated[str, External("data")]
    """Demonstration records: a file, a folder or a hub data set."""
    learning_rate: Positive | None = None
    """Peak learning rate of AdamW; null is 2e-4 with `adapter: lora` and 2e-5 with `adapter: none`."""
    batch_size: Count = 32
    """Records per optimizer step; with `packing`, packed sequences."""
    epochs: Positive = 1.0
    """Passes over the demonstrations."""
    max_length: Count = 1024
    """Maximum sequence length in tokens; longer records are skipped and counted."""
    assistant_turns: Literal["all", "last"] = "all"
    """Assistant turns to train on in conversations with several: `all` of them, or only the `last`."""
    packing: bool = False
    """Pack several records into each sequence of up to `max_length` tokens. For decoder-only models."""
    adapter: Adapter = "lora"
    """`lora` trains an adapter and merges it into the model; `none` trains all weights."""
    lora: LoraSettings = LoraSettings()
    """LoRA settings of the adapter, with `adapter: lora`."""
    lm_coef: NonNegative = 0.0
    """Weight lambda of the language-modeling loss L1 on the whole sequence, in L3 = L2 + lambda L1 (GPT-1, section
    3.2); L2 is the loss on the completion."""
    router_aux_coef: NonNegative | None = None
    """Weight of the load-balancing loss of a mixture-of-experts model's router (Fedus et al. 2021, arXiv:2101.03961).
    Null is `router_aux_loss_coef` of the model's configuration."""

    @property
    def peak_rate(self) -> float:
        """See `TrainingSettings`."""
        return self.learning_rate or default_rate(self.adapter, lora=2e-4, full=2e-5)
