"""What a clip is: size, exact rate, duration, colours, sound; and a refusal of whatever is none.

There is no ffprobe here: the first frame is decoded by ffmpeg, and what it says on the way is read.
Images are asked of Pillow. Knows nothing of models.
"""

from __future__ import annotations

import re
import secrets
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from app.errors import InputError
from app.video import ffmpeg
from app.video.images import ImageInfo, animation_rate, image_frame_count, image_info, too_many_pixels
from app.video.opening import Opening, read_opening, refusal
from app.video.pixels import HDR, Color, bit_depth, color_of, has_alpha, whole_chroma
from app.video.rates import constant_rate, is_constant

_SECONDS_TO_PROBE = 60.0
_HIGHEST_DECLARED_RATE = 480  # above, the "rate" is the tick of the container's clock
_RATE_OF_ONE_FRAME = 25.0
_PACKETS_COUNTED = 20_000  # for a rate that nobody declares


@dataclass(frozen=True)
class AudioTrack:
    """One sound track: its place among the file's sound tracks, and its codec ("aac")."""

    index: int
    codec: str


@dataclass(frozen=True)
class ClipInfo:
    """A clip or image as `read_frames` gives it."""

    path: Path
    width: int  # upright, with square pixels
    height: int
    rate: Fraction  # frames per second, constant: see app/video/rates.py
    duration: float | None  # seconds, of the longest stream; None where the file does not say
    frames: int | None  # estimated from duration and rate; exact for images; None without a duration
    start: Fraction  # time stamp of the first frame, seconds: what sound is aligned to
    rotation: int  # degrees the stored picture is turned by to be upright: 0, 90, 180, 270
    sample_aspect: Fraction  # width to height of a stored pixel, upright
    codec: str
    pixel_format: str
    bit_depth: int
    whole_chroma: bool  # whether the sides are multiples of the chroma's subsampling
    color: Color
    audio: tuple[AudioTrack, ...]
    is_image: bool
    durations: tuple[int, ...]  # milliseconds of each picture of an animated image; else empty
    notes: tuple[str, ...]  # what reading changes or leaves out, for a person

    @property
    def has_audio(self) -> bool:
        return bool(self.audio)

    @property
    def audio_codec(self) -> str | None:
        return self.audio[0].codec if self.audio else None

    @property
    def animated(self) -> bool:
        """An image of several pictures (GIF, WebP, PNG): a clip without sound, read by Pillow."""
        return bool(self.durations)

    @property
    def has_alpha(self) -> bool:
        return has_alpha(self.pixel_format)


def probe(
    path: Path,
    *,
    max_pixels: int | None = None,
    max_frames: int | None = None,
    max_seconds: float | None = None,
) -> ClipInfo:
    """Look at a clip or image. Limits: pixels of a frame, frames, seconds; None is no limit.

    Raises InputError: input_missing, input_is_folder, input_not_file, input_empty, input_unreadable,
    input_not_video, input_no_video, input_codec_unknown, input_damaged, input_too_large.
    """
    _check_file(path)
    _refuse_tiled_pictures(path)
    image = image_info(path, max_pixels, max_frames)
    info = _image_clip(path, image) if image is not None else _video_clip(path)
    _check_limits(info, max_pixels, max_frames, max_seconds)
    return info


def _check_file(path: Path) -> None:
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise InputError(
                "input_is_folder", f"{path.name} is a folder; expected a video or image file: name one in it."
            )
        if not stat.S_ISREG(status.st_mode):
            raise InputError("input_not_file", f"{path.name} is a device or pipe; expected a regular file.")
        with path.open("rb"):
            pass
    except PermissionError as error:
        raise InputError(
            "input_unreadable", f"{path.name} may not be read by this user: give it read permission."
        ) from error
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(
            "input_missing",
            f"{path.name or path} does not exist; expected a video or image file: check the path.",
        ) from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError("input_unreadable", f"{path.name} cannot be read: {reason}.") from error
    if status.st_size == 0:
        raise InputError(
            "input_empty", f"{path.name} is empty (0 bytes); expected a video or image: copy it again."
        )


def _refuse_tiled_pictures(path: Path) -> None:
    """HEIC and AVIF look like MP4 to ffmpeg, which would take one tile of a photograph for the whole."""
    with path.open("rb") as file:
        head = file.read(12)
    if head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"hevc", b"mif1", b"msf1", b"avif", b"avis"):
        raise InputError(
            "input_codec_unknown",
            f"{path.name} is a HEIC or AVIF picture, which is not read here: convert it to PNG or JPEG.",
        )


def _check_limits(
    info: ClipInfo, max_pixels: int | None, max_frames: int | None, max_seconds: float | None
) -> None:
    if max_pixels is not None and info.width * info.height > max_pixels:
        raise too_many_pixels(info.path, info.width, info.height, max_pixels)
    if max_frames is not None and info.frames is not None and info.frames > max_frames:
        raise InputError(
            "input_too_large",
            f"{info.path.name} has about {info.frames} frames; at most {max_frames} are taken here: cut it"
            " into parts, or raise the limit.",
        )
    if max_seconds is not None and info.duration is not None and info.duration > max_seconds:
        raise InputError(
            "input_too_large",
            f"{info.path.name} lasts {info.duration:.1f} s; at most {max_seconds:g} s are taken here: cut it"
            " into parts, or raise the limit.",
        )


def _image_clip(path: Path, image: ImageInfo) -> ClipInfo:
    rate = animation_rate(image.durations) if image.durations else Fraction(1)
    seconds = Fraction(sum(image.durations), 1000)
    return ClipInfo(
        path=path,
        width=image.width,
        height=image.height,
        rate=rate,
        duration=float(seconds) if image.durations else None,
        frames=image_frame_count(image.durations, rate),
        start=Fraction(0),
        rotation=0,
        sample_aspect=Fraction(1),
        codec=image.format.lower(),
        pixel_format=image.mode,
        bit_depth=8,
        whole_chroma=True,
        color=Color("gbr", True, "bt709", "iec61966-2-1"),
        audio=(),
        is_image=not image.durations,
        durations=image.durations,
        notes=image.notes,
    )


def _video_clip(path: Path) -> ClipInfo:
    # ffmpeg also prints titles and other text of the file: only lines that bear this name are the filter's
    name = f"showinfo@{secrets.token_hex(16)}"
    with _plain_name(path) as opened:
        arguments = ["-copyts", *ffmpeg.input_options(opened), "-map", "0:V:0", "-vf", name]
        try:
            lines = ffmpeg.run([*arguments, "-frames:v", "1", "-f", "null", "-"], _SECONDS_TO_PROBE).lines
        except subprocess.TimeoutExpired as error:
            raise _too_slow(path, "gave no frame") from error
    filtered = [i for i, line in enumerate(lines) if line.startswith(f"[{name} @ ")]
    said = "\n".join(lines[i].partition("] ")[2] for i in filtered)
    frame = _FRAME.search(said)
    if frame is None:
        raise refusal(path, lines)
    return _described(path, read_opening(path, lines[: filtered[0]]), said, frame)


def _too_slow(path: Path, what: str) -> InputError:
    return InputError(
        "input_damaged",
        f"{path.name} {what} within {_SECONDS_TO_PROBE:.0f} s; expected a video: re-encode it.",
    )


@contextmanager
def _plain_name(path: Path) -> Iterator[Path]:
    """A name that ffmpeg may print: one with a line break would look like lines of its own."""
    if str(path).isprintable():
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        suffix = path.suffix if path.suffix[1:].isalnum() else ""
        link = Path(folder, "clip" + suffix)
        link.symlink_to(path.absolute())
        yield link


# of the filter's own lines
_LINK = re.compile(r"^config in time_base: (\d+)/(\d+), frame_rate: (\d+)/(\d+)", re.MULTILINE)
_FRAME = re.compile(
    r"^n: *0 pts: *(-?\d+|NOPTS) .*? fmt:(\w+) .*?sar:(\d+)/(\d+) s:(\d+)x(\d+) i:(\w)", re.MULTILINE
)
_TAGS = re.compile(
    r"^color_range:(\S+) color_space:(\S+) color_primaries:(\S+) color_trc:(\S+)", re.MULTILINE
)


def _described(path: Path, opening: Opening, said: str, frame: re.Match[str]) -> ClipInfo:
    """The clip that ffmpeg's words describe."""
    pts, pixel_format, sar_x, sar_y, width, height, field = frame.groups()
    link = _LINK.search(said)
    tick, nominal = (_fraction(link[1], link[2]), _fraction(link[3], link[4])) if link else (Fraction(0),) * 2
    average = opening.rate if 0 < opening.rate <= _HIGHEST_DECLARED_RATE else counted_rate(path)
    rate = constant_rate(nominal, average)
    sample_aspect = _fraction(sar_x, sar_y) or Fraction(1)
    seconds = opening.seconds
    shown_rows = int(height)
    shown_columns = max(1, round(int(width) * sample_aspect))
    tags = _TAGS.search(said)
    color = color_of(pixel_format, int(width), int(height), tags.groups() if tags else ("unknown",) * 4)
    notes = []
    if not is_constant(nominal, average):
        notes.append(f"a variable rate ({average:.4g} frames/s on average) is read at a constant {rate}")
    if sample_aspect != 1:
        notes.append(
            f"pixels of {sample_aspect} are made square: {width}x{height} -> {shown_columns}x{height}"
        )
    if field in "TB":
        notes.append("interlaced material is read as whole frames")
    if color.transfer in HDR:
        notes.append(f"{HDR[color.transfer]} is mapped to standard range")
    if has_alpha(pixel_format):
        notes.append("transparency is laid over black")
    if "none" in opening.sound:
        notes.append("a sound track of unknown format is left out")
    return ClipInfo(
        path=path,
        width=shown_columns,
        height=shown_rows,
        rate=rate,
        duration=seconds,
        frames=round(seconds * rate) if seconds is not None else None,
        start=int(pts) * tick if pts != "NOPTS" else Fraction(0),
        rotation=opening.rotation,
        sample_aspect=sample_aspect,
        codec=opening.codec,
        pixel_format=pixel_format,
        bit_depth=bit_depth(pixel_format),
        whole_chroma=whole_chroma(pixel_format, int(width), int(height)),
        color=color,
        audio=tuple(AudioTrack(i, codec) for i, codec in enumerate(opening.sound) if codec != "none"),
        is_image=False,
        durations=(),
        notes=tuple(notes),
    )


def _fraction(numerator: str, denominator: str) -> Fraction:
    """The fraction; 0 where ffmpeg writes that it does not know (0/1, 1/0)."""
    return Fraction(int(numerator), int(denominator)) if int(denominator) else Fraction(0)


def counted_rate(path: Path) -> float:
    """Frames per second of a clip that declares no rate (browsers record such WebM): count and divide."""
    copied = ["-map", "0:V:0", "-c", "copy", "-frames:v", str(_PACKETS_COUNTED), "-f", "framecrc", "-"]
    arguments = ["-loglevel", "error", *ffmpeg.input_options(path), *copied]
    try:
        output = ffmpeg.run(arguments, _SECONDS_TO_PROBE).output.decode()
    except subprocess.TimeoutExpired as error:
        raise _too_slow(path, "could not be counted through") from error
    tick = re.search(r"^#tb 0: (\d+)/(\d+)$", output, re.MULTILINE)
    stamps = sorted(int(stamp) for stamp in re.findall(r"^0, +-?\d+, +(-?\d+),", output, re.MULTILINE))
    if tick is None or len(stamps) < 2 or stamps[-1] == stamps[0]:
        return _RATE_OF_ONE_FRAME
    return (len(stamps) - 1) / (stamps[-1] - stamps[0]) * int(tick[2]) / int(tick[1])
