"""The position-wise part: linear layers with a nonlinearity between them, the same at every position."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from rlhf_cli.transformer.config import TransformerConfig

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,  # x Phi(x) (Hendrycks and Gimpel 2016, section 2)
    "gelu-tanh": partial(F.gelu, approximate="tanh"),  # its approximation, same section
}


class FeedForward(nn.Module):
    """FFN(x) = max(0, x W1 + b1) W2 + b2 (Vaswani et al. 2017, equation 2), or with GELU in place of max(0, .).

    Args:
        config: sizes, activation and biases.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        inner, biases = config.intermediate_size, config.feed_forward_biases
        self.up_proj = nn.Linear(config.hidden_size, inner, bias=biases)
        self.down_proj = nn.Linear(inner, config.hidden_size, bias=biases)
        self.activation = ACTIVATIONS[config.feed_forward]

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        return self.down_proj(self.activation(self.up_proj(x)))


class GatedFeedForward(nn.Module):
    """SwiGLU(x) = (Swish(x W) * x V) W2, Swish(x) = x sigmoid(x) (Shazeer 2020, arXiv:2002.05202, equation 6).

    Args:
        config: sizes and biases.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        inner, biases = config.intermediate_size, config.feed_forward_biases
        self.gate_proj = nn.Linear(config.hidden_size, inner, bias=biases)
        self.up_proj = nn.Linear(config.hidden_size, inner, bias=biases)
        self.down_proj = nn.Linear(inner, config.hidden_size, bias=biases)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def make_feed_forward(config: TransformerConfig) -> nn.Module:
    """Make the feed-forward part of a configuration."""
    return GatedFeedForward(config) if config.feed_forward == "swiglu" else FeedForward(config)
