"""Before/after sheets: the picture a person judges a restoration by."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.errors import FileError, UsageError
from app.video.probe import ClipInfo, probe
from app.video.read import read_frames

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image

ROWS = 3
MARGIN, CAPTION = 8, 22  # pixels


def write_sheet(path: Path, columns: Sequence[tuple[str, Path]], rows: int = ROWS) -> None:
    """Frames of several clips side by side, a clip a column, as one PNG.

    Args:
        path: The picture to write.
        columns: (caption, clip or image); all but the largest are enlarged bicubically to its size.
        rows: Moments, evenly spaced over the clips.

    Raises:
        InputError: A clip cannot be read. FileError: `sheet_write_failed`; the old picture then stays.
    """
    from PIL import Image, ImageDraw

    infos = [probe(clip) for _, clip in columns]
    height, width = max((info.height, info.width) for info in infos)
    moments = [(row + 0.5) / rows for row in range(1 if infos[0].is_image else rows)]
    sheet = Image.new(
        "RGB",
        (len(columns) * (width + MARGIN) + MARGIN, len(moments) * (height + MARGIN) + MARGIN + CAPTION),
        "white",
    )
    for column, ((caption, _), info) in enumerate(zip(columns, infos, strict=True)):
        left = MARGIN + column * (width + MARGIN)
        ImageDraw.Draw(sheet).text((left, MARGIN // 2), caption, fill="black", font_size=14)
        for row, picture in enumerate(_pictures(info, moments)):
            placed = picture.resize((width, height), Image.Resampling.BICUBIC)
            sheet.paste(placed, (left, CAPTION + MARGIN // 2 + row * (height + MARGIN)))
    temporary = path.with_name(f".{secrets.token_hex(6)}.partial")
    try:
        sheet.save(temporary, format="PNG")
        temporary.replace(path)
    except OSError as error:
        raise FileError(
            "sheet_write_failed", f"The sheet {path.name} cannot be written: {error.strerror or error}."
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


def check_sheet(path: Path, protected: Sequence[Path]) -> None:
    """Whether a sheet may be written to `path`, before any work is done.

    Raises:
        UsageError: `sheet_refused`: it is one of `protected`, or not a PNG's name. FileError:
            `sheet_write_failed`: its folder is not there or may not be written.
    """
    if path.suffix.lower() != ".png":
        raise UsageError("sheet_refused", f"The sheet {path.name} ends in {path.suffix!r}; expected .png.")
    if any(path.resolve() == other.resolve() for other in protected):
        raise UsageError("sheet_refused", f"The sheet {path.name} is the source or the result; name another.")
    if path.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise FileError(
            "sheet_write_failed",
            f"The sheet {path.name} cannot be written: its folder is not there or may not be written; name "
            "another.",
        )


def _pictures(info: ClipInfo, moments: Sequence[float]) -> Iterator[Image]:
    """The frames at `moments`, fractions of the clip in ascending order."""
    from PIL import Image

    count = info.frames or sum(1 for _ in read_frames(info.path, info))
    wanted = [min(int(moment * count), count - 1) for moment in moments]
    last: NDArray[Any] | None = None
    frames = read_frames(info.path, info)
    for index, frame in enumerate(frames):
        last = frame
        while wanted and wanted[0] == index:
            wanted.pop(0)
            yield Image.fromarray(frame)
        if not wanted:
            break
    for _ in wanted:  # the file declares more frames than it holds
        if last is not None:
            yield Image.fromarray(last)
