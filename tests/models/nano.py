"""A small SeedVR2 with drawn weights and the published strides, and moving pictures for it."""

from functools import cache

import numpy as np
from numpy.typing import NDArray

from app.models.seedvr2.config import config_3b
from app.models.seedvr2.dit import DiT
from app.models.seedvr2.restore import Restorer
from app.models.seedvr2.vae import VideoVAE
from app.models.seedvr2.vae_config import VAEConfig
from app.models.seedvr2.variants import Variant
from tests import seeded
from tests.golden import draw

SMALL = Variant(
    config_3b(dim=128, heads=2, head_dim=64, layers=4, separate=2, text_dim=64),
    VAEConfig(block_out_channels=(8, 16, 32, 32), layers_per_block=1, norm_num_groups=8),
)


@cache
def restorer() -> Restorer:
    variant = SMALL
    return Restorer(
        dit=draw(DiT(variant.dit), "nano/"),
        vae=draw(VideoVAE(variant.vae), "nano/"),
        positive=seeded.randn("nano/positive", 8, variant.dit.text_dim),
        negative=seeded.randn("nano/negative", 6, variant.dit.text_dim),
    )


def moving(count: int, height: int = 32, width: int = 48, seed: int = 0) -> list[NDArray[np.uint8]]:
    """A texture that pans, (height, width, 3) uint8 frames."""
    texture = np.random.default_rng(seed).integers(0, 255, (height, width + count, 3), dtype=np.uint8)
    return [np.ascontiguousarray(texture[:, i : i + width]) for i in range(count)]
