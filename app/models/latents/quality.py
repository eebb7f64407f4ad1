"""How near one clip is to another: PSNR, SSIM and the difference from frame to frame, frame after frame.

    measured = measure(zip(original, reconstructed))      # or Meter().add(frame, other) ... .quality()

Memory does not grow with the clip. Knows nothing of latents.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Frame = NDArray[np.uint8]

POINTS: Final = 1024  # of a curve at most
WINDOW, SIGMA = 11, 1.5  # Wang et al. 2004
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


@dataclass(frozen=True)
class Curve:
    """A value over a clip: each point is the mean of `every` frames, of the last one maybe of fewer."""

    every: int
    values: tuple[float, ...]


@dataclass(frozen=True)
class Quality:
    """How near a clip is to another. Frames are compared in pairs, as bytes of RGB.

    psnr: in dB, of the whole clip (from its mean squared error); None where not one byte differs.
    psnr_worst: of the worst frame. ssim, ssim_worst: mean and least over the frames, 1 for equal ones; None
    for frames with a side below 11 pixels. temporal, temporal_other: mean absolute change of a byte from a
    frame to the next, in the first clip and in the other: a higher one flickers more. temporal_error: mean
    absolute difference between these changes. The last three are None for one frame. psnr_curve: a point is
    from the mean of its frames' squared errors; equal frames count as 100 dB there.
    """

    frames: int
    psnr: float | None
    psnr_worst: float | None
    ssim: float | None
    ssim_worst: float | None
    temporal: float | None
    temporal_other: float | None
    temporal_error: float | None
    psnr_curve: Curve
    ssim_curve: Curve | None


class CurveOf:
    """Collects a curve: where it gets longer than `POINTS`, neighbours become one point."""

    def __init__(self) -> None:
        self._every, self._sums, self._waiting, self._count = 1, list[float](), 0.0, 0

    def add(self, value: float) -> None:
        self._waiting += value
        self._count += 1
        if self._count == self._every:
            self._sums.append(self._waiting)
            self._waiting, self._count = 0.0, 0
            if len(self._sums) == POINTS:
                self._sums = [a + b for a, b in zip(self._sums[::2], self._sums[1::2], strict=True)]
                self._every *= 2

    def curve(self) -> Curve:
        last = (self._waiting / self._count,) if self._count else ()
        return Curve(self._every, (*(total / self._every for total in self._sums), *last))


class Meter:
    """Compares two clips frame by frame: `add` each pair, then ask for the `quality`."""

    def __init__(self) -> None:
        self._errors, self._likenesses = CurveOf(), CurveOf()
        self._squared, self._worst, self._likeness, self._least = 0.0, 0.0, 0.0, math.inf
        self._changes = [0.0, 0.0, 0.0]
        self._before: tuple[Tensor, Tensor] | None = None
        self._count, self._windowed = 0, True

    def add(self, first: Frame, second: Frame) -> None:
        """One frame of each, (height, width, 3) uint8, of one size."""
        one, other = _planes(first), _planes(second)
        error = float((one - other).square().mean(dtype=torch.float64))
        self._errors.add(error)
        self._squared, self._worst = self._squared + error, max(self._worst, error)
        self._windowed = self._windowed and min(one.shape[1:]) >= WINDOW
        if self._windowed:
            likeness = ssim(one, other)
            self._likenesses.add(likeness)
            self._likeness, self._least = self._likeness + likeness, min(self._least, likeness)
        if self._before is not None:
            steps = one - self._before[0], other - self._before[1]
            for i, step in enumerate((*steps, steps[1] - steps[0])):
                self._changes[i] += float(step.abs().mean(dtype=torch.float64))
        self._before = one, other
        self._count += 1

    def quality(self) -> Quality:
        """ValueError where no frame was added."""
        if not self._count:
            raise ValueError("Clips of no frames cannot be compared.")
        count, windowed, errors = self._count, self._windowed, self._errors.curve()
        moves = [change / (count - 1) if count > 1 else None for change in self._changes]
        return Quality(
            frames=count,
            psnr=psnr(self._squared / count),
            psnr_worst=psnr(self._worst),
            ssim=self._likeness / count if windowed else None,
            ssim_worst=self._least if windowed else None,
            temporal=moves[0],
            temporal_other=moves[1],
            temporal_error=moves[2],
            psnr_curve=Curve(errors.every, tuple(psnr(error) or 100.0 for error in errors.values)),
            ssim_curve=self._likenesses.curve() if windowed else None,
        )


def measure(pairs: Iterable[tuple[Frame, Frame]]) -> Quality:
    """Compare frames (height, width, 3) uint8 in pairs of one size. ValueError where there are none."""
    meter = Meter()
    for first, second in pairs:
        meter.add(first, second)
    return meter.quality()


def psnr(error: float) -> float | None:
    """Peak signal-to-noise ratio of bytes in dB, from a mean squared error; None where that is 0."""
    return 10 * math.log10(255**2 / error) if error else None


def ssim(first: Tensor, second: Tensor) -> float:
    """Structural similarity of two pictures (channels, height, width) of values 0 to 255, float32.

    Wang, Bovik, Sheikh, Simoncelli: "Image quality assessment: from error visibility to structural
    similarity", 2004: Gaussian window of 11x11 with a standard deviation of 1.5, K1 = 0.01, K2 = 0.03, mean
    over all places where the window fits. Mean over channels, each on its own.
    """
    # Variances do not depend on the origin; near the middle of the range they lose fewer digits.
    a, b = first - 127.5, second - 127.5
    maps = torch.stack([a, b, a * a, b * b, a * b])
    mean_a, mean_b, aa, bb, ab = _blurred(maps)
    var_a, var_b, covariance = aa - mean_a**2, bb - mean_b**2, ab - mean_a * mean_b
    mean_a, mean_b = mean_a + 127.5, mean_b + 127.5
    alike = (2 * mean_a * mean_b + C1) * (2 * covariance + C2)
    return float((alike / ((mean_a**2 + mean_b**2 + C1) * (var_a + var_b + C2))).mean(dtype=torch.float64))


def _blurred(maps: Tensor) -> Tensor:
    """(n, channels, height, width) under the window, where it fits wholly."""
    taps = torch.exp(-0.5 * (torch.arange(WINDOW, dtype=torch.float32) - WINDOW // 2).square() / SIGMA**2)
    taps = taps / taps.sum()
    planes = maps.shape[0] * maps.shape[1]
    down, right = (taps.view(1, 1, *sides).repeat(planes, 1, 1, 1) for sides in ((-1, 1), (1, -1)))
    # As channels that lie together: six times as fast as plane by plane.
    flat = maps.flatten(0, 1)[None].contiguous(memory_format=torch.channels_last)
    blurred = F.conv2d(F.conv2d(flat, down, groups=planes), right, groups=planes)
    return blurred.contiguous().view(*maps.shape[:2], *blurred.shape[2:])


def _planes(frame: Frame) -> Tensor:
    assert frame.ndim == 3 and frame.shape[2] == 3, frame.shape
    return torch.tensor(frame).permute(2, 0, 1).float()
