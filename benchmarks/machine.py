"""What a figure was measured on, and how figures are printed. No figure without both."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from importlib.metadata import version

from app import machine


def about(packages: Sequence[str] = ()) -> str:
    """What `app.machine` tells, and the versions of other packages."""
    return machine.about() + "".join(f"; {package} {version(package)}" for package in packages)


def spread(values: Sequence[float]) -> str:
    """Median and range: 1.23 (1.20-1.41). Of one value that alone."""
    if len(values) == 1:
        return f"{values[0]:.3g}"
    return f"{statistics.median(values):.3g} ({min(values):.3g}-{max(values):.3g})"


def ratios(mine: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Mine over theirs, round by round."""
    return [one / other for one, other in zip(mine, theirs, strict=True)]


def show(
    title: str, header: Sequence[str], rows: Sequence[Sequence[str]], packages: Sequence[str] = ()
) -> None:
    """Print a table with what it was measured on: Markdown, as the page has it, in columns for a terminal.

    The first column is text, the others are numbers.
    """
    widths = [max(3, *map(len, column)) for column in zip(header, *rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    print(f"\n**{title}**\n")
    for first, *others in (header, rule, *rows):
        cells = [first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]
        print(f"| {' | '.join(cells)} |")
    print(f"\n{about(packages)}", flush=True)
