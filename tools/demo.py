#!/usr/bin/env python3
"""The demo: nano models restore a clip, make a video from a prompt, and take a clip through a video
autoencoder, with the commands a user types.

Builds nano's checkpoints in a workspace, checks, stages, restores a spoiled clip, generates, autoencodes, and
leaves the restored clip with a sheet (spoiled, bicubic, nano, original), the generated one with a sheet of
its frames, and a folder that shows what the autoencoder keeps and what noise on its latents does. Prints each
command, tables of what each step took, and how near the restored clip is to the original. The weights that
generate were never trained: they show the way a job takes.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from app.boot.copies import Copy
from app.errors import UnavailableError
from app.models.latents.extra import require
from app.video.probe import probe
from app.video.read import read_frames
from tools.measure_nano import CRF, NOISE, compared, picture
from tools.nano_data import spoil

CLIP = REPOSITORY / "examples" / "clip.mp4"
PROMPT = (
    "A red fox runs through deep snow at dawn, powder flying behind its paws. Low golden light falls between "
    "bare birches. The camera glides beside it at the height of its eyes. Documentary style, medium shot."
)
COLUMNS, ROWS, GAP = 4, 3, 4  # of the sheet; the gap in pixels


def main() -> None:
    """Run the demo; a failing command ends it with its exit status."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    arguments.add_argument("--workspace", type=Path, default=REPOSITORY / "build" / "workspace")
    arguments.add_argument("--out", type=Path, default=REPOSITORY / "out")
    options = arguments.parse_args()
    begin = time.perf_counter()
    workspace, out = options.workspace.resolve(), options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    # A small file on a local disk would stay in place; the demo shows it staged.
    place = "shm" if Path("/dev/shm").is_dir() else "tmp"
    environment = os.environ | {"SEEDPOD_ROOTS": str(workspace), "SEEDPOD_STAGE": place}
    spoiled, restored, sheet = out / "spoiled.mp4", out / "restored.mp4", out / "sheet.png"
    generated, frames = out / "generated.mp4", out / "generated.png"

    took: dict[str, float] = {}
    command(took, "make nano's checkpoints", ["tools/make_nano.py", str(workspace)], environment)
    command(took, "check", ["entrypoint.py", "check", "nano", "nano-wan"], environment)
    staged = command(took, "stage", ["entrypoint.py", "stage", "nano", "nano-wan"], environment)
    clean = np.stack(list(read_frames(CLIP, probe(CLIP))))
    print(f"$ # {CLIP.name}: half the size, noise of {NOISE:.0f}/255, H.264 at CRF {CRF}: {spoiled}")
    poor = spoil(clean, spoiled, noise=NOISE, crf=CRF)
    restore = ["run", "restore", str(spoiled), "-o", str(restored), "--model", "nano", "--scale", "2"]
    restoring = command(took, "run restore", ["entrypoint.py", *restore], environment, show=False)
    row = compared("clip", clean, poor, np.stack(list(read_frames(restored, probe(restored)))))
    picture(row, sheet, (0.2, 0.5, 0.8))
    generate = ["run", "generate", PROMPT, "-o", str(generated), "--model", "nano-wan"]
    generate += ["--height", "128", "--width", "224", "--frames", "33"]
    generating = command(took, "run generate", ["entrypoint.py", *generate], environment, show=False)
    contact_sheet(generated, frames)
    give_back(staged)
    looked, report = out / "autoencoded", reportable()
    shutil.rmtree(looked, ignore_errors=True)
    autoencode = ["run", "autoencode", str(CLIP), "-o", str(looked), "--model", "nano-vqvae"]
    autoencode += ["--frames", "33", "--edits", "noise strength=0.3 seed=7", "--report", str(report).lower()]
    autoencoding = command(took, "run autoencode", ["entrypoint.py", *autoencode], environment, show=False)

    console = Console()
    made = {"run restore": restoring, "run generate": generating, "run autoencode": autoencoding}
    results = {name: json.loads(told) for name, told in made.items()}
    console.print(table(took, results))
    before, after = row.before, row.after
    console.print(
        f"Restored: {after.psnr:.2f} dB, SSIM {after.ssim:.3f}; bicubic: {before.psnr:.2f} dB, SSIM "
        f"{before.ssim:.3f}. The weights that generate were never trained: their video is noise.",
        soft_wrap=True,
    )
    console.print(f"{time.perf_counter() - begin:.0f} s in all. See:")
    shown = [spoiled, restored, sheet, generated, frames, looked / "side_by_side.mp4", looked / "sheet.png"]
    if report:
        shown.append(looked / "report.html")
    else:
        console.print(
            "No report of the autoencoder: it needs two packages more (pip install -e '.[latents]').",
            soft_wrap=True,
            markup=False,
        )
    console.print("\n".join(map(str, shown)), soft_wrap=True)


def reportable() -> bool:
    """Whether the packages that only the autoencoder's report needs are installed."""
    try:
        require()
    except UnavailableError:
        return False
    return True


def command(
    took: dict[str, float], name: str, arguments: list[str], environment: dict[str, str], *, show: bool = True
) -> str:
    """Run one command of the repository, show what it says, and note how long it took."""
    print(f"$ {shlex.join(arguments)}", flush=True)
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *arguments], cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, text=True
    )
    took[name] = time.perf_counter() - begin
    if show or done.returncode:
        print(done.stdout, flush=True)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


def give_back(staged: str) -> None:
    """Remove the copies that `stage` told of; a worker with a disk of its own would keep them for its next
    start, a demo leaves nothing in memory."""
    for line in staged.splitlines():
        source, _, told = line.partition(" -> ")
        copy = told.partition(" (")[0]
        if copy and copy != source:
            Copy(Path(copy), boot_id="").remove()


def table(took: dict[str, float], results: dict[str, dict[str, Any]]) -> Table:
    """Seconds of each command, and below those that made something, of each of its steps."""
    made = Table(box=None)
    made.add_column("step")
    made.add_column("seconds", justify="right")
    made.add_column("made")
    for name, seconds in took.items():
        result = results.get(name)
        told = f"{result['frames']} frames, {result['width']}x{result['height']}" if result else ""
        made.add_row(name, f"{seconds:.2f}", told)
        for step, spent in (result["seconds"] if result else {}).items():
            made.add_row(f"  {step}", f"{spent:.2f}")
    return made


def contact_sheet(clip: Path, picture: Path) -> None:
    """Moments of a clip, evenly spaced from its first frame to its last, row by row in one PNG."""
    info = probe(clip)
    frames = list(read_frames(clip, info))
    count = min(COLUMNS * ROWS, len(frames))
    width, height = info.width + GAP, info.height + GAP
    rows = -(-count // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * width + GAP, rows * height + GAP), "white")
    for place in range(count):
        frame = frames[place * (len(frames) - 1) // max(1, count - 1)]
        row, column = divmod(place, COLUMNS)
        sheet.paste(Image.fromarray(frame), (GAP + column * width, GAP + row * height))
    sheet.save(picture)


if __name__ == "__main__":
    main()
