#!/usr/bin/env python3
"""What nano's trained weights do to clips that they were not trained on: the figures of docs/nano.md.

    python tools/measure_nano.py [--pictures docs/img]

`python -m benchmarks --write measure_nano` puts them there.

Each clip is halved, gets noise of 15/255 and H.264 at CRF 35; nano restores it at twice the size in one step,
with the options that a job has where it names none. Bicubic enlargement of the same clip stands beside it.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from app.boot.manifest import read_manifest
from app.device import Placement, place
from app.models.latents.quality import Quality, measure
from app.models.seedvr2.load import load_restorer
from app.models.seedvr2.restore import RestoreOptions, Restorer
from app.models.seedvr2.segment import SHORTEST, Span, segment
from app.models.seedvr2.vae import VideoVAE
from app.models.source import Loading, Source
from app.progress import Silent
from app.video.frames import resize, to_unit
from app.video.probe import probe
from app.video.read import read_frames
from tools.make_nano import TRAINED
from tools.nano_data import scene, spoil

Clip = NDArray[np.uint8]  # (frames, height, width, 3)

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "clip.mp4"
DRAWN = range(100_000, 100_008)  # scenes; training begins at 0
NOISE, CRF = 15.0, 35
CAPTION, GAP = 24, 6  # of pictures, in pixels


@dataclass(frozen=True)
class Row:
    """A clip, what is left of it, and what bicubic enlargement and nano make of that."""

    name: str
    clean: Clip
    spoiled: Clip
    bicubic: Clip
    restored: Clip
    before: Quality
    after: Quality

    @property
    def gain(self) -> tuple[float, float]:
        """Of PSNR in dB, and of SSIM."""
        assert self.after.psnr and self.before.psnr and self.after.ssim and self.before.ssim
        return self.after.psnr - self.before.psnr, self.after.ssim - self.before.ssim


def nano(root: Path = TRAINED, placement: Placement | None = None) -> Restorer:
    """Nano from the files that ship, as a job has it: loaded by the product's own loader; in float32 on the
    CPU unless told otherwise."""
    manifest = read_manifest()
    parts = manifest.models["nano"].parts
    files = {}
    for part, name in parts.items():
        entry = manifest.files[name]
        path = root / Path(*entry.path.parts[1:])
        files[part] = Source(path, entry.format, path)
    return load_restorer("nano", files, Loading(placement or place("cpu", "float32"), 1, Silent()))


def clips(frames: int = 17, height: int = 128, width: int = 160) -> Iterator[tuple[str, Clip]]:
    """The example, and drawn scenes that no training saw."""
    yield "examples/clip.mp4", np.stack(list(read_frames(EXAMPLE, probe(EXAMPLE))))
    for seed in DRAWN:
        yield f"scene {seed}", scene(seed, frames, height, width)


def spoiled(clean: Clip) -> Clip:
    """What a job gets of it."""
    with tempfile.TemporaryDirectory() as folder:
        return spoil(clean, Path(folder) / "spoiled.mp4", noise=NOISE, crf=CRF)


def restored(restorer: Restorer, poor: Clip, options: RestoreOptions) -> Clip:
    """What a job makes of it."""
    with torch.inference_mode():
        made = torch.cat(list(restorer.restore_shot(iter(poor), len(poor), options)))
    return _bytes((made + 1) / 2)


def compared(name: str, clean: Clip, poor: Clip, made: Clip) -> Row:
    """Beside bicubic enlargement."""
    bicubic = _bytes(resize(to_unit(poor), *clean.shape[1:3]))
    before, after = (measure(zip(clean, other, strict=True)) for other in (bicubic, made))
    return Row(name, clean, poor, bicubic, made, before, after)


def through(vae: VideoVAE, clean: Clip) -> float:
    """PSNR in dB of what the VAE alone gives back of the first frames."""
    side = vae.config.spatial_factor
    height, width = (size // side * side for size in clean.shape[1:3])
    known = to_unit(clean[:9, :height, :width])
    with torch.inference_mode():
        back = vae.decode(vae.encode((known * 2 - 1).transpose(0, 1)[None])[0])[0].transpose(0, 1)
    found = measure(zip(_bytes(known), _bytes((back + 1) / 2), strict=True)).psnr
    assert found
    return found


def _bytes(frames: torch.Tensor) -> Clip:
    """(n, 3, h, w) in [0, 1] -> (n, h, w, 3) uint8."""
    made: Clip = (frames.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    return made


def seam(restorer: Restorer, row: Row, options: RestoreOptions) -> tuple[float, float]:
    """How much the error changes from frame to frame where two of the transformer's windows meet, in steps of
    255: of the restored clip, and of the same clip restored in one window, which has no border."""
    count = len(row.clean)
    windows = segment(count, Span(0, count), options.window, restorer.vae.config).windows
    whole = replace(options, window=max(SHORTEST, len(row.clean)))
    factor = restorer.vae.config.temporal_factor
    shared = [
        frame
        for one, other in itertools.pairwise(windows)
        for frame in range(factor * other.start, min(factor * one.stop + 1, count))
    ]
    changes = []
    for chosen in (options, whole):
        error = restored(restorer, row.spoiled, chosen).astype(np.float32) - row.clean
        steps = np.abs(np.diff(error, axis=0)).mean((1, 2, 3))
        changes.append(float(np.mean([steps[frame - 1] for frame in shared])))
    return changes[0], changes[1]


def table(rows: Sequence[Row], alone: Sequence[float]) -> list[str]:
    """Markdown; `alone` is what the VAE alone gives back."""
    lines = ["| clip | frames | bicubic | nano | gain | VAE alone |", "|---|---|---|---|---|---|"]
    for row, decibels in zip(rows, alone, strict=True):
        before, after = row.before, row.after
        lines.append(
            f"| {row.name} | {len(row.clean)}, {row.clean.shape[2]}x{row.clean.shape[1]} "
            f"| {before.psnr:.2f} dB, {before.ssim:.3f} | {after.psnr:.2f} dB, {after.ssim:.3f} "
            f"| {row.gain[0]:+.2f} dB, {row.gain[1]:+.3f} | {decibels:.1f} dB |"
        )
    gain = np.mean([row.gain for row in rows], axis=0)
    lines.append(f"| mean | | | | {gain[0]:+.2f} dB, {gain[1]:+.3f} | {np.mean(alone):.1f} dB |")
    return lines


def picture(row: Row, path: Path, moments: Sequence[float] = (0.5,)) -> None:
    """Degraded, bicubic, nano, original: the middle of some frames, side by side, a moment a row."""
    height, width = row.clean.shape[1:3]
    across = min(width, height * 5 // 4)
    left = (width - across) // 2
    sheet = Image.new("RGB", (4 * (across + GAP), len(moments) * (height + GAP) + CAPTION), "white")
    columns = {"degraded": row.spoiled, "bicubic": row.bicubic, "nano": row.restored, "original": row.clean}
    for column, (caption, clip) in enumerate(columns.items()):
        ImageDraw.Draw(sheet).text((column * (across + GAP) + 2, 3), caption, fill="black", font_size=14)
        for line, moment in enumerate(moments):
            frame = Image.fromarray(clip[round(moment * (len(clip) - 1))])
            frame = frame.resize((width, height), Image.Resampling.NEAREST)  # the large ones keep their size
            place = (column * (across + GAP), CAPTION + line * (height + GAP))
            sheet.paste(frame.crop((left, 0, left + across, height)), place)
    sheet.save(path)


def main(arguments: Sequence[str]) -> None:
    """Measure, print, and draw where asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--root", type=Path, default=TRAINED, help="the folder of the weights")
    parser.add_argument("--pictures", type=Path, help="a folder for the pictures")
    options = parser.parse_args(arguments)
    restorer = nano(options.root)
    rows, alone = [], []
    for name, clean in clips():
        poor = spoiled(clean)
        rows.append(compared(name, clean, poor, restored(restorer, poor, RestoreOptions(*clean.shape[1:3]))))
        alone.append(through(restorer.vae, clean))
        print(table(rows[-1:], alone[-1:])[2], file=sys.stderr, flush=True)
    lines = table(rows, alone)
    options_of_a_job = RestoreOptions(*rows[0].clean.shape[1:3])
    at, alone_at = seam(restorer, rows[0], options_of_a_job)
    lines += [
        "",
        f"Seam: on the example, {len(rows[0].clean)} frames in windows of at most {options_of_a_job.window} "
        f"latents, the error changes by {at:.2f} steps of 255 from frame to frame where two windows meet; "
        f"restored in one window it changes by {alone_at:.2f} at the same frames.",
    ]
    print("\n".join(lines))
    if options.pictures:
        options.pictures.mkdir(parents=True, exist_ok=True)
        for row in (rows[0], rows[2], rows[5]):
            name = Path(row.name).stem.replace(" ", "-")
            picture(row, options.pictures / f"nano-{name}.png")


if __name__ == "__main__":
    main(sys.argv[1:])
