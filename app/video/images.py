"""Still and animated images, through Pillow: PNG, JPEG, WebP, BMP, TIFF and GIF.

An animation (GIF, WebP, PNG) is a clip: its pictures, each shown for a time of its own, become frames
at a constant rate. Orientation from EXIF is applied; transparency is laid over black. Knows nothing of
ffmpeg.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from app.errors import InputError
from app.video.rates import standard_rate

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

_STILLS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
_ANIMATED = ("PNG", "WEBP", "GIF")
# what Pillow's readers raise at data that is cut or odd
_BROKEN = (
    *(OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, AttributeError),
    *(OverflowError, NotImplementedError, struct.error, zlib.error),
)
_HIGHEST_RATE = 60
_MILLISECONDS_IF_UNSET = 100  # what browsers give a picture that asks for 10 ms or less


@dataclass(frozen=True)
class ImageInfo:
    """What Pillow says of an image: the size as displayed, the format, how long each picture is shown."""

    width: int
    height: int
    format: str
    mode: str
    durations: tuple[int, ...]  # milliseconds of each picture of an animation; empty for a still
    notes: tuple[str, ...]


def image_info(path: Path, max_pixels: int | None = None, max_frames: int | None = None) -> ImageInfo | None:
    """What `path` holds if it is an image, else None. InputError: input_too_large, input_damaged."""
    with _opened(path) as image:
        if image is None:
            return None
        width, height = image.size
        if max_pixels is not None and width * height > max_pixels:
            raise too_many_pixels(path, width, height, max_pixels)
        count = getattr(image, "n_frames", 1)
        if image.format in _ANIMATED and count > 1:
            if max_frames is not None and count > max_frames:
                raise InputError(
                    "input_too_large",
                    f"{path.name} has {count} pictures; at most {max_frames} frames are taken here: cut it"
                    " into parts, or raise the limit.",
                )
            return ImageInfo(width, height, str(image.format), image.mode, tuple(_durations(image)), ())
        notes = []
        if image.format == "TIFF" and count > 1:
            notes.append("only the first page is read")
        if image.mode.startswith("I") or (image.format == "PNG" and _png_depth(path) == 16):
            notes.append("16 bits a channel are read as 8")
        if image.has_transparency_data:
            notes.append("transparency is laid over black")
        picture = _rgb(image)
        height, width = picture.shape[:2]
        return ImageInfo(width, height, str(image.format), image.mode, (), tuple(notes))


def too_many_pixels(path: Path, width: int, height: int, max_pixels: int) -> InputError:
    """The error for a picture over the limit."""
    return InputError(
        "input_too_large",
        f"{path.name} is {width}x{height} = {width * height} pixels; at most {max_pixels} are taken here:"
        " give a smaller one, or raise the limit.",
    )


def animation_rate(durations: tuple[int, ...]) -> Fraction:
    """A constant rate for pictures shown for these milliseconds each.

    The slowest rate that shows each picture for exactly its time, where that is at most 60 a second;
    else the standard rate at or above the average.
    """
    exact = Fraction(1000, math.gcd(*durations))
    return exact if exact <= _HIGHEST_RATE else standard_rate(len(durations) * 1000 / sum(durations))


def image_frame_count(durations: tuple[int, ...], rate: Fraction) -> int:
    """How many frames `image_frames` gives: 1 for a still."""
    if not durations:
        return 1
    return max(1, math.ceil(Fraction(sum(durations), 1000) * rate - Fraction(1, 2)))


def image_frames(path: Path, durations: tuple[int, ...], rate: Fraction) -> Iterator[NDArray[np.uint8]]:
    """(height, width, 3) uint8: one frame of a still, frames at `rate` of an animation."""
    with _opened(path) as image:
        if image is None:
            raise InputError(
                "input_damaged", f"{path.name} is no longer an image: it changed while it was read."
            )
        if not durations:
            yield _rgb(image)
            return
        shown = 0
        for i in range(len(durations)):
            image.seek(i)
            picture = _rgb(image)
            # frame k shows what is on screen in the middle of its time
            for _ in range(shown, image_frame_count(durations[: i + 1], rate)):
                yield picture
                shown += 1


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image | None]:
    """The image in `path`, or None where it is none; whatever Pillow raises inside becomes InputError."""
    from PIL import Image, UnidentifiedImageError

    name = "an"
    try:
        try:
            image = Image.open(path, formats=_STILLS)
        except UnidentifiedImageError:
            yield None
            return
        name = f"a {image.format}"
        with image:
            yield image
    except Image.DecompressionBombError as error:
        raise InputError(
            "input_too_large",
            f"{path.name} claims more pixels than any picture has ({error}): give a smaller one.",
        ) from error
    except _BROKEN as error:
        raise InputError(
            "input_damaged",
            f"{path.name} is {name} image that cannot be decoded ({_words(error, path)}); expected a whole"
            " file: copy or export it again.",
        ) from error


def _words(error: Exception, path: Path) -> str:
    """What an error says, on one line and without the folder."""
    said = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(said.replace(str(path), path.name).split())


def _png_depth(path: Path) -> int:
    """Bits a channel, from the header: Pillow reads 16 as 8 without a word."""
    with path.open("rb") as file:
        return file.read(25)[24]


def _durations(image: Image.Image) -> Iterator[int]:
    for i in range(getattr(image, "n_frames", 1)):
        image.seek(i)
        image.load()
        milliseconds = round(image.info.get("duration", 0))
        yield milliseconds if milliseconds > 10 else _MILLISECONDS_IF_UNSET


def _rgb(image: Image.Image) -> NDArray[np.uint8]:
    """(height, width, 3) uint8 of the current picture, upright, over black."""
    import numpy as np
    from PIL import Image, ImageOps

    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion clips instead of scaling
        grey = np.asarray(upright).astype(np.float64) / 257
        return np.repeat(np.rint(grey.clip(0, 255)).astype(np.uint8)[..., None], 3, -1)
    if upright.has_transparency_data:
        picture = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", picture.size, (0, 0, 0, 255)), picture)
    return np.array(upright.convert("RGB"))
