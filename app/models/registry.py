"""The families of models: what their files must hold, and how they are loaded.

Torch-free until a model is loaded. To add a family: its `contents` and its loader, and one entry here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from app.errors import ConfigError
from app.models.latents import parts as latents_parts
from app.models.seedvr2 import parts as seedvr2_parts
from app.models.wan import parts as wan_parts

if TYPE_CHECKING:
    from app.boot.locate import Found
    from app.boot.manifest import ModelEntry
    from app.boot.tensorfile import TensorIndex
    from app.models.source import Loading, Source

Loader = Callable[[str | None, Mapping[str, "Source"], "Loading"], Any]


@dataclass(frozen=True)
class Family:
    """A family: the task it does, its parts, and the two functions that know its files.

    `lazy` parts are read when a job first needs them: their loader says when it has.
    """

    task: str
    parts: tuple[str, ...]
    optional: tuple[str, ...]
    lazy: frozenset[str]
    contents: Callable[[str | None, str, TensorIndex], list[str]]
    abilities: Callable[[str | None, Mapping[str, Found]], Any]  # what its task's planner asks of a model
    loader: Callable[[], Loader]  # imports torch when called


def _seedvr2_loader() -> Loader:
    from app.models.seedvr2.load import load_restorer

    return load_restorer


def _wan_loader() -> Loader:
    from app.models.wan.load import load_generator

    return load_generator


def _codec_loader(name: str) -> Callable[[], Loader]:
    def loader() -> Loader:
        from app.models.latents import load

        found: Loader = getattr(load, name)
        return found

    return loader


def _codec(contents: Callable[[str | None, str, TensorIndex], list[str]], loader: str) -> Family:
    """A family of video autoencoders: one part, and for Stable Diffusion's its configuration."""
    parts = latents_parts.SD_PARTS if loader == "load_sd_codec" else latents_parts.PARTS
    return Family(
        "autoencode", parts, (), frozenset(), contents, lambda variant, files: None, _codec_loader(loader)
    )


FAMILIES = {
    "sd-vae": _codec(latents_parts.sd_contents, "load_sd_codec"),
    "seedvr2-vae": _codec(latents_parts.seedvr2_contents, "load_seedvr2_codec"),
    "wan-vae": _codec(latents_parts.wan_contents, "load_wan_codec"),
    "vqvae": _codec(latents_parts.vqvae_contents, "load_vqvae_codec"),
    "seedvr2": Family(
        "restore",
        seedvr2_parts.PARTS,
        (),
        frozenset(),
        seedvr2_parts.contents,
        lambda variant, files: None,
        _seedvr2_loader,
    ),
    "wan": Family(
        "generate",
        wan_parts.PARTS,
        wan_parts.OPTIONAL,
        wan_parts.LAZY,
        wan_parts.contents,
        wan_parts.abilities_of,
        _wan_loader,
    ),
}


def family(model: ModelEntry) -> Family:
    """The family of a manifest's model.

    Raises:
        ConfigError: `model_family_unknown`, `model_task_wrong`, `model_parts_wrong`.
    """
    if model.family not in FAMILIES:
        raise ConfigError(
            "model_family_unknown",
            f"model {model.name} is of family {model.family!r}; known families: {', '.join(FAMILIES)}.",
        )
    known = FAMILIES[model.family]
    if model.task != known.task:
        raise ConfigError(
            "model_task_wrong",
            f"model {model.name} has task {model.task!r}; family {model.family} does {known.task!r}.",
        )
    if set(model.parts) != set(known.parts):
        raise ConfigError(
            "model_parts_wrong",
            f"model {model.name} has the parts {', '.join(model.parts)}; family {model.family} needs "
            f"{', '.join(known.parts)}.",
        )
    if strange := set(model.optional) - set(known.optional):
        raise ConfigError(
            "model_parts_wrong",
            f"model {model.name} has the optional part {min(strange)}; family {model.family} knows "
            f"{', '.join(known.optional) or 'none'}.",
        )
    return known


def contents(model: ModelEntry, part: str, index: TensorIndex) -> list[str]:
    """How the tensors of a part's file differ from what the model needs, in sentences."""
    return family(model).contents(model.variant, part, index)


def abilities(model: ModelEntry, files: Mapping[str, Found]) -> Any:
    """What a model can do, as its files say: what the planner of its task asks before anything is loaded."""
    return family(model).abilities(model.variant, files)


def load_model(model: ModelEntry, files: Mapping[str, Source], loading: Loading) -> Any:
    """Load a model: a pipeline of its task, such as `Restorer`."""
    return family(model).loader()(model.variant, files, loading)
