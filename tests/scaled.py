"""Products of 8 bits by 8 bits, a scale for each row, as cards make them: whether a CPU does, too."""

from __future__ import annotations

import pytest
import torch

from app.nn.float8 import FLOAT8


def rows_are_scaled() -> bool:
    eights, scale = torch.ones(16, 16).to(FLOAT8), torch.ones(16, 1)
    try:
        torch._scaled_mm(eights, eights.t(), scale, scale.t(), out_dtype=torch.bfloat16)
    except RuntimeError:  # 2.11 has one scale for all
        return False
    return True


needs_scaled_rows = pytest.mark.skipif(
    not rows_are_scaled(), reason=f"torch {torch.__version__} scales no rows of float8 on a CPU"
)
