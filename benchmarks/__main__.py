"""Every benchmark, one of them, or the figures of the pages, which are what commands print.

    python -m benchmarks                        every script, one after the other
    python -m benchmarks NAME [OPTIONS]         one of them
    python -m benchmarks --write [NAME ...]     run the commands that README.md and docs/ name, and put what
                                                they print there; only those that run these scripts
    python -m benchmarks --write NAME --from F  the same with what the one command printed on another machine

A script ends with status 69 where this machine lacks what it measures, such as a card: that is no failure,
and what a page holds of it stays. Tables that come from the code are written by tools/make_docs.py.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tools import page

FOLDER = Path(__file__).resolve().parent
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
    """Fill the pages, a part at a time; 1 if a command failed, and its part is left as it was."""
    held = [(path, command) for path in page.pages() for command in page.commands(path.read_text())]
    names = {page.script(command) for _, command in held} - {"make_docs"}
    parser = argparse.ArgumentParser("python -m benchmarks --write")
    parser.add_argument("names", nargs="*", choices=[[], *sorted(names)], metavar="NAME")
    parser.add_argument("--from", type=Path, dest="taken", help="what the one command of NAME printed")
    options = parser.parse_args(arguments)
    wanted = options.names or names
    chosen = [(path, command) for path, command in held if page.script(command) in wanted]
    if options.taken and len(chosen) != 1:
        parser.error(f"--from is of one command; these are {len(chosen)}")
    failed = False
    for path, command in chosen:
        printed = options.taken.read_text() if options.taken else page.measured(command)
        if printed is None:
            print(f"left as it was: {command}", file=sys.stderr)
            failed = True
        else:
            parts = {command: page.section(command, printed)}
            path.write_text(page.fill(path.read_text(), parts.get))  # read again: measuring takes an hour
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
