"""Frames to a video file, a folder of PNG files, or an image.

Nothing is found under the output's name before it is complete: everything is written under a hidden
temporary name beside it and renamed at the end; on an error or cancel it is removed. Frames go to the
encoder through a pipe, one at a time. Knows nothing of models.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

from app.errors import FileError, InternalError, UsageError
from app.video import ffmpeg
from app.video.probe import AudioTrack, probe

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

Codec = Literal["h264", "hevc10", "h264_10", "lossless", "png"]
CODECS: tuple[Codec, ...] = get_args(Codec)
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv")

_MUXERS = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska"}
# Sound that plays from these containers as it is; anything else becomes AAC.
_COPIED_SOUND = {
    ".mp4": {"aac", "mp3", "ac3", "eac3", "alac", "opus"},
    ".mov": {"aac", "mp3", "ac3", "eac3", "alac", "pcm_s16le", "pcm_s24le", "pcm_s16be", "pcm_s24be"},
    ".mkv": {"aac", "mp3", "mp2", "ac3", "eac3", "dts", "truehd", "opus", "vorbis", "flac", "alac"}
    | {"pcm_s16le", "pcm_s24le", "pcm_f32le", "wavpack"},
}
_WITHOUT_EARLY = "noise=drop='lt(pts*tb,-0.008)'"  # changes no packet it keeps


@dataclass(frozen=True)
class _Encoder:
    options: tuple[str, ...]
    pixel_format: str | None  # None: RGB as it is
    crf: int | None

    def video_options(self, odd: bool, crf: int | None) -> list[str]:
        quality = crf if crf is not None else self.crf
        chosen = [*self.options, *(("-crf", str(quality)) if self.crf is not None else ())]
        if self.pixel_format is None:
            return chosen
        # BT.709 for real, not only by tag: swscale would convert by BT.601
        stored = self.pixel_format.replace("420", "444") if odd else self.pixel_format
        convert = (
            "format=gbrp16le,zscale=matrixin=gbr:rangein=full:primariesin=bt709:transferin=bt709"
            ":matrix=bt709:range=limited:primaries=bt709:transfer=bt709:filter=bicubic"
        )
        return [*chosen, "-vf", f"{convert},format={stored}"]


_QUIET_X265 = ("-x265-params", "log-level=error")
_ENCODERS: dict[Codec, _Encoder] = {
    "h264": _Encoder(("-c:v", "libx264", "-preset", "medium"), "yuv420p", 16),
    "h264_10": _Encoder(("-c:v", "libx264", "-preset", "medium"), "yuv420p10le", 16),
    "hevc10": _Encoder(
        ("-c:v", "libx265", "-preset", "medium", "-tag:v", "hvc1", *_QUIET_X265), "yuv420p10le", 18
    ),
}
_FFV1 = _Encoder(("-c:v", "ffv1", "-level", "3", "-slicecrc", "1", "-pix_fmt", "bgr0"), None, None)
_RGB_H264 = _Encoder(("-c:v", "libx264rgb", "-preset", "medium", "-qp", "0", "-pix_fmt", "rgb24"), None, None)


class VideoWriter:
    """Writes frames of one size at one rate. A context manager: complete on a normal exit, else gone.

    `path`: a .mp4, .mov or .mkv file, or for "png" a folder of 000001.png, 000002.png, ...
    `codec`: h264 (8 bits), h264_10 and hevc10 (10 bits, from the floats), lossless (8-bit RGB, bit-exact:
    FFV1 in .mkv, H.264 RGB in .mp4 and .mov), png. All but the last two are BT.709, limited range, 4:2:0;
    sides that are not even keep their size through 4:4:4, which some players do not show (see `notes`).
    `audio_from`: a clip whose sound is kept whole and in sync with its first frame: copied where the
    container allows, else AAC. `read_frames` keeps the duration at any rate, so the sound always fits.
    `crf`: quality of h264 and hevc, lower is better.

    Raises UsageError output_suffix, FileError output_folder_missing, output_is_folder, output_exists,
    output_unwritable, output_no_space, output_failed.
    """

    def __init__(
        self,
        path: Path,
        width: int,
        height: int,
        rate: Fraction,
        *,
        codec: Codec = "h264",
        audio_from: Path | None = None,
        crf: int | None = None,
    ) -> None:
        assert rate > 0 and width > 0 and height > 0, (rate, width, height)
        self.path = path
        self.frames_written = 0
        self._size = height, width
        self._sink: _PngFolder | _Encoding
        if codec == "png":
            _check_place(path, folder=True)
            self._sink = _PngFolder(path)
        else:
            _check_suffix(path, VIDEO_SUFFIXES, f"a video ({codec})")
            _check_place(path)
            self._sink = _Encoding(path, width, height, rate, codec, audio_from, crf)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person should know of the file."""
        return self._sink.notes

    def write(self, frames: Tensor | NDArray[np.uint8]) -> None:
        """Append (n, 3, height, width) floats in [-1, 1], or (n, height, width, 3) uint8.

        Floats are rounded once, to 16 bits for YUV codecs and to 8 for RGB ones, and clipped.
        """
        for frame in frames:
            picture = _picture(frame, self._sink.deep)
            assert picture.shape == (*self._size, 3), (picture.shape, self._size)
            with _failures_of(self.path):
                self._sink.put(picture)
            self.frames_written += 1

    def __enter__(self) -> Self:
        with _failures_of(self.path):
            self._sink.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                if not self.frames_written:
                    raise InternalError("nothing_to_write", f"No frame was written to {self.path.name}.")
                with _failures_of(self.path):
                    self._sink.finish()
        finally:
            self._sink.close()


class ImageWriter:
    """Writes the one frame of an image; used like `VideoWriter`, and as early sure of its path."""

    notes: tuple[str, ...] = ()

    def __init__(self, path: Path) -> None:
        _check_suffix(path, IMAGE_SUFFIXES, "an image")
        _check_place(path)
        self.path = path

    def write(self, frames: Tensor) -> None:
        """The frame, (1, 3, height, width) floats in [-1, 1]."""
        (frame,) = frames
        write_image(self.path, frame)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def write_image(path: Path, frame: Tensor | NDArray[np.uint8]) -> None:
    """One (3, height, width) float frame in [-1, 1], or (height, width, 3) uint8, by the path's suffix."""
    _check_suffix(path, IMAGE_SUFFIXES, "an image")
    _check_place(path)
    temporary = _temporary(path)
    try:
        with _failures_of(path):
            _save_image(temporary, _picture(frame, deep=False), path.suffix.lower())
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _save_image(path: Path, picture: NDArray[Any], suffix: str) -> None:
    from PIL import Image

    kinds = {".jpg": "JPEG", ".jpeg": "JPEG", ".tif": "TIFF", ".tiff": "TIFF"}
    options: dict[str, Any] = {
        ".jpg": {"quality": 95, "subsampling": 0},
        ".jpeg": {"quality": 95, "subsampling": 0},
        ".webp": {"quality": 95},
        ".png": {"compress_level": 4},
    }.get(suffix, {})
    Image.fromarray(picture).save(path, format=kinds.get(suffix, suffix[1:].upper()), **options)


def _picture(frame: Tensor | NDArray[np.uint8], deep: bool) -> NDArray[Any]:
    """One frame as (height, width, 3): uint16 when `deep`, else uint8; rounded and clipped."""
    import numpy as np

    if isinstance(frame, np.ndarray):
        assert frame.dtype == np.uint8, frame.dtype
        return np.ascontiguousarray(frame).astype("<u2") * 257 if deep else np.ascontiguousarray(frame)
    values = frame.float()
    if not values.isfinite().all():
        raise InternalError("not_finite", "A frame holds values that are not numbers; nothing is written.")
    half = 65535 / 2 if deep else 255 / 2
    levels = values.clamp(-1, 1).add(1).mul(half).round()
    return np.ascontiguousarray(levels.permute(1, 2, 0).cpu().numpy(), "<u2" if deep else np.uint8)


class _PngFolder:
    deep = False
    notes: tuple[str, ...] = ()

    def __init__(self, path: Path) -> None:
        self._path = path
        # Beside a folder that is yet to be made; inside one that is there, which may be a mount or a link.
        self._inside = path.is_dir()
        self._temporary = _temporary(path / "frames" if self._inside else path)
        self._count = 0

    def open(self) -> None:
        self._temporary.mkdir()

    def put(self, picture: NDArray[Any]) -> None:
        self._count += 1
        _save_image(self._temporary / f"{self._count:06d}.png", picture, ".png")

    def finish(self) -> None:
        if not self._inside:
            self._temporary.replace(self._path)
            return
        for frame in self._temporary.iterdir():
            frame.replace(self._path / frame.name)

    def close(self) -> None:
        shutil.rmtree(self._temporary, ignore_errors=True)


class _Encoding:
    def __init__(
        self,
        path: Path,
        width: int,
        height: int,
        rate: Fraction,
        codec: Codec,
        audio_from: Path | None,
        crf: int | None,
    ) -> None:
        suffix = path.suffix.lower()
        lossless = _FFV1 if suffix == ".mkv" else _RGB_H264
        encoder = lossless if codec == "lossless" else _ENCODERS[codec]
        odd = bool(width % 2 or height % 2)
        self.deep = encoder.pixel_format is not None
        self.notes = (
            (f"sides of {width}x{height} are kept exactly by 4:4:4 chroma, which some players do not show",)
            if odd and self.deep
            else ()
        )
        self._path = path
        self._temporary = _temporary(path)
        picture = ["-f", "rawvideo", "-pix_fmt", "rgb48le" if self.deep else "rgb24"]
        picture += ["-video_size", f"{width}x{height}", "-framerate", str(rate), "-i", "pipe:0"]
        sound_in, sound_out = _sound(audio_from, suffix) if audio_from is not None else ([], [])
        container = ["-f", _MUXERS[suffix], *(["-movflags", "+faststart"] if suffix != ".mkv" else [])]
        self._arguments = [
            *("-y", "-loglevel", "level+warning", "-copyts"),
            *picture,
            *sound_in,
            *("-map", "0:v:0", "-fps_mode", "passthrough"),
            *encoder.video_options(odd, crf),
            *sound_out,
            *("-map_chapters", "-1"),
            *container,
            f"file:{self._temporary}",
        ]
        self._child: ffmpeg.Ffmpeg | None = None

    def open(self) -> None:
        self._child = ffmpeg.Ffmpeg(self._arguments, writable=True)

    def put(self, picture: NDArray[Any]) -> None:
        assert self._child is not None
        try:
            self._child.write(picture.data.cast("B"))
        except BrokenPipeError:
            self._child.finish()
            raise self._failure() from None

    def finish(self) -> None:
        assert self._child is not None
        if self._child.finish() != 0:
            raise self._failure()
        self._temporary.replace(self._path)

    def close(self) -> None:
        if self._child is not None:
            self._child.close()
        self._temporary.unlink(missing_ok=True)

    def _failure(self) -> FileError:
        assert self._child is not None
        lines = [ffmpeg.clean(line, self._temporary, self._path) for line in self._child.last_lines]
        if any("No space left" in line for line in lines):
            return _no_space(self._path)
        said = "; ".join(line.replace(self._temporary.name, self._path.name) for line in lines[-3:])
        return FileError("output_failed", f"{self._path.name} could not be encoded; ffmpeg says: {said}.")


def _sound(source: Path, suffix: str) -> tuple[list[str], list[str]]:
    """Input and output options that bring the sound of `source`, its time 0 at the first frame."""
    info = probe(source)
    if not info.audio:
        return [], []
    outputs: list[str] = []
    # Matroska knows no time below 0: sound from before the first frame would delay the picture
    drop_early = suffix == ".mkv" and info.start > 0
    for i, track in enumerate(info.audio):
        outputs += ["-map", f"1:a:{track.index}", *_track(i, track, suffix, drop_early)]
    # with -copyts the sound keeps its time stamps: take off that of the first frame
    return ["-itsoffset", f"{-float(info.start):.6f}", "-vn", *ffmpeg.input_options(source)], outputs


def _track(i: int, track: AudioTrack, suffix: str, drop_early: bool) -> list[str]:
    if track.codec in _COPIED_SOUND[suffix]:
        return [f"-c:a:{i}", "copy", *([f"-bsf:a:{i}", _WITHOUT_EARLY] if drop_early else [])]
    return [f"-c:a:{i}", "aac", f"-b:a:{i}", "256k", f"-filter:a:{i}", "aresample=async=1:first_pts=0"]


def _check_suffix(path: Path, suffixes: tuple[str, ...], what: str) -> None:
    if path.suffix.lower() not in suffixes:
        raise UsageError(
            "output_suffix",
            f"{path.name} ends in {path.suffix or 'no suffix'!r}; {what} is written as one of"
            f" {', '.join(suffixes)}: change the name or the codec.",
        )


def _check_place(path: Path, *, folder: bool = False) -> None:
    """Whether `path` can be written, before any work is done."""
    parent = path.parent
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:  # a name that is too long, or holds a null
        raise FileError(
            "output_unwritable",
            f"{path.name[:80]!r} cannot be written: {getattr(error, 'strerror', None) or error}; choose "
            "another name.",
        ) from None
    if not parent.is_dir():
        raise FileError(
            "output_folder_missing",
            f"The folder {parent.name!r} for {path.name} does not exist: make it, or choose another.",
        )
    if folder and path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileError(
            "output_exists", f"{path.name} exists and is not an empty folder: remove it, or choose another."
        )
    if not folder and path.is_dir():
        raise FileError("output_is_folder", f"{path.name} is a folder; expected a file's name: add one.")
    where = path if folder and path.is_dir() else parent
    if not os.access(where, os.W_OK | os.X_OK):
        raise FileError(
            "output_unwritable",
            f"The folder {where.name!r} for {path.name} may not be written by this user: choose another.",
        )


@contextmanager
def _failures_of(path: Path) -> Iterator[None]:
    """What the system refuses, in our words."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _no_space(path) from error
        raise FileError(
            "output_failed", f"{path.name} could not be written: {error.strerror or error}."
        ) from error


def _temporary(path: Path) -> Path:
    return path.with_name(f".{secrets.token_hex(6)}.partial")


def _no_space(path: Path) -> FileError:
    free = shutil.disk_usage(path.parent).free
    return FileError(
        "output_no_space",
        f"No room is left for {path.name} ({free / 1e6:.0f} MB free): make room and run again.",
    )
