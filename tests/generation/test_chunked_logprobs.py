"""Log-probabilities, entropies and gradients in tiles, against float64 and autograd."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from rlhf_cli.generation import chunked_logprobs
from rlhf_cli.generation import logprobs as logprobs_module
from rlhf_cli.generation.chunked_logprobs import ChunkedLogprobs, LogitTransform, matmul_dtype, operand, product
from rlhf_cli.generation.logprobs import Projection

N, V, D = 7, 53, 16
PLAIN = LogitTransform()


class Case(NamedTuple):
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor

    def to(self, dtype: torch.dtype) -> Case:
        """The same values in another type, each a leaf of autograd."""
        made = (None if one is None else one.detach().to(dtype).requires_grad_() for one in self[:3])
        return Case(*made, self.targets)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Neither divides the sizes, so that the last tiles are partial."""
    monkeypatch.setattr(chunked_logprobs, "VOCABULARY_TILE", 20)
    monkeypatch.setattr(chunked_logprobs, "TOKEN_TILE", 3)


def case(dtype: torch.dtype, *, biased: bool = False, n: int = N, v: int = V, d: int = D) -> Case:
    """Hidden states and weights whose largest logit is 25, as in a language model."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(n, d, generator=generator), torch.randn(v, d, generator=generator)
    weight *= 25.0 / (hidden @ weight.T).amax()
    bias = torch.randn(v, generator=generator) if biased else None
    targets = torch.multinomial((hidden @ weight.T).softmax(-1), 1, generator=generator).squeeze(1)
    targets[:4] = torch.tensor([0, v - 1, 19, 20])  # the ends of tiles
    return Case(hidden, weight, bias, targets).to(dtype)


def plain(given: Case, transform: LogitTransform) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies by definition, in float64."""
    y = given.hidden @ given.weight.T
    y = (y if given.bias is None else y + given.bias) * transform.scale
    if transform.softcap is not None:
        y = transform.softcap * torch.tanh(y / transform.softcap)
    logp = (y / transform.temperature).log_softmax(-1)
    return logp.gather(-1, given.targets.unsqueeze(-1)).squeeze(-1), -(logp.exp() * logp).sum(-1)


def ours(given: Case, transform: LogitTransform = PLAIN, *, trains_entropy: bool = False) -> tuple[Tensor, Tensor]:
    return ChunkedLogprobs.apply(*given, transform, trains_entropy)


def weighted(outputs: tuple[Tensor, Tensor]) -> Tensor:
    """A loss whose gradient by each output differs from token to token, and that uses the entropy as well."""
    logprobs, entropy = outputs
    weights = torch.linspace(-1, 2, len(logprobs), dtype=logprobs.dtype)
    return (weights * logprobs).sum() + 0.3 * (weights.flip(0) * entropy).sum()


CASES = [
    pytest.param({}, LogitTransform(), id="plain"),
    pytest.param({"biased": True}, LogitTransform(), id="bias"),
    pytest.param({}, LogitTransform(scale=0.25), id="scale"),
    pytest.param({}, LogitTransform(softcap=9.0), id="softcap"),
    pytest.param({}, LogitTransform(temperature=0.7), id="temperature"),
    pytest.param({"biased": True}, LogitTransform(0.5, 9.0, 0.7), id="all of them"),
]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-3)])
@pytest.mark.parametrize(("kind", "transform"), CASES)
def test_outputs_are_those_of_float64(kind, transform, dtype, tolerance):
    given = case(dtype, **kind)
    got = ours(given, transform)
    for mine, exact in zip(got, plain(given.to(torch.float64), transform), strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), exact, atol=tolerance, rtol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize(("kind", "transform"), CASES)
def test_gradients_are_those_of_float64(kind, transform, dtype, tolerance):
    given = case(dtype, **kind)
    exact = given.to(torch.float64)
    weighted(ours(given, transform)).backward()
    weighted(plain(exact, transform)).backward()
    for mine, theirs in zip(given[:3], exact[:3], strict=True):
        if mine is None:
            continue
        assert mine.grad.dtype == dtype
        assert (mine.grad.double() - theirs.grad).norm() < tolerance * theirs.grad.norm()


@pytest.mark.parametrize("output", [0, 1])
def test_one_output_alone_has_its_own_gradient(output):
    given = case(torch.float32)
    exact = given.to(torch.float64)
    ours(given)[output].sum().backward()
    plain(exact, LogitTransform())[output].sum().backward()
    torch.testing.assert_close(given.hidden.grad.double(), exact.hidden.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize(("kind", "transform"), CASES)
def test_a_frozen_head_has_the_same_gradients_in_fewer_products(kind, transform, dtype, tolerance, monkeypatch):
    given = case(dtype, **kind)
    exact = given.to(torch.float64)
    frozen = Case(given.hidden, *(None if one is None else one.detach() for one in given[1:3]), given.targets)
    products, plain_product = [], chunked_logprobs.product
    monkeypatch.setattr(
        chunked_logprobs, "product", lambda *given, **named: products.append(1) or plain_product(*given, **named)
    )
    factors = torch.linspace(-1, 2, N)
    (ours(frozen, transform)[0] * factors).sum().backward()
    (plain(exact, transform)[0] * factors).sum().backward()
    assert len(products) == 9 * (3 if transform.softcap else 2)  # 3 x 3 tiles
    error = (given.hidden.grad.double() - exact.hidden.grad).norm()
    assert error < tolerance * exact.hidden.grad.norm()


@pytest.mark.parametrize(("trains_entropy", "products"), [(True, 3), (False, 4)])
def test_a_frozen_head_has_gradients_of_the_entropy(trains_entropy, products, monkeypatch):
    given = case(torch.float32)
    exact = given.to(torch.float64)
    made, plain_product = [], chunked_logprobs.product
    monkeypatch.setattr(
        chunked_logprobs, "product", lambda *given, **named: made.append(1) or plain_product(*given, **named)
    )
    frozen = Case(given.hidden, given.weight.detach(), None, given.targets)
    weighted(ours(frozen, trains_entropy=trains_entropy)).backward()
    assert len(made) == 9 * products  # 3 x 3 tiles
    weighted(plain(exact, PLAIN)).backward()
    torch.testing.assert_close(given.hidden.grad.double(), exact.hidden.grad, atol=1e-4, rtol=1e-4)


def test_a_token_that_is_almost_certain_keeps_its_small_gradient(monkeypatch):
    """The gradient of a probability of 0.9995 is a difference of 0.0005; a GPU rounds both operands to bfloat16."""
    monkeypatch.setattr(chunked_logprobs, "operand", lambda tensor, dtype: tensor.bfloat16().float())
    hidden = torch.tensor([[7.0, 0.0]]).requires_grad_()
    weight = torch.tensor([[1.001, 0.503], [0.0, -1.007], [0.0, 1.003]])  # not numbers of bfloat16
    given = Case(hidden, weight, None, torch.tensor([0]))
    exact = Case(hidden, weight.bfloat16(), None, torch.tensor([0])).to(torch.float64)
    ours(given, LogitTransform(scale=1.2))[0].sum().backward()
    plain(exact, LogitTransform(scale=1.2))[0].sum().backward()
    torch.testing.assert_close(hidden.grad.double(), exact.hidden.grad, rtol=1e-2, atol=1e-7)


def test_tied_weights_add_their_gradients():
    """With tied embeddings the weights receive a gradient as the input's table too."""
    given = case(torch.float32)
    exact = given.to(torch.float64)
    for one in (given, exact):
        hidden = torch.nn.functional.embedding(one.targets, one.weight).tanh()
        tied = Case(hidden, *one[1:])
        weighted(ours(tied) if one is given else plain(tied, LogitTransform())).backward()
    torch.testing.assert_close(given.weight.grad.double(), exact.weight.grad, atol=1e-4, rtol=1e-4)


def test_autocast_does_not_round_logits():
    """float32 weights under bfloat16 autocast, as in full fine-tuning: torch would return bfloat16 logits."""
    given = case(torch.float32)
    exact, _ = plain(given.to(torch.float64), LogitTransform())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert matmul_dtype(given.hidden) == torch.bfloat16
        got, _ = ours(given)
        rounded = torch.log_softmax((given.hidden @ given.weight.T).float(), -1)
        weighted(ours(given)).backward()
    assert given.weight.grad.dtype == torch.float32
    torch.testing.assert_close(got.double(), exact, atol=1e-5, rtol=0)
    assert (rounded.gather(-1, given.targets.unsqueeze(-1)).squeeze(-1) - exact).abs().max() > 1e-2


def test_a_product_of_bfloat16_values_returns_float32():
    """At a size at which oneDNN takes over; bfloat16 logits of this size are off by 0.06."""
    torch.manual_seed(0)
    left, right = (torch.randn(*shape).bfloat16() for shape in ((64, 256), (256, 128)))
    before = torch.backends.mkldnn.matmul.fp32_precision
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = product(operand(left, torch.bfloat16), operand(right, torch.bfloat16), may_round=True)
    exact = left.double() @ right.double()
    assert got.dtype == torch.float32
    assert (got - exact).abs().max() < 1e-4
    assert ((left @ right).double() - exact).abs().max() > 0.03
    assert torch.backends.mkldnn.matmul.fp32_precision == before


@pytest.mark.parametrize(("hidden", "weight", "may_round"), [
    (torch.bfloat16, torch.bfloat16, True),
    (torch.float32, torch.bfloat16, False),
    (torch.bfloat16, torch.float32, False),
    (torch.float32, torch.float32, False),
])  # fmt: skip
def test_only_bfloat16_values_are_rounded(hidden, weight, may_round, monkeypatch):
    """Weights that train are float32, and a small change of theirs must not be lost."""
    given, seen = case(torch.float32), []
    given = Case(given.hidden.detach().to(hidden), given.weight.detach().to(weight), None, given.targets)
    given.hidden.requires_grad_()
    plain_product = chunked_logprobs.product

    def watched(left, right, *, may_round=False):
        seen.append(may_round)
        return plain_product(left, right, may_round=may_round)

    for module in (chunked_logprobs, logprobs_module):
        monkeypatch.setattr(module, "product", watched)
    head = Projection(given.weight, None, 1.0, None, weight == torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weighted(ours(given)).backward()
        head.as_operand(torch.bfloat16).logits(given.hidden.detach())
    assert set(seen) == {may_round}


def test_no_tensor_has_a_column_per_vocabulary_entry_and_a_row_per_token(monkeypatch):
    sizes = []
    plain_product = chunked_logprobs.product

    def watched(left, right, **named):
        made = plain_product(left, right, **named)
        sizes.append(tuple(made.shape))
        return made

    monkeypatch.setattr(chunked_logprobs, "product", watched)
    given = case(torch.float32)
    weighted(ours(given)).backward()
    assert sizes
    assert all(shape[0] <= 20 and shape[1] <= 20 for shape in sizes)


def test_no_token_gives_no_output_and_no_gradient():
    given = case(torch.float32)
    hidden = given.hidden[:0]
    logprobs, entropy = ours(Case(hidden, given.weight, None, given.targets[:0]))
    assert logprobs.shape == entropy.shape == (0,)
    (logprobs.sum() + entropy.sum()).backward()
    assert not given.weight.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_for_sampling_are_those_of_the_log_probabilities(dtype):
    given = case(dtype, biased=True)
    head = Projection(given.weight, given.bias, scale=0.5, softcap=9.0)
    logprobs, entropy = head.logprobs(given.hidden, given.targets, temperature=0.7)
    for one in (head, head.as_operand(dtype)):
        logp = (one.logits(given.hidden) / 0.7).log_softmax(-1)
        torch.testing.assert_close(logp.gather(-1, given.targets.unsqueeze(-1)).squeeze(-1), logprobs)
        torch.testing.assert_close(-(logp.exp() * logp).sum(-1), entropy, atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("kind", "transform"), CASES)
def test_the_gpu_multiplies_bfloat16_and_sums_in_float32(kind, transform):
    given = case(torch.bfloat16, n=64, v=1000, d=256, **kind)
    there = Case(*(None if one is None else one.detach().cuda() for one in given))
    got = ours(there, transform)
    for mine, exact in zip(got, plain(given.to(torch.float64), transform), strict=True):
        torch.testing.assert_close(mine.cpu().double(), exact, atol=2e-3, rtol=0)
    leaves = Case(*(None if one is None else one.requires_grad_() for one in there[:3]), there.targets)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        outputs = ours(leaves, transform)
    weighted(tuple(one.cpu() for one in outputs)).backward()
    exact = given.to(torch.float64)
    weighted(plain(exact, transform)).backward()
    error = (leaves.hidden.grad.cpu().double() - exact.hidden.grad).norm()
    assert error < 2e-2 * exact.hidden.grad.norm()
