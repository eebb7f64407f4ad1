"""Linear layers whose 16-bit products are fast on any CPU.

A CPU without 16-bit arithmetic (AVX2 has none) multiplies 16-bit matrices some ten times slower than float32
ones. There a product is computed in float32, from a few rows of the weight at a time: what is widened stays
in a core's cache, and the model keeps its size. Sums are float32 either way, and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_BLOCK = 2**20  # elements of a weight that are widened at a time
_onednn_is_available: Callable[[], bool] = torch.backends.mkldnn.is_available


class Linear(nn.Linear):
    """`nn.Linear`, by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in_features) -> (..., out_features), of the weight's type."""
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """x (..., in) times weight (out, in) transposed, plus bias: (..., out), of x's type, as the weight is;
    or scale, (out, 1), is that of a weight in 8 bits."""
    if x.device.type != "cpu" or not slow_in(x.dtype):
        return F.linear(x, _widened(weight, scale, x.dtype), bias)
    wide = x.float()
    out = torch.empty((*x.shape[:-1], len(weight)), dtype=x.dtype)
    rows = max(1, _BLOCK // weight.shape[1])
    for begin in range(0, len(weight), rows):
        part = slice(begin, begin + rows)
        own = None if bias is None else bias[part].float()
        factor = None if scale is None else scale[part]
        out[..., part] = F.linear(wide, _widened(weight[part], factor, torch.float32), own)
    return out


def _widened(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    wide = weight.to(dtype)
    return wide if scale is None else wide.mul_(scale.to(dtype))


def slow_in(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of this type slowly: whether oneDNN leaves them to others."""
    if dtype not in (torch.bfloat16, torch.float16):
        return False
    if not _onednn_is_available():
        return True
    ours = torch.ops.mkldnn
    return not (
        ours._is_mkldnn_bf16_supported() if dtype == torch.bfloat16 else ours._is_mkldnn_fp16_supported()
    )
