"""Frames of a clip or image, one after the other, as RGB arrays.

Only one frame exists at a time, however long the clip. Frames are upright, with square pixels, at a
constant rate, and in full-range RGB with BT.709 transfer: matrix and range are those the file names
(or `probe` decided), HDR is mapped to standard range. Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from app.errors import InputError, InternalError, UsageError
from app.video import ffmpeg
from app.video.images import image_frames
from app.video.pixels import HDR, MATRICES
from app.video.probe import ClipInfo

if TYPE_CHECKING:
    from numpy.typing import NDArray

PixelFormat = Literal["rgb24", "rgb48le"]

_TAIL_SECONDS = 1.0
_TAIL_SHARE = 0.1


def read_frames(
    path: Path,
    info: ClipInfo,
    *,
    rate: Fraction | None = None,
    size: tuple[int, int] | None = None,
    pixel_format: PixelFormat = "rgb24",
    warn: Callable[[str], None] | None = None,
) -> Generator[NDArray[Any]]:
    """The frames of `path` in order: (height, width, 3), uint8 for rgb24, uint16 for rgb48le.

    `rate` other than the clip's own drops or repeats frames; the duration stays. `size` (height, width)
    resizes with an antialiased bicubic. A clip is always read through the same rule of times, so two
    passes with the same `rate` give the same frames. Closing the iterator ends ffmpeg.

    Raises UsageError rate_invalid where a rate is too low for a single frame, and InputError input_damaged
    when the data is broken, as soon as that is known, which may be after the last good frame. Damage in the
    last second (at most a tenth of the clip) is reported to `warn`.
    """
    rate = info.rate if rate is None else rate
    assert rate > 0, rate
    if info.is_image or info.animated:
        return _image(path, info, rate, size, pixel_format)
    return _video(path, info, rate, size or (info.height, info.width), pixel_format, warn)


def _image(
    path: Path, info: ClipInfo, rate: Fraction, size: tuple[int, int] | None, pixel_format: PixelFormat
) -> Generator[NDArray[Any]]:
    import numpy as np
    from PIL import Image

    for frame in image_frames(path, info.durations, rate):
        picture = frame
        if size is not None and size != frame.shape[:2]:
            resized = Image.fromarray(frame).resize((size[1], size[0]), Image.Resampling.BICUBIC)
            picture = np.asarray(resized)
        yield picture if pixel_format == "rgb24" else picture.astype(np.uint16) * 257


def _video(
    path: Path,
    info: ClipInfo,
    rate: Fraction,
    size: tuple[int, int],
    pixel_format: PixelFormat,
    warn: Callable[[str], None] | None,
) -> Generator[NDArray[Any]]:
    import numpy as np

    depth = np.dtype(np.uint8) if pixel_format == "rgb24" else np.dtype("<u2")
    channels = 4 if info.has_alpha else 3
    filters = f"{_times(rate)},{_to_rgb(info, size, pixel_format)}"
    count = 0
    with ffmpeg.Ffmpeg([*_decoding(path), "-vf", filters, "-f", "rawvideo", "pipe:1"]) as child:
        while True:
            frame = np.empty((*size, channels), depth)
            if child.read_into(frame.data.cast("B")) < frame.nbytes:
                break
            count += 1
            yield _over_black(frame) if info.has_alpha else frame
        status = child.finish()
        complaint = next(iter(child.damage), None)
        if not (status or count or complaint) and rate < info.rate:
            raise UsageError(
                "rate_invalid",
                f"rate is {float(rate):g}, at which {path.name} has no frame; ask for a higher one, or none.",
            )
        if status or count == 0:
            complaint = next(iter(child.damage or child.last_lines), "no frame came out")
    if complaint is not None:
        _judge(
            path, info, Fraction(count) / rate, ffmpeg.clean(complaint, path), status == 0 and count > 0, warn
        )


def _decoding(path: Path) -> list[str]:
    return [
        *("-loglevel", "level+warning"),
        *ffmpeg.input_options(path),
        *("-map", "0:V:0", "-fps_mode", "passthrough"),
    ]


def _times(rate: Fraction) -> str:
    """Constant rate from the first frame on. Both passes over a clip (cuts, frames) must use this rule."""
    return f"setpts=PTS-STARTPTS,fps={rate}:round=near"


def _to_rgb(info: ClipInfo, size: tuple[int, int], pixel_format: PixelFormat) -> str:
    """The filters from what is stored to packed full-range RGB.

    zscale converts: it is exact for more than 8 bits, where swscale is half a level too dark.
    """
    color = info.color
    if color.matrix not in MATRICES:  # it becomes part of a program for ffmpeg
        raise InternalError("color_unknown", f"{color.matrix!r} is no matrix of colours that is known here.")
    alpha = "a" if info.has_alpha else ""
    planar = f"gbr{alpha}p" + ("" if pixel_format == "rgb24" else "16le")
    packed = {"gbrp": "rgb24", "gbrap": "rgba", "gbrp16le": "rgb48le", "gbrap16le": "rgba64le"}[planar]
    steps = []
    if color.matrix == "gbr":
        steps.append(f"format={planar}")
    elif not info.whole_chroma:
        steps.append(_full_chroma(info))
    hdr = color.transfer in HDR
    wide = color.primaries == "bt2020"
    stored = (
        f"matrixin={color.matrix}:rangein={'full' if color.full_range else 'limited'}"
        f":primariesin={'bt2020' if wide or hdr else 'bt709'}:transferin={color.transfer if hdr else 'bt709'}"
    )
    scaled = f"w={size[1]}:h={size[0]}:filter=bicubic"
    if hdr:
        # light relative to 203 nits, the level of white that ITU-R BT.2408 gives graphics in HDR
        steps.append(f"zscale={stored}:matrix=gbr:range=full:primaries=bt709:transfer=linear:npl=203")
        steps.append("format=gbrpf32le,tonemap=tonemap=mobius:desat=0")
        stored = "matrixin=gbr:rangein=full:primariesin=bt709:transferin=linear"
    steps.append(f"zscale={stored}:matrix=gbr:range=full:primaries=bt709:transfer=bt709:{scaled}")
    return ",".join([*steps, f"format={planar}", f"format={packed}"])


def _full_chroma(info: ClipInfo) -> str:
    """One chroma sample a pixel, values as stored: zscale refuses sides that the chroma does not divide."""
    full = f"yuv{'a' if info.has_alpha else ''}444p{f'{info.bit_depth}le' if info.bit_depth > 8 else ''}"
    same = "in_range=full:out_range=full:in_color_matrix=bt709:out_color_matrix=bt709"
    return f"scale={same}:flags=bicubic+accurate_rnd+full_chroma_inp,format={full}"


def _over_black(frame: NDArray[Any]) -> NDArray[Any]:
    """(height, width, 4) with straight alpha -> (height, width, 3) over black, rounded."""
    import numpy as np

    peak = np.iinfo(frame.dtype).max
    color, alpha = frame[..., :3].astype(np.float32), frame[..., 3:].astype(np.float32)
    return np.rint(color * (alpha / peak)).astype(frame.dtype)


def _judge(
    path: Path,
    info: ClipInfo,
    seconds: Fraction,
    complaint: str,
    forgivable: bool,
    warn: Callable[[str], None] | None,
) -> None:
    """Damage was reported in a clip that gave `seconds` of frames: forgive it at the very end only."""
    tail = min(_TAIL_SECONDS, float(seconds) * _TAIL_SHARE)
    missing = info.duration is not None and float(seconds) < info.duration - max(tail, _TAIL_SECONDS * 0.5)
    if missing or not forgivable:
        length = f" of {info.duration:.2f} s" if info.duration is not None else ""
        raise InputError(
            "input_damaged",
            f"{path.name} is damaged or cut short: {float(seconds):.2f} s{length} could be decoded"
            f" ({complaint}); copy it again, or re-encode it to accept the loss.",
        )
    # decode once more without the tail: when that is clean, the damage lies in it
    all_but_the_tail = ["-t", f"{float(seconds) - tail:.3f}", *_decoding(path), "-f", "null", "-"]
    if any(ffmpeg.DAMAGE.search(line) for line in ffmpeg.run(all_but_the_tail).lines):
        raise InputError(
            "input_damaged",
            f"{path.name} is damaged within its {float(seconds):.2f} s ({complaint}); expected a clip"
            " that decodes without errors: copy it again, or re-encode it to accept the loss.",
        )
    if warn is not None:
        warn(f"{path.name} may be damaged at its end ({complaint}); every frame that can be decoded is used")
