"""Edits that look along time: smoothing, sharpening, shuffling, freezing and swapping motion. See
`edit_request.py`."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from app.models.latents.edit_request import Motion, Sharpen, Shuffle, Smooth
from app.models.latents.spool import Latents, View, chunks, held_to_length

REACH = 3  # standard deviations of the Gaussian on each side; beyond lie 0.3 %


def smooth(edit: Smooth, clip: Latents, clips: Mapping[str, Latents]) -> Latents:
    return View(clip.shape, lambda start, stop: _smoothed(clip, edit.sigma, start, stop))


def sharpen(edit: Sharpen, clip: Latents, clips: Mapping[str, Latents]) -> Latents:
    def read(start: int, stop: int) -> Tensor:
        before = clip.read(start, stop)
        return before + (before - _smoothed(clip, edit.sigma, start, stop)) * edit.amount

    return View(clip.shape, read)


def _smoothed(clip: Latents, sigma: float, start: int, stop: int) -> Tensor:
    """A Gaussian over time. At the ends of the clip the weights of the latents that are there are made to sum
    to 1 again, so that a still clip stays as it is."""
    reach = math.ceil(REACH * sigma)
    first, last = max(start - reach, 0), min(stop + reach, clip.shape[1])
    near = clip.read(first, last)
    total = torch.zeros_like(near[:, : stop - start])
    weights = torch.zeros(1, stop - start, 1, 1)
    # One shift after the other, product and sum apart: each value is computed alike wherever a chunk is cut.
    for shift in range(-reach, reach + 1):
        weight = math.exp(-0.5 * (shift / sigma) ** 2)
        low, high = max(start + shift, first), min(stop + shift, last)
        if low < high:
            here = slice(low - shift - start, high - shift - start)
            total[:, here] += near[:, low - first : high - first] * weight
            weights[:, here] += weight
    return total / weights


def shuffle(edit: Shuffle, clip: Latents, clips: Mapping[str, Latents]) -> Latents:
    """Blocks are ordered by a hash of seed and number. The last block may be a shorter one and moves too."""
    count = clip.shape[1]
    blocks = [range(start, min(start + edit.block, count)) for start in range(0, count, edit.block)]
    blocks.sort(key=lambda block: hashlib.sha256(f"{edit.seed}/{block.start}".encode()).digest())
    order = [number for block in blocks for number in block]

    def read(start: int, stop: int) -> Tensor:
        return torch.cat([clip.read(number, number + 1) for number in order[start:stop]], 1)

    return View(clip.shape, read)


def motion(edit: Motion, clip: Latents, clips: Mapping[str, Latents]) -> Latents:
    """mean(one) + amount (other - mean(other)); where a clip is shorter, it stops moving."""
    still = clips[edit.still_from] if edit.still_from else clip
    moving = clips[edit.motion_from] if edit.motion_from else clip
    kept = _mean(still)
    taken = kept if moving is still else _mean(moving)
    moving = held_to_length(moving, clip.shape[1])

    def read(start: int, stop: int) -> Tensor:
        return (moving.read(start, stop) - taken) * edit.amount + kept

    return View(clip.shape, read)


def _mean(clip: Latents) -> Tensor:
    """The mean over time, (channels, 1, height, width) float32; one pass, summed in float64."""
    channels, count, height, width = clip.shape
    total = torch.zeros(channels, height, width, dtype=torch.float64)
    for chunk in chunks(clip):
        for latent in chunk.unbind(1):
            total += latent
    return (total / count).float()[:, None]
