"""Where a part of a model is read from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from app.boot.manifest import Format


@dataclass(frozen=True)
class Source:
    """A checkpoint file, staged or in place."""

    path: Path
    format: Format
