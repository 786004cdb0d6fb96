"""The decode kernels in Triton's interpreter against the reference. `test_decode.py` runs this file.

Triton decides when it is imported whether it interprets, and most tests import it without: these need a process of
their own, with TRITON_INTERPRET=1.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from rlhf_cli.attention.backends.reference import attention_weights
from rlhf_cli.attention.contract import Request
from rlhf_cli.attention.layout import Layout, Segment
from rlhf_cli.attention.registry import attention
from rlhf_cli.errors import UsageError
from tests.attention.kernels.verified import sample

BOTH_SIDES = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0]], dtype=torch.bool)
LAYOUTS = {
    "one query": Layout.dense(2, 1, 40),
    "three queries": Layout.dense(2, 3, 21),
    "padded cache": Layout.padded(BOTH_SIDES, query_length=1, query_offset=6),
    "static cache": Layout.padded(
        torch.tensor([[0, 1, 1, 1, 0], [1, 1, 1, 1, 0]], dtype=torch.bool), query_length=2, query_offset=2
    ),
    "no real key": Layout(1, 2, 3, (Segment(0, 1, 0, 0), Segment(1, 1, 0, 3))),
    "shared prompt": Layout(
        1, 4, 51, (Segment(0, 0, 0, 34), *(Segment(n, 1, 34 + 4 * n, 4 - n, 0) for n in range(4)))
    ),
    "two prompts in two rows": Layout(
        2, 2, 24,
        (Segment(0, 0, 0, 20), Segment(0, 1, 20, 1, 0), Segment(1, 1, 21, 3, 0),
         Segment(2, 0, 24, 5), Segment(2, 2, 29, 6, 3)),
    ),
    "tree of three levels": Layout(
        1, 8, 8, (Segment(0, 3, 0, 3), Segment(3, 2, 3, 2, 0), Segment(5, 2, 5, 2, 1), Segment(7, 1, 7, 1, 0))
    ),
}  # fmt: skip
RULES = {
    "causal": {"causal": True},
    "all": {"causal": False},
    "window": {"causal": True, "window": 3},
    "window, both sides": {"causal": False, "window": 2},
    "softcap": {"causal": True, "softcap": 1.5},
    "sinks": {"causal": True, "sinks": torch.tensor([0.5, -1.0, 2.0, -30.0])},
}


def tensors(layout: Layout, *, heads=4, key_heads=2, size=16, value_size=None, dtype=torch.float32):
    generator = torch.Generator().manual_seed(layout.key_length)

    def draw(*shape: int):
        return torch.randn(*shape, generator=generator).to(dtype)

    return (
        draw(layout.batch, heads, layout.query_length, size),
        draw(layout.batch, key_heads, layout.key_length, size),
        draw(layout.batch, key_heads, layout.key_length, value_size or size),
    )


def decode(query, key, value, layout, *, causal=True, window=None, softcap=None, sinks=None):
    from rlhf_cli.attention.kernels.decode import decode

    rules = {"causal": causal, "window": window, "softcap": softcap, "sinks": sinks}
    return decode(query, key, value, layout, scale=query.shape[-1] ** -0.5, **rules)


def exact(inputs, layout, **rules):
    rules = {"causal": True} | rules
    return attention(*(tensor.double() for tensor in inputs), layout, backend="reference", **rules)


def assert_within_twice_torchs(inputs, layout, **rules):
    """FlashAttention's rule: max|out - exact| <= 2 max|torch at the same dtype - exact| + what one rounding costs."""
    expected, found = exact(inputs, layout, **rules), decode(*inputs, layout, **rules)
    plain = attention(*inputs, layout, backend="torch", **({"causal": True} | rules)).output
    assert found.output.dtype == inputs[0].dtype
    torchs = (plain.double() - expected.output).abs().max()
    floor = 2 * torch.finfo(inputs[0].dtype).eps * expected.output.abs().max()
    assert (found.output.double() - expected.output).abs().max() <= 2 * torchs + floor
    torch.testing.assert_close(found.logsumexp, expected.logsumexp.float(), atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("case", sample([f"{layout}: {rule}" for layout in LAYOUTS for rule in RULES]))
def test_output_and_logsumexp_are_the_references(case):
    layout, rule = case.split(": ")
    assert_within_twice_torchs(tensors(LAYOUTS[layout]), LAYOUTS[layout], **RULES[rule])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("heads", "key_heads", "size", "value_size"),
    [(4, 4, 20, 20), (6, 2, 33, 12), (5, 1, 8, 64), (20, 2, 16, 16), (2, 1, 256, 128)],
)
def test_heads_of_every_number_and_size(heads, key_heads, size, value_size, dtype):
    layout = LAYOUTS["shared prompt"]
    shape = {"heads": heads, "key_heads": key_heads, "size": size, "value_size": value_size}
    assert_within_twice_torchs(tensors(layout, **shape, dtype=dtype), layout)


@pytest.mark.parametrize("rule", ["window", "softcap", "sinks"])
def test_rules_in_half_precision(rule):
    layout = LAYOUTS["shared prompt"]
    assert_within_twice_torchs(tensors(layout, dtype=torch.float16), layout, **RULES[rule])


def test_scores_too_large_for_exp_do_not_overflow():
    layout = LAYOUTS["shared prompt"]
    query, key, value = tensors(layout)
    inputs = (100 * query, 10 * key, value)
    found = decode(*inputs, layout).output
    assert torch.isfinite(found).all()
    assert ((found.double() - exact(inputs, layout).output).abs() <= most_that_rounding_may_do(inputs, layout)).all()


def most_that_rounding_may_do(inputs, layout):
    """How far an output in float32 may be from the true one: (B, H, Lq, Dv).

    A score is a sum of D products, scaled: whatever the order of its terms, it errs by at most
    d = (D + 2) u scale sum|q k|, with u half of eps (Higham 2002, section 3.1). A weight w = exp(s - L) is then between
    w exp(-2 d) and w exp(2 d), d being the largest of its row. Weights sum to 1, so o' - o = sum (w' - w) (v - o), and
    |o' - o| <= (exp(2 d) - 1) sum w |v - o|. The second sum, of N weighted values, adds at most (N + 4) eps max|v|.
    """
    query, key, value = (tensor.double() for tensor in inputs)
    group = query.shape[1] // key.shape[1]
    scale, rules = query.shape[-1] ** -0.5, {"causal": True, "window": None, "softcap": None}
    weights, _ = attention_weights(query, key, layout, scale=scale, sinks=None, bias=None, **rules)
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    eps = torch.finfo(torch.float32).eps
    is_seen = layout.visible(causal=True, window=None, device=query.device).unsqueeze(1)
    sizes = (scale * query.abs() @ key.abs().transpose(-1, -2)).masked_fill(~is_seen, 0.0)
    score_error = (query.shape[-1] + 2) * eps / 2 * sizes.amax(-1, keepdim=True)  # (B, H, Lq, 1)
    distance = (value.unsqueeze(2) - (weights @ value).unsqueeze(3)).abs()  # (B, H, Lq, Lk, Dv)
    spread = (weights.unsqueeze(-1) * distance).sum(3)
    return torch.expm1(2 * score_error) * spread + (value.shape[2] + 4) * eps * value.abs().max()


@pytest.mark.parametrize("layout", ["padded cache", "static cache", "shared prompt", "two prompts in two rows"])
def test_what_padding_holds_changes_nothing(layout):
    where = LAYOUTS[layout]
    clean = tensors(where)
    is_real = (where.is_real(), where.is_real_key(), where.is_real_key())
    dirty = [
        tensor.masked_fill(~rows[:, None, :, None], torch.nan) for tensor, rows in zip(clean, is_real, strict=True)
    ]
    assert not all(rows.all() for rows in is_real)
    torch.testing.assert_close(tuple(decode(*dirty, where)), tuple(decode(*clean, where)), rtol=0, atol=0)


@pytest.mark.parametrize("factor", [1, -1])
def test_many_chunks_are_merged(factor):
    """Scores that rise, or fall, along the keys, so that the largest is in the last, or first, of many chunks."""
    layout = Layout.dense(1, 1, 120)
    query, key, value = tensors(layout, heads=2, key_heads=1)
    key = query.sum(1, keepdim=True) * factor * torch.linspace(-1, 1, 120).view(1, 1, 120, 1) + 0.1 * key
    assert_within_twice_torchs((query, key, value), layout)


def test_any_strides():
    layout = LAYOUTS["three queries"]
    clean = tensors(layout)
    strided = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in clean]
    strided[1] = clean[1].transpose(2, 3).contiguous().transpose(2, 3)
    torch.testing.assert_close(decode(*strided, layout).output, decode(*clean, layout).output, rtol=0, atol=0)


@pytest.mark.parametrize("view", [lambda sinks: sinks[::2], lambda sinks: sinks[:1].expand(4)])
def test_sinks_of_any_stride(view):
    layout = LAYOUTS["shared prompt"]
    sinks = view(torch.tensor([0.5, 9.0, -1.0, 9.0, 2.0, 9.0, 1.0, 9.0]))
    assert_within_twice_torchs(tensors(layout), layout, sinks=sinks)


def test_rows_too_far_apart_for_32_bits_are_copied():
    from rlhf_cli.attention.kernels.arguments import addressable

    near, far = (torch.empty(1, device="meta").as_strided((1, 1, 3, 16), (1, 1, step, 1)) for step in (2**29, 2**30))
    assert addressable(near) is near
    assert addressable(far).is_contiguous()


def test_tensors_of_several_dtypes_are_refused():
    from rlhf_cli.attention.kernels import decode, function

    layout = LAYOUTS["three queries"]
    query, key, value = tensors(layout, dtype=torch.float16)
    rules = {"scale": 1.0, "causal": True, "window": None, "softcap": None, "sinks": None}
    for attend in (decode.decode, partial(function.attend, bias=None)):
        with pytest.raises(UsageError, match="different dtypes: float32, float16, float16"):
            attend(query.float(), key, value, layout, **rules)


def test_the_same_input_gives_the_same_bits():
    layout = LAYOUTS["shared prompt"]
    inputs = tensors(layout, dtype=torch.float16)
    first = decode(*inputs, layout)
    for _ in range(2):
        again = decode(*inputs, layout)
        assert torch.equal(again.output, first.output)
        assert torch.equal(again.logsumexp, first.logsumexp)


def test_more_answers_do_not_read_the_prompt_more_often():
    from rlhf_cli.attention.kernels.decode import launches

    def reads(answers: int) -> int:
        own = (Segment(number, 1, 64 + number, 1, 0) for number in range(answers))
        layout = Layout(1, answers, 64 + answers, (Segment(0, 0, 0, 64), *own))
        rules = {"scale": 1.0, "causal": True, "window": None, "softcap": None, "sinks": None}
        work = launches(*tensors(layout, key_heads=4), layout, **rules)[0].arguments["work"]
        return sum(length for _, row, length, *_ in work.tolist() if row < 64)

    assert [reads(answers) for answers in (1, 2, 16)] == [64, 64, 64]


def test_a_long_run_of_keys_is_split_among_programs():
    from rlhf_cli.attention.kernels.decode import launches

    layout = Layout.dense(1, 1, 100)
    rules = {"scale": 1.0, "causal": True, "softcap": None, "sinks": None}
    first, *_ = launches(*tensors(layout), layout, window=None, **rules)
    assert first.programs > 2  # with one chunk it would be one a key head
    narrow, *_ = launches(*tensors(layout), layout, window=20, **rules)
    assert sum(narrow.arguments["work"][:, 2].tolist()) == 20  # keys that nobody sees are not read


def request(layout: Layout) -> Request:
    query, key, value = tensors(layout)
    no_rules = {"causal": True, "window": None, "softcap": None, "sinks": None, "bias": None}
    return Request.of(query, key, value, layout, **no_rules)


def test_decoding_is_few_queries_over_many_keys_without_gradient_or_bias():
    from rlhf_cli.attention.kernels.decode import serves

    decoding = request(LAYOUTS["shared prompt"])
    assert serves(decoding)
    assert serves(request(Layout.dense(2, 1, 1)))
    assert serves(request(Layout.dense(2, 16, 64)))
    assert not serves(request(Layout.dense(2, 16, 63)))
    assert not serves(request(Layout.dense(2, 17, 1000)))
    assert not serves(request(Layout.dense(0, 1, 10)))
    assert not serves(replace(decoding, needs_grad=True))
    assert not serves(replace(decoding, has_bias=True))
