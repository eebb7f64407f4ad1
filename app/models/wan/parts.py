"""What the files of a Wan model must hold, and what it can do with them. Torch-free, for `check`.

Parts: `transformer`, `vae`, `t5` and its `tokenizer`. Optional: `pose`, the embedders of rendered poses, and
`clip`, the image encoder of models that condition on an image.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from app.boot.tensorfile import TensorIndex, compare_tensors, read_index, rename_tensors
from app.errors import ConfigError
from app.models.wan.clip_config import DROPPED, clip_tensors
from app.models.wan.config import (
    IMAGE_CHANNELS,
    LATENT_CHANNELS,
    SECTIONS,
    Shapes,
    TransformerConfig,
    current_name,
    recognise,
    tensors,
)
from app.models.wan.pose_config import pose_name, pose_tensors
from app.models.wan.umt5_config import umt5_tensors
from app.models.wan.vae_config import vae_tensors
from app.models.wan.variants import Sampling, Variant, variant

if TYPE_CHECKING:
    from app.boot.locate import Found
    from app.boot.manifest import Format

PARTS = ("transformer", "vae", "t5", "tokenizer")
OPTIONAL = ("pose", "clip")
LAZY = frozenset({"t5", "pose", "clip"})


def contents(variant_name: str | None, part: str, index: TensorIndex) -> list[str]:
    """How the tensors of a part's file differ from what the model needs, in sentences; [] is right."""
    wanted = variant(variant_name)
    if part == "transformer":
        return _transformer(wanted, index)
    if part == "vae":
        return compare_tensors(vae_tensors(wanted.vae), index)
    if part == "t5":
        return compare_tensors(umt5_tensors(wanted.text), index)
    if part == "pose":  # the file holds more: changes to the weights of another model
        return compare_tensors(pose_tensors(), rename_tensors(index, pose_name))
    return compare_tensors(clip_tensors(wanted.clip), index, dropped=DROPPED)


@dataclass(frozen=True)
class Abilities:
    """What a model can be asked for, as its files say.

    `sections`: the state dicts of its transformer's file, () where that is one itself. `image`: it conditions
    on an image, and needs one. `takes_pose`: its transformer takes pose tokens. `has`: optional parts there.
    """

    sampling: Sampling
    sections: tuple[str, ...]
    image: bool
    takes_pose: bool
    has: frozenset[str]
    config: TransformerConfig
    spatial_factor: int

    @property
    def multiple(self) -> int:
        """What height and width must be multiples of, in pixels."""
        return self.spatial_factor * self.config.patch_size[1]


def abilities_of(variant_name: str | None, files: Mapping[str, Found]) -> Abilities:
    """What the model of these files can do."""
    transformer = files["transformer"]
    return abilities(
        variant_name, transformer.path, transformer.entry.format, [part for part in OPTIONAL if part in files]
    )


def abilities(variant_name: str | None, transformer: Path, format: Format, has: Collection[str]) -> Abilities:
    """What the model can do whose transformer's file is at `transformer` and whose optional parts are `has`.

    Raises:
        ConfigError: The file is no Wan transformer, or none at all.
    """
    wanted = variant(variant_name)
    index = read_index(transformer, format)
    try:
        config = recognise(shapes_of(transformer_index(index)))
    except ValueError as error:
        raise ConfigError("checkpoint_tensors", f"{transformer} is not a Wan transformer: {error}.") from None
    return Abilities(
        wanted.sampling,
        tuple(name for name in SECTIONS if name in index.sections),
        config.image,
        config.takes_pose,
        frozenset(has),
        config,
        wanted.vae.spatial_factor,
    )


def transformer_index(index: TensorIndex, section: str | None = None) -> TensorIndex:
    """A transformer's tensors under the model's names: those of the section named, else of the first of
    `SECTIONS` that the file has, else of its top."""
    section = section or next((name for name in SECTIONS if name in index.sections), None)
    if section is not None:
        index = read_index(index.path, index.format, section)
    return rename_tensors(index, current_name)


def shapes_of(index: TensorIndex) -> Shapes:
    """name -> shape."""
    return {name: entry.shape for name, entry in index.tensors.items()}


def _transformer(wanted: Variant, index: TensorIndex) -> list[str]:
    if not index.tensors and not set(SECTIONS) & set(index.sections):
        return [
            f"It holds the sections {', '.join(index.sections)}, expected {' or '.join(SECTIONS)}, or the "
            "tensors themselves."
        ]
    sentences: list[str] = []
    sections: list[str | None] = [name for name in SECTIONS if name in index.sections]
    for section in sections or [None]:
        own = transformer_index(index, section)
        try:
            found = recognise(shapes_of(own))
        except ValueError as error:
            return [f"This is not a Wan transformer: {error}."]
        channels = LATENT_CHANNELS + IMAGE_CHANNELS * found.image
        config = replace(wanted.transformer, image=found.image, pose=found.pose, in_channels=channels)
        wrong = compare_tensors(tensors(config), own)
        if wrong and (found.dim, found.layers) != (config.dim, config.layers):
            sentences.append(
                f"Its tensors are those of {found.layers} layers of width {found.dim}, expected "
                f"{config.layers} of width {config.dim}."
            )
        sentences += [f"{section}: {sentence}" if section else sentence for sentence in wrong]
    return sentences
