"""The film as its workers will see it: its frames' checksums and its shots.

Everything is read by the code that workers read with, so that frames have the same numbers and cuts the same
places here and there. Knows nothing of parts, jobs or endpoints.
"""

from __future__ import annotations

import json
import urllib.request
import zlib
from array import array
from collections.abc import Callable, Generator
from contextlib import closing, suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import count
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from app.errors import InputError, UnavailableError, UsageError
from app.job.request import RestoreRequest
from app.video.probe import ClipInfo, probe
from app.video.rates import exact_rate
from app.video.read import PixelFormat, read_frames
from app.video.shots import Shot, find_shots

LOWEST, HIGHEST = 0.01, 240.0  # frames per second that a job may name


@dataclass(frozen=True)
class Film:
    """A film that was read through.

    rate: of the result, exactly. job_rate: as a job can name it, the same but for the rounding of rare ones.
    checks: a checksum of each frame, in full size and depth. shots: without gaps, to the last frame.
    """

    path: Path
    info: ClipInfo
    rate: Fraction
    checks: array[int]
    shots: list[Shot]

    @property
    def job_rate(self) -> Fraction:
        return exact_rate(float(self.rate))

    def __len__(self) -> int:
        return len(self.checks)


def fetched(source: str, folder: Path, on_bytes: Callable[[int, int | None], None]) -> Path:
    """The file of a film: itself, or for a link a copy in `folder`, which is downloaded once.

    Raises:
        UnavailableError: `film_unreachable`.
    """
    if not source.startswith(("http://", "https://")):
        return Path(source)
    suffix = PurePosixPath(urlsplit(source).path).suffix
    path = folder / f"film{suffix if suffix[1:].isalnum() else ''}"
    if path.exists():
        return path
    partial = path.with_name(path.name + ".partial")
    try:
        with urllib.request.urlopen(source, timeout=60) as answer, partial.open("wb") as file:
            length = answer.headers.get("Content-Length")
            while block := answer.read(1 << 20):
                file.write(block)
                on_bytes(file.tell(), int(length) if length else None)
            if length and file.tell() != int(length):
                raise OSError(f"{file.tell():,} of {length} bytes came")
    except (OSError, ValueError) as error:
        partial.unlink(missing_ok=True)
        raise UnavailableError(
            "film_unreachable",
            f"The film cannot be downloaded from {urlsplit(source).netloc}: {error}; check the link, or give "
            "a file.",
        ) from None
    return partial.rename(path)


def read_film(
    path: Path, request: RestoreRequest, notes: Path, show: Callable[[str, int, int], None]
) -> Film:
    """Read a film through, twice: for its cuts and for its checksums; or remember it from the file `notes`.

    `show` is told a step, and how many frames of about how many it has seen.

    Raises:
        InputError: It is no clip that can be read. UsageError: `rate_refused`.
    """
    info = probe(path)
    if info.is_image or info.animated:
        raise InputError("film_is_image", f"{path.name} is an image; send it to one worker: see client.py.")
    rate = info.rate if request.rate is None else exact_rate(request.rate)
    if not LOWEST <= rate <= HIGHEST:
        raise UsageError(
            "rate_refused",
            f"{path.name} has {float(rate):g} frames per second; a job takes {LOWEST:g} to {HIGHEST:g}: give "
            "another --rate.",
        )
    key = _key(path, rate, request.cuts)
    known = _remembered(notes, key)
    if known is not None:
        return Film(path, info, rate, *known)
    about = round(float(info.duration * rate)) if info.duration else 0
    seen = count(1)

    def on_frame() -> None:
        show("finding cuts", next(seen), about)

    shots = find_shots(path, info, rate=rate, on_frame=on_frame) if request.cuts else None
    checks = array("I")
    with closing(checked(path, info, rate)) as frames:
        for check in frames:
            checks.append(check)
            show("reading the film", len(checks), about)
    shots = shots or [Shot(0, len(checks))]
    if shots[-1].stop != len(checks):
        raise InputError(
            "film_unsteady",
            f"{path.name} gave {shots[-1].stop} frames in one pass and {len(checks)} in another; it changes "
            "or is damaged: copy it again.",
        )
    edges = [[shot.start, shot.stop] for shot in shots]
    notes.write_text(json.dumps({"key": key, "checks": list(checks), "shots": edges}))
    return Film(path, info, rate, checks, shots)


def checked(path: Path, info: ClipInfo, rate: Fraction) -> Generator[int]:
    """The checksum of each frame, as a worker reads them."""
    deep: PixelFormat = "rgb48le" if info.bit_depth > 8 else "rgb24"
    with closing(read_frames(path, info, rate=rate, pixel_format=deep)) as frames:
        for frame in frames:
            yield zlib.crc32(frame.data)


def _key(path: Path, rate: Fraction, cuts: bool) -> dict[str, Any]:
    status = path.stat()
    return {"bytes": status.st_size, "modified": status.st_mtime_ns, "rate": str(rate), "cuts": cuts}


def _remembered(notes: Path, key: dict[str, Any]) -> tuple[array[int], list[Shot]] | None:
    with suppress(OSError, ValueError, KeyError, TypeError):
        held = json.loads(notes.read_text())
        if held["key"] == key:
            return array("I", held["checks"]), [Shot(*edges) for edges in held["shots"]]
    return None
