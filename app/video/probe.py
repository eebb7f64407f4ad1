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
from app.video.rates import constant_rate, is_constant

_SECONDS_TO_PROBE = 60.0
_HIGHEST_DECLARED_RATE = 480  # above, the "rate" is the tick of the container's clock
_RATE_OF_ONE_FRAME = 25.0
_PACKETS_COUNTED = 20_000  # for a rate that nobody declares
# The names of matrices that zscale takes; what a file says is never handed on otherwise.
MATRICES = (
    *("gbr", "bt709", "fcc", "bt470bg", "smpte170m", "smpte240m", "ycgco", "bt2020nc", "bt2020c"),
    *("chroma-derived-nc", "chroma-derived-c", "ictcp"),
)
_HDR = {"smpte2084": "HDR (PQ)", "arib-std-b67": "HDR (HLG)"}
_ALPHA = re.compile(r"^(yuva|gbrap|rgba|bgra|argb|abgr|ya\d|ayuv)")
_RGB = re.compile(r"^(gbr|rgb|bgr|argb|abgr|0rgb|0bgr|x2rgb|x2bgr|pal8|mono)")
_SUBSAMPLING = {"420": (2, 2), "422": (2, 1), "440": (1, 2), "411": (4, 1), "410": (4, 4)}


@dataclass(frozen=True)
class Color:
    """How stored values become RGB: names are ffmpeg's; what the file does not say is decided here."""

    matrix: str  # "bt709", "smpte170m", ...; "gbr" where RGB is stored
    full_range: bool
    primaries: str
    transfer: str


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
        return bool(_ALPHA.match(self.pixel_format))


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
        raise _refusal(path, lines)
    return _described(path, _opening(path, lines[: filtered[0]]), said, frame)


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


@dataclass(frozen=True)
class _Opening:
    """What ffmpeg prints of a file as it opens it. The file's own text may imitate it: only words and
    numbers are taken from it, and two stories about one stream are refused."""

    video: re.Match[str]
    sound: tuple[str, ...]  # the codec of each sound track
    rotation: int
    seconds: float | None


def _opening(path: Path, lines: list[str]) -> _Opening:
    """Read what came before the filter's first word; the last "Stream mapping:" there is ffmpeg's own."""
    text = "\n".join(lines)
    mapping = list(re.finditer(r"^Stream mapping:$", text, re.MULTILINE))
    mapped = _MAPPED.search(text, mapping[-1].end()) if mapping else None
    end = mapping[-1].start() if mapping else 0
    streams: dict[int, re.Match[str]] = {}
    clear = True
    for stream in _STREAM.finditer(text, 0, end):  # one that belongs to two programs is printed twice
        clear &= streams.setdefault(int(stream[1]), stream)[0] == stream[0]
    video = streams.get(int(mapped[1])) if mapped else None
    if video is None or video[2] != "Video" or not clear:
        raise InputError(
            "input_damaged",
            f"{path.name} describes its streams in a way that cannot be followed; expected an ordinary"
            " video: remove its titles and tags, or re-encode it.",
        )
    clock = _DURATION.search(text, 0, end)
    return _Opening(
        video,
        tuple(stream[3] for _, stream in sorted(streams.items()) if stream[2] == "Audio"),
        _rotation(text[video.end() : end]),
        int(clock[1]) * 3600 + int(clock[2]) * 60 + float(clock[3]) if clock else None,
    )


_STREAM = re.compile(r"^ *Stream #0:(\d{1,6})\b[^:\n]*: (Video|Audio): (\w+)(.*)$", re.MULTILINE | re.ASCII)
_MAPPED = re.compile(r"^ *Stream #0:(\d{1,6}) -> #0:0 ", re.MULTILINE | re.ASCII)
_DURATION = re.compile(r"^ *Duration: (\d{1,9}):(\d\d):(\d\d\.\d{1,9}),", re.MULTILINE | re.ASCII)
_DECLARED = re.compile(r", (\d{1,9}(?:\.\d{1,9})?)(k?) fps\b", re.ASCII)
_ROTATION = re.compile(
    r"^ *display ?matrix: rotation of (-?\d{1,3}(?:\.\d{1,9})?) degrees", re.I | re.MULTILINE | re.ASCII
)
# of the filter's own lines
_LINK = re.compile(r"^config in time_base: (\d+)/(\d+), frame_rate: (\d+)/(\d+)", re.MULTILINE)
_FRAME = re.compile(
    r"^n: *0 pts: *(-?\d+|NOPTS) .*? fmt:(\w+) .*?sar:(\d+)/(\d+) s:(\d+)x(\d+) i:(\w)", re.MULTILINE
)
_TAGS = re.compile(
    r"^color_range:(\S+) color_space:(\S+) color_primaries:(\S+) color_trc:(\S+)", re.MULTILINE
)


def _described(path: Path, opening: _Opening, said: str, frame: re.Match[str]) -> ClipInfo:
    """The clip that ffmpeg's words describe."""
    pts, pixel_format, sar_x, sar_y, width, height, field = frame.groups()
    link = _LINK.search(said)
    tick, nominal = (_fraction(link[1], link[2]), _fraction(link[3], link[4])) if link else (Fraction(0),) * 2
    declared = _DECLARED.search(opening.video[4])
    average = float(declared[1]) * (1000 if declared[2] else 1) if declared else 0.0
    if not 0 < average <= _HIGHEST_DECLARED_RATE:
        average = counted_rate(path)
    rate = constant_rate(nominal, average)
    sample_aspect = _fraction(sar_x, sar_y) or Fraction(1)
    seconds = opening.seconds
    shown_rows = int(height)
    shown_columns = max(1, round(int(width) * sample_aspect))
    tags = _TAGS.search(said)
    color = _color(pixel_format, int(width), int(height), tags.groups() if tags else ("unknown",) * 4)
    notes = []
    if not is_constant(nominal, average):
        notes.append(f"a variable rate ({average:.4g} frames/s on average) is read at a constant {rate}")
    if sample_aspect != 1:
        notes.append(
            f"pixels of {sample_aspect} are made square: {width}x{height} -> {shown_columns}x{height}"
        )
    if field in "TB":
        notes.append("interlaced material is read as whole frames")
    if color.transfer in _HDR:
        notes.append(f"{_HDR[color.transfer]} is mapped to standard range")
    if _ALPHA.match(pixel_format):
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
        codec=opening.video[3],
        pixel_format=pixel_format,
        bit_depth=bit_depth(pixel_format),
        whole_chroma=_whole_chroma(pixel_format, int(width), int(height)),
        color=color,
        audio=tuple(AudioTrack(i, codec) for i, codec in enumerate(opening.sound) if codec != "none"),
        is_image=False,
        durations=(),
        notes=tuple(notes),
    )


def _fraction(numerator: str, denominator: str) -> Fraction:
    """The fraction; 0 where ffmpeg writes that it does not know (0/1, 1/0)."""
    return Fraction(int(numerator), int(denominator)) if int(denominator) else Fraction(0)


def bit_depth(pixel_format: str) -> int:
    """Bits of a channel: "yuv420p10le" -> 10, "rgb48be" -> 16, "nv12" -> 8."""
    if re.match(r"(rgb|bgr)48|(rgba|bgra)64", pixel_format):
        return 16
    found = re.search(r"(?:p|gray|ya|p0|x2rgb|x2bgr|y2|xv)(9|10|12|14|16)(?:msb)?(?:le|be)?$", pixel_format)
    return int(found[1]) if found else 8


def _whole_chroma(pixel_format: str, width: int, height: int) -> bool:
    found = re.search(r"yuv[aj]?(4\d\d)|(?:nv12|nv21|p01\d)", pixel_format)
    across, down = _SUBSAMPLING.get(found[1] or "420", (1, 1)) if found else (1, 1)
    return width % across == 0 and height % down == 0


def _rotation(following: str) -> int:
    """Degrees clockwise to turn the stored picture; ffmpeg itself applies them when decoding."""
    found = _ROTATION.search(re.split(r"^ *Stream #", following, maxsplit=1, flags=re.MULTILINE)[0])
    return round(-float(found[1])) % 360 if found else 0


def _color(pixel_format: str, width: int, height: int, tags: tuple[str, ...]) -> Color:
    """Tags as the file gives them; without, what players assume: BT.709 above television's 576 rows.

    A side of 1280 counts as well: a wide film cut from 1280x720 has fewer rows and the same colours.
    """
    stored_range, matrix, primaries, transfer = tags
    if _RGB.match(pixel_format):
        return Color("gbr", True, primaries, transfer)
    if matrix == "gbr" or matrix not in MATRICES:
        large = max(width, height) >= 1280 or min(width, height) > 576
        matrix = "bt709" if large else "smpte170m"
    if stored_range in ("tv", "pc"):
        full = stored_range == "pc"
    else:
        full = pixel_format.startswith(("yuvj", "gray", "ya"))
    return Color(matrix, full, primaries, transfer)


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


def _refusal(path: Path, lines: list[str]) -> InputError:
    """Why ffmpeg gave no frame, in a sentence."""
    text = "\n".join(lines)
    name = path.name
    if "matches no streams" in text:
        return InputError(
            "input_no_video", f"{name} has no video stream, only sound or data; expected a video or image."
        )
    if "moov atom not found" in text and _is_mp4(path):
        return InputError(
            "input_not_video",
            f"{name} is an MP4 or MOV without its index (moov atom): it was cut short, most likely by an"
            " interrupted copy or recording; copy it again.",
        )
    if "Decoder (codec" in text or "Unknown decoder" in text:
        codec = re.search(r"Decoder \(codec (\w+)\)", text)
        return InputError(
            "input_codec_unknown",
            f"{name} is coded with {codec[1] if codec else 'an unknown codec'}, which this ffmpeg cannot"
            " decode; re-encode it, for example as H.264.",
        )
    if "Stream mapping:" in lines:
        return InputError(
            "input_damaged", f"{name} holds a video stream, but no frame of it can be decoded: copy it again."
        )
    return InputError(
        "input_not_video",
        f"{name} is {_kind(path)}; expected a video or image (MP4, MOV, MKV, WebM, PNG, ...).",
    )


def _is_mp4(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(8)[4:] in (b"ftyp", b"mdat", b"wide", b"free", b"skip")


def _kind(path: Path) -> str:
    """What a file that is no video looks like."""
    with path.open("rb") as file:
        head = file.read(512).lstrip().lower()
    if head.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page or XML, perhaps an error page saved in a video's place"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file itself (run `git lfs pull`)"
    if head.startswith(b"#extm3u"):
        return "a playlist that names other files, not a video"
    if head and all(32 <= byte < 127 or byte in b"\t\r\n" for byte in head):
        return "text"
    return "of no known video or image format"
