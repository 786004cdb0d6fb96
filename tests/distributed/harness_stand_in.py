"""A stand-in for the part of lm-eval that we call, which uses a model as the wrapper of lm-eval 0.4 does."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


class HFLM:
    """Holds a model that is in memory already, and ties its weights again."""

    def __init__(self, pretrained: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> None:
        self.model, self.tokenizer, self.batch_size = pretrained.eval(), tokenizer, batch_size
        pretrained.tie_weights()


@torch.no_grad()
def simple_evaluate(model: HFLM, tasks: list[str], **seeds: int) -> dict[str, Any]:
    """Read two texts of different lengths, and continue one of them."""
    pretrained, scores = model.model, list[float]()
    for length in (4, 7):
        tokens = torch.arange(3, 3 + length, device=pretrained.device)[None]
        given = {"decoder_input_ids": tokens} if pretrained.config.is_encoder_decoder else {}
        logits = pretrained(input_ids=tokens, **given).logits.float()
        scores.append(float(logits.log_softmax(-1)[0, :, 5].mean()))
    written = pretrained.generate(tokens, max_new_tokens=3, do_sample=False)
    metrics = {"alias": tasks[0], "logprob,none": sum(scores), "written,none": float(written.sum())}
    return {"results": {tasks[0]: metrics}, "n-samples": {tasks[0]: {"effective": 2}}}


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Install the stand-in."""
    package, wrappers = ModuleType("lm_eval"), ModuleType("lm_eval.models.huggingface")
    package.simple_evaluate, wrappers.HFLM = simple_evaluate, HFLM  # type: ignore[attr-defined]
    for module in (package, wrappers):
        monkeypatch.setitem(sys.modules, module.__name__, module)
