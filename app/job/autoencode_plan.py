"""What an autoencode job will do, and everything that can be refused before any costly work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from app.errors import InputError, UsageError
from app.job.autoencode_request import AutoencodeRequest
from app.job.result import Limits
from app.models.latents.edit_request import clips_of
from app.models.latents.extra import require
from app.models.latents.fit import LARGEST_SIDE
from app.video.place import check_place
from app.video.probe import ClipInfo, probe


@dataclass(frozen=True)
class AutoencodeJob:
    """A job that was looked at and can begin: nothing is decoded or written yet."""

    request: AutoencodeRequest
    info: ClipInfo
    others: Mapping[str, ClipInfo]
    size: tuple[int, int]  # height and width of the frames
    output: Path
    most_frames: int


def plan_autoencode(
    request: AutoencodeRequest,
    source: Path,
    others: Mapping[str, Path],
    output: Path,
    limits: Limits,
    *,
    parent: bool = True,
) -> AutoencodeJob:
    """Everything that can be refused before any costly work; nothing is written yet.

    others: Files of the clips "b" and "c", as far as they are given. parent: whether the folder that
    `output` lies in must be there yet.

    Raises:
        UsageError: An edit needs a clip that is not given.
        InputError: A source cannot be read, or is beyond the limits.
        FileError: `output` cannot be written, or is a folder with something in it.
    """
    if request.report:
        require()
    if request.frames is not None and request.frames > limits.frames:
        raise InputError(
            "input_too_large",
            f"frames is {request.frames:,}, and the limit is {limits.frames:,}; ask for fewer, or raise "
            "SEEDPOD_MAX_FRAMES.",
        )
    # Of a clip that is too long its first frames may still be asked for.
    most_frames = limits.frames if request.frames is None else None

    def look(path: Path) -> ClipInfo:
        return probe(path, max_frames=most_frames, max_pixels=4 * limits.pixels)

    info = look(source)
    if missing := sorted(clips_of(request.edits) - set(others)):
        raise UsageError(
            "clip_unknown", f"An edit needs the clip {missing[0]!r}, which is not given; give its file."
        )
    size = _size(info, request.short_side)
    if size[0] * size[1] > limits.pixels:
        raise InputError(
            "output_too_large",
            f"The clip is {size[1]}x{size[0]}, {size[0] * size[1]:,} pixels a frame, and the limit is "
            f"{limits.pixels:,}; set short_side, or raise SEEDPOD_MAX_PIXELS.",
        )
    if max(size) > LARGEST_SIDE:
        raise InputError(
            "size_invalid",
            f"The clip is {size[1]}x{size[0]}; expected sides of at most {LARGEST_SIDE}: set a smaller "
            "short_side, or cut it.",
        )
    if parent:
        check_place(output, folder=True)
    return AutoencodeJob(
        request,
        info,
        {name: look(path) for name, path in others.items()},
        size,
        output,
        limits.frames,
    )


def _size(info: ClipInfo, short_side: int | None) -> tuple[int, int]:
    if short_side is None:
        return info.height, info.width
    scale = short_side / min(info.height, info.width)
    return round(info.height * scale), round(info.width * scale)
