"""Edits that change each value where it is: noise, scale and bias, quantise, mask. See `edit_request.py`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from app.models.latents.edit_request import Mask, Noise, Quantise, Scale
from app.models.latents.spool import Latents, View, held_to_length
from app.models.wan.schedule import SeededNoise


def noise(edit: Noise, clip: Latents, clips: Mapping[str, Latents]) -> Latents:
    """Noise is addressed by seed and number of the latent: cutting a clip into chunks changes nothing."""
    channels, _, height, width = clip.shape
    draw = SeededNoise(edit.seed)

    def read(start: int, stop: int) -> Tensor:
        numbers = [0 if edit.still else number for number in range(start, stop)]
        drawn = [draw(number, 0, (channels, height, width)) for number in numbers]
        return clip.read(start, stop) + torch.stack(drawn, 1) * edit.strength

    return View(clip.shape, read)


def scale(edit: Scale, clip: Latents, clips: Mapping[str, Latents]) -> Latents:
    return View(clip.shape, lambda start, stop: clip.read(start, stop) * edit.factor + edit.bias)


def quantise(edit: Quantise, clip: Latents, clips: Mapping[str, Latents]) -> Latents:
    """2^bits cells of equal width tile [-span, span]; a value becomes the middle of its cell."""
    cells = 2**edit.bits
    width = 2 * edit.span / cells

    def read(start: int, stop: int) -> Tensor:
        cell = ((clip.read(start, stop) + edit.span) / width).floor().clamp(0, cells - 1)
        middle: Tensor = (cell + 0.5) * width - edit.span
        return middle

    return View(clip.shape, read)


def mask(edit: Mask, clip: Latents, clips: Mapping[str, Latents]) -> Latents:
    """Edges are rounded to whole latents; what is asked for is at least one latent wide."""
    channels, count, height, width = clip.shape
    other = held_to_length(clips[edit.clip], count) if edit.clip else None
    rows, columns = _part(edit.top, edit.bottom, height), _part(edit.left, edit.right, width)
    times = _part(edit.start, edit.stop, count)

    def read(start: int, stop: int) -> Tensor:
        before = clip.read(start, stop)
        chosen = torch.zeros(channels, stop - start, height, width, dtype=torch.bool)
        time = slice(max(times.start - start, 0), max(times.stop - start, 0))
        block = torch.zeros_like(chosen)
        block[:, time, rows, columns] = True
        picked = slice(None) if edit.channels is None else list(edit.channels)
        chosen[picked] = block[picked]
        if edit.outside:
            chosen = ~chosen
        if other is not None:
            return torch.where(chosen, other.read(start, stop), before)
        return before.masked_fill(chosen, edit.value)

    return View(clip.shape, read)


def _part(start: float, stop: float, length: int) -> slice:
    first = min(round(start * length), length - 1)
    return slice(first, max(round(stop * length), first + 1))
