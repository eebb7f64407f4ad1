"""What a folder really holds, in words for a person who looks for a file there.

Everything here is bounded, so that it stays quick on a network volume. It knows nothing of manifests.
"""

from __future__ import annotations

import os
import stat
from collections import deque
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Final

from rich.filesize import decimal

NAMED: Final = 10  # entries of a folder that a message names
COUNTED: Final = 2000  # entries of a folder, or of a root's tree, that are looked at
DEPTH: Final = 4  # folders below a root that are searched for a misplaced file


def present(path: Path) -> bool:
    """Whether something is at `path` that can be looked at; a link that leads nowhere is nothing."""
    return isinstance(_kind(path), int)


def describe(folder: Path, root: Path) -> str:
    """A clause about `folder`: what it holds, or that it does not exist and what its nearest existing
    parent, not above `root`, holds."""
    parent = folder
    while isinstance(_kind(parent), FileNotFoundError | NotADirectoryError) and parent != root:
        parent = parent.parent
    kind = _kind(parent)
    missing = "" if parent == folder else "the folder does not exist; "
    if isinstance(kind, FileNotFoundError | NotADirectoryError):
        return f"the root {root} does not exist"
    if isinstance(kind, OSError):
        return f"{missing}{parent} cannot be looked at ({kind.strerror})"
    if kind != stat.S_IFDIR:
        return f"{missing}{parent} is a file, not a folder"
    return f"{missing or 'the folder holds '}{f'{parent} holds ' if missing else ''}{_holding(parent)}"


def _kind(path: Path) -> int | OSError:
    """The type of what is at `path` (stat.S_IFDIR, ...), or why that cannot be told."""
    try:
        return stat.S_IFMT(path.stat().st_mode)
    except OSError as error:
        return error


def _holding(folder: Path) -> str:
    """The entries of `folder`, files with their sizes and folders with a slash, at most `NAMED`."""
    try:
        with os.scandir(folder) as scan:
            entries = [entry for entry, _ in zip(scan, range(COUNTED), strict=False)]
    except OSError as error:
        return f"what cannot be listed ({error.strerror})"
    if not entries:
        return "nothing"
    entries.sort(key=lambda entry: entry.name)
    named = ", ".join(_named(entry) for entry in entries[:NAMED])
    left = len(entries) - NAMED
    if left <= 0:
        return named
    return f"{named} and {'over ' if len(entries) == COUNTED else ''}{left} more"


def _named(entry: os.DirEntry[str]) -> str:
    try:
        if entry.is_dir():
            return f"{entry.name}/"
        return f"{entry.name} ({decimal(entry.stat().st_size)})"
    except OSError:  # a link that leads nowhere, or a disk that does not answer
        return f"{entry.name} (cannot be read)"


class Nearby:
    """Files anywhere near the top of the roots, by name: for a file that lies in the wrong folder.

    The roots are walked once, when first asked: breadth first, `DEPTH` folders deep, at most `COUNTED`
    entries of each root, links to folders not followed.
    """

    def __init__(self, roots: Sequence[Path]) -> None:
        self._roots = roots

    def named(self, name: str) -> tuple[Path, ...]:
        """The files called `name`, those nearest to a root first."""
        return tuple(self._files.get(name, ()))

    @cached_property
    def _files(self) -> dict[str, list[Path]]:
        files: dict[str, list[Path]] = {}
        for root in self._roots:
            folders, left = deque([(root, 0)]), COUNTED
            while folders and left > 0:
                folder, depth = folders.popleft()
                try:
                    with os.scandir(folder) as scan:
                        entries = [entry for entry, _ in zip(scan, range(left), strict=False)]
                except OSError:
                    continue
                left -= len(entries)
                for entry in entries:
                    if not entry.is_dir(follow_symlinks=False):
                        files.setdefault(entry.name, []).append(Path(entry.path))
                    elif depth < DEPTH:
                        folders.append((Path(entry.path), depth + 1))
        return files
