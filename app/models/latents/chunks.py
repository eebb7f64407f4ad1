"""Clips that come in chunks of any lengths, cut anew without ever holding more than one piece."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor


def regroup(chunks: Iterable[Tensor], dim: int, first: int, later: int) -> Iterator[Tensor]:
    """The same clip with `first` frames in the first chunk and `later` in every other, along `dim`; the last
    may be shorter. Empty chunks are passed over."""
    waiting: list[Tensor] = []
    held, wanted = 0, first
    sides: torch.Size | None = None
    for chunk in chunks:
        sides = chunk.select(dim, 0).shape if sides is None and chunk.shape[dim] else sides
        if chunk.shape[dim] and chunk.select(dim, 0).shape != sides:
            raise ValueError(f"A chunk of the clip is {tuple(chunk.shape)}, unlike those before it.")
        while held + chunk.shape[dim] >= wanted:
            cut = wanted - held
            part, chunk = chunk.narrow(dim, 0, cut), chunk.narrow(dim, cut, chunk.shape[dim] - cut)
            yield torch.cat([*waiting, part], dim) if waiting else part
            waiting, held, wanted = [], 0, later
        if chunk.shape[dim]:
            waiting.append(chunk)
            held += chunk.shape[dim]
    if waiting:
        yield torch.cat(waiting, dim) if len(waiting) > 1 else waiting[0]
