"""The load-balancing loss of a mixture-of-experts model, which keeps its router from sending all tokens to few experts.

It is N sum_i f_i P_i over N experts, where f_i is the share of tokens that expert i gets and P_i its mean probability
(Fedus et al. 2021, arXiv:2101.03961, equations 4 to 6), computed by the function of the model's own family.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from rlhf_cli.errors import ModelError
from rlhf_cli.models.backbone import text_config


@dataclass(frozen=True)
class RouterLoss:
    """The load-balancing loss of one model.

    Attributes:
        coef: its weight in the loss.
        experts: experts per layer.
        top_k: experts per token.
    """

    coef: float
    experts: int
    top_k: int
    _family: Callable[..., Any]

    @staticmethod
    def of(model: PreTrainedModel, coef: float | None = None) -> RouterLoss | None:
        """Return the loss of a model; None if its family has none or its weight is 0.

        Args:
            model: a language model.
            coef: weight of the loss; None is that of the model's configuration.
        """
        config = text_config(model.config)
        family = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
        own = getattr(config, "router_aux_loss_coef", None)
        experts = getattr(model, "num_experts", None) or getattr(config, "num_experts", None)
        top_k = getattr(model, "num_experts_per_tok", None) or getattr(config, "num_experts_per_tok", None)
        if family is None or own is None or not experts or not top_k:
            return None
        coef = float(own) if coef is None else coef
        return RouterLoss(coef, int(experts), int(top_k), family) if coef > 0 else None

    def __call__(self, router_logits: list[Tensor], is_real: Tensor | None) -> Tensor:
        """Return the weighted loss of one forward pass.

        Args:
            router_logits: per layer (B * L, experts), from `decoder_hidden`.
            is_real: (B, L), False on padding; None if there is none.

        Raises:
            ModelError: the model gave no router logits.
        """
        if not router_logits:
            raise ModelError(
                "the model gives no router logits, which its load-balancing loss needs",
                hint="train without it: `--set sft.router_aux_coef=0`",
            )
        mask = None if is_real is None else is_real.long()
        return self.coef * self._family(tuple(router_logits), self.experts, self.top_k, mask)
