"""Frames as tensors: sizes, resizing, cropping and padding.

Knows nothing of files, of rates or of any model but one fact: SeedVR2 works on sides that are multiples
of 16 (8 for the autoencoder times 2 for the transformer's patches).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from app.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MULTIPLE = 16
REFLECTED_ROWS = 8
BLACK_ROWS = 16
SMALLEST_SIDE, LARGEST_SIDE = 16, 16384


@dataclass(frozen=True)
class Crop:
    """Where the picture lies in padded frames: the first `height` rows and `width` columns."""

    height: int
    width: int


def to_unit(frames: NDArray[np.uint8] | NDArray[np.uint16]) -> Tensor:
    """(frames, height, width, 3) uint8 or uint16 -> (frames, 3, height, width) float32 in [0, 1]."""
    import numpy as np

    assert frames.ndim == 4 and frames.shape[-1] == 3, frames.shape
    peak = np.iinfo(frames.dtype).max
    return torch.from_numpy(frames.astype(np.float32)).permute(0, 3, 1, 2).contiguous().div_(peak)


def resize(frames: Tensor, height: int, width: int) -> Tensor:
    """(frames, 3, h, w) float32 in [0, 1] -> (frames, 3, height, width), clamped to [0, 1].

    Antialiased bicubic, as the original resizes: bicubic overshoots at edges, hence the clamp.
    """
    if frames.shape[-2:] == (height, width):
        return frames
    return F.interpolate(frames, (height, width), mode="bicubic", antialias=True, align_corners=False).clamp_(
        0, 1
    )


def area_size(height: int, width: int, res_h: int, res_w: int) -> tuple[int, int]:
    """The original's size: the same shape with the area of res_h x res_w, each side rounded (to even)."""
    scale = math.sqrt(res_h * res_w / (height * width))
    return round(height * scale), round(width * scale)


def target_size(
    height: int,
    width: int,
    *,
    to_height: int | None = None,
    to_width: int | None = None,
    scale: float | None = None,
    short_side: int | None = None,
    multiple: int = 1,
) -> tuple[int, int]:
    """The (height, width) a user asks for; nothing asked for means the source's own.

    One of: `to_height` and `to_width` (with one of them the other keeps the shape), `scale` (a factor for
    both sides), `short_side`. Sides that follow from others are rounded to `multiple` (2 for the 4:2:0
    video that plays everywhere); sides that are given, or do not change, are kept as they are.
    Raises UsageError: size_conflict, size_invalid.
    """
    ways = [to_height is not None or to_width is not None, scale is not None, short_side is not None]
    if sum(ways) > 1:
        raise UsageError(
            "size_conflict",
            f"The output size is given in {sum(ways)} ways (height {to_height}, width {to_width}, scale"
            f" {scale}, short side {short_side}); give height and/or width, or scale, or the short side.",
        )

    def fit(side: int, factor: float) -> int:
        return side if factor == 1 else max(1, round(side * factor / multiple)) * multiple

    if scale is not None:
        if not (math.isfinite(scale) and scale > 0):
            raise UsageError("size_invalid", f"The scale is {scale}; give a number above 0, such as 2.")
        size = fit(height, scale), fit(width, scale)
    elif short_side is not None:
        factor = short_side / min(height, width)
        size = (short_side, fit(width, factor)) if height <= width else (fit(height, factor), short_side)
    elif to_height is not None:
        size = to_height, to_width if to_width is not None else fit(width, to_height / height)
    elif to_width is not None:
        size = fit(height, to_width / width), to_width
    elif max(height, width) <= LARGEST_SIDE:
        return height, width
    else:
        size = height, width
    if not all(SMALLEST_SIDE <= side <= LARGEST_SIDE for side in size):
        raise UsageError(
            "size_invalid",
            f"The output would be {size[1]}x{size[0]} (from {width}x{height}); each side must be"
            f" {SMALLEST_SIDE} to {LARGEST_SIDE} pixels: ask for another size.",
        )
    return size


def center_crop16(frames: Tensor) -> Tensor:
    """(..., h, w) cut around its centre to sides that are multiples of 16, as the original does."""
    height, width = frames.shape[-2:]
    rows, columns = height - height % MULTIPLE, width - width % MULTIPLE
    assert rows and columns, f"frames of {width}x{height} are smaller than {MULTIPLE} pixels"
    top, left = round((height - rows) / 2), round((width - columns) / 2)
    return frames[..., top : top + rows, left : left + columns]


def preprocess_original(frames: Tensor, res_h: int, res_w: int) -> Tensor:
    """(frames, 3, h, w) in [0, 1] -> what the original encodes: in [-1, 1], sides multiples of 16."""
    size = area_size(frames.shape[-2], frames.shape[-1], res_h, res_w)
    return center_crop16(resize(frames, *size)) * 2 - 1


def padded_size(height: int, width: int) -> tuple[int, int]:
    """The size `pad_reflect_black` gives: 720x1280 -> 752x1280, 1080x1920 -> 1104x1920."""
    reflected = REFLECTED_ROWS + -(height + REFLECTED_ROWS) % MULTIPLE
    return height + reflected + BLACK_ROWS, width + -width % MULTIPLE


def pad_reflect_black(frames: Tensor) -> tuple[Tensor, Crop]:
    """(frames, 3, h, w) in [-1, 1] -> the same with sides that are multiples of 16, and where it lies.

    Below: at least 8 reflected rows, then exactly 16 black ones; right: reflected columns where needed.
    Black rows alone damage the lowest rows of the picture, reflection alone lets brightness drift
    (measured on SeedVR2); together they do neither.
    """
    height, width = frames.shape[-2:]
    rows, columns = padded_size(height, width)
    down = _mirror(height, rows - BLACK_ROWS, frames.device)
    right = _mirror(width, columns, frames.device)
    picture = frames.index_select(-2, down)
    if columns != width:
        picture = picture.index_select(-1, right)
    return F.pad(picture, (0, 0, 0, BLACK_ROWS), value=-1.0), Crop(height, width)


def unpad(frames: Tensor, crop: Crop) -> Tensor:
    """Undo `pad_reflect_black`: (..., H, W) -> (..., crop.height, crop.width), a view."""
    return frames[..., : crop.height, : crop.width]


def _mirror(side: int, length: int, device: torch.device) -> Tensor:
    """Indices 0..side-1 continued by reflection without repeating the edge, back and forth where needed."""
    period = max(1, 2 * (side - 1))
    index = torch.arange(length, device=device) % period
    return torch.minimum(index, period - index) if side > 1 else torch.zeros_like(index)
