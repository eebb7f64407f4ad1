#!/usr/bin/env python3
"""What Self-Forcing's weights, its cache and its decoder take of a GPU's memory, in 16 bits, by the clip's
length. Computed from the models' shapes; nothing is loaded.

    python tools/generate_memory.py [--height 480] [--width 832] [--window 21]

What a pass of the transformer itself needs, and a device's own workspace, come on top.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from app.models.wan.clip_config import CLIP_VIT_H, clip_tensors
from app.models.wan.config import TRAINED_BLOCK, TransformerConfig, tensors
from app.models.wan.layout import Layout
from app.models.wan.pose_config import pose_tensors
from app.models.wan.umt5_config import UMT5_XXL, umt5_tensors
from app.models.wan.vae_config import VAEConfig, decode_bytes, vae_tensors

ITEM = 2  # bytes of a number
LENGTHS = (9, 21, 45, 81, 237)  # frames


def main() -> None:
    """Print the tables for a size."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    for name, default in (("height", 480), ("width", 832), ("window", 21)):
        arguments.add_argument(f"--{name}", type=int, default=default, help="default: %(default)s")
    options = arguments.parse_args()
    if (
        options.height % 16
        or options.width % 16
        or min(options.height, options.width, options.window - 2) < 1
    ):
        arguments.error("height and width are multiples of 16 above 0, and a window is 3 latents or more")
    print(parts_table())
    print()
    print(lengths_table(options.height, options.width, options.window))


def parts_table() -> str:
    """What lies on the device, part by part."""
    parts = (
        ("text encoder (T5)", umt5_tensors(UMT5_XXL), "while there is room, see below"),
        ("transformer", tensors(TransformerConfig()), "always"),
        ("VAE", vae_tensors(VAEConfig.published()), "always"),
        (
            "image encoder (CLIP)",
            clip_tensors(CLIP_VIT_H),
            "from the first image on, image-conditioned models",
        ),
        ("pose embedders", pose_tensors(), "from the first job with poses on"),
    )
    rows = [(name, _size(_nbytes(shapes)), when) for name, shapes, when in parts]
    return _table(("part", "16 bits", "on the GPU"), rows)


def lengths_table(height: int, width: int, window: int = 21) -> str:
    """What a clip of each length takes beside the weights."""
    config, vae = TransformerConfig(), VAEConfig.published()
    weights = _nbytes(tensors(config)) + _nbytes(vae_tensors(vae))
    rows = []
    for frames in LENGTHS:
        latents = (frames + 3) // 4
        size = height // vae.spatial_factor, width // vae.spatial_factor
        seen = Layout(latents, *size, window=window).capacity()
        cache = config.cache_bytes(*size, seen, itemsize=ITEM) + config.cross_bytes(itemsize=ITEM)
        decode = decode_bytes(vae, height, width, latents=TRAINED_BLOCK, item=ITEM)
        rows.append(
            (f"{frames}", f"{latents}", f"{seen or latents}", _size(cache), _size(2 * cache), _size(decode),
             _size(weights + cache + decode))
        )  # fmt: skip
    head = (
        "frames",
        "latents",
        "latents seen",
        "keys and values",
        "under guidance",
        "decoding",
        "in all, without T5",
    )
    return _table(head, rows)


def _nbytes(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return ITEM * sum(math.prod(shape) for shape in shapes.values())


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 5e7 else f"{nbytes / 1e6:.1f} MB"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows))


if __name__ == "__main__":
    main()
