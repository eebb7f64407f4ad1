"""The families of models: what their files must hold, and how they are loaded.

A family's modules are imported when a model of it is asked for, and those that import torch when one is
loaded. To add a family: its `contents` and its loader, and one entry here.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from app.errors import ConfigError

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


def _seedvr2() -> Family:
    from app.models.seedvr2 import parts

    def loader() -> Loader:
        from app.models.seedvr2.load import load_restorer

        return load_restorer

    return Family("restore", parts.PARTS, (), frozenset(), parts.contents, _none, loader)


def _wan() -> Family:
    from app.models.wan import parts

    def loader() -> Loader:
        from app.models.wan.load import load_generator

        return load_generator

    return Family(
        "generate", parts.PARTS, parts.OPTIONAL, parts.LAZY, parts.contents, parts.abilities_of, loader
    )


def _codec(kind: str) -> Callable[[], Family]:
    """A family of video autoencoders: one part, and for Stable Diffusion's its configuration."""

    def made() -> Family:
        from app.models.latents import parts

        def loader() -> Loader:
            from app.models.latents import load

            found: Loader = getattr(load, f"load_{kind}_codec")
            return found

        names = parts.SD_PARTS if kind == "sd" else parts.PARTS
        contents = getattr(parts, f"{kind}_contents")
        return Family("autoencode", names, (), frozenset(), contents, _none, loader)

    return made


def _none(variant: str | None, files: Mapping[str, Found]) -> None:
    """The abilities of a family that has no variants in what it can do."""


FAMILIES: Mapping[str, Callable[[], Family]] = {
    "sd-vae": cache(_codec("sd")),
    "seedvr2-vae": cache(_codec("seedvr2")),
    "wan-vae": cache(_codec("wan")),
    "vqvae": cache(_codec("vqvae")),
    "seedvr2": cache(_seedvr2),
    "wan": cache(_wan),
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
    known = FAMILIES[model.family]()
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
    load = family(model).loader()
    if not gc.get_freeze_count():
        # Nearly 200,000 objects, most of them torch's, that stay for ever: looking through them takes the
        # collector some 80 ms, each time that memory is given back and now and then in a job.
        gc.freeze()
    return load(model.variant, files, loading)
