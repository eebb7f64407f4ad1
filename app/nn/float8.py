"""Matrices in 8 bits: float8 (E4M3; Micikevicius et al., 2022, arXiv:2209.05433) and a scale for each row.

Scales are powers of two. A float's relative error does not depend on its scale, so that costs nothing; what
is in float8 already stays as it is, and a matrix that is widened to bfloat16 is exact there. There are two
ways to a product. "widened": the matrix is widened for as long as the product takes, and what comes in keeps
its 16 bits. "scaled": what comes in is rounded to 8 bits as well, a scale for each token, and a card
multiplies 8 bits by 8 bits. It knows nothing of files or of devices' abilities.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final, Literal

import torch
from torch import Tensor, nn

from app.nn.linear import Linear, linear

Product = Literal["widened", "scaled"]

PRODUCTS: Final[dict[Product, str]] = {  # in words
    "widened": "widened to 16 bits for each product",
    "scaled": "multiplied with tokens in float8",
}
FLOAT8: Final = torch.float8_e4m3fn
MULTIPLE: Final = 16  # of a matrix's sides, as a card's kernels for 8 bits want them
_MOST: Final = torch.finfo(FLOAT8).max
_LEAST: Final = 1e-30  # largest value of a row, as far as scales can tell it from zero
_PIECE: Final = 32_000  # elements; torch keeps fewer than 32,768 of them in the calling thread


class Float8Linear(nn.Module):
    """A `Linear` whose matrix is in 8 bits; its memory holds nothing before `receive_rows`."""

    weight: nn.Parameter
    scale: Tensor

    def __init__(self, wide: Linear, product: Product) -> None:
        super().__init__()
        self.product = product
        self.shape = wide.out_features, wide.in_features
        self.bias = wide.bias
        self.register_buffer("scale", None, persistent=False)  # made of the matrix, in no file
        self.receive_rows(wide.weight.device)

    def receive_rows(self, device: torch.device) -> Rows:
        """Memory for the matrix on the device; what it is given, it holds."""
        self.weight = nn.Parameter(torch.empty(self.shape, dtype=FLOAT8, device=device), requires_grad=False)
        self.scale = torch.empty(self.shape[0], 1, device=device)
        return Rows(self.weight, self.scale)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in_features), bfloat16 or float32 -> (..., out_features), of x's type."""
        if self.product == "widened":
            return linear(x, self.weight, self.bias, self.scale)
        values, scale = quantised(x.reshape(-1, x.shape[-1]))
        out: Tensor = torch._scaled_mm(
            values, self.weight.t(), scale, self.scale.t(), bias=self.bias, out_dtype=x.dtype
        )
        return out.view(*x.shape[:-1], len(self.weight))


class Rows:
    """A matrix in float8 that is filled some rows at a time, by several threads."""

    def __init__(self, values: Tensor, scale: Tensor) -> None:
        self._values, self._scale = values, scale

    @property
    def device(self) -> torch.device:
        return self._values.device

    def put(self, first: int, rows: Tensor) -> None:
        """rows (count, in), of any floating type, on the device: rows `first` and following."""
        for part in _pieces(rows):
            place = slice(first + part.start, first + part.stop)
            values, scale = quantised(_scalable(rows[part]))
            self._values[place].copy_(values)
            self._scale[place].copy_(scale)


def keep_in_float8(blocks: nn.Module, product: Product | None) -> None:
    """Replace the linear layers of `blocks` by such ones, before their values are loaded; odd sizes are
    always widened. None: leave all as they are."""
    if product is None:
        return
    for module in list(blocks.modules()):
        for name, child in module.named_children():
            if isinstance(child, Linear):
                odd = child.in_features % MULTIPLE or child.out_features % MULTIPLE
                setattr(module, name, Float8Linear(child, "widened" if odd else product))


def matrix_bytes(shape: tuple[int, ...]) -> int:
    """Memory of such a matrix and its scales."""
    return math.prod(shape) + 4 * shape[0]


def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (rows, columns), bfloat16 or float32, as float8 (rows, columns) times scales (rows, 1) in float32.

    A scale is the smallest power of two with which the row's largest value is one of float8. A value that is
    not finite becomes not a number, and spoils its row.
    """
    # On a CPU ten times as quick as the maximum norm, or as both at once (aminmax).
    largest = torch.maximum(x.amax(-1, keepdim=True), x.amin(-1, keepdim=True).neg_()).float()
    bits = (largest.clamp_min_(_LEAST) / _MOST).view(torch.int32)
    scale = (bits + 0x7FFFFF).bitwise_and_(0x7F800000).view(torch.float32)  # rounded up to a power of two
    return (x * scale.reciprocal().to(x.dtype)).to(FLOAT8), scale


def _scalable(rows: Tensor) -> Tensor:
    """In a type that holds every scale."""
    return rows if rows.dtype == torch.bfloat16 else rows.float()


def _pieces(rows: Tensor) -> Iterator[slice]:
    """Parts of few rows on a CPU, where a thread of ours must not wait for torch's: see `tensorread.cast`."""
    step = max(1, _PIECE // rows.shape[1]) if rows.device.type == "cpu" else max(1, len(rows))
    for first in range(0, len(rows), step):
        yield slice(first, min(first + step, len(rows)))
