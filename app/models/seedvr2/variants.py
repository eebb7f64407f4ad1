"""The variants of SeedVR2 that manifests name: each a transformer and a VAE. Torch-free.

`nano` has every kind of layer of the 3B at toy width. Its VAE halves the picture twice and keeps every frame,
so that so small a network can still draw 30 dB; it is a model like any other.
"""

from __future__ import annotations

from dataclasses import dataclass

from app.models.seedvr2.config import DiTConfig, config_3b, config_7b
from app.models.seedvr2.vae_config import VAEConfig


@dataclass(frozen=True)
class Variant:
    dit: DiTConfig
    vae: VAEConfig


VARIANTS = {
    "3b": Variant(config_3b(), VAEConfig.published()),
    "7b": Variant(config_7b(), VAEConfig.published()),
    "nano": Variant(
        config_3b(dim=192, heads=6, head_dim=36, layers=4, separate=2, text_dim=64),
        VAEConfig((8, 16, 40), layers_per_block=1, norm_num_groups=1, temporal_scale_num=0),
    ),
}
