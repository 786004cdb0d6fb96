"""Every backend against the reference: all layouts, all rules, outputs, log-sum-exps and gradients."""

from __future__ import annotations

import pytest
import torch

from rlhf_cli.attention.layout import Layout, Segment
from rlhf_cli.attention.registry import attention

LEFT_RIGHT = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0]], dtype=torch.bool)

LAYOUTS = {
    "dense": Layout.dense(2, 9),
    "fewer queries": Layout.dense(2, 3, 8),
    "padded": Layout.padded(LEFT_RIGHT),
    "a whole row of padding": Layout.padded(torch.tensor([[1, 1, 1], [0, 0, 0]], dtype=torch.bool)),
    "static cache": Layout.padded(
        torch.tensor([[0, 1, 1, 1, 0], [1, 1, 1, 1, 0]], dtype=torch.bool), query_length=2, query_offset=2
    ),
    "packed": Layout.packed([[3, 1, 4], [5]], width=9),
    "empty segments": Layout.packed([[0, 3, 0, 2]]),
    "cross": Layout.cross(4, LEFT_RIGHT),
    "cross, no key": Layout(1, 2, 3, (Segment(0, 1, 0, 0), Segment(1, 1, 0, 3))),
    "tree": Layout.tree([(4, [3, 1, 5]), (2, [2])]),
    "tree of three levels": Layout(
        1, 8, 8, (Segment(0, 3, 0, 3), Segment(3, 2, 3, 2, 0), Segment(5, 2, 5, 2, 1), Segment(7, 1, 7, 1, 0))
    ),
    "decoding after a shared prompt": Layout(
        1, 2, 9, (Segment(0, 0, 0, 5), Segment(0, 1, 5, 2, 0), Segment(1, 1, 7, 1, 0))
    ),
}
RULES = {
    "causal": {"causal": True},
    "all": {"causal": False},
    "window": {"causal": True, "window": 3},
    "window, both sides": {"causal": False, "window": 2},
    "softcap": {"causal": True, "softcap": 1.5},
}


def tensors(layout: Layout, *, heads: int = 4, key_heads: int = 2, size: int = 5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(layout.query_length)

    def draw(*shape: int):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    query = draw(layout.batch, heads, layout.query_length, size)
    return query, *(draw(layout.batch, key_heads, layout.key_length, size) for _ in range(2))


def gradients(outputs, inputs):
    generator = torch.Generator().manual_seed(1)
    total = sum(
        (tensor.masked_fill(torch.isneginf(tensor), 0.0) * torch.randn(tensor.shape, generator=generator)).sum()
        for tensor in outputs
    )
    return torch.autograd.grad(total, inputs, materialize_grads=True, retain_graph=True)


@pytest.fixture(params=["tiled", "torch, a loop", "torch, groups", "torch, small groups", "torch, a mask"])
def backend(request, monkeypatch):
    """Tiny tiles, so that short sequences span several of them; torch with a loop over segments, in groups of them and
    with a mask."""
    monkeypatch.setattr("rlhf_cli.attention.backends.tiled.QUERY_TILE", 2)
    monkeypatch.setattr("rlhf_cli.attention.backends.tiled.KEY_TILE", 3)
    monkeypatch.setattr("rlhf_cli.attention.backends.library.SHORT_SEGMENT", 1000 if "mask" in request.param else 0)
    if "groups" in request.param:
        floating = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
        monkeypatch.setattr("rlhf_cli.attention.backends.library.GROUPED", dict.fromkeys(floating, 100))
    else:
        monkeypatch.setattr("rlhf_cli.attention.backends.library.GROUPED", {})
    if "small" in request.param:
        monkeypatch.setattr("rlhf_cli.attention.backends.short_segments.FREE_PADDING", 0)
    return request.param.split(",")[0]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_outputs_and_gradients_are_the_references(backend, layout, rule):
    inputs = tensors(LAYOUTS[layout])
    expected = attention(*inputs, LAYOUTS[layout], **RULES[rule], backend="reference")
    found = attention(*inputs, LAYOUTS[layout], **RULES[rule], backend=backend)
    torch.testing.assert_close(found.output, expected.output)
    torch.testing.assert_close(gradients([found.output], inputs), gradients([expected.output], inputs))
    if backend == "tiled":
        torch.testing.assert_close(found.logsumexp, expected.logsumexp)
        both = gradients([found.output, found.logsumexp], inputs)
        torch.testing.assert_close(both, gradients([expected.output, expected.logsumexp], inputs))


@pytest.mark.parametrize("layout", ["dense", "padded", "tree", "a whole row of padding", "fewer queries"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 4, 1, 1), (-1, 1, 0, 0), (1, 4, 0, 0), (-1, 4, 0, 0)])
def test_a_bias_and_sinks_get_their_gradients(backend, layout, shape):
    where = LAYOUTS[layout]
    inputs = tensors(where)
    full = (where.batch, 4, where.query_length, where.key_length)
    # -1 and 0 stand for the whole size of batch or length.
    bias = torch.randn([size if asked in (-1, 0) else asked for size, asked in zip(full, shape, strict=True)])
    bias = bias.double().requires_grad_()
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True) if backend == "tiled" else None
    every = [*inputs, bias, *([sinks] if sinks is not None else [])]
    expected = attention(*inputs, where, causal=True, bias=bias, sinks=sinks, backend="reference").output
    found = attention(*inputs, where, causal=True, bias=bias, sinks=sinks, backend=backend).output
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients([found], every), gradients([expected], every))


@pytest.mark.parametrize("layout", ["dense", "padded", "tree", "cross, no key"])
def test_sinks(backend, layout):
    inputs, sinks = tensors(LAYOUTS[layout]), torch.randn(4, dtype=torch.float64, requires_grad=True)
    every = [*inputs, sinks]
    expected = attention(*inputs, LAYOUTS[layout], causal=True, sinks=sinks, backend="reference")
    found = attention(*inputs, LAYOUTS[layout], causal=True, sinks=sinks, backend=backend)
    torch.testing.assert_close(found.output, expected.output)
    torch.testing.assert_close(gradients([found.output], every), gradients([expected.output], every))
    if backend == "tiled":
        torch.testing.assert_close(found.logsumexp, expected.logsumexp)
        torch.testing.assert_close(gradients([found.logsumexp], every), gradients([expected.logsumexp], every))


@pytest.mark.parametrize("layout", ["padded", "packed", "static cache"])
@pytest.mark.parametrize("rule", RULES)
def test_padding_filled_with_nan_changes_nothing(backend, layout, rule):
    where = LAYOUTS[layout]
    clean = tensors(where)
    dirty = [tensor.detach().clone() for tensor in clean]
    dirty[0].masked_fill_(~where.is_real()[:, None, :, None], torch.nan)
    for tensor in dirty[1:]:
        tensor.masked_fill_(~where.is_real_key()[:, None, :, None], torch.nan)
    dirty = [tensor.requires_grad_() for tensor in dirty]
    expected = attention(*clean, where, **RULES[rule], backend="reference").output
    found = attention(*dirty, where, **RULES[rule], backend=backend).output
    torch.testing.assert_close(found, expected)
    real = [where.is_real(), where.is_real_key(), where.is_real_key()]
    pairs = zip(gradients([found], dirty), gradients([expected], clean), real, strict=True)
    for mine, theirs, rows in pairs:
        keep = rows[:, None, :, None]
        torch.testing.assert_close(mine.masked_fill(~keep, 0.0), theirs.masked_fill(~keep, 0.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_output_keeps_the_dtype_of_the_query(backend, dtype):
    layout = LAYOUTS["tree"]
    inputs = tensors(layout, dtype=dtype)
    found = attention(*inputs, layout, causal=True, backend=backend).output
    assert found.dtype == dtype
    expected = attention(*(tensor.double() for tensor in inputs), layout, causal=True, backend="reference").output
    torch.testing.assert_close(found.double(), expected, atol=2e-2 if dtype != torch.float32 else 1e-5, rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rule", [{}, {"softcap": 2.0}])
def test_a_row_fully_hidden_by_a_bias_gives_zero_and_no_gradient(backend, rule, dtype):
    inputs = tensors(LAYOUTS["dense"], dtype=dtype)
    bias = torch.zeros(1, 1, 9, 9, dtype=dtype)
    bias[..., 2, :] = -torch.inf
    bias.requires_grad_()
    found = attention(*inputs, LAYOUTS["dense"], causal=True, bias=bias, backend=backend, **rule).output
    expected = attention(
        *(tensor.double() for tensor in inputs), LAYOUTS["dense"], causal=True, bias=bias.double(),
        backend="reference", **rule,
    ).output  # fmt: skip
    assert (found[:, :, 2] == 0).all()
    close = {} if dtype == torch.float64 else {"atol": 2e-2, "rtol": 2e-2}
    torch.testing.assert_close(found.double(), expected, **close)
    for mine, theirs in zip(gradients([found.double()], [*inputs, bias]), gradients([expected], [*inputs, bias]),
                            strict=True):  # fmt: skip
        assert torch.isfinite(theirs).all()
        torch.testing.assert_close(mine, theirs, **({} if dtype == torch.float64 else {"atol": 0.2, "rtol": 0.1}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_queries_before_the_first_key_see_nothing(backend, dtype):
    layout = Layout(1, 60, 50, (Segment(0, 60, 0, 50),))
    inputs = tensors(layout, dtype=dtype)
    found = attention(*inputs, layout, causal=True, backend=backend).output
    assert (found[:, :, :10] == 0).all()
    assert torch.isfinite(found).all()


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_no_queries_or_no_keys(backend, shape):
    layout = Layout.dense(2, *shape)
    found = attention(*tensors(layout), layout, causal=False, backend=backend).output
    assert found.shape == (2, 4, shape[0], 5)
    assert (found == 0).all()


def test_a_bias_may_omit_batch_and_heads(backend):
    bias = torch.randn(9, 9, dtype=torch.float64)
    inputs = tensors(LAYOUTS["dense"])
    expected = attention(*inputs, LAYOUTS["dense"], causal=True, bias=bias, backend="reference").output
    found = attention(*inputs, LAYOUTS["dense"], causal=True, bias=bias, backend=backend).output
    torch.testing.assert_close(found, expected)


def test_values_may_have_another_head_size_than_keys(backend):
    layout = LAYOUTS["tree"]
    query, key, _ = tensors(layout)
    value = torch.randn(1, 2, layout.key_length, 3, dtype=torch.float64)
    expected = attention(query, key, value, layout, causal=True, backend="reference").output
    torch.testing.assert_close(attention(query, key, value, layout, causal=True, backend=backend).output, expected)


def test_tiled_allocates_nothing_quadratic_in_the_length():
    """The largest tensor of a forward and backward pass is an input or one tile of scores."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from rlhf_cli.attention.backends import tiled

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            made = function(*args, **(kwargs or {}))
            for tensor in made if isinstance(made, tuple | list) else [made]:
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return made

    length, heads, size = 2048, 2, 8
    query, key, value = (torch.randn(1, heads, length, size, requires_grad=True) for _ in range(3))
    with Watch():
        found = attention(query, key, value, causal=True, needs_logsumexp=True, backend="tiled")
        (found.output.sum() + found.logsumexp.sum()).backward()
    assert largest <= heads * max(tiled.QUERY_TILE * tiled.KEY_TILE, length * size)
    assert largest < heads * length * length / 10
