"""The variants of Wan that manifests name: a transformer, a VAE, a text encoder, and how it is sampled.
Torch-free.

Whether a transformer conditions on images or takes poses, its tensors tell; a variant fixes its width. That
a model was distilled to few steps no tensor tells: the variant says it. `nano` has every kind of layer at
toy width; it is a model like any other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from app.errors import ConfigError
from app.models.wan.clip_config import CLIP_NANO, CLIP_VIT_H, CLIPConfig
from app.models.wan.config import VARIANTS as TRANSFORMERS
from app.models.wan.config import TransformerConfig
from app.models.wan.umt5_config import UMT5_NANO, UMT5_XXL, UMT5Config
from app.models.wan.vae_config import VAEConfig

Sampling = Literal["few", "many"]


@dataclass(frozen=True)
class Variant:
    """`sampling`: few: block by block, four steps each (Self-Forcing). many: the whole clip at once, fifty
    steps under guidance (Wan 2.1 as published)."""

    transformer: TransformerConfig
    vae: VAEConfig
    text: UMT5Config
    clip: CLIPConfig
    sampling: Sampling


_DISTILLED = Variant(TRANSFORMERS["1.3b"], VAEConfig.published(), UMT5_XXL, CLIP_VIT_H, "few")
_NANO = Variant(
    replace(TRANSFORMERS["nano"], image_dim=CLIP_NANO.dim), VAEConfig.nano(), UMT5_NANO, CLIP_NANO, "few"
)

VARIANTS = {
    "self-forcing-1.3b": _DISTILLED,
    "wan-1.3b": replace(_DISTILLED, sampling="many"),
    "nano": _NANO,
    "nano-many": replace(_NANO, sampling="many"),
}


def variant(name: str | None) -> Variant:
    """The variant a manifest names.

    Raises:
        ConfigError: `model_variant_unknown`.
    """
    if name not in VARIANTS:
        raise ConfigError(
            "model_variant_unknown",
            f"variant {name!r} of family wan is not known; expected one of {', '.join(VARIANTS)}: tensors do "
            "not tell whether a model was made for few steps.",
        )
    return VARIANTS[name]
