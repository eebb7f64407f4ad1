"""The pixels that `train_latents.py` trains on: the videos of a folder, or generated patterns."""

from __future__ import annotations

import contextlib
import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from app.errors import InputError
from app.models.latents.pixels import from_bytes

MOST_BYTES = 2 * 10**9  # of pixels that are held in memory
PATTERN_CLIPS, PATTERN_FRAMES = 24, 33


@dataclass(frozen=True)
class Data:
    """Clips of one size, (frames, height, width, 3) uint8 each, and a name of all their bytes."""

    clips: tuple[NDArray[np.uint8], ...]
    digest: str

    def batch(self, step: int, seed: int, count: int, frames: int, size: int) -> torch.Tensor:
        """`count` cuts (count, 3, frames, size, size) in [-1, 1]: the same for the same step and seed."""
        draw = np.random.default_rng([seed, step])
        weights = np.array([len(clip) - frames + 1 for clip in self.clips], dtype=np.float64)
        cuts = []
        for which in draw.choice(len(self.clips), count, p=weights / weights.sum()):
            clip = self.clips[which]
            begin, top, left = (
                int(draw.integers(side - part + 1))
                for side, part in zip(clip.shape, (frames, size, size), strict=False)
            )
            cut = clip[begin : begin + frames, top : top + size, left : left + size]
            cuts.append(from_bytes(cut[:, :, ::-1] if draw.integers(2) else cut))
        return torch.stack(cuts).transpose(1, 2)


def videos(folder: Path, settings: dict[str, Any]) -> Data:
    """The first frames of every clip in `folder`, scaled so that the shorter side is half as long again as
    the cuts; as many as memory takes. Files that are no clips are named and passed over."""
    from app.video.probe import probe
    from app.video.read import read_frames

    if not folder.is_dir():
        raise InputError("training_data", f"{folder} is no folder; expected one of videos.")
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    clips: list[NDArray[np.uint8]] = []
    size, least = settings["size"], settings["frames"]
    for path in files:
        try:
            info = probe(path)
            scale = max(size, round(size * 1.5)) / min(info.height, info.width)
            sides = max(size, round(info.height * scale)), max(size, round(info.width * scale))
            most = max(least, MOST_BYTES // len(files) // (sides[0] * sides[1] * 3))
            with contextlib.closing(read_frames(path, info, size=sides)) as frames:
                clip = np.stack([frame for _, frame in zip(range(most), frames, strict=False)])
        except InputError as error:
            print(f"passed over: {error.message}", file=sys.stderr)
            continue
        if len(clip) < least:
            print(f"passed over: {path} has {len(clip)} frames, fewer than {least}.", file=sys.stderr)
            continue
        clips.append(clip)
    if not clips:
        raise InputError(
            "training_data",
            f"{folder} holds {len(files)} files, of which none is a clip of {least} frames or more; "
            "expected one at least: put videos there, or leave --data out for generated patterns.",
        )
    return Data(tuple(clips), digest(clips))


def patterns(settings: dict[str, Any]) -> Data:
    """Clips of every generated pattern in turn."""
    from app.models.latents.patterns import KINDS, pattern

    size = settings["size"] * 3 // 2
    frames = max(PATTERN_FRAMES, settings["frames"])
    clips = [
        np.stack(list(pattern(kind, frames, size, size, seed)))
        for seed, kind in zip(range(PATTERN_CLIPS), [*KINDS] * PATTERN_CLIPS, strict=False)
    ]
    return Data(tuple(clips), digest(clips))


def digest(clips: Sequence[NDArray[np.uint8]]) -> str:
    """A name of these pixels."""
    found = hashlib.sha256()
    for clip in clips:
        found.update(repr(clip.shape).encode())
        found.update(np.ascontiguousarray(clip).data)
    return found.hexdigest()
