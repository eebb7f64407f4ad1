"""What ffmpeg says of a file: as it opens it, and where no frame comes of it.

The file's own text may imitate ffmpeg's: only words and numbers are taken from it, and two stories about one
stream are refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from app.errors import InputError

_STREAM = re.compile(r"^ *Stream #0:(\d{1,6})\b[^:\n]*: (Video|Audio): (\w+)(.*)$", re.MULTILINE | re.ASCII)
_MAPPED = re.compile(r"^ *Stream #0:(\d{1,6}) -> #0:0 ", re.MULTILINE | re.ASCII)
_DURATION = re.compile(r"^ *Duration: (\d{1,9}):(\d\d):(\d\d\.\d{1,9}),", re.MULTILINE | re.ASCII)
_RATE = re.compile(r", (\d{1,9}(?:\.\d{1,9})?)(k?) fps\b", re.ASCII)
_ROTATION = re.compile(
    r"^ *display ?matrix: rotation of (-?\d{1,3}(?:\.\d{1,9})?) degrees", re.I | re.MULTILINE | re.ASCII
)


@dataclass(frozen=True)
class Opening:
    """What ffmpeg prints of a file as it opens it."""

    codec: str
    rate: float  # frames per second that the container declares; 0 where it does not
    sound: tuple[str, ...]  # the codec of each sound track
    rotation: int  # degrees clockwise: 0, 90, 180, 270
    seconds: float | None


def read_opening(path: Path, lines: list[str]) -> Opening:
    """Read what came before a filter's first word; the last "Stream mapping:" there is ffmpeg's own.

    Raises InputError: input_damaged.
    """
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
    rate = _RATE.search(video[4])
    clock = _DURATION.search(text, 0, end)
    return Opening(
        video[3],
        float(rate[1]) * (1000 if rate[2] else 1) if rate else 0.0,
        tuple(stream[3] for _, stream in sorted(streams.items()) if stream[2] == "Audio"),
        _rotation(text[video.end() : end]),
        int(clock[1]) * 3600 + int(clock[2]) * 60 + float(clock[3]) if clock else None,
    )


def _rotation(following: str) -> int:
    """Degrees clockwise to turn the stored picture; ffmpeg itself applies them when decoding."""
    found = _ROTATION.search(re.split(r"^ *Stream #", following, maxsplit=1, flags=re.MULTILINE)[0])
    return round(-float(found[1])) % 360 if found else 0


def refusal(path: Path, lines: list[str]) -> InputError:
    """Why ffmpeg gave no frame, in a sentence: input_no_video, input_not_video, input_codec_unknown or
    input_damaged."""
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
