"""The fused product of an adapted layer is PEFT's, forward and backward, and applies only where it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn
from torch.autograd import gradcheck

from rlhf_cli.models.adapter_layers import adapter_layers
from rlhf_cli.models.fused_lora import FusedLoraLinear, LowRankProduct
from rlhf_cli.models.loading import ModelSource, load_policy
from rlhf_cli.models.lora import add_lora
from rlhf_cli.settings.shared import LoraSettings


def adapted(folder: Path, *, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> list[FusedLoraLinear]:
    model = load_policy(ModelSource(str(folder), dtype=dtype))
    torch.manual_seed(0)
    add_lora(model, LoraSettings(rank=3, alpha=12.0, dropout=dropout))
    found = [layer for _, layer in adapter_layers(model)]
    for layer in found:
        nn.init.normal_(layer.lora_B["default"].weight)  # type: ignore[arg-type]
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("has_bias", [True, False])
def test_gradients_are_those_of_finite_differences(has_bias: bool):
    torch.manual_seed(0)
    x, weight, a, b = (torch.randn(*shape, dtype=torch.float64) for shape in ((6, 5), (4, 5), (2, 5), (4, 2)))
    bias = torch.randn(4, dtype=torch.float64) if has_bias else None
    inputs = [one.requires_grad_() for one in (x, a, b)]
    assert gradcheck(lambda x, a, b: LowRankProduct.apply(x, weight, bias, a, b, 0.7), inputs)
    expected = x @ weight.T + 0.7 * (x @ a.T @ b.T) + (0.0 if bias is None else bias)
    torch.testing.assert_close(LowRankProduct.apply(x, weight, bias, a, b, 0.7), expected)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_it_agrees_with_peft(tiny_qwen2: Path, precision: torch.dtype):
    is_exact = precision == torch.float32
    for layer in adapted(tiny_qwen2, dtype=precision):
        assert type(layer) is FusedLoraLinear
        x = torch.randn(2, 5, layer.in_features, dtype=precision)
        direction = torch.randn(2, 5, layer.out_features)

        def run(forward, x: Tensor = x, layer: FusedLoraLinear = layer, direction: Tensor = direction) -> list[Tensor]:
            x = x.clone().requires_grad_()
            factors = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
            with torch.autocast("cpu", dtype=precision, enabled=not is_exact):
                y = forward(layer, x)
            assert y.dtype == precision
            (y.float() * direction).sum().backward()
            found = [y.detach().float(), x.grad.float(), *(factor.grad.clone() for factor in factors)]  # type: ignore
            for factor in factors:
                factor.grad = None
            return found

        for ours, theirs in zip(run(FusedLoraLinear.forward), run(PeftLinear.forward), strict=True):
            tolerance = 1e-5 if is_exact else 0.02 * float(theirs.abs().max())
            torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=1e-5)


def test_without_an_active_adapter_it_is_the_layer_itself(tiny_llama: Path):
    layer = adapted(tiny_llama)[0]
    x = torch.randn(3, layer.in_features)
    expected = nn.functional.linear(x, layer.base_layer.weight)
    layer.enable_adapters(False)
    assert torch.equal(layer(x), expected)
    layer.enable_adapters(True)
    assert not torch.allclose(layer(x), expected)


def test_peft_computes_what_it_does_not_cover(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch):
    calls: list[nn.Module] = []
    real = PeftLinear.forward

    def watched(self: PeftLinear, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        calls.append(self)
        return real(self, x, *args, **kwargs)

    monkeypatch.setattr(PeftLinear, "forward", watched)
    plain, other, trained = (adapted(tiny_llama, dropout=rate)[0] for rate in (0.0, 0.5, 0.0))
    trained.base_layer.weight.requires_grad_(True)
    x = torch.randn(3, plain.in_features)
    plain(x)
    assert not calls
    other(x)
    trained(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain(x)  # a float32 weight would be cast in the forward and again in the backward pass
    assert calls == [other, trained, plain]
