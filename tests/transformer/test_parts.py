"""The parts of the transformer against their equations, written out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from rlhf_cli.transformer import TransformerConfig
from rlhf_cli.transformer.blocks import Block, residual
from rlhf_cli.transformer.feed_forward import make_feed_forward
from rlhf_cli.transformer.multi_head import MultiHeadAttention, scaled_dot_product_attention
from rlhf_cli.transformer.norms import RMSNorm, make_norm
from rlhf_cli.transformer.positions import frequencies, rotate, rotation, scaled_frequencies, sinusoids


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def config(**parts) -> TransformerConfig:
    sizes = {"hidden_size": 12, "intermediate_size": 20, "num_attention_heads": 3, "num_hidden_layers": 1}
    made = TransformerConfig(**(sizes | parts))
    made._attn_implementation = "eager"
    return made


def randomized(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.5, generator=generator)
    return module


def test_sinusoids_are_the_papers():
    table = sinusoids(torch.arange(7), 6)
    for position in range(7):
        for i in range(3):
            angle = position / 10_000 ** (2 * i / 6)
            assert table[position, 2 * i] == pytest.approx(math.sin(angle), abs=1e-6)
            assert table[position, 2 * i + 1] == pytest.approx(math.cos(angle), abs=1e-6)


def test_rotation_turns_each_pair_by_its_angle():
    made = config(hidden_size=4, num_attention_heads=1, rope_base=100.0)
    angles = rotation(made, torch.tensor([[3]]))
    assert angles is not None
    turned = rotate(torch.tensor([[[[1.0, 0.0, 0.0, 2.0]]]]), angles)
    # Pairs are (0, 2) by 3 * 100^0 and (1, 3) by 3 * 100^(-1/2).
    expected = [math.cos(3.0), -2 * math.sin(0.3), math.sin(3.0), 2 * math.cos(0.3)]
    close(turned.flatten(), torch.tensor(expected))


def test_rotated_product_depends_on_the_distance_alone():
    made = config()
    query, key = torch.randn(2, 1, 1, 1, 4)

    def product(m: int, n: int) -> float:
        at_m, at_n = (rotation(made, torch.tensor([[at]])) for at in (m, n))
        assert at_m is not None
        assert at_n is not None
        return float((rotate(query, at_m) * rotate(key, at_n)).sum())

    assert product(9, 4) == pytest.approx(product(15, 10), abs=1e-5)
    assert product(9, 4) != pytest.approx(product(4, 9), abs=1e-3)


def test_stretched_frequencies_are_llama_3s():
    scaling = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    rope = {"rope_type": "llama3", "rope_theta": 500.0, **scaling}
    llama = LlamaConfig(hidden_size=64, num_attention_heads=2, max_position_embeddings=512, rope_parameters=rope)
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](llama, "cpu")
    ours = scaled_frequencies(frequencies(32, 500.0), scaling)
    close(ours, theirs)
    kinds = (ours / frequencies(32, 500.0)).round(decimals=4)
    assert (kinds == 1).any()
    assert (kinds == 0.125).any()
    assert ((kinds > 0.125) & (kinds < 1)).any()


def test_norms_are_their_equations():
    x = torch.randn(3, 12) * 4 + 2
    norm = randomized(make_norm(config(norm="layer", norm_eps=0.3)))
    centered = x - x.mean(-1, keepdim=True)
    close(norm(x), norm.weight * centered / (centered.square().mean(-1, keepdim=True) + 0.3).sqrt() + norm.bias, 1e-5)
    norm = randomized(make_norm(config(norm="rms", norm_eps=0.3)))
    close(norm(x), norm.weight * x / (x.square().mean(-1, keepdim=True) + 0.3).sqrt(), 1e-5)


def test_rms_norm_divides_in_float32():
    x = torch.full((1, 8), 300.0, dtype=torch.float16)  # its square is beyond float16
    close(RMSNorm(8, eps=1e-6).half()(x), torch.ones(1, 8, dtype=torch.float16), 1e-3)


@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("kind", ["relu", "gelu", "gelu-tanh", "swiglu"])
def test_feed_forward_is_its_equation(kind: str, biases: bool):
    part = randomized(make_feed_forward(config(feed_forward=kind, feed_forward_biases=biases)))
    assert any(name.endswith("bias") for name, _ in part.named_parameters()) == biases
    weights = {name: value.detach() for name, value in part.named_parameters()}
    x = torch.randn(5, 12)

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", torch.zeros(()))

    up = linear("up_proj", x)
    if kind == "swiglu":
        gate = linear("gate_proj", x)
        inner = gate * torch.sigmoid(gate) * up
    else:
        cubic = math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)
        inner = {
            "relu": up.clamp(min=0),
            "gelu": up * 0.5 * (1 + torch.erf(up / math.sqrt(2))),
            "gelu-tanh": up * 0.5 * (1 + torch.tanh(cubic)),
        }[kind]
    close(part(x), linear("down_proj", inner), 1e-5)


@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_multi_head_attention_is_its_equation_head_by_head(key_heads: int):
    made = config(hidden_size=12, num_attention_heads=4, num_key_value_heads=key_heads, head_dim=6, positions="learned")
    part = randomized(MultiHeadAttention(made, 0, is_causal=True))
    x = torch.randn(2, 5, 12)
    mask = torch.full((5, 5), torch.finfo(torch.float32).min).triu(1)
    heads = []
    for head in range(4):
        shared = head // (4 // key_heads)
        query = x @ part.q_proj.weight[6 * head : 6 * head + 6].T
        key = x @ part.k_proj.weight[6 * shared : 6 * shared + 6].T
        value = x @ part.v_proj.weight[6 * shared : 6 * shared + 6].T
        scores = query @ key.transpose(1, 2) / math.sqrt(6)
        heads.append(scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf).softmax(-1) @ value)
    expected = torch.cat(heads, dim=-1) @ part.o_proj.weight.T
    for implementation in ("eager", "sdpa"):
        made._attn_implementation = implementation
        close(part(x, attention_mask=mask)[0], expected, 1e-5)


def test_cross_attention_asks_with_the_decoder_and_answers_with_the_encoder():
    made = config()
    part = randomized(MultiHeadAttention(made, 0, is_causal=False, is_cross=True))
    x, memory = torch.randn(1, 2, 12), torch.randn(1, 6, 12)
    query, key, value = (
        (side @ layer.weight.T).unflatten(-1, (3, 4)).transpose(1, 2)
        for side, layer in ((x, part.q_proj), (memory, part.k_proj), (memory, part.v_proj))
    )
    weights = (query @ key.transpose(-1, -2) / 2).softmax(-1)
    assert weights.shape == (1, 3, 2, 6)
    expected = (weights @ value).transpose(1, 2).flatten(2) @ part.o_proj.weight.T
    output, found = part(x, memory)
    close(output, expected, 1e-5)
    assert found is not None
    close(found, weights, 1e-5)


def test_equation_1_on_numbers():
    query, key = torch.tensor([[[[2.0, 0.0]]]]), torch.tensor([[[[1.0, 0.0], [0.0, 5.0]]]])
    value = torch.tensor([[[[10.0], [20.0]]]])
    output, weights = scaled_dot_product_attention(nn.Module(), query, key, value, None, scaling=1 / math.sqrt(2))
    first = math.exp(math.sqrt(2)) / (math.exp(math.sqrt(2)) + 1)  # scores 2/sqrt(2) and 0
    close(weights.flatten(), torch.tensor([first, 1 - first]))
    assert float(output) == pytest.approx(10 * first + 20 * (1 - first))


def test_residual_places_the_norm():
    def norm(x: Tensor) -> Tensor:
        return F.layer_norm(x, (3,))

    def sublayer(x: Tensor) -> Tensor:
        return x**2 + 1

    x = torch.tensor([[1.0, 2.0, 4.0]])
    close(residual(x, sublayer, norm, "post"), norm(x + x**2 + 1))
    close(residual(x, sublayer, norm, "pre"), x + norm(x) ** 2 + 1)


@pytest.mark.parametrize("placement", ["pre", "post"])
def test_block_is_its_equation(placement: str):
    made = config(norm="layer", norm_placement=placement, feed_forward="relu", positions="learned")
    block = randomized(Block(made, 0, is_causal=False, has_cross=True))
    x, memory = torch.randn(2, 4, 12), torch.randn(2, 3, 12)

    def self_attention(x: Tensor) -> Tensor:
        return block.self_attention(x)[0]

    def cross_attention(x: Tensor) -> Tensor:
        return block.cross_attention(x, memory)[0]

    if placement == "post":
        y = block.self_attention_norm(x + self_attention(x))
        y = block.cross_attention_norm(y + cross_attention(y))
        y = block.feed_forward_norm(y + block.feed_forward(y))
    else:
        y = x + self_attention(block.self_attention_norm(x))
        y = y + cross_attention(block.cross_attention_norm(y))
        y = y + block.feed_forward(block.feed_forward_norm(y))
    close(block(x, memory), y)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"positions": "alibi"}, "`positions` must be one of sinusoidal, learned, rotary, got `alibi`"),
        ({"norm_placement": "sandwich"}, "`norm_placement` must be one of pre, post, got `sandwich`"),
        ({"num_attention_heads": 5}, "`num_attention_heads` must divide `hidden_size`, got 5 and 12"),
        ({"num_key_value_heads": 2}, "`num_key_value_heads` must divide `num_attention_heads`, got 2 and 3"),
        ({"num_attention_heads": 4}, "rotary positions need an even `head_dim`, got 3"),
        ({"hidden_size": 9, "positions": "sinusoidal"}, "sinusoidal positions need an even `hidden_size`, got 9"),
        ({"num_key_value_heads": 0}, "`num_key_value_heads` must be at least 1, got 0"),
        ({"num_attention_heads": 0}, "`num_attention_heads` must be at least 1, got 0"),
        ({"num_hidden_layers": -1}, "`num_hidden_layers` must be at least 1, got -1"),
        ({"llama3_rope": {"factor": 2.0}}, "`llama3_rope` must have factor, high_freq_factor, low_freq_factor, "),
    ],
)
def test_parts_that_do_not_fit_are_refused(parts: dict, message: str):
    with pytest.raises(ValueError, match=message):
        config(**parts)
