"""Every benchmark, one of them, or the figures of the page, which are their output.

    python -m benchmarks                        every script, one after the other
    python -m benchmarks NAME [OPTIONS]         one of them
    python -m benchmarks --write [NAME ...]     run the commands that docs/benchmarks.md names, and put what
                                                they print there; only those of these scripts
    python -m benchmarks --write NAME --from F  the same with what the one command printed on another machine

A script ends with status 69 where this machine lacks what it measures, such as a card: that is no failure,
and what the page holds of it stays.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import page

FOLDER = Path(__file__).resolve().parent
PAGE = FOLDER.parent / "docs" / "benchmarks.md"
UNAVAILABLE = 69


def main(arguments: Sequence[str]) -> int:
    """Do what is asked; 1 if a script failed."""
    if arguments and arguments[0] in scripts():
        return run(arguments[0], *arguments[1:])
    if arguments and arguments[0] == "--write":
        return write(arguments[1:])
    if arguments:
        print(f"{__doc__}\nNAME: {', '.join(scripts())}", file=sys.stderr)
        return 0 if arguments[0] in ("-h", "--help") else 64
    failed = []
    for script in scripts():
        print(f"\n$ python -m benchmarks.{script}", flush=True)
        if run(script) not in (0, UNAVAILABLE):
            failed.append(script)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


def scripts() -> list[str]:
    """The modules of this folder that can be run."""
    paths = sorted(path for path in FOLDER.glob("*.py") if path.stem != "__main__")
    return [path.stem for path in paths if '\nif __name__ == "__main__":' in path.read_text()]


def run(script: str, *options: str) -> int:
    """Run a script in a process of its own; its status."""
    return subprocess.run(
        [sys.executable, "-m", f"benchmarks.{script}", *options], cwd=FOLDER.parent
    ).returncode


def write(arguments: Sequence[str]) -> int:
    """Fill the page; 1 if a command failed, and its figures are left as they were."""
    parser = argparse.ArgumentParser("python -m benchmarks --write")
    parser.add_argument("names", nargs="*", choices=[[], *scripts()], metavar="NAME")
    parser.add_argument(
        "--from", type=Path, dest="taken", help="what the one NAME printed on another machine"
    )
    options = parser.parse_args(arguments)
    names, taken = options.names, options.taken
    if taken and len(names) != 1:
        parser.error("--from is of one NAME")
    measure = page.measured if taken is None else lambda command: taken.read_text()
    filled, failed = page.fill(PAGE.read_text(), names, measure)
    PAGE.write_text(filled)
    for command in failed:
        print(f"left as it was: {command}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
