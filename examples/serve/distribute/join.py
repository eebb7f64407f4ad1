"""Putting the results together: the encoded frames of all parts in one file, and the film's sound.

Nothing is decoded or encoded again, so nothing is lost, and parts may have any length. Time stamps are made
anew, on the exact grid of the film's rate: those of parts add up to within a rounding only. What comes out is
decoded once and compared with the parts.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from app.errors import FileError, UnavailableError
from app.job.request import Codec
from app.video import ffmpeg
from app.video.write import _sound as sound_options

_PACKET = re.compile(r"^0, *-?\d+, *(-?\d+),.*(0x[0-9a-f]{8})", re.MULTILINE)


@dataclass(frozen=True)
class Decoded:
    """A video's frames as checksums, and how many packets before its place in time one is stored at most."""

    frames: tuple[str, ...]
    early: int


def decoded(path: Path) -> Decoded:
    """What is in a video.

    Raises:
        UnavailableError: `result_damaged`.
    """
    opened = ["-loglevel", "error", *ffmpeg.input_options(path), "-map", "0:v:0", "-fps_mode", "passthrough"]
    shown = ffmpeg.run([*opened, "-f", "framecrc", "-"])
    stored = ffmpeg.run([*opened, "-c", "copy", "-f", "framecrc", "-"])
    frames = tuple(check for _, check in _PACKET.findall(shown.output.decode()))
    stamps = [int(stamp) for stamp, _ in _PACKET.findall(stored.output.decode())]
    if shown.status or stored.status or any(ffmpeg.DAMAGE.search(line) for line in shown.lines):
        raise UnavailableError("result_damaged", f"{path.name} cannot be decoded; it is made again.")
    place = {stamp: i for i, stamp in enumerate(sorted(stamps))}
    return Decoded(frames, max((i - place[stamp] for i, stamp in enumerate(stamps)), default=0))


def join(
    parts: Sequence[Path],
    contents: Sequence[Decoded],
    output: Path,
    *,
    rate: Fraction,
    part_rate: Fraction,
    codec: Codec,
    sound_from: Path | None,
) -> None:
    """Write `output`: the parts' frames one after the other at `rate`, and the sound of `sound_from`.

    Args:
        parts: Files of one container in one folder, made at `part_rate` with `codec`.
        contents: What is in each.

    Raises:
        FileError: `join_failed`. Nothing is left then.
    """
    suffix = output.suffix.lower()
    names = parts[0].with_name("parts.ffconcat")
    lengths = [float(len(content.frames) / part_rate) for content in contents]
    listed = (f"file '{path.name}'\nduration {n:.6f}\n" for path, n in zip(parts, lengths, strict=True))
    names.write_text("".join(["ffconcat version 1.0\n", *listed]))
    early = max(content.early for content in contents)
    stamps = f"setts=time_base={1 / rate}:pts=round(PTS*TB*{part_rate}):dts=N-{early}"
    sound_in, sound_out = sound_options(sound_from, suffix) if sound_from else ([], [])
    mp4 = suffix != ".mkv"
    temporary = output.with_name(f".{secrets.token_hex(6)}{suffix}")
    try:
        done = ffmpeg.run(
            [
                *("-y", "-loglevel", "level+warning", "-copyts"),
                *("-protocol_whitelist", "file,pipe", "-f", "concat", "-i", f"file:{names}"),
                *sound_in,
                *("-map", "0:v:0", "-c:v", "copy", "-bsf:v", stamps, "-r", str(rate)),
                *(("-tag:v", "hvc1") if codec == "hevc10" and mp4 else ()),
                *sound_out,
                *("-map_chapters", "-1", *(("-movflags", "+faststart") if mp4 else ())),
                f"file:{temporary}",
            ]
        )
        if done.status:
            said = "; ".join(ffmpeg.clean(line, temporary, names) for line in done.lines[-3:] if line)
            raise FileError("join_failed", f"{output.name} could not be written; ffmpeg says: {said}.")
        made, wanted = decoded(temporary).frames, [each for content in contents for each in content.frames]
        if list(made) != wanted:
            raise FileError(
                "join_failed",
                f"{output.name} would show {len(made)} frames, and not the {len(wanted)} of the parts, which "
                "are kept. Have the same version of the worker everywhere, or ask for another codec.",
            )
        temporary.rename(output)
    finally:
        temporary.unlink(missing_ok=True)
        names.unlink(missing_ok=True)
