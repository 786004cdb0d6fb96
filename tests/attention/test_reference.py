"""The reference is the equation: worked by hand, and the same as torch's own where torch has it."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_cli.attention.layout import Layout
from rlhf_cli.attention.registry import attention


def test_one_query_two_keys_by_hand():
    # Scores 0 and ln 3 give weights 1/4 and 3/4; L = ln 4.
    query = torch.ones(1, 1, 1, 1)
    key = torch.tensor([0.0, math.log(3)]).view(1, 1, 2, 1)
    value = torch.tensor([4.0, 8.0]).view(1, 1, 2, 1)
    found = attention(query, key, value, scale=1.0, backend="reference")
    assert found.output.item() == pytest.approx(7.0)
    assert found.logsumexp.item() == pytest.approx(math.log(4))


def test_a_sink_takes_its_share():
    query, key = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    found = attention(query, key, torch.full((1, 1, 1, 1), 6.0), sinks=torch.tensor([math.log(2)]), backend="reference")
    assert found.output.item() == pytest.approx(2.0)  # e^0 of e^0 + 2
    assert found.logsumexp.item() == pytest.approx(math.log(3))


def test_softcap_comes_before_the_bias():
    query, key = torch.ones(1, 1, 1, 1), torch.full((1, 1, 1, 1), 100.0)
    found = attention(query, key, key, scale=1.0, softcap=5.0, bias=torch.full((1, 1, 1, 1), 3.0), backend="reference")
    assert found.logsumexp.item() == pytest.approx(8.0)


@pytest.mark.parametrize("causal", [True, False])
def test_it_is_torchs_own(causal):
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, 5, 8, dtype=torch.float64) for heads in (4, 2, 2))
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)
    found = attention(query, key, value, causal=causal, backend="reference").output
    torch.testing.assert_close(found, expected)


def test_rows_that_see_nothing_give_zero_and_no_gradient():
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    sinks = torch.randn(2, dtype=torch.float64, requires_grad=True)
    layout = Layout.padded(torch.tensor([[0, 1, 1]], dtype=torch.bool))
    found = attention(query, key, value, layout, causal=True, sinks=sinks, backend="reference")
    assert (found.output[:, :, 0] == 0).all()
    assert torch.isneginf(found.logsumexp[:, :, 0]).all()
    (found.output.sum() + found.logsumexp[:, :, 1:].sum()).backward()
    for tensor in (query, key, value, sinks):
        assert torch.isfinite(tensor.grad).all()
    assert (query.grad[:, :, 0] == 0).all()
    assert (key.grad[:, :, 0] == 0).all()


def test_padding_filled_with_nan_changes_nothing():
    torch.manual_seed(0)
    tensors = [torch.randn(1, 2, 4, 4, dtype=torch.float64) for _ in range(3)]
    layout = Layout.packed([[2, 1]], width=4)
    clean = attention(*tensors, layout, causal=True, backend="reference").output
    for tensor in tensors:
        tensor[:, :, 3] = torch.nan
    torch.testing.assert_close(attention(*tensors, layout, causal=True, backend="reference").output, clean)


def test_gradients_agree_with_differences():
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, h, 4, 3, dtype=torch.float64, requires_grad=True) for h in (2, 1, 1))
    sinks = torch.randn(2, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    layout = Layout.tree([(2, [1, 1])])

    def both(query, key, value, sinks, bias):
        return attention(
            query, key, value, layout, causal=True, softcap=2.0, sinks=sinks, bias=bias, backend="reference"
        )

    assert torch.autograd.gradcheck(both, (query, key, value, sinks, bias))
