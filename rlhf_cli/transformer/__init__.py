"""The explicit transformer, from Vaswani et al. 2017 to today, with each part in its own file.

Importing this package registers it with transformers' Auto classes.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from rlhf_cli.transformer.classifier import TransformerForSequenceClassification
from rlhf_cli.transformer.config import TransformerConfig
from rlhf_cli.transformer.heads import (
    TransformerForCausalLM,
    TransformerForMaskedLM,
    TransformerForSeq2SeqLM,
)
from rlhf_cli.transformer.model import TransformerModel

__all__ = [
    "TransformerConfig",
    "TransformerForCausalLM",
    "TransformerForMaskedLM",
    "TransformerForSeq2SeqLM",
    "TransformerForSequenceClassification",
    "TransformerModel",
]

AutoConfig.register(TransformerConfig.model_type, TransformerConfig)
AutoModel.register(TransformerConfig, TransformerModel)
AutoModelForCausalLM.register(TransformerConfig, TransformerForCausalLM)
AutoModelForMaskedLM.register(TransformerConfig, TransformerForMaskedLM)
AutoModelForSeq2SeqLM.register(TransformerConfig, TransformerForSeq2SeqLM)
AutoModelForSequenceClassification.register(TransformerConfig, TransformerForSequenceClassification)
