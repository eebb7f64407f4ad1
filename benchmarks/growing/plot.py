"""Growth as pictures: time and memory against what grows, both axes logarithmic, a line for each task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.growing.jobs import Point

COLORS = {"restore": "C0", "generate": "C1", "autoencode": "C2"}
LABELS = {"length": "frames", "area": "pixels of a frame", "jobs": "jobs at once"}


def draw(path: Path, axis: str, rounds: Mapping[str, Sequence[Sequence[Point]]]) -> None:
    """Write the picture of an axis. `rounds`: task -> rounds -> points."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = "growth"  # the same figures give the same file
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    time, memory = figure.subplots(1, 2)
    for task, taken in rounds.items():
        x = [point.x for point in taken[0]]
        line(time, x, taken, "core", label=task, color=COLORS[task], marker="o")
        if axis == "area":
            within = [[p.frame_attention + p.attention for p in points] for points in taken]
            middle = [median(column) for column in zip(*within, strict=True)]
            time.plot(x, middle, "--", label=f"{task}, its attention", color=COLORS[task])
        line(memory, x, taken, "memory", label=task, color=COLORS[task], marker="o")
    for panel, title in ((time, "core seconds"), (memory, "bytes at peak")):
        panel.set(xscale="log", yscale="log", xlabel=LABELS[axis], title=title)
        panel.grid(alpha=0.3, which="both")
    time.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def line(panel: Any, x: Sequence[int], rounds: Sequence[Sequence[Point]], what: str, **style: Any) -> None:
    """Medians, with the range of the rounds behind them."""
    columns = list(zip(*([getattr(point, what) for point in points] for points in rounds), strict=True))
    panel.plot(x, [median(column) for column in columns], **style)
    panel.fill_between(
        x, [*map(min, columns)], [*map(max, columns)], color=style["color"], alpha=0.2, linewidth=0
    )
