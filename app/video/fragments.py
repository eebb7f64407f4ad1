"""Frames to an MP4 that plays as it arrives: pieces while it is made, and the same bytes as a file.

Fragmented MP4 (ISO/IEC 14496-12, 8.8): first `ftyp` and `moov` without samples, then a `moof` and `mdat`
for each frame. The encoder looks at no later frame, so what was written is out at once, but for the last
frame, whose duration is known when the next one comes. Concatenated, the pieces are the file. Knows nothing
of models or of who takes the pieces.
"""

from __future__ import annotations

import threading
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from app.errors import FileError, InternalError
from app.video import ffmpeg
from app.video.encoders import ENCODERS, picture_of
from app.video.place import check_place, check_suffix, failures_of, no_space, temporary

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

SUFFIXES: Final = (".mp4", ".mov")
_PATIENCE: Final = 30.0  # seconds for the encoder to give the fragment of a frame that it was given
_BLOCK: Final = 1 << 16  # bytes


class FragmentWriter:
    """Writes frames of one size at one rate as H.264, 8 bits, BT.709; used like `VideoWriter`.

    `take` gives what has been made since it was last called. The file at `path` is complete on a normal
    exit, else gone.

    Raises what `VideoWriter` raises.
    """

    notes: tuple[str, ...] = ()

    def __init__(
        self, path: Path, width: int, height: int, rate: Fraction, *, crf: int | None = None
    ) -> None:
        assert rate > 0 and not (width % 2 or height % 2), (rate, width, height)
        check_suffix(path, SUFFIXES, "a stream")
        check_place(path)
        self.path = path
        self.frames_written = 0
        self._size = height, width
        self._temporary = temporary(path)
        self._arguments = [
            # Without probing: it would wait for five megabytes of frames.
            *("-loglevel", "level+warning", "-probesize", "32", "-analyzeduration", "0"),
            *("-f", "rawvideo", "-pix_fmt", "rgb48le"),
            *("-video_size", f"{width}x{height}", "-framerate", str(rate), "-i", "pipe:0"),
            *ENCODERS["h264"].video_options(False, crf),
            *("-fps_mode", "passthrough", "-tune", "zerolatency"),
            *("-g", str(max(1, round(2 * rate))), "-flush_packets", "1"),
            *("-movflags", "empty_moov+default_base_moof+frag_every_frame", "-f", "mp4", "pipe:1"),
        ]
        self._made = _Made()
        self._child: ffmpeg.Ffmpeg | None = None
        self._reader: threading.Thread | None = None

    def write(self, frames: Tensor | NDArray[np.uint8]) -> None:
        """Append (n, 3, height, width) floats in [-1, 1], or (n, height, width, 3) uint8."""
        assert self._child is not None
        for frame in frames:
            picture = picture_of(frame, deep=True)
            assert picture.shape == (*self._size, 3), (picture.shape, self._size)
            try:
                self._child.write(picture.data.cast("B"))
            except BrokenPipeError:
                self._child.finish()
                raise self._failure() from None
            self.frames_written += 1

    def take(self) -> bytes:
        """What was made since the last call, of all frames written but the last: whole boxes."""
        if not self._made.wait(self.frames_written - 1, _PATIENCE):
            raise self._failure()
        return self._made.take()

    def __enter__(self) -> Self:
        with failures_of(self.path):
            self._child = ffmpeg.Ffmpeg(self._arguments, writable=True)
            self._reader = threading.Thread(target=self._read, args=(self._child,), daemon=True)
            self._reader.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            if self._child is not None:
                self._child.close()
            self._temporary.unlink(missing_ok=True)

    def _finish(self) -> None:
        assert self._child is not None and self._reader is not None
        if not self.frames_written:
            raise InternalError("nothing_to_write", f"No frame was written to {self.path.name}.")
        status = self._child.finish()
        self._reader.join()
        if status or self._made.error is not None:
            raise self._failure()
        with failures_of(self.path):
            self._temporary.replace(self.path)

    def _read(self, child: ffmpeg.Ffmpeg) -> None:
        try:
            with self._temporary.open("xb") as file:
                while block := child.read_some(_BLOCK):
                    file.write(block)
                    self._made.add(block)
        except OSError as error:
            self._made.fail(error)
            child.kill()
        else:
            self._made.end()

    def _failure(self) -> FileError:
        error = self._made.error
        if error is not None:
            with failures_of(self.path):
                raise error
        assert self._child is not None
        lines = [ffmpeg.clean(line, self.path) for line in self._child.last_lines]
        if any("No space left" in line for line in lines):
            return no_space(self.path)
        return FileError(
            "output_failed", f"{self.path.name} could not be encoded; ffmpeg says: {'; '.join(lines[-3:])}."
        )


class _Made:
    """Bytes of an MP4 on their way from one thread to another: whole boxes leave, fragments are counted."""

    def __init__(self) -> None:
        self.error: OSError | None = None
        self._bytes = bytearray()
        self._whole = 0  # bytes that are whole boxes, each fragment with its samples
        self._fragments = 0
        self._ended = False
        self._changed = threading.Condition()

    def add(self, block: bytes) -> None:
        with self._changed:
            self._bytes += block
            while (size := self._box()) is not None:
                self._fragments += self._bytes[self._whole + 4 : self._whole + 8] == b"mdat"
                self._whole += size
            self._changed.notify_all()

    def _box(self) -> int | None:
        """The size of the next box, if all of it is here."""
        head = self._bytes[self._whole : self._whole + 16]
        if len(head) < 16:
            return None
        size = int.from_bytes(head[:4], "big")
        if size == 1:  # a size of 64 bits follows the name
            size = int.from_bytes(head[8:16], "big")
        return size if self._whole + size <= len(self._bytes) else None

    def fail(self, error: OSError) -> None:
        with self._changed:
            self.error = error
            self._ended = True
            self._changed.notify_all()

    def end(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def wait(self, fragments: int, seconds: float) -> bool:
        """Wait for so many fragments; False when they do not come."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended or self._fragments >= fragments, seconds)
            return self.error is None and self._fragments >= fragments

    def take(self) -> bytes:
        with self._changed:
            piece = bytes(self._bytes[: self._whole])
            del self._bytes[: self._whole]
            self._whole = 0
            return piece
