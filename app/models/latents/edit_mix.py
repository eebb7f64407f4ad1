"""Edits that mix clips: interpolation, paths, grids, arithmetic. See `edit_request.py`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from app.models.latents.edit_request import Arithmetic, Grid, Interpolate, Path, Point
from app.models.latents.spool import Latents, View, held_to_length

Method = Literal["linear", "spherical"]
PARALLEL = 1e-3  # sine of an angle below which two latents have no great circle between them


def interpolate(edit: Interpolate, clip: Latents, clips: Mapping[str, Latents]) -> Latents:
    other = clips[edit.clip]
    end = edit.weight if edit.end_weight is None else edit.end_weight

    def latent(number: int) -> Tensor:
        weight = edit.weight + (end - edit.weight) * _moment(number, clip)
        return mix(_read(clip, number), _read(other, number), weight, edit.method)

    return _by_latent(clip, latent)


def path(edit: Path, clip: Latents, clips: Mapping[str, Latents]) -> Latents:
    def latent(number: int) -> Tensor:
        along = _moment(number, clip) * (len(edit.points) - 1)
        leg = min(int(along), max(len(edit.points) - 2, 0))
        first = _at(edit.points[leg], number, clips)
        if along == leg:
            return first
        return mix(first, _at(edit.points[leg + 1], number, clips), along - leg, edit.method)

    return _by_latent(clip, latent)


def grid(edit: Grid, clip: Latents, clips: Mapping[str, Latents]) -> Latents:
    """Bilinear between the corners."""

    def latent(number: int) -> Tensor:
        row, column = cell(edit, number, clip.shape[1])
        across, down = column / (edit.columns - 1), row / (edit.rows - 1)
        corners = [_at(corner, number, clips) for corner in edit.corners]
        top = mix(corners[0], corners[1], across, "linear")
        bottom = mix(corners[2], corners[3], across, "linear")
        return mix(top, bottom, down, "linear")

    return _by_latent(clip, latent)


def cell(edit: Grid, number: int, count: int) -> tuple[int, int]:
    """(row, column) of the grid that latent `number` of `count` shows."""
    row, step = divmod(number * edit.rows * edit.columns // count, edit.columns)
    return row, edit.columns - 1 - step if row % 2 else step


def arithmetic(edit: Arithmetic, clip: Latents, clips: Mapping[str, Latents]) -> Latents:
    plus, minus = (held_to_length(clips[name], clip.shape[1]) for name in (edit.plus, edit.minus))

    def read(start: int, stop: int) -> Tensor:
        return clip.read(start, stop) + (plus.read(start, stop) - minus.read(start, stop)) * edit.factor

    return View(clip.shape, read)


def mix(first: Tensor, second: Tensor, weight: float, method: Method) -> Tensor:
    """Between two latents of one shape, weight 0 the first and 1 the second, exactly.

    Spherical (Shoemake 1985, "Animating rotation with quaternion curves"): sin((1 - w) t) / sin(t) first +
    sin(w t) / sin(t) second, t the angle between the latents as vectors. Where they are parallel, opposite or
    zero there is no one great circle, and it is linear.
    """
    if weight in (0, 1):
        return second if weight else first
    one, two = 1 - weight, weight
    if method == "spherical":
        a, b = first.double(), second.double()
        lengths = float(a.norm() * b.norm())
        angle = math.acos(max(-1.0, min(1.0, float((a * b).sum()) / lengths))) if lengths else 0.0
        if math.sin(angle) > PARALLEL:
            one = math.sin((1 - weight) * angle) / math.sin(angle)
            two = math.sin(weight * angle) / math.sin(angle)
    return first * one + second * two


def _by_latent(clip: Latents, latent: Callable[[int], Tensor]) -> Latents:
    """A clip of the shape of `clip`, each latent of which is computed on its own: (channels, 1, h, w)."""
    return View(clip.shape, lambda start, stop: torch.cat([latent(n) for n in range(start, stop)], 1))


def _read(clip: Latents, number: int) -> Tensor:
    """Latent `number`, or the last one of a clip that is over."""
    number = min(number, clip.shape[1] - 1)
    return clip.read(number, number + 1)


def _at(point: Point, number: int, clips: Mapping[str, Latents]) -> Tensor:
    clip = clips[point.clip]
    return _read(clip, number if point.at is None else round(point.at * (clip.shape[1] - 1)))


def _moment(number: int, clip: Latents) -> float:
    return number / max(clip.shape[1] - 1, 1)
