"""Matrices in 8 bits: what is kept of their values, and both ways to a product."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from app.nn import linear as module
from app.nn.float8 import FLOAT8, Float8Linear, Product, keep_in_float8, matrix_bytes, quantised
from app.nn.linear import Linear
from tests.scaled import needs_scaled_rows


def widened(values: Tensor, scale: Tensor) -> Tensor:
    return values.double() * scale.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-20, 1e-4, 1.0, 1e4, 1e30])
def test_a_value_is_off_by_a_sixteenth_at_most(dtype: torch.dtype, size: float) -> None:
    torch.manual_seed(0)
    x = (torch.randn(64, 512) * size).to(dtype)
    values, scale = quantised(x)
    assert values.dtype == FLOAT8 and scale.shape == (64, 1) and scale.dtype == torch.float32
    assert torch.equal(torch.frexp(scale).mantissa, torch.full_like(scale, 0.5)), "powers of two"
    largest = values.float().abs().amax(1)
    assert (largest <= 448).all() and (largest > 200).all(), "the range is used"
    off = (widened(values, scale) - x.double()).abs()
    assert (off <= x.double().abs() / 16 + scale.double() * 2**-10).all()
    assert off.square().mean().sqrt() < 0.03 * x.double().square().mean().sqrt()


def test_a_power_of_two_is_as_good_a_scale_as_any_and_much_better_than_none() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 512) * 0.01  # as trained weights are
    own = x.abs().amax(1, keepdim=True) / 448
    ways = [widened(*quantised(x)), widened((x / own).to(FLOAT8), own), x.to(FLOAT8).double()]
    powers, exact, none = ((way - x).norm() / x.norm() for way in ways)
    assert powers < 1.02 * exact and powers < 0.6 * none


@pytest.mark.parametrize("largest", [448.0, 240.0, 2.0**-6, 2.0**-9])
def test_what_is_in_float8_already_stays_as_it_is(largest: float) -> None:
    every = torch.arange(256, dtype=torch.uint8).view(FLOAT8).float()
    every = every[every.isfinite() & (every.abs() <= largest)]
    values, scale = quantised(every[None])
    assert torch.equal(widened(values, scale)[0], every.double())


def test_rows_have_scales_of_their_own_and_odd_rows_harm_no_other() -> None:
    x = torch.randn(6, 32)
    x[0] *= 1e6
    x[1], x[2, 3], x[3, 4] = 0, math.inf, math.nan
    values, scale = quantised(x)
    back = widened(values, scale)
    assert (back[1] == 0).all() and back[2, 3].isnan() and back[3, 4].isnan()
    for row in (0, 4, 5):
        torch.testing.assert_close(
            back[row], x[row].double(), rtol=1 / 16, atol=2e-3 * x[row].abs().max().item()
        )
    assert quantised(torch.empty(0, 32))[0].shape == (0, 32)


def made(product: Product, dtype: torch.dtype, bias: bool, sides: tuple[int, int] = (32, 48)) -> Float8Linear:
    """A layer with drawn values."""
    torch.manual_seed(0)
    wide = Linear(sides[1], sides[0], bias=bias).to(dtype).requires_grad_(False)
    layer = Float8Linear(wide, product)
    layer.receive_rows(torch.device("cpu")).put(0, wide.weight)
    return layer


@pytest.fixture(params=[True, False], ids=["slow", "native"])
def arithmetic(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU with 16-bit arithmetic, and one without, which takes few rows at a time."""
    monkeypatch.setattr(module, "slow_in", lambda dtype: request.param and dtype != torch.float32)
    monkeypatch.setattr(module, "_BLOCK", 7 * 48)


@pytest.mark.usefixtures("arithmetic")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(48,), (5, 48), (2, 3, 48), (0, 48)])
def test_widened_is_the_product_with_what_is_kept(
    dtype: torch.dtype, bias: bool, shape: tuple[int, ...]
) -> None:
    layer = made("widened", dtype, bias)
    x = torch.randn(shape).to(dtype)
    kept = widened(layer.weight, layer.scale)
    exact = F.linear(x.double(), kept, layer.bias.double() if bias else None)
    out = layer(x)
    assert out.dtype == dtype and out.shape == exact.shape
    torch.testing.assert_close(out.double(), exact, rtol=torch.finfo(dtype).eps, atol=2e-6)


@needs_scaled_rows
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(48,), (5, 48), (2, 3, 48), (0, 48)])
def test_scaled_is_widened_of_rounded_tokens(bias: bool, shape: tuple[int, ...]) -> None:
    layer, plain = made("scaled", torch.bfloat16, bias), made("widened", torch.bfloat16, bias)
    x = torch.randn(shape).bfloat16()
    rounded = widened(*quantised(x.reshape(-1, 48))).view(shape).bfloat16()
    out = layer(x)
    assert out.dtype == torch.bfloat16 and out.shape == (*shape[:-1], 32)
    torch.testing.assert_close(out, plain(rounded), rtol=2**-7, atol=1e-3)
    if len(x) > 1:
        apart = (out - plain(x)).float().norm() / out.float().norm()
        assert 0 < apart < 0.05, "tokens in 8 bits are not those in 16"


def test_linear_layers_are_replaced_and_odd_ones_always_widened() -> None:
    inner = nn.Sequential(Linear(32, 48), nn.LayerNorm(48), Linear(48, 24))
    blocks = nn.ModuleList([inner, nn.Linear(16, 16)])
    keep_in_float8(blocks, None)
    assert not any(isinstance(layer, Float8Linear) for layer in blocks.modules())
    keep_in_float8(blocks, "scaled")
    found = {name: layer for name, layer in blocks.named_modules() if isinstance(layer, Float8Linear)}
    assert {name: layer.product for name, layer in found.items()} == {"0.0": "scaled", "0.2": "widened"}
    for layer in found.values():
        assert matrix_bytes(layer.shape) == layer.weight.nbytes + layer.scale.nbytes
