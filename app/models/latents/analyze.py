"""What latents hold: statistics of each channel, what each looks at, how the clip moves among them, and how
much smaller than the frames they are.

    statistics = channel_statistics(latents)
    tracks = principal_components({"original": latents, "edited": edited})
    holds = channel_map(fit.frames(frames), latents, codec.facts)

Latents are read in order, once each; memory does not grow with the clip. Only `principal_components` needs
scikit-learn. Pictures and pages are made by `report.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from app.models.latents.chunks import regroup
from app.models.latents.codec import Facts
from app.models.latents.extra import require
from app.models.latents.spool import Latents, chunks

BINS, REACH = 64, 6.0  # of histograms: from -REACH to REACH, what is beyond in the outer bins
SAMPLES, POOL = 512, 16  # of the principal components: latents, evenly taken, of at most POOL x POOL places
FEATURES: Final = ("luma", "blue", "red", "edges", "motion")


@dataclass(frozen=True)
class Channel:
    """One channel of latents. `change`: mean absolute difference from a latent to the next, None for one
    latent. `histogram`: shares of the values in `BINS` equal bins from -6 to 6."""

    mean: float
    std: float
    least: float
    most: float
    change: float | None
    histogram: tuple[float, ...]


@dataclass(frozen=True)
class Tracks:
    """How clips move among their latents. `points`: per clip, per taken latent, its components along the axes
    of the largest variance of all clips together. `numbers`: per clip, which latents were taken. `explained`:
    share of the variance that each axis holds."""

    points: dict[str, tuple[tuple[float, ...], ...]]
    numbers: dict[str, tuple[int, ...]]
    explained: tuple[float, ...]


@dataclass(frozen=True)
class Compression:
    """What a clip takes as latents. `values`: numbers of the frames per number of the latents. `bytes_32`,
    `bytes_16`: bytes of the frames (8 bits a colour) per byte of the latents, 32 or 16 bits a number.
    `codebook`: the same where latents are entries of a codebook, written as their numbers; None where there
    is none."""

    frames: int
    latents: int
    values: float
    bytes_32: float
    bytes_16: float
    codebook: float | None


def channel_statistics(latents: Latents) -> tuple[Channel, ...]:
    """One pass, summed in float64 around the first latent's mean, so that a large mean costs no digits."""
    channels, count, height, width = latents.shape
    total, squared, changes = (torch.zeros(channels, dtype=torch.float64) for _ in range(3))
    least, most = torch.full((channels,), math.inf), torch.full((channels,), -math.inf)
    bins = torch.zeros(channels, BINS, dtype=torch.int64)
    origin: Tensor | None = None
    before: Tensor | None = None
    for chunk in chunks(latents):
        for latent in chunk.unbind(1):
            flat = latent.flatten(1).double()
            origin = flat.mean(1, keepdim=True) if origin is None else origin
            total += (flat - origin).sum(1)
            squared += (flat - origin).square().sum(1)
            least, most = torch.minimum(least, latent.amin((1, 2))), torch.maximum(most, latent.amax((1, 2)))
            index = ((flat + REACH) / (2 * REACH) * BINS).clamp(0, BINS - 1).long()
            bins.scatter_add_(1, index, torch.ones_like(index))
            if before is not None:
                changes += (flat - before).abs().mean(1)
            before = flat
    assert origin is not None
    places = count * height * width
    offset = total / places
    std = (squared / places - offset.square()).clamp(min=0).sqrt()
    return tuple(
        Channel(
            mean=float(origin[c, 0] + offset[c]),
            std=float(std[c]),
            least=float(least[c]),
            most=float(most[c]),
            change=float(changes[c]) / (count - 1) if count > 1 else None,
            histogram=tuple((bins[c].double() / places).tolist()),
        )
        for c in range(channels)
    )


def principal_components(clips: Mapping[str, Latents], axes: int = 3) -> Tracks:
    """Principal components of the latents of clips of one size, all clips together, a latent a sample.

    Of a long clip `SAMPLES` latents are taken, evenly; latents are averaged to at most 16x16 places first.

    Raises:
        UnavailableError: `package_missing`: scikit-learn is not installed.
    """
    pca = _sklearn_pca()
    numbers = {name: _evenly(clip.shape[1]) for name, clip in clips.items()}
    rows = [_pooled(clip.read(n, n + 1)[:, 0]) for name, clip in clips.items() for n in numbers[name]]
    samples = torch.stack(rows).double().numpy()
    kept = min(axes, *samples.shape)
    model = pca(n_components=kept, svd_solver="full")
    with np.errstate(invalid="ignore", divide="ignore"):
        found = model.fit_transform(samples)
    # Of samples that are all alike there is no variance, and no share of it.
    explained = [float(share) if math.isfinite(share) else 0.0 for share in model.explained_variance_ratio_]
    points: dict[str, tuple[tuple[float, ...], ...]] = {}
    begin = 0
    for name in clips:
        part = found[begin : begin + len(numbers[name])]
        points[name] = tuple(tuple(float(value) for value in row) for row in part)
        begin += len(part)
    return Tracks(points, numbers, tuple(explained))


def channel_map(frames: Iterable[Tensor], latents: Latents, facts: Facts) -> tuple[dict[str, float], ...]:
    """What each channel holds: its correlation (Pearson, -1 to 1) with features of the frames, over all
    places and times.

    frames: chunks (n, 3, height, width) in [-1, 1], as the codec encoded them. latents: what they became.
    Features, averaged over the pixels and frames that a latent covers: luma; blue and red (differences to
    luma, BT.601); edges (length of luma's gradient); motion (change of luma to the frame before). 0 where
    either does not vary.
    """
    channels, count, height, width = latents.shape
    names = channels + len(FEATURES)
    total, products = torch.zeros(names, dtype=torch.float64), torch.zeros(names, names, dtype=torch.float64)
    origin: Tensor | None = None
    last: Tensor | None = None
    seen = 0
    for number, group in enumerate(regroup(frames, 0, facts.first, facts.temporal)):
        if number == count:
            break
        features, last = _features(group.detach().cpu().float(), last, (height, width))
        values = torch.cat([latents.read(number, number + 1)[:, 0], features]).flatten(1).double()
        origin = values.mean(1, keepdim=True) if origin is None else origin
        values = values - origin
        total += values.sum(1)
        products += values @ values.T
        seen += height * width
    covariance = products / seen - torch.outer(total, total) / seen**2
    spread = covariance.diagonal().clamp(min=0).sqrt()
    scale = torch.outer(spread[:channels], spread[channels:])
    level = scale > 1e-9
    found = torch.where(level, covariance[:channels, channels:] / scale.clamp(min=1e-9), 0.0).clamp(-1, 1)
    return tuple(dict(zip(FEATURES, row, strict=True)) for row in found.tolist())


def compression(latents: Latents, frames: int, height: int, width: int, facts: Facts) -> Compression:
    """Of a clip of `frames` frames of height x width, as it was before it was made to fit the codec."""
    channels, count, rows, columns = latents.shape
    pixels = frames * height * width * 3
    numbers = channels * count * rows * columns
    bits = math.log2(facts.codebook) * count * rows * columns if facts.codebook else None
    return Compression(
        frames=frames,
        latents=count,
        values=pixels / numbers,
        bytes_32=pixels / (4 * numbers),
        bytes_16=pixels / (2 * numbers),
        codebook=8 * pixels / bits if bits else None,
    )


def colours(latents: Latents, moments: Sequence[float], like: Latents | None = None) -> list[Tensor]:
    """Latents at moments (0 the first, 1 the last) as pictures (height, width, 3) in [0, 1]: the three
    directions of the channels in which these latents vary most as red, green and blue. `like`: the clip whose
    latents give the directions, so that two clips can be compared; by default the clip itself."""
    flat, base = _flat(latents, moments), _flat(like or latents, moments)
    middle = base.mean(1, keepdim=True)
    flat, base = flat - middle, base - middle
    _, directions = torch.linalg.eigh(base @ base.T)
    axes = directions.flip(1)[:, :3]
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()  # eigenvectors have no sign
    spread = (4 * (axes.T @ base).std(1, keepdim=True, correction=0)).clamp(min=1e-9)
    shown = F.pad(axes.T @ flat / spread, (0, 0, 0, 3 - axes.shape[1]))
    shown = (shown + 0.5).clamp(0, 1).float()
    return [part.view(3, *latents.shape[2:]).permute(1, 2, 0) for part in shown.chunk(len(moments), 1)]


def _flat(latents: Latents, moments: Sequence[float]) -> Tensor:
    """(channels, places) of the latents at `moments`, one after the other."""
    numbers = [round(moment * (latents.shape[1] - 1)) for moment in moments]
    return torch.cat([latents.read(n, n + 1).flatten(1) for n in numbers], 1).double()


def _features(frames: Tensor, last: Tensor | None, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(features, height, width) of the frames (n, 3, h, w) of one latent, and the luma of the last."""
    red, green, blue = frames.unbind(1)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    down, right = F.pad(luma.diff(dim=1), (0, 0, 0, 1)), F.pad(luma.diff(dim=2), (0, 1))
    before = torch.cat([luma[:1] if last is None else last, luma[:-1]])
    planes = torch.stack([luma, blue - luma, red - luma, torch.hypot(down, right), (luma - before).abs()])
    return F.adaptive_avg_pool2d(planes.mean(1), size), luma[-1:]


def _pooled(latent: Tensor) -> Tensor:
    _, height, width = latent.shape
    return F.adaptive_avg_pool2d(latent, (min(height, POOL), min(width, POOL))).flatten()


def _evenly(count: int) -> tuple[int, ...]:
    taken = min(count, SAMPLES)
    return tuple(round(i * (count - 1) / max(taken - 1, 1)) for i in range(taken))


def _sklearn_pca() -> type:
    require("sklearn.decomposition")
    found: type = import_module("sklearn.decomposition").PCA
    return found
