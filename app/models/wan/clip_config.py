"""The image half of the CLIP that Wan's image-conditioned variants see with. Torch-free, for `check`.

The file, models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth, holds a text half too (`textual.*`),
which nothing here uses. Names are those of the original.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

Shape = tuple[int, ...]

HEAD_DIM = 80  # channels of a head of ViT-H; the tensors do not tell
DROPPED = ("textual.*", "log_scale")  # the text half, and the temperature of both


@dataclass(frozen=True)
class CLIPConfig:
    """Sizes of a vision transformer; the defaults are ViT-H/14's. `grid`: patches on an image's side."""

    dim: int = 1280
    hidden_dim: int = 5120
    layers: int = 32
    patch: int = 14
    grid: int = 16
    out_dim: int = 1024

    def __post_init__(self) -> None:
        if self.dim % HEAD_DIM:
            raise ValueError(f"width {self.dim} does not divide into heads of {HEAD_DIM} channels")

    @property
    def heads(self) -> int:
        return self.dim // HEAD_DIM

    @property
    def image_size(self) -> int:
        """Pixels on a side."""
        return self.patch * self.grid

    @property
    def tokens(self) -> int:
        """The class token and one for each patch: 257 as published."""
        return self.grid**2 + 1


CLIP_VIT_H = CLIPConfig()
CLIP_NANO = CLIPConfig(dim=160, hidden_dim=320, layers=3, out_dim=64)  # 257 tokens, as the real one


def clip_tensors(config: CLIPConfig) -> dict[str, Shape]:
    """Every tensor of the image half of a checkpoint: original name -> shape."""
    dim, patch = config.dim, config.patch
    shapes: dict[str, Shape] = {
        "visual.cls_embedding": (1, 1, dim),
        "visual.pos_embedding": (1, config.tokens, dim),
        "visual.patch_embedding.weight": (dim, 3, patch, patch),
        "visual.head": (dim, config.out_dim),
        **_affine("visual.pre_norm", dim),
        **_affine("visual.post_norm", dim),
    }
    for layer in range(config.layers):
        prefix = f"visual.transformer.{layer}"
        shapes |= {
            **_affine(f"{prefix}.norm1", dim),
            **_affine(f"{prefix}.attn.to_qkv", 3 * dim, dim),
            **_affine(f"{prefix}.attn.proj", dim, dim),
            **_affine(f"{prefix}.norm2", dim),
            **_affine(f"{prefix}.mlp.0", config.hidden_dim, dim),
            **_affine(f"{prefix}.mlp.2", dim, config.hidden_dim),
        }
    return shapes


def unused_tensors(config: CLIPConfig) -> tuple[str, ...]:
    """Patterns of what the features do not pass through: they leave before the last layer."""
    return *DROPPED, f"visual.transformer.{config.layers - 1}.*", "visual.post_norm.*", "visual.head"


def recognise_clip(shapes: Mapping[str, Shape]) -> CLIPConfig:
    """The configuration of a checkpoint, from its tensors alone.

    Raises:
        ValueError: This is not that CLIP; the sentence says what it lacks.
    """
    marks = {
        "visual.patch_embedding.weight": 4,
        "visual.pos_embedding": 3,
        "visual.head": 2,
        "visual.transformer.0.mlp.0.weight": 2,
    }
    for name, dimensions in marks.items():
        if len(shapes.get(name, ())) != dimensions:
            raise ValueError(f"it holds no {name} of {dimensions} dimensions, as Wan's CLIP does")
    dim, _, patch, _ = shapes["visual.patch_embedding.weight"]
    tokens = shapes["visual.pos_embedding"][1]
    grid = math.isqrt(max(tokens - 1, 0))
    if not grid or grid**2 != tokens - 1:
        raise ValueError(f"it has {tokens} positions, expected one more than a square, as 257")
    numbers = (name.split(".")[2] for name in shapes if name.startswith("visual.transformer."))
    return CLIPConfig(
        dim=dim,
        hidden_dim=shapes["visual.transformer.0.mlp.0.weight"][0],
        layers=1 + max(int(number) for number in numbers if number.isdigit()),
        patch=patch,
        grid=grid,
        out_dim=shapes["visual.head"][1],
    )


def _affine(name: str, *shape: int) -> dict[str, Shape]:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
