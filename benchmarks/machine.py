"""What a figure was measured on, and how figures are printed. No figure without both."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from importlib.metadata import version

from rich.console import Console
from rich.table import Table

from app import machine


def about(packages: Sequence[str] = ()) -> str:
    """What `app.machine` tells, and the versions of other packages."""
    return machine.about() + "".join(f"; {package} {version(package)}" for package in packages)


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
