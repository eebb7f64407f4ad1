"""Products with matrices in 8 bits on a CUDA card: `python -m pytest -m gpu -s tests/gpu/test_float8.py`."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor, nn

from app.device import place
from app.nn.float8 import Float8Linear, Product, quantised
from app.nn.linear import Linear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="NO CUDA CARD HERE: nothing of the GPU path is tested"
    ),
]
CARD = torch.device("cuda")
TOKENS = 8192  # of a timed product: a run of SeedVR2's windows


def made(product: Product, rows: int, columns: int, bias: bool = True) -> tuple[Linear, Float8Linear]:
    """A layer in bfloat16, and the same in float8."""
    torch.manual_seed(0)
    wide = Linear(columns, rows, bias=bias).to(CARD, torch.bfloat16).requires_grad_(False)
    layer = Float8Linear(wide, product)
    layer.receive_rows(CARD).put(0, wide.weight)
    return wide, layer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [0, 1, 7, 64, 1000, 4097])
def test_the_card_multiplies_8_bits_as_it_multiplies_16(tokens: int, bias: bool) -> None:
    """Rows in odd numbers too: runs of windows have any."""
    if place("cuda", "float8").float8 != "scaled":
        pytest.skip("NO CARD OF COMPUTE CAPABILITY 8.9 HERE: its products in 8 bits are not tested")
    _, layer = made("scaled", 1536, 3072, bias)
    _, plain = made("widened", 1536, 3072, bias)
    x = torch.randn(tokens, 3072, device=CARD).bfloat16()
    values, scale = quantised(x)
    rounded = values.bfloat16() * scale.bfloat16()
    torch.testing.assert_close(layer(x), plain(rounded), rtol=2**-6, atol=5e-3)


@pytest.mark.parametrize(("rows", "columns"), [(9216, 3072), (12288, 3072), (3072, 12288)])
def test_what_a_product_takes(rows: int, columns: int) -> None:
    """The 7B's matrices: times are printed, not judged."""
    x = torch.randn(TOKENS, columns, device=CARD).bfloat16()
    times = {}
    products: tuple[Product, ...] = ("widened", "scaled")
    for product in products if place("cuda", "float8").float8 == "scaled" else products[:1]:
        wide, layer = made(product, rows, columns)
        times |= {"bfloat16": seconds(wide, x), product: seconds(layer, x)}
    ratios = ", ".join(f"{way} {spent / times['bfloat16']:.2f}" for way, spent in times.items())
    print(f"\n{rows}x{columns}, {TOKENS} tokens: {times['bfloat16'] * 1e3:.2f} ms; {ratios}")
    assert all(spent > 0 for spent in times.values())


def seconds(layer: nn.Module, x: Tensor) -> float:
    """Of a product, the best of five times ten."""
    layer(x)
    best = float("inf")
    for _ in range(5):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(10):
            layer(x)
        torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - begin) / 10)
    return best
