"""The main figures of docs/precision.md, on one small clip: 8 bits change less than another seed does."""

from __future__ import annotations

import pytest

from tests.scaled import needs_scaled_rows
from tools.measure_float8 import WAYS, WIDTHS, differences, products, restorers, table
from tools.nano_data import scene

pytestmark = needs_scaled_rows


def test_8_bits_stay_inside_the_spread_of_seeds() -> None:
    found = differences(restorers(), scene(100_001, 9, 96, 128), steps=1)
    print("\n".join(table({"scene 100001": found})))
    seed, half = found["another seed"], found["bfloat16"]
    assert 0 < half.rms < seed.rms
    for way in WAYS[1:]:
        assert found[way].rms < 0.8 * seed.rms, "inside the spread, with room"
        assert half.rms < found[way].rms < 1.4 * half.rms, "most of it is that of 16 bits"


@pytest.mark.parametrize("width", WIDTHS)
def test_a_product_is_as_exact_in_a_wide_model_as_in_a_narrow_one(width: int) -> None:
    half, widened, scaled = products(width)
    assert half < 0.005
    assert 0.015 < widened < 0.03 < scaled < 0.045
