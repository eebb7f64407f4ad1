"""What a figure was measured on, and how figures are printed. No figure without both."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.table import Table


def about(packages: Sequence[str] = ()) -> str:
    """Processor, cores, memory, Python, torch, other packages, card and load, in a line."""
    import torch

    names = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    card = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    others = "".join(f", {package} {version(package)}" for package in packages)
    return (
        f"{names[0] if names else platform.machine()}, {len(os.sched_getaffinity(0))} cores, "
        f"{memory:.0f} GiB{card}; Python {platform.python_version()}, torch {torch.__version__}{others}; "
        f"load {os.getloadavg()[0]:.1f}"
    )


def spread(values: Sequence[float]) -> str:
    """Median and range: 1.23 (1.20-1.41)."""
    return f"{statistics.median(values):.3g} ({min(values):.3g}-{max(values):.3g})"


def ratios(mine: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Mine over theirs, round by round."""
    return [one / other for one, other in zip(mine, theirs, strict=True)]


def show(
    title: str, header: Sequence[str], rows: Sequence[Sequence[str]], packages: Sequence[str] = ()
) -> None:
    """Print a table with what it was measured on."""
    table = Table(title=title, caption=about(packages), title_justify="left", caption_justify="left")
    for name in header:
        table.add_column(name, justify="left" if name == header[0] else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=120).print(table)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
