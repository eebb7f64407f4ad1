"""The piece of the film that a worker is sent for a part: small where it can be, and always right.

A stream copy from a keyframe on holds the film's own bytes, and is tried first. Whether it gives the frames
that the whole film has there is not guessed (open groups of pictures, variable rates and edit lists would
make it wrong): it is read as a worker reads it, and compared. Where it differs, the frames are encoded anew
without loss, which gives larger pieces.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from app.errors import InputError
from app.models.seedvr2.segment import Span
from app.video import ffmpeg
from app.video.probe import probe
from examples.serve.distribute.film import Film, checked

EARLY = 2.0  # seconds before the frames that a piece is encoded from, for the decoder to find its feet
LATE = 2.0  # seconds after them: frames are not stored in the order in which they are shown
FURTHER = 12.0  # seconds: some files are not cut where they are asked to be


@dataclass(frozen=True)
class Piece:
    """A file without sound, whose first frame is number `source_start` of the film."""

    path: Path
    source_start: int


Way = Callable[[Film, Span], list[str]]  # the ffmpeg options that make a piece


class Cutter:
    """Cuts pieces out of one film. What worked for the last piece is tried first for the next."""

    def __init__(self, film: Film, folder: Path) -> None:
        self._film, self._folder = film, folder
        mov = film.path.suffix.lower() in (".mp4", ".mov", ".m4v")
        copies = (".mov", ".mkv") if mov else (".mkv", ".mov")
        self._ways: list[tuple[Way, str]] = [
            *((_copy, suffix) for suffix in copies),
            *((_copy_from_further, suffix) for suffix in copies),
            (_encode, ".mkv"),
        ]

    def cut(self, frames: Span, name: str) -> Piece:
        """A piece that holds these frames of the film, in a file `name` and a suffix.

        Raises:
            InputError: `film_not_cut`.
        """
        for way in list(self._ways):
            make, suffix = way
            path = self._folder / f"{name}{suffix}"
            options = [*make(self._film, frames), "-map_chapters", "-1", "-avoid_negative_ts", "make_zero"]
            done = ffmpeg.run(["-y", "-loglevel", "error", *options, f"file:{path}"])
            start = _located(path, self._film, frames) if done.status == 0 else None
            if start is not None:
                if self._ways[0] is not way:
                    self._ways = [way, *(other for other in self._ways if other is not way)]
                return Piece(path, start)
            path.unlink(missing_ok=True)
        raise InputError(
            "film_not_cut",
            f"Frames {frames.start} to {frames.stop - 1} of {self._film.path.name} cannot be cut out without "
            "a change; expected an ordinary video: re-encode it, or send it to one worker.",
        )


def _located(path: Path, film: Film, frames: Span) -> int | None:
    """The film's number of the piece's first frame, if a worker reads the film's frames from the piece."""
    wanted = film.checks[frames.start : frames.stop]
    seen = array("I")
    try:
        info = probe(path)
        if (info.width, info.height) != (film.info.width, film.info.height):
            return None
        with closing(checked(path, info, film.job_rate)) as checks:
            for check in checks:  # no further than a worker reads: behind that, a piece may be torn
                seen.append(check)
                if check == wanted[-1] and seen[-len(wanted) :] == wanted:
                    start = frames.start - (len(seen) - len(wanted))
                    return start if start >= 0 else None  # some begin with a frame that is not the film's
    except InputError:
        return None
    return None


def _from(film: Film, frame: int, early: float) -> list[str]:
    """Options that open the film and go to `early` seconds before a frame, or its beginning."""
    first = film.info.start
    begin = first + frame / film.rate - Fraction(early)
    seek = ["-seek_timestamp", "1", "-ss", f"{float(begin):.6f}"] if begin > first else []
    return [*seek, *ffmpeg.input_options(film.path), "-map", "0:V:0", "-map_metadata", "-1"]


def _copy(film: Film, frames: Span, early: float = 0.5) -> list[str]:
    seconds = float(len(frames) / film.rate) + early + LATE
    return [*_from(film, frames.start, early), "-c", "copy", "-t", f"{seconds:.6f}"]


def _copy_from_further(film: Film, frames: Span) -> list[str]:
    return _copy(film, frames, FURTHER)


def _encode(film: Film, frames: Span) -> list[str]:
    """The frames on the film's own grid of times, in its own pixel format, without loss."""
    start, count = film.info.start, len(frames) + math.ceil((EARLY + 1) * film.rate)
    grid = f"setpts=round(PTS-{start.numerator}/{start.denominator}/TB),fps={film.rate}:round=near,setpts=N"
    return [
        *("-copyts", *_from(film, frames.start, EARLY)),
        *("-vf", grid, "-fps_mode", "passthrough", "-frames:v", str(count)),
        *("-c:v", "ffv1", "-level", "3"),
    ]
