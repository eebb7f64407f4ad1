"""A long run of latents through a model that sees a bounded window of them.

Windows are consecutive runs of latents of nearly equal length; neighbours share `OVERLAP` latents, which
are cross-faded. Everything is an iterator: however long the shot, two windows are held at a time. Knows
nothing of what the model does to a window.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from app.models.seedvr2.segment import OVERLAP, Span
from app.models.seedvr2.segment import SHORTEST as SHORTEST


def fade(overlap: int = OVERLAP) -> Tensor:
    """Weights of the later window over the shared latents, rising as a cosine strictly between 0 and 1."""
    steps = torch.arange(1, overlap + 1, dtype=torch.float32) / (overlap + 1)
    return (1 - torch.cos(math.pi * steps)) / 2


def in_windows(
    latents: Iterator[Tensor], windows: list[Span], run: Callable[[Tensor, Span], Tensor]
) -> Iterator[Tensor]:
    """Run windows over a stream of latents and join the results.

    Args:
        latents: Tensors (n, H, W, C), n of any size, from the first latent of the first window to the last
            of the last.
        windows: Consecutive ones of `segment.spans`.
        run: (T, H, W, C) latents of a window, and where it lies -> (T, H, W, C') result.

    Yields:
        (n, H, W, C') results in order, each latent once, as soon as no later window can change them.
    """
    held = torch.empty(0)  # latents from the current window's start on
    tail: Tensor | None = None  # the last window's results over the shared latents
    for window, following in zip(windows, [*windows[1:], None], strict=True):
        needed = window.stop - window.start
        parts = [held] if held.numel() else []
        while sum(len(part) for part in parts) < needed:
            parts.append(next(latents))
        held = torch.cat(parts)
        result = run(held[:needed], window)
        if tail is not None:
            weight = fade().view(-1, 1, 1, 1).to(result)
            result = torch.cat([torch.lerp(tail, result[:OVERLAP], weight), result[OVERLAP:]])
        if following is None:
            yield result
        else:
            fresh = following.start - window.start
            tail, held = result[fresh:], held[fresh:]
            yield result[:fresh]


def cut(parts: Iterator[Tensor], skip: int, count: int) -> Iterator[Tensor]:
    """The `count` rows after the first `skip` of a stream of tensors (n, ...); no later part is asked for."""
    while count:
        part = next(parts)
        skipped = min(skip, len(part))
        skip -= skipped
        kept = part[skipped : skipped + count]
        count -= len(kept)
        if len(kept):
            yield kept


def noise(seed: int, kind: str, shot: int, span: Span, height: int, width: int, channels: int = 16) -> Tensor:
    """Standard normal noise of a run of latents, addressed by seed, shot and latent.

    Each latent has a generator of its own, so the noise does not depend on how a shot is cut into
    windows, on the device or on the worker. `kind` keeps different uses of a seed apart.

    Returns:
        (span.stop - span.start, height, width, channels) float32, on the CPU.
    """
    return torch.stack(
        [
            torch.randn(height, width, channels, generator=_generator(f"{seed}/{kind}/{shot}/{latent}"))
            for latent in range(span.start, span.stop)
        ]
    )


def _generator(address: str) -> torch.Generator:
    digest = hashlib.sha256(address.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
