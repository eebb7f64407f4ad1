"""A folder as one file: a ZIP archive that is the same bytes whenever the files in it are.

It does not know what the files are.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Final
from zipfile import ZIP_STORED, ZipFile, ZipInfo

from app.errors import FileError, is_full

BLOCK: Final = 1 << 20  # bytes
ENTRY: Final = 76  # bytes that a file costs in an archive, beside its own and twice its name's
END: Final = 22  # bytes at the end of an archive
_EARLIEST: Final = (1980, 1, 1, 0, 0, 0)  # the first date that the format knows
_UNIX: Final = 3
_MODE: Final = 0o100644 << 16


def pack(folder: Path, on_step: Callable[[], None] = lambda: None) -> Path:
    """Move the files of `folder` into an archive beside it, `<folder>.zip`; the folder is then gone.

    In the order of their names, stored as they are (pictures are compressed already), with one date and one
    mode for all: two runs that made the same files make the same archive. A file is removed once it is
    packed, so that no second copy of all of them needs room. `on_step` is called all along and may raise to
    stop; what is there then is no use to anybody.

    Raises:
        FileError: `archive_no_room`, `archive_failed`.
    """
    try:
        return _pack(folder, on_step)
    except OSError as error:
        full = is_full(error)
        raise FileError(
            "archive_no_room" if full else "archive_failed",
            f"The files of the result cannot be put into one archive: {error.strerror or error}. "
            f"{'Give the worker more room' if full else 'Look at its disk'}, and send the job again.",
        ) from error


def _pack(folder: Path, on_step: Callable[[], None]) -> Path:
    target = folder.with_name(f"{folder.name}.zip")
    files = sorted(
        (path.relative_to(folder).as_posix(), path) for path in folder.rglob("*") if path.is_file()
    )
    with ZipFile(target, "x", ZIP_STORED) as archive:
        for name, path in files:
            entry = ZipInfo(name, _EARLIEST)
            entry.create_system, entry.external_attr = _UNIX, _MODE
            entry.file_size = path.stat().st_size  # whether it needs the format's larger fields
            with path.open("rb") as source, archive.open(entry, "w") as packed:
                while block := source.read(BLOCK):
                    packed.write(block)
                    on_step()
            path.unlink()
    shutil.rmtree(folder)
    return target
