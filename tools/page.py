"""Pages that hold what commands print, each part behind the command that prints it:

    <!-- python -m benchmarks.boot --repeat 3: begin -->
    (what it printed)
    <!-- end -->

What stands outside of such marks is prose. Knows nothing of what the commands do.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = ": begin -->", "<!-- end -->"
MARKS = re.compile(rf"<!-- (?P<command>[^\n]+){BEGIN}\n.*?{END}", re.DOTALL)


def pages(root: Path = ROOT) -> list[Path]:
    """The documents that may hold such parts."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def commands(text: str) -> list[str]:
    """The commands whose parts a page holds, in their order.

    ValueError where a mark stands without its other: what lies between would be lost.
    """
    found = [part["command"] for part in MARKS.finditer(text)]
    if not text.count(BEGIN) == text.count(END) == len(found):
        begun, ended = text.count(BEGIN), text.count(END)
        raise ValueError(
            f"a mark stands without its other: {begun} begin, {ended} end, {len(found)} together"
        )
    return found


def script(command: str) -> str:
    """The name of what a command runs: `python -m benchmarks.boot --quick` and `python tools/boot.py` run
    "boot"."""
    words = shlex.split(command)
    runs = words[words.index("python") + 1 :]
    return runs[1].rpartition(".")[2] if runs[0] == "-m" else Path(runs[0]).stem


def fill(text: str, parts: Callable[[str], str | None]) -> str:
    """The page with what `parts` gives for each command; where it gives None, the part stays as it is."""

    def filled(found: re.Match[str]) -> str:
        part = parts(found["command"])
        return found[0] if part is None else f"<!-- {found['command']}{BEGIN}\n{part}\n{END}"

    commands(text)
    return MARKS.sub(filled, text)


def section(command: str, printed: str) -> str:
    """A part that names its command: tables are Markdown already, all else is shown as it was printed."""
    shown = printed.strip() if re.search(r"^\| ", printed, re.MULTILINE) else f"```\n{printed.strip()}\n```"
    return f"`{command}`\n\n{shown}"


def measured(command: str) -> str | None:
    """What a command prints; None where it fails, or where this machine lacks what it takes."""
    print(f"\n$ {command}", file=sys.stderr, flush=True)
    words = shlex.split(command)
    start = words.index("python")
    environ = os.environ | dict(word.split("=", 1) for word in words[:start])
    ran = subprocess.run(
        [sys.executable, *words[start + 1 :]], cwd=ROOT, env=environ, stdout=subprocess.PIPE, text=True
    )
    print(ran.stdout, file=sys.stderr)
    return None if ran.returncode else ran.stdout
