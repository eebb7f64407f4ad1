"""How time and memory grow with a clip's length, a frame's area and the number of jobs, with nano models.

    python -m benchmarks.growth [--rounds 3] [--only length] [--plots docs/img] [--json FILE] [--quick]

Speed does not depend on weights, so they are drawn. For each task and axis a process of its own measures
all sizes, once a round. An exponent is the slope of a line through the logarithms of all sizes of a round (1
is linear); the last step's is that of the two largest sizes, which fixed costs flatten least. Seconds are the
clock's, core seconds those of processors, which other work on the machine changes less.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.growing import plot, served
from benchmarks.growing.jobs import TASKS, Point
from benchmarks.machine import show, spread

ROOT = Path(__file__).resolve().parents[1]
SIZES = {
    "length": ("33", "69", "129", "261", "513"),  # of blocks, as generate wants them: 12 n - 3
    "area": ("64x96", "96x144", "128x192", "192x288", "256x384", "384x576"),
    "jobs": ("1", "2", "4", "8", "16"),
}
QUICK = {"length": ("9", "21"), "area": ("32x48", "64x96"), "jobs": ("1", "2")}
LEAST = 1e-6  # seconds and bytes below it have no logarithm
# Memory that is given back is gone from the process at once, so that its peak is that of what is held.
EXACT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}
Value = Callable[[Point], float]
VALUES: dict[str, Value] = {
    "seconds": lambda point: point.seconds,
    "core seconds": lambda point: point.core,
    "memory": lambda point: point.memory,
}
PARTS: dict[str, Value] = {
    "attention within a frame": lambda point: point.frame_attention,
    "attention of transformers": lambda point: point.attention,
    "all but attention": lambda point: point.core - point.frame_attention - point.attention,
}


def main() -> None:
    """Measure, draw, print."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--only", default="", help="axes and tasks whose name holds this text")
    arguments.add_argument("--plots", type=Path, help="folder for the pictures")
    arguments.add_argument("--json", type=Path, help="file for every point")
    arguments.add_argument(
        "--quick", action="store_true", help="two small sizes, one round: see that it runs"
    )
    options = arguments.parse_args()
    sizes, rounds = (QUICK, 1) if options.quick else (SIZES, options.rounds)
    kept = {}
    with tempfile.TemporaryDirectory() as temporary:
        for axis, wanted in sizes.items():
            tasks = [task for task in TASKS if options.only in axis or options.only in task]
            if not tasks:
                continue
            taken: dict[str, list[list[Point]]] = {task: [] for task in tasks}
            for _ in range(rounds):
                for task in tasks:
                    taken[task].append(points(task, axis, wanted, Path(temporary)))
            table(axis, taken)
            if axis == "area":
                parts_table(taken)
            if options.plots:
                picture = options.plots / f"growth-{axis}.svg"
                plot.draw(picture, axis, taken)
                print(
                    f"\n![Growth with {plot.LABELS[axis]}]({os.path.relpath(picture, ROOT / 'docs')})",
                    flush=True,
                )
            kept[axis] = {task: [[*map(asdict, each)] for each in found] for task, found in taken.items()}
    if options.json:
        options.json.write_text(json.dumps(kept, indent=1))


def points(task: str, axis: str, sizes: Sequence[str], folder: Path) -> list[Point]:
    """One round of a task."""
    if axis == "jobs":
        return served.points(task, [*map(int, sizes)], folder)
    command = [sys.executable, "-m", "benchmarks.growing.jobs", task, axis, str(folder), *sizes]
    ran = subprocess.run(
        command, cwd=ROOT, env=os.environ | EXACT, stdout=subprocess.PIPE, text=True, check=True
    )
    return [Point(**each) for each in json.loads(ran.stdout)]


def exponent(points: Sequence[Point], value: Value) -> float:
    """The slope of the line through the logarithms, by least squares."""
    x = [math.log(point.x) for point in points]
    y = [math.log(max(value(point), LEAST)) for point in points]
    x0, y0 = sum(x) / len(x), sum(y) / len(y)
    return sum((a - x0) * (b - y0) for a, b in zip(x, y, strict=True)) / sum((a - x0) ** 2 for a in x)


def table(axis: str, taken: dict[str, list[list[Point]]]) -> None:
    """Exponents of each task, with the values at the ends."""
    rows = []
    for task, rounds in taken.items():
        for what, value in VALUES.items():
            scale = 1e6 if what == "memory" else 1
            first, last = ([value(points[at]) / scale for points in rounds] for at in (0, -1))
            rows.append([
                f"{task}, {what}{' (MB)' * (scale > 1)}", f"{rounds[0][0].x} to {rounds[0][-1].x}",
                spread(first), spread(last), *exponents(rounds, value),
            ])  # fmt: skip
    label = plot.LABELS[axis]
    show(
        f"Growth with {label}",
        ["of", label, "at first", "at last", "exponent", "of the last step"],
        rows,
    )


def parts_table(taken: dict[str, list[list[Point]]]) -> None:
    """What of the time is attention, and how both grow."""
    rows = []
    for task, rounds in taken.items():
        for what, value in PARTS.items():
            last = [value(points[-1]) / points[-1].core for points in rounds]
            if max(last) > 0:
                rows.append(
                    [f"{task}, {what}", spread([100 * share for share in last]), *exponents(rounds, value)]
                )
    show("Of it attention", ["of", "% of core seconds at last", "exponent", "of the last step"], rows)


def exponents(rounds: Sequence[Sequence[Point]], value: Value) -> tuple[str, str]:
    """Of all sizes, and of the last two."""
    whole, end = ([exponent(points[at:], value) for points in rounds] for at in (0, -2))
    return spread(whole), spread(end)


if __name__ == "__main__":
    main()
