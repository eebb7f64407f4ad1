"""Fake places for the staging tests: two folders, a volume, and the kernel's facts about them."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from app.boot.places import Place, Places

GIB = 1 << 30


class Recorder:
    """A progress that remembers, and calls `on_block` with the bytes so far after each block."""

    def __init__(self, on_block: Callable[[float], None] = lambda done: None) -> None:
        self.done, self.blocks, self.notes, self.on_block = 0.0, 0, [], on_block
        self.labels: list[str] = []
        self.total: float | None = None

    def start(self, label: str, total: float | None, unit: str) -> None:
        self.labels.append(label)
        self.done, self.total = 0.0, total

    def advance(self, amount: float) -> None:
        self.done += amount
        if amount > 0:
            self.blocks += 1
            self.on_block(self.done)

    def finish(self, note: str = "") -> None:
        self.notes.append(note)


class Machine:
    """A machine below `root`: /volume on a network file system, /dev/shm in memory, /tmp on a disk."""

    def __init__(self, root: Path, volume: str = "nfs4") -> None:
        self.root, self.proc, self.cgroup = root, root / "proc", root / "cgroup"
        self.volume, self.shm, self.tmp = root / "volume", root / "shm", root / "tmp"
        for folder in (self.volume, self.shm, self.tmp, self.cgroup):
            folder.mkdir()
        self.write("proc/sys/kernel/random/boot_id", "boot-1\n")
        mounts = [(root, "ext4"), (self.volume, volume), (self.shm, "tmpfs"), (self.tmp, "overlay")]
        self.mounts([(str(path), kind, "none") for path, kind in mounts])
        self.memory(available=64 * GIB)

    def write(self, path: str, text: str) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(text)

    def mounts(self, mounts: list[tuple[str, str, str]]) -> None:
        lines = [f"2{n} 1 0:2{n} / {at} rw - {kind} {dev} rw" for n, (at, kind, dev) in enumerate(mounts)]
        self.write("proc/self/mountinfo", "\n".join(lines) + "\n")

    def memory(self, available: int) -> None:
        total = 64 * GIB >> 10
        self.write("proc/meminfo", f"MemTotal: {total} kB\nMemAvailable:   {available >> 10} kB\n")

    def limit_v2(self, most: int, used: int, cached: int = 0, group: str = "", active: int = 0) -> None:
        """Put the process in `group`'s child, and a limit on `group`. `active` are cached pages, too, which
        were read twice."""
        self.write("proc/self/cgroup", f"0::/{group}/child\n".replace("//", "/"))
        self.write(f"cgroup/{group}/memory.max", f"{most}\n")
        self.write(f"cgroup/{group}/memory.current", f"{used}\n")
        stat = f"anon 1\ninactive_anon 9\ninactive_file {cached}\nactive_file {active}\nshmem 7\n"
        self.write(f"cgroup/{group}/memory.stat", stat)

    def limit_v1(self, most: int, used: int, path: str = "/docker/abc", cached: int = 0) -> None:
        """A container's own group at the mount's root, known to the kernel by the host's path."""
        self.write("proc/self/cgroup", f"5:cpu:{path}\n4:memory:{path}\n0::/\n")
        self.write("cgroup/memory/memory.limit_in_bytes", f"{most}\n")
        self.write("cgroup/memory/memory.usage_in_bytes", f"{used}\n")
        stat = f"inactive_file 3\nactive_file 4\ntotal_inactive_file 0\ntotal_active_file {cached}\n"
        self.write("cgroup/memory/memory.stat", stat)

    def places(self, keep: float = 0.0) -> Places:
        order = (Place("shm", self.shm, keep), Place("tmp", self.tmp, keep))
        return Places(order, self.proc, self.cgroup)

    def file(self, size: int, name: str = "model.pth", seed: int = 0) -> Path:
        path = self.volume / name
        path.write_bytes(random.Random(seed).randbytes(size))
        return path

    def left(self) -> list[str]:
        """Every file in the two places."""
        return sorted(p.name for f in (self.shm, self.tmp) for p in f.rglob("*") if not p.is_dir())


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A real tmpfs at `folder`; the test is skipped where mounting is not allowed."""
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)
