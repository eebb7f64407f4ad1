#!/usr/bin/env python3
"""The demo: a clip restored by the nano model, with the commands a user types.

Builds nano's checkpoints in a workspace, checks, stages, restores, and leaves the restored clip and a
before/after sheet. Prints each command, and a table of what each step took.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

REPOSITORY = Path(__file__).resolve().parents[1]
CLIP = REPOSITORY / "examples" / "clip.mp4"


def main() -> None:
    """Run the demo; a failing command ends it with its exit status."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    arguments.add_argument("--workspace", type=Path, default=REPOSITORY / "build" / "workspace")
    arguments.add_argument("--out", type=Path, default=REPOSITORY / "out")
    options = arguments.parse_args()
    workspace, out = options.workspace.resolve(), options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    # A small file on a local disk would stay in place; the demo shows it staged.
    place = "shm" if Path("/dev/shm").is_dir() else "tmp"
    environment = os.environ | {"SEEDPOD_ROOTS": str(workspace), "SEEDPOD_STAGE": place}
    restored, sheet = out / "restored.mp4", out / "sheet.png"

    took: dict[str, float] = {}
    command(took, "make nano's checkpoints", ["tools/make_nano.py", str(workspace)], environment)
    command(took, "check", ["entrypoint.py", "check", "nano"], environment)
    command(took, "stage", ["entrypoint.py", "stage", "nano"], environment)
    restore = ["run", "restore", str(CLIP), "-o", str(restored), "--model", "nano", "--scale", "2"]
    restore += ["--color", "wavelet"]
    text = command(
        took, "run restore", ["entrypoint.py", *restore, "--sheet", str(sheet)], environment, show=False
    )
    result = json.loads(text)
    console = Console()
    console.print(table(took, result))
    console.print(f"{restored}\n{sheet}", soft_wrap=True)


def command(
    took: dict[str, float], name: str, arguments: list[str], environment: dict[str, str], *, show: bool = True
) -> str:
    """Run one command of the repository, show what it says, and note how long it took."""
    print(f"$ {' '.join(arguments)}", flush=True)
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


def table(took: dict[str, float], result: dict[str, object]) -> Table:
    """Seconds of each command, and of each step of the restoration."""
    made = Table(title=f"{result['frames']} frames, {result['width']}x{result['height']}", box=None)
    made.add_column("step")
    made.add_column("seconds", justify="right")
    for name, seconds in took.items():
        made.add_row(name, f"{seconds:.2f}")
    steps = result["seconds"]
    assert isinstance(steps, dict)
    for name, seconds in steps.items():
        made.add_row(f"  {name}", f"{seconds:.2f}")
    return made


if __name__ == "__main__":
    main()
