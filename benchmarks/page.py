"""The page of figures: each lies behind the command that printed it, and is written by running that.

    <!-- python -m benchmarks.boot --repeat 3: begin -->
    (the command, and what it printed)
    <!-- end -->

What stands outside of such marks is prose, and holds no figure.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Collection
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MARKS = re.compile(r"<!-- (?P<command>[^\n]*?python -m benchmarks\.(?P<script>\w+)[^\n]*?): begin -->\n"
                   r".*?<!-- end -->", re.DOTALL)  # fmt: skip
Measure = Callable[[str], "str | None"]


def fill(text: str, scripts: Collection[str], measure: Measure) -> tuple[str, list[str]]:
    """The page with new figures, and the commands that gave none, whose figures are those of before.

    scripts: fill what these print, or everything if there are none.
    """
    failed = []

    def filled(found: re.Match[str]) -> str:
        command = found["command"]
        if scripts and found["script"] not in scripts:
            return found[0]
        printed = measure(command)
        if printed is None:
            failed.append(command)
            return found[0]
        return f"<!-- {command}: begin -->\n{section(command, printed)}<!-- end -->"

    return MARKS.sub(filled, text), failed


def section(command: str, printed: str) -> str:
    """What lies between two marks: tables are Markdown already, anything else is shown as it was printed."""
    shown = printed.strip() if re.search(r"^\| ", printed, re.MULTILINE) else f"```\n{printed.strip()}\n```"
    return f"`{command}`\n\n{shown}\n"


def measured(command: str) -> str | None:
    """What a command of the page prints; None where it fails, or where this machine lacks what it takes."""
    print(f"\n$ {command}", file=sys.stderr, flush=True)
    words = shlex.split(command)
    start = words.index("python")
    environ = os.environ | dict(word.split("=", 1) for word in words[:start])
    ran = subprocess.run(
        [sys.executable, *words[start + 1 :]], cwd=ROOT, env=environ, stdout=subprocess.PIPE, text=True
    )
    print(ran.stdout, file=sys.stderr)
    return None if ran.returncode else ran.stdout
