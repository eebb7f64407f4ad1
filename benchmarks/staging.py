"""Staging with verification against `cp`, `cp` then `sha256sum`, and a plain read, in one run.

    python -m benchmarks.staging [--size 1.0] [--folder build/bench] [--repeat 3] [--quick]

The file lies in `folder` and is staged to /dev/shm. Cold: the file's pages are dropped from the page cache
before each run (posix_fadvise), where the file system does that. Each way takes its turn in every round.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from app.boot.stage import stage, unstage
from app.progress import Silent
from benchmarks.machine import show, spread

ROOT = Path(__file__).resolve().parents[1]
BLOCK = 1 << 24
READERS = (1, 2, 4, 8, 16)


def main() -> None:
    """Measure and print."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    arguments.add_argument("--size", type=float, default=1.0, help="GB of the file (default: 1)")
    arguments.add_argument("--folder", type=Path, default=ROOT / "build" / "bench")
    arguments.add_argument("--repeat", type=int, default=3)
    arguments.add_argument("--quick", action="store_true", help="10 MB, once: see that it runs")
    options = arguments.parse_args()
    if options.quick:
        options.size, options.repeat = 0.01, 1
    options.folder.mkdir(parents=True, exist_ok=True)
    source = options.folder / "staging.bin"
    sha256 = make(source, int(options.size * 1e9))
    try:
        with tempfile.TemporaryDirectory(dir="/dev/shm") as shm:
            ways = ways_of(source, sha256, Path(shm))
            for cold in (False, True):
                seconds: dict[str, list[float]] = {name: [] for name in ways}
                for _ in range(options.repeat):
                    for name, way in ways.items():
                        seconds[name].append(timed(way, source, cold))
                table(source, seconds, cold)
    finally:
        source.unlink()


def make(path: Path, size: int) -> str:
    """Write `size` random bytes; returns their SHA-256."""
    digest = hashlib.sha256()
    with path.open("wb") as file:
        while size > 0:
            block = os.urandom(min(BLOCK, size))
            digest.update(block)
            file.write(block)
            size -= len(block)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def ways_of(source: Path, sha256: str, shm: Path) -> dict[str, Callable[[], None]]:
    """What is measured, by name. Each leaves nothing behind."""
    copy = shm / "copy"

    def staged(readers: int) -> None:
        # As a file on a network volume would be: in `auto`, one on a local disk stays where it is.
        made = stage(source, sha256=sha256, mode="shm", readers=readers, progress=Silent())
        assert made.sha256 == sha256, made
        unstage(made)

    def run(*command: str) -> None:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        copy.unlink(missing_ok=True)

    def read() -> None:
        with source.open("rb", buffering=0) as file:
            buffer = bytearray(BLOCK)
            while file.readinto(buffer):
                pass

    return {
        "cp then sha256sum": lambda: run("sh", "-c", f"cp '{source}' '{copy}' && sha256sum '{copy}'"),
        "cp": lambda: run("cp", str(source), str(copy)),
        "read": read,
        "copy in Python": lambda: (shutil.copyfile(source, copy), copy.unlink())[1],
        **{f"staged, {count} readers": (lambda count=count: staged(count)) for count in READERS},
    }


def timed(way: Callable[[], None], source: Path, cold: bool) -> float:
    """Seconds of one run."""
    descriptor = os.open(source, os.O_RDONLY)
    try:
        if cold:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        else:
            while os.read(descriptor, BLOCK):
                pass
    finally:
        os.close(descriptor)
    begin = time.perf_counter()
    way()
    return time.perf_counter() - begin


def table(source: Path, seconds: dict[str, list[float]], cold: bool) -> None:
    """Print the rates, and the ratio to `cp` then `sha256sum` of the same round."""
    size = source.stat().st_size / 1e9
    rows = []
    for name, taken in seconds.items():
        for reference in ("cp then sha256sum", "cp"):
            assert len(seconds[reference]) == len(taken)
        ratios = [
            [mine / other for mine, other in zip(taken, seconds[reference], strict=True)]
            for reference in ("cp then sha256sum", "cp")
        ]
        rows.append([name, spread([size / each for each in taken]), *map(spread, ratios)])
    title = f"Staging {size:.1f} GB to /dev/shm, {'cold' if cold else 'warm'} page cache"
    show(title, ["way", "GB/s", "time / (cp then sha256sum)", "time / cp"], rows)


if __name__ == "__main__":
    main()
