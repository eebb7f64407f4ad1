"""Whether a result can be delivered, as early as that is certain: before it is made, and while it grows.

Only bounds that hold for every picture there can be: what might fit is made. It does not know how results
are made or delivered.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from app.job.archive import END, ENTRY
from app.job.deliver import DeliverySettings, check_delivery

EVERY: Final = 0.5  # seconds between two looks at a result that grows
_DEFLATE: Final = 1032  # bytes that one byte of a deflate stream stands for at most: 258 for each two bits
_PNG: Final = 63  # bytes of a PNG around that stream: signature, three chunks, zlib's header and sum
_FRAME_NAME: Final = 10  # 000001.png
_VIDEO_FRAME: Final = 5  # bytes of an encoded frame that repeats the one before: its length, and a header


def least_bytes(suffix: str, frames: int, height: int, width: int) -> int:
    """The fewest bytes that a result of `frames` pictures can have, whatever they show.

    `suffix` is the file's: ".png" is one picture, "" a folder of PNGs that goes into one archive.
    """
    png = _PNG + math.ceil(height * (1 + 3 * width) / _DEFLATE)
    if suffix == ".png":
        return png
    if suffix == "":
        return END + frames * (ENTRY + 2 * _FRAME_NAME + png)
    return frames * _VIDEO_FRAME


def stopped_by_growth(
    folder: Path,
    how: DeliverySettings,
    on_step: Callable[[], None],
    clock: Callable[[], float] = time.monotonic,
) -> Callable[[], None]:
    """`on_step`, which also looks twice a second at what was added to `folder` since now, all of it the
    result: once that alone is too large for where it goes, no more of it is made.

    Raises (the function that is returned):
        InputError: `deliver_too_large`.
    """
    if how.bucket is not None or how.output_root is not None:
        return on_step
    before = {entry.name for entry in os.scandir(folder)}
    due = clock()

    def step() -> None:
        nonlocal due
        on_step()
        if clock() >= due:
            check_delivery(sum(_size(entry) for entry in os.scandir(folder) if entry.name not in before), how)
            due = clock() + EVERY

    return step


def _size(entry: os.DirEntry[str]) -> int:
    """Bytes of a file, or of the files in a folder; 0 if it is gone."""
    try:
        if entry.is_dir(follow_symlinks=False):
            return sum(_size(below) for below in os.scandir(entry.path))
        return entry.stat(follow_symlinks=False).st_size
    except FileNotFoundError:
        return 0
