"""Staging with verification against `cp`, `cp` then `sha256sum`, and a plain read, in one run.

    python -m benchmarks.staging [--size 1.0] [--folder build/bench] [--repeat 3] [--quick]

The file lies in `folder` and is staged to /dev/shm. Cold: the file's pages are dropped from the page cache
before each run (posix_fadvise), where the file system does that: "read" is then the disk's sequential rate.
Each way takes its turn in every round. "Fastest copy" is the quicker of the two that verify nothing. Two rows
are bounds: SHA-256 of one block again and again, which no verified copy can outrun, and memory bandwidth. CPU
seconds are of all threads and processes: on a busy machine they tell more than the clock.
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
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from app.boot.stage import stage, unstage
from app.progress import Silent
from benchmarks.machine import ratios, show, spread

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
                taken: dict[str, list[Taken]] = {name: [] for name in ways}
                for _ in range(options.repeat):
                    for name, way in ways.items():
                        taken[name].append(timed(way, source, cold))
                table(source, taken, cold)
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
    copy, size = shm / "copy", source.stat().st_size
    blocks = [memoryview(bytearray(min(size, 1 << 27))) for _ in range(2)]

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

    def copied() -> None:
        shutil.copyfile(source, copy)
        copy.unlink()

    return {
        "cp then sha256sum": lambda: run("sh", "-c", f"cp '{source}' '{copy}' && sha256sum '{copy}'"),
        "cp": lambda: run("cp", str(source), str(copy)),
        "read": read,
        "copy in Python": copied,
        "SHA-256 alone": lambda: hashed(size),
        "memory to memory": lambda: moved(size, *blocks),
        **{f"staged, {count} readers": partial(staged, count) for count in READERS},
    }


def hashed(size: int) -> None:
    """The SHA-256 of `size` bytes that are in the processor's cache."""
    block, digest = bytes(1 << 20), hashlib.sha256()
    for _ in range(size >> 20):
        digest.update(block)


def moved(size: int, here: memoryview, there: memoryview) -> None:
    """`size` bytes from memory to memory, in blocks of which no processor's cache holds one."""
    for start in range(0, size, len(here)):
        length = min(len(here), size - start)
        there[:length] = here[:length]


@dataclass(frozen=True)
class Taken:
    """Seconds of a run, by the clock and of the CPU, its children's with them."""

    seconds: float
    cpu: float


def timed(way: Callable[[], None], source: Path, cold: bool) -> Taken:
    """One run."""
    descriptor = os.open(source, os.O_RDONLY)
    try:
        if cold:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        else:
            while os.read(descriptor, BLOCK):
                pass
    finally:
        os.close(descriptor)
    begin, before = time.perf_counter(), os.times()
    way()
    return Taken(time.perf_counter() - begin, sum(os.times()[:4]) - sum(before[:4]))


def table(source: Path, taken: dict[str, list[Taken]], cold: bool) -> None:
    """Print the rates, and the ratios to other ways of the same round."""
    size = source.stat().st_size / 1e9
    seconds = {name: [each.seconds for each in runs] for name, runs in taken.items()}
    verified = seconds["cp then sha256sum"]
    fastest = [min(pair) for pair in zip(seconds["cp"], seconds["copy in Python"], strict=True)]
    rows = [
        [
            name,
            spread([size / each for each in mine]),
            *(spread(ratios(mine, theirs)) for theirs in (verified, fastest)),
            spread([each.cpu / size for each in taken[name]]),
        ]
        for name, mine in seconds.items()
    ]
    title = f"Staging {size:.1f} GB to /dev/shm, {'cold' if cold else 'warm'} page cache"
    header = ["way", "GB/s", "time / (cp then sha256sum)", "time / fastest copy", "CPU s/GB"]
    show(title, header, rows)


if __name__ == "__main__":
    main()
