"""Attention windows of SeedVR2: where they lie, and the order of tokens that makes each one contiguous.

Plain integers and index arithmetic; it knows nothing of attention or weights. The sizes follow section
"adaptive window attention" of SeedVR (Wang et al., 2025, arXiv:2501.01320): a window covers the same
share of the picture that it covered at 720p in training, whatever the picture's size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from math import ceil, sqrt

import torch
from torch import Tensor

Size = tuple[int, int, int]  # frames, height, width, in tokens
Window = tuple[slice, slice, slice]

GRID = 45 * 80  # tokens of one 720p latent frame after 2 x 2 patching
# A layer works on about this many at a time: fastest on a CPU, and memory stays flat. On a card it was not
# measured: more tokens launch fewer kernels, and take memory for queries, keys, values and the hidden layer.
RUN_TOKENS = 2048
LONGEST = 30  # latent frames over which the temporal window keeps growing


def window_size(size: Size, windows: Size) -> Size:
    """Tokens per window along each axis, when a 45 x 80 grid is cut into `windows`.

    Python's `round` (half to even) is part of the definition.
    """
    frames, height, width = size
    scale = sqrt(GRID / (height * width))
    return (
        ceil(min(frames, LONGEST) / windows[0]),
        ceil(round(height * scale) / windows[1]),
        ceil(round(width * scale) / windows[2]),
    )


def _cuts(length: int, step: int, shifted: bool) -> list[slice]:
    """The ragged pieces of one axis. Shifted pieces begin half a step early, truncated towards zero."""
    shift = 0.5 if shifted and step < length else 0.0
    count = ceil((length - shift) / step) + (shift > 0)
    edges = [
        (max(int((i - shift) * step), 0), min(int((i - shift + 1) * step), length)) for i in range(count)
    ]
    return [slice(start, stop) for start, stop in edges if stop > start]


def make_windows(size: Size, windows: Size, shifted: bool) -> list[Window]:
    """All windows over a grid of `size` tokens. They cover every token exactly once."""
    frames, height, width = (
        _cuts(length, step, shifted) for length, step in zip(size, window_size(size, windows), strict=True)
    )
    return list(product(frames, height, width))


@dataclass(frozen=True)
class Group:
    """Consecutive windows of one shape in a `Partition`'s order of tokens."""

    shape: Size
    count: int
    start: int  # first token

    @property
    def length(self) -> int:
        """Tokens of one window."""
        return self.shape[0] * self.shape[1] * self.shape[2]

    @property
    def tokens(self) -> int:
        """Tokens of all its windows."""
        return self.count * self.length

    @property
    def stop(self) -> int:
        return self.start + self.tokens


Run = tuple[Group, ...]  # consecutive groups, at most `RUN_TOKENS` tokens or a single window


@dataclass(frozen=True)
class Partition:
    """One way of cutting a grid into windows.

    `order` (tokens,) int64: the raster position of each token in window order; windows of one shape
    stand together, so that a group of them is a view (count, length, ...) of the tokens.
    """

    order: Tensor
    runs: tuple[Run, ...]

    @property
    def groups(self) -> Run:
        return tuple(group for run in self.runs for group in run)

    @property
    def count(self) -> int:
        """Windows in all."""
        return sum(group.count for group in self.groups)


def partition(size: Size, windows: Size, shifted: bool, device: torch.device | str = "cpu") -> Partition:
    """The partition of a grid of `size` tokens."""
    grid = torch.arange(size[0] * size[1] * size[2]).view(size)
    by_shape: dict[Size, list[Tensor]] = {}
    for window in make_windows(size, windows, shifted):
        piece = grid[window]
        by_shape.setdefault((piece.shape[0], piece.shape[1], piece.shape[2]), []).append(piece.flatten())
    groups: list[Group] = []
    for shape, pieces in by_shape.items():
        most = max(RUN_TOKENS // len(pieces[0]), 1)
        for i in range(0, len(pieces), most):
            start = groups[-1].stop if groups else 0
            groups.append(Group(shape, len(pieces[i : i + most]), start))
    order = torch.cat([piece for pieces in by_shape.values() for piece in pieces])
    return Partition(order.to(device), tuple(_runs(groups)))


def _runs(groups: Sequence[Group]) -> list[Run]:
    """Consecutive groups joined while they stay within `RUN_TOKENS`."""
    runs: list[Run] = []
    for group in groups:
        if runs and group.stop - runs[-1][0].start <= RUN_TOKENS:
            runs[-1] += (group,)
        else:
            runs.append((group,))
    return runs


def inverse(order: Tensor) -> Tensor:
    """The permutation that undoes `order`."""
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return back


def reorder(current: Tensor | None, wanted: Tensor | None) -> Tensor | None:
    """Indices that take tokens from one order to another; `None` is raster order, or nothing to do."""
    if current is wanted:
        return None
    if current is None:
        return wanted
    back = inverse(current)
    return back if wanted is None else back[wanted]


def transitions(orders: Sequence[Tensor]) -> list[Tensor | None]:
    """The reorderings before each of a sequence of layers, and after the last one, back to raster."""
    route: list[Tensor | None] = [None, *orders, None]
    known: dict[tuple[int, int], Tensor | None] = {}
    steps = []
    for current, wanted in pairwise(route):
        key = (id(current), id(wanted))
        if key not in known:  # layers alternate between few partitions: compute each change once
            known[key] = reorder(current, wanted)
        steps.append(known[key])
    return steps
