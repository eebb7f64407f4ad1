"""Products in 16 bits: the same numbers however they are computed."""

import pytest
import torch
from torch import nn

from app.nn import linear as module
from app.nn.linear import Linear, linear


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without 16-bit arithmetic, whatever this one has; few rows at a time."""
    monkeypatch.setattr(module, "slow_in", lambda dtype: dtype != torch.float32)
    monkeypatch.setattr(module, "_BLOCK", 7 * 24)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(24,), (5, 24), (2, 3, 24), (0, 24)])
def test_sixteen_bits_are_the_exact_product_rounded_once(slow, dtype, bias, shape):
    torch.manual_seed(0)
    layer = Linear(24, 16, bias=bias).to(dtype).requires_grad_(False)
    x = torch.randn(shape).to(dtype)
    exact = x.double() @ layer.weight.double().T + (layer.bias.double() if bias else 0)
    out = layer(x)
    assert out.dtype == dtype and out.shape == exact.shape
    torch.testing.assert_close(out.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_other_types_and_native_arithmetic_are_torchs(monkeypatch):
    x, layer = torch.randn(5, 24), nn.Linear(24, 16).requires_grad_(False)
    assert torch.equal(linear(x, layer.weight, layer.bias), layer(x))
    monkeypatch.setattr(module, "slow_in", lambda dtype: False)
    x, layer = x.bfloat16(), layer.bfloat16()
    assert torch.equal(linear(x, layer.weight, layer.bias), layer(x))


def test_a_product_has_a_gradient(slow):
    layer = Linear(24, 16).bfloat16()
    x = torch.randn(5, 24).bfloat16().requires_grad_()
    layer(x).float().sum().backward()
    expected = layer.weight.detach().float().sum(0).expand(5, 24)
    torch.testing.assert_close(x.grad.float(), expected, rtol=0.02, atol=0.02)
    assert layer.weight.grad is not None and layer.bias.grad is not None
