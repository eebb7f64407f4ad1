"""What a loader is given: where each part of a model is read from, and how to load it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from app.boot.manifest import Format
    from app.device import Placement
    from app.nn.compiled import Compiler
    from app.nn.ranks import Ranks
    from app.progress import Progress


@dataclass(frozen=True)
class Source:
    """A checkpoint file, staged or in place.

    `original` is the user's own file. `sha256`, where it is known, was verified. A loader that reads a part
    later than at the boot calls `done` when it has: a staged copy is then given back.
    """

    path: Path
    format: Format
    original: Path
    sha256: str | None = None
    done: Callable[[], None] = lambda: None

    def now(self) -> Path:
        """Where to read it at this moment: staged copies do not stay for ever."""
        return self.path if self.path.exists() else self.original


@dataclass(frozen=True)
class Loading:
    """How models are loaded. `text_encoder`, where a large one stays: see the setting of that name. `eager`:
    what every job may need is loaded at once, not with the first job. `cache`: a folder for embeddings.
    `ranks`: processes that share the work of a transformer, where that is asked for. `compiler`: for its
    steps, likewise."""

    placement: Placement
    readers: int
    progress: Progress
    text_encoder: Literal["auto", "host", "release"] = "auto"
    eager: bool = False
    cache: Path | None = None
    ranks: Ranks | None = None
    compiler: Compiler | None = None
