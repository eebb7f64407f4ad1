"""Frames to a video file, a folder of PNG files, or an image.

Nothing is found under the output's name before it is complete: everything is written under a hidden
temporary name beside it and renamed at the end; on an error or cancel it is removed. Frames go to the
encoder through a pipe, one at a time. Knows nothing of models.
"""

from __future__ import annotations

import shutil
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from app.errors import FileError, InternalError
from app.video import ffmpeg
from app.video.encoders import ENCODERS, FFV1, RGB_H264, Codec, picture_of
from app.video.place import check_place, check_suffix, failures_of, no_space, temporary
from app.video.probe import AudioTrack, probe

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

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
            check_place(path, folder=True)
            self._sink = _PngFolder(path)
        else:
            check_suffix(path, VIDEO_SUFFIXES, f"a video ({codec})")
            check_place(path)
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
            picture = picture_of(frame, self._sink.deep)
            assert picture.shape == (*self._size, 3), (picture.shape, self._size)
            with failures_of(self.path):
                self._sink.put(picture)
            self.frames_written += 1

    def __enter__(self) -> Self:
        with failures_of(self.path):
            self._sink.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                if not self.frames_written:
                    raise InternalError("nothing_to_write", f"No frame was written to {self.path.name}.")
                with failures_of(self.path):
                    self._sink.finish()
        finally:
            self._sink.close()


class ImageWriter:
    """Writes the one frame of an image; used like `VideoWriter`, and as early sure of its path."""

    notes: tuple[str, ...] = ()

    def __init__(self, path: Path) -> None:
        check_suffix(path, IMAGE_SUFFIXES, "an image")
        check_place(path)
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
    check_suffix(path, IMAGE_SUFFIXES, "an image")
    check_place(path)
    hidden = temporary(path)
    try:
        with failures_of(path):
            _save_image(hidden, picture_of(frame, deep=False), path.suffix.lower())
            hidden.replace(path)
    finally:
        hidden.unlink(missing_ok=True)


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


class _PngFolder:
    deep = False
    notes: tuple[str, ...] = ()

    def __init__(self, path: Path) -> None:
        self._path = path
        # Beside a folder that is yet to be made; inside one that is there, which may be a mount or a link.
        self._inside = path.is_dir()
        self._temporary = temporary(path / "frames" if self._inside else path)
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
        # FFV1 cannot write a picture of one column.
        lossless = FFV1 if suffix == ".mkv" and width > 1 else RGB_H264
        encoder = lossless if codec == "lossless" else ENCODERS[codec]
        odd = bool(width % 2 or height % 2)
        self.deep = encoder.pixel_format is not None
        self.notes = (
            (f"sides of {width}x{height} are kept exactly by 4:4:4 chroma, which some players do not show",)
            if odd and self.deep
            else ()
        )
        self._path = path
        self._temporary = temporary(path)
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
            return no_space(self._path)
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
