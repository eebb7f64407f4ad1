"""How evenly cards share SeedVR2's windows, and what they send each other in a pass. Counted, not measured.

    python -m benchmarks.sharing

Beside it, what the original's sequence parallelism sends: queries, keys, values and the result of every
layer's attention, each once to the rank of a head and the result back.
"""

from __future__ import annotations

import argparse
from itertools import pairwise

from app.models.seedvr2.config import DiTConfig, config_3b, config_7b
from app.models.seedvr2.parallel import spread
from app.models.seedvr2.windows import Size, partition
from app.nn.exchange import exchange
from benchmarks.machine import show

CASES: tuple[tuple[str, DiTConfig, Size], ...] = (
    ("3B, 720p, 31 latents", config_3b(), (31, 45, 80)),
    ("7B, 1080p, 31 latents", config_7b(), (31, 68, 120)),
    ("7B, 4K, 11 latents", config_7b(), (11, 135, 240)),
)
CARDS = (2, 4, 8)


def main() -> None:
    """Count, and print."""
    argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0]).parse_args()
    rows = [
        [name, str(count), *counted(config, size, count)] for name, config, size in CASES for count in CARDS
    ]
    head = ["case", "cards", "largest share / even", "GB a card sends a pass", "original's", "ratio"]
    show("One pass of SeedVR2's transformer on several cards, 16 bits", head, rows, [])


def counted(config: DiTConfig, size: Size, count: int) -> list[str]:
    """The largest share over an even one; gigabytes that a card sends, and in the original; the ratio."""
    kinds = list(zip(config.windows, config.shifted, strict=True))
    parts = {kind: partition(size, *kind) for kind in dict.fromkeys(kinds)}
    spreads = {kind: spread(windows, count) for kind, windows in parts.items()}
    tokens = size[0] * size[1] * size[2]
    largest = max(len(held) for each in spreads.values() for held in each) / (tokens / count)
    sent = {
        step: sum(
            sum(move.sent) - move.sent[rank]
            for rank in range(count)
            for move in [exchange(spreads[step[0]], spreads[step[1]], rank)]
        )
        for step in set(pairwise(kinds))
    }
    ours = sum(sent[step] for step in pairwise(kinds)) * config.dim * 2 / count
    theirs = 4 * config.layers * tokens * (count - 1) / count**2 * config.inner_dim * 2
    return [f"{largest:.2f}", f"{ours / 1e9:.1f}", f"{theirs / 1e9:.1f}", f"{ours / theirs:.2f}"]


if __name__ == "__main__":
    main()
