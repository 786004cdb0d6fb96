"""The configuration of a transformer: one choice per part, each with the paper it comes from."""

from __future__ import annotations

from typing import Any, Literal, get_args

from transformers import PretrainedConfig

from rlhf_cli.cache_names import CACHE

Architecture = Literal["decoder", "encoder", "encoder-decoder"]
Positions = Literal["sinusoidal", "learned", "rotary"]
Norm = Literal["layer", "rms"]
NormPlacement = Literal["pre", "post"]
FeedForwardKind = Literal["relu", "gelu", "gelu-tanh", "swiglu"]

_CHOICES = {
    "architecture": Architecture,
    "positions": Positions,
    "norm": Norm,
    "norm_placement": NormPlacement,
    "feed_forward": FeedForwardKind,
}
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
_LLAMA3_ROPE = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}


class TransformerConfig(PretrainedConfig):
    """Parts and sizes of a transformer. The defaults are today's decoder; `vaswani_2017` is the original model.

    Attributes:
        architecture: a decoder attends to earlier tokens (GPT), an encoder to all tokens (BERT); an encoder-decoder
            reads with an encoder and generates with a decoder (Vaswani et al. 2017, arXiv:1706.03762).
        positions: sinusoidal (Vaswani et al. 2017, section 3.5), learned (GPT-2) or rotary (Su et al. 2021,
            arXiv:2104.09864).
        norm: layer (Ba et al. 2016, arXiv:1607.06450) or rms (Zhang and Sennrich 2019, arXiv:1910.07467).
        norm_placement: post, LayerNorm(x + Sublayer(x)), or pre, x + Sublayer(LayerNorm(x)) with a final norm after the
            blocks (GPT-2; Xiong et al. 2020, arXiv:2002.04745).
        feed_forward: relu (Vaswani et al. 2017, equation 2), gelu (Hendrycks and Gimpel 2016, arXiv:1606.08415), its
            tanh approximation (GPT-2), or swiglu (Shazeer 2020, arXiv:2002.05202).
        num_key_value_heads: heads of keys and values, each shared by several query heads (Ainslie et al. 2023,
            arXiv:2305.13245); None is one per query head.
        head_dim: size of a head; None is hidden_size / num_attention_heads.
        attention_biases: whether the four projections of attention have biases.
        feed_forward_biases: whether the linear layers of the feed-forward part have biases.
        norm_eps: added to the variance.
        rope_base: base of the rotary frequencies.
        llama3_rope: Llama 3.1's scaling of the frequencies: `factor`, `low_freq_factor`, `high_freq_factor` and
            `original_max_position_embeddings`; None does not scale.
        scale_embeddings: multiply token embeddings by sqrt(hidden_size) (Vaswani et al. 2017, section 3.4), which gives
            them the size of sinusoids.
        tie_word_embeddings: use one matrix for the embeddings of encoder and decoder and for the output projection.
    """

    model_type = "rlhf-transformer"
    keys_to_ignore_at_inference = [CACHE]  # noqa: RUF012  (transformers' name and type)

    architecture: str = "decoder"
    positions: str = "rotary"
    norm: str = "rms"
    norm_placement: str = "pre"
    feed_forward: str = "swiglu"
    vocab_size: int = 32_000
    hidden_size: int = 512
    intermediate_size: int = 1536
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    attention_biases: bool = False
    feed_forward_biases: bool = False
    norm_eps: float = 1e-6
    rope_base: float = 10_000.0
    llama3_rope: dict[str, Any] | None = None
    scale_embeddings: bool = False
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    decoder_start_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Derive missing sizes and check the configuration.

        Raises:
            ValueError: the choices do not make a transformer.
        """
        self._check_sizes()
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"`num_attention_heads` must divide `hidden_size`, got {self.num_attention_heads} and "
                    f"{self.hidden_size}"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        self._check()
        self.is_encoder_decoder = self.architecture == "encoder-decoder"
        super().__post_init__(**kwargs)

    def _check_sizes(self) -> None:
        for name in _SIZES:
            if (size := getattr(self, name)) is not None and size < 1:
                raise ValueError(f"`{name}` must be at least 1, got {size}")

    def _check(self) -> None:
        assert self.num_key_value_heads is not None
        assert self.head_dim is not None
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in get_args(choices):
                raise ValueError(f"`{name}` must be one of {', '.join(get_args(choices))}, got `{getattr(self, name)}`")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"`num_key_value_heads` must divide `num_attention_heads`, got {self.num_key_value_heads} and "
                f"{self.num_attention_heads}"
            )
        if self.positions == "rotary" and self.head_dim % 2:
            raise ValueError(f"rotary positions need an even `head_dim`, got {self.head_dim}")
        if self.llama3_rope is not None and self.llama3_rope.keys() != _LLAMA3_ROPE:
            raise ValueError(
                f"`llama3_rope` must have {', '.join(sorted(_LLAMA3_ROPE))}, got {sorted(self.llama3_rope)}"
            )
        if self.positions == "sinusoidal" and self.hidden_size % 2:
            raise ValueError(f"sinusoidal positions need an even `hidden_size`, got {self.hidden_size}")

    @property
    def is_decoder(self) -> bool:
        """Whether it can generate text, as all but a lone encoder can."""
        return self.architecture != "encoder"

    @classmethod
    def vaswani_2017(cls, **sizes: Any) -> TransformerConfig:
        """Return the model of Vaswani et al. 2017: encoder and decoder with sinusoids, post-LayerNorm and ReLU.

        Args:
            sizes: the other fields, such as `hidden_size`.
        """
        parts: dict[str, Any] = {
            "architecture": "encoder-decoder",
            "positions": "sinusoidal",
            "norm": "layer",
            "norm_placement": "post",
            "feed_forward": "relu",
            "attention_biases": False,  # W^Q, W^K, W^V and W^O of section 3.2.2 have no biases
            "feed_forward_biases": True,  # b1 and b2 of equation 2
            "norm_eps": 1e-5,
            "scale_embeddings": True,
            "tie_word_embeddings": True,  # section 3.4
        }
        return cls(**(parts | sizes))
