"""The tables that come from the code, and where they stand."""

from __future__ import annotations

import subprocess
import sys

from tools import make_docs, page


def test_every_part_stands_on_one_page() -> None:
    held = [command for path in page.pages() for command in page.commands(path.read_text())]
    ours = [command for command in held if page.script(command) == "make_docs"]
    assert sorted(ours) == sorted(make_docs.COMMAND + name for name in make_docs.PARTS)


def test_other_parts_are_left_to_their_commands() -> None:
    assert make_docs.part("python -m benchmarks.boot") is None
    assert make_docs.part("python tools/make_docs.py models") == make_docs.models_table()


def test_a_mark_is_a_command() -> None:
    printed = subprocess.run(
        [sys.executable, "tools/make_docs.py", "models"], cwd=page.ROOT, capture_output=True, text=True
    )
    assert printed.stdout == make_docs.models_table() + "\n"
