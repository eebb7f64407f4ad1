"""The families of models: what their files must hold, and how they are loaded.

Torch-free until a model is loaded. To add a family: its `contents` and its loader, and one entry here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from app.errors import ConfigError
from app.models.seedvr2 import parts as seedvr2_parts

if TYPE_CHECKING:
    from app.boot.manifest import ModelEntry
    from app.boot.tensorfile import TensorIndex
    from app.device import Placement
    from app.models.source import Source
    from app.progress import Progress

Loader = Callable[[str | None, Mapping[str, "Source"], "Placement", int, "Progress"], Any]


@dataclass(frozen=True)
class Family:
    """A family: the task it does, its parts, and the two functions that know its files."""

    task: str
    parts: tuple[str, ...]
    optional: tuple[str, ...]
    contents: Callable[[str | None, str, TensorIndex], list[str]]
    loader: Callable[[], Loader]  # imports torch when called


def _seedvr2_loader() -> Loader:
    from app.models.seedvr2.load import load_restorer

    return load_restorer


FAMILIES = {
    "seedvr2": Family("restore", seedvr2_parts.PARTS, (), seedvr2_parts.contents, _seedvr2_loader),
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


def load_model(
    model: ModelEntry, files: Mapping[str, Source], placement: Placement, readers: int, progress: Progress
) -> Any:
    """Load a model: a pipeline of its task, such as `Restorer`."""
    return family(model).loader()(model.variant, files, placement, readers, progress)
