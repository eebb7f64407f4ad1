"""Where a part of a model is read from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from app.boot.manifest import Format


@dataclass(frozen=True)
class Source:
    """A checkpoint file, staged or in place.

    `original` is the user's own file: what a part that is read again later falls back on, as staged copies
    are given back once the model is loaded.
    """

    path: Path
    format: Format
    original: Path

    def now(self) -> Path:
        """Where to read it at this moment."""
        return self.path if self.path.exists() else self.original
