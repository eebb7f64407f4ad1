"""Colour repair: give restored frames the colours of their source.

Every function takes `content` (restored) and `style` (the source at the same size), both
(frames, 3, height, width) float32 RGB in [-1, 1], and returns new frames. Each frame is repaired from
itself and its own source alone, so that the way a clip is cut into chunks changes nothing.
Written from definitions; knows nothing of models or files.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

ColorFix = Literal["wavelet", "adain", "lab", "none"]
COLOR_FIXES: tuple[ColorFix, ...] = get_args(ColorFix)

LEVELS = 5
VARIANCE_FLOOR = 1e-5


def repair(method: ColorFix, content: Tensor, style: Tensor) -> Tensor:
    """Repair `content` by `method`, frame by frame: only one frame's intermediates exist at a time."""
    assert content.shape == style.shape, (content.shape, style.shape)
    if method == "none":
        return content
    one = {"wavelet": wavelet, "adain": adain, "lab": lab}[method]
    out = torch.empty_like(content)
    for i in range(len(content)):
        out[i] = one(content[i : i + 1], style[i : i + 1])[0]
    return out


def wavelet(content: Tensor, style: Tensor) -> Tensor:
    """The detail of `content` on the residual of `style` (a trous decomposition, five levels).

    Holschneider et al. 1989; kernel (1 2 1)/4 along each axis, dilation 2^level, edges repeated. The
    decomposition is linear, so content - low(content) + low(style) = content + low(style - content), and
    one pass does the work of two. Not clamped: values may leave [-1, 1] a little.
    """
    low = style - content
    for level in range(LEVELS):
        low = _smooth(low, 2**level)
    return low.add_(content)


def _smooth(x: Tensor, dilation: int) -> Tensor:
    """(n, c, h, w) convolved with the 3x3 binomial kernel of this dilation, edges repeated."""
    wide = F.pad(x, (dilation, dilation, 0, 0), mode="replicate")
    x = (wide[..., 2 * dilation :] + wide[..., : -2 * dilation]).add_(x, alpha=2)
    tall = F.pad(x, (0, 0, dilation, dilation), mode="replicate")
    return (tall[..., 2 * dilation :, :] + tall[..., : -2 * dilation, :]).add_(x, alpha=2).mul_(1 / 16)


def adain(content: Tensor, style: Tensor) -> Tensor:
    """Mean and standard deviation of each channel of each frame moved from `style` to `content`.

    Huang and Belongie 2017, with unbiased variance + 1e-5. Not clamped.
    """
    mean, deviation = _statistics(content)
    style_mean, style_deviation = _statistics(style)
    return (content - mean).mul_(style_deviation / deviation).add_(style_mean)


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over the pixels of (n, c, h, w), each (n, c, 1, 1)."""
    variance, mean = torch.var_mean(x, dim=(-2, -1), keepdim=True)
    return mean, (variance + VARIANCE_FLOOR).sqrt()


# CIE L*a*b*: sRGB primaries and D65 white (IEC 61966-2-1), CIE 15:2004 for L*, a*, b*.
_RGB_TO_XYZ = (
    (0.4124564, 0.3575761, 0.1804375),
    (0.2126729, 0.7151522, 0.0721750),
    (0.0193339, 0.1191920, 0.9503041),
)
_DELTA = 6 / 29
_LAB_BLOCK = 8
_LAB_GAIN = (0.5, 2.0)


def lab(content: Tensor, style: Tensor) -> Tensor:
    """Mean and spread of L*, a* and b* moved from `style` to `content`, then clamped to [-1, 1].

    Reinhard et al. 2001, "Color Transfer between Images", in CIELAB. Two things make it safe here.
    Statistics come from the means of 8x8 blocks, so that restored detail and removed noise are not taken
    for contrast. The gain of each axis stays within [0.5, 2], so that a nearly grey or flat frame is not
    blown up. Strong blues may still turn purple: the axes are moved independently.
    """
    ours, theirs = _to_lab(content), _to_lab(style)
    mean, deviation = _block_statistics(ours)
    style_mean, style_deviation = _block_statistics(theirs)
    gain = (style_deviation / deviation).clamp(*_LAB_GAIN)
    return _from_lab((ours - mean).mul_(gain).add_(style_mean))


def _block_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over the 8x8 block means of (n, 3, h, w), each (n, 3, 1, 1)."""
    blocks = F.avg_pool2d(x, _LAB_BLOCK, ceil_mode=True)
    variance, mean = torch.var_mean(blocks, dim=(-2, -1), keepdim=True, correction=0)
    # a spread far below one step of L*a*b* is no information: the floor makes two flat frames have gain 1
    return mean, (variance + 1e-2).sqrt()


def _matrix(like: Tensor, *, inverted: bool = False) -> Tensor:
    """Linear sRGB -> XYZ relative to the white point, so that white is (1, 1, 1), or the way back.

    Computed on the CPU in float64, which not every device has."""
    matrix = torch.tensor(_RGB_TO_XYZ, dtype=torch.float64, device="cpu")
    matrix = matrix / matrix.sum(1, keepdim=True)
    return (torch.linalg.inv(matrix) if inverted else matrix).to(dtype=like.dtype, device=like.device)


def _to_lab(frames: Tensor) -> Tensor:
    """(n, 3, h, w) sRGB in [-1, 1] -> L* in [0, 100], a*, b*."""
    rgb = frames.add(1).mul_(0.5).clamp_(0, 1)
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = torch.einsum("ij,njhw->nihw", _matrix(linear), linear)
    f = torch.where(xyz > _DELTA**3, xyz.clamp_min(_DELTA**3) ** (1 / 3), xyz / (3 * _DELTA**2) + 4 / 29)
    x, y, z = f.unbind(1)
    return torch.stack((116 * y - 16, 500 * (x - y), 200 * (y - z)), 1)


def _from_lab(lab_frames: Tensor) -> Tensor:
    """The inverse of `_to_lab`; colours outside sRGB are clamped to [-1, 1]."""
    lightness, a, b = lab_frames.unbind(1)
    y = (lightness + 16) / 116
    f = torch.stack((y + a / 500, y, y - b / 200), 1)
    xyz = torch.where(f > _DELTA, f**3, 3 * _DELTA**2 * (f - 4 / 29))
    inverse = _matrix(xyz, inverted=True)
    linear = torch.einsum("ij,njhw->nihw", inverse, xyz).clamp_(0, 1)
    rgb = torch.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
    return rgb.mul_(2).sub_(1).clamp_(-1, 1)
