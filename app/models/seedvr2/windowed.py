"""A long run of latents through a model that sees a bounded window of them.

Windows are consecutive runs of latents of nearly equal length; neighbours share `OVERLAP` latents, which
are cross-faded. Everything is an iterator: however long the shot, two windows are held at a time. Knows
nothing of what the model does to a window.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

OVERLAP = 2
SHORTEST = 2 * OVERLAP + 1  # a window must keep a latent that no neighbour sees


@dataclass(frozen=True)
class Span:
    """A window: latents start to stop of a shot, half open."""

    start: int
    stop: int


def spans(latents: int, longest: int) -> list[Span]:
    """The windows over a shot of `latents` latents, none longer than `longest`.

    As few as will do, their lengths equal to within one, so that no short window is left at the end.

    Raises:
        ValueError: `longest` is too short for windows that share `OVERLAP` latents.
    """
    if latents <= longest:
        return [Span(0, latents)]
    if longest < SHORTEST:
        raise ValueError(f"a window of {longest} latents is too short; it takes {SHORTEST} or more")
    count = math.ceil((latents - OVERLAP) / (longest - OVERLAP))
    # Each window but the last brings this many new latents before the next one begins.
    starts = [round(i * (latents - OVERLAP) / count) for i in range(count)]
    return [
        Span(start, (starts[i + 1] if i + 1 < count else latents - OVERLAP) + OVERLAP)
        for i, start in enumerate(starts)
    ]


def fade(overlap: int = OVERLAP) -> Tensor:
    """Weights of the later window over the shared latents, rising as a cosine strictly between 0 and 1."""
    steps = torch.arange(1, overlap + 1, dtype=torch.float32) / (overlap + 1)
    return (1 - torch.cos(math.pi * steps)) / 2


def in_windows(
    latents: Iterator[Tensor], windows: list[Span], run: Callable[[Tensor, Span], Tensor]
) -> Iterator[Tensor]:
    """Run windows over a stream of latents and join the results.

    Args:
        latents: Tensors (n, H, W, C), n of any size, `windows[-1].stop` latents in all.
        windows: See `spans`.
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
