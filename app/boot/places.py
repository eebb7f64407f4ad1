"""Where a file may be staged: which file systems are fast and local, and how much room there is.

Room is the least of what the folder has free and, where the folder lives in memory, what the machine
and the container's memory limit leave. It reads /proc and the control groups; it knows nothing of
checkpoints and copies nothing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from rich.filesize import decimal

IN_MEMORY: Final = frozenset(("tmpfs", "ramfs"))
ON_DISK: Final = frozenset(
    ("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "bcachefs", "overlay", "squashfs", "erofs")
)
_REMOTE_DEVICES: Final = ("/dev/nbd", "/dev/rbd", "/dev/drbd")  # disks over the network, whatever is on them
_UNLIMITED: Final = 1 << 60  # a version 1 control group writes "no limit" as a number about this large


@dataclass(frozen=True)
class Place:
    """A folder to stage in. `keep` is the share of its room, and of the memory's, that stays free:
    models need memory beside their files, and RunPod's health check fails below 10% of free disk."""

    name: Literal["shm", "tmp"]
    folder: Path
    keep: float = 0.1


@dataclass(frozen=True)
class Places:
    """The places in order of preference, and where the kernel's facts are read (a test has its own)."""

    order: tuple[Place, ...]
    proc: Path = Path("/proc")
    cgroup: Path = Path("/sys/fs/cgroup")

    def filesystem(self, path: Path) -> Filesystem:
        """The file system that holds `path`."""
        return filesystem(path, self.proc)

    def shortage(self, place: Place, size: int) -> str | None:
        """Why `size` bytes have no room in `place`, with the numbers; None if they have."""
        limits = [folder_limit(place.folder)]
        if self.filesystem(place.folder).kind in IN_MEMORY:
            limits += memory_limits(self.proc, self.cgroup)
        for limit in limits:
            keep = int(limit.total * place.keep)
            if size + keep > limit.free:
                return (
                    f"{limit.name} leaves {decimal(limit.free)} of {decimal(limit.total)}, "
                    f"and {decimal(size)} with {decimal(keep)} kept free are needed"
                )
        return None

    def boot_id(self) -> str:
        """A name for the time since the machine started; empty where the kernel has none."""
        return _text(self.proc / "sys/kernel/random/boot_id").strip()


def default_places() -> Places:
    """/dev/shm, then /tmp, of this machine."""
    return Places((Place("shm", Path("/dev/shm")), Place("tmp", Path("/tmp"))))


# ------------------------------------------------------------------ file systems


@dataclass(frozen=True)
class Filesystem:
    """A mounted file system: its kind as the kernel names it, its device, and where it is mounted."""

    kind: str
    device: str
    mounted: Path

    @property
    def local(self) -> bool:
        """Whether it is memory or a disk of this machine. An unknown kind counts as not: staging then
        costs time, where the other mistake would leave a model on a slow volume."""
        return self.kind in IN_MEMORY | ON_DISK and not self.device.startswith(_REMOTE_DEVICES)

    def __str__(self) -> str:
        return f"{self.kind} at {self.mounted}"


def filesystem(path: Path, proc: Path = Path("/proc")) -> Filesystem:
    """The file system that holds `path`, from `proc`/self/mountinfo (proc(5))."""
    found = Filesystem("unknown", "", Path("/"))
    real = Path(os.path.realpath(path))
    for line in _text(proc / "self/mountinfo").splitlines():
        fields = line.split(" ")
        if "-" not in fields[6:]:
            continue
        kind, device = fields[fields.index("-", 6) + 1 :][:2]
        mounted = Path(_unescape(fields[4]))
        # A later line mounts over an earlier one at the same point.
        if real.is_relative_to(mounted) and len(mounted.parts) >= len(found.mounted.parts):
            found = Filesystem(kind, _unescape(device), mounted)
    return found


def _unescape(text: str) -> str:
    return re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), text)


# ------------------------------------------------------------------ room


@dataclass(frozen=True)
class Limit:
    """Bytes that are free, of a total; `name` begins a clause."""

    name: str
    free: int
    total: int


def folder_limit(folder: Path) -> Limit:
    """What the file system of `folder` has free for us. Zeros mean it does not count (tmpfs without a
    size, some network volumes); a write that fails says the rest."""
    facts = os.statvfs(folder)
    if not facts.f_blocks:
        return Limit("the folder", _UNLIMITED, 0)
    return Limit("the folder", facts.f_bavail * facts.f_frsize, facts.f_blocks * facts.f_frsize)


def memory_limits(proc: Path, cgroup: Path) -> list[Limit]:
    """What the machine's memory and each control group above this process leave, in bytes."""
    limits = []
    meminfo = dict(re.findall(r"^(\w+):\s+(\d+) kB$", _text(proc / "meminfo"), re.MULTILINE))
    if "MemAvailable" in meminfo:
        available, total = int(meminfo["MemAvailable"]) << 10, int(meminfo["MemTotal"]) << 10
        limits.append(Limit("the machine's memory", available, total))
    for line in _text(proc / "self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2, alone or beside version 1
            for base in (cgroup, cgroup / "unified"):
                limits += _group_limits(base, path, "memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            names = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
            limits += _group_limits(cgroup / "memory", path, *names)
    return limits


def _group_limits(base: Path, path: str, most: str, used: str, whole: str) -> Iterator[Limit]:
    """The limits of the group `path` and of those above it; `whole` begins the names of what a group and
    those below it use together. In a container `path` may be the host's, and lie outside of what is mounted:
    the base is then the container's own group."""
    groups = [base] if ".." in path else [base / path.lstrip("/"), *(base / path.lstrip("/")).parents]
    for group in groups:
        limit, usage = _text(group / most).strip(), _text(group / used).strip()
        if limit.isdecimal() and usage.isdecimal() and int(limit) < _UNLIMITED:
            # Cached file pages count as used, and are dropped as soon as room is wanted; active are those
            # of a file that was read twice, as a checkpoint is that was verified and loaded.
            cached = re.findall(
                rf"^{whole}(?:in)?active_file (\d+)$", _text(group / "memory.stat"), re.MULTILINE
            )
            free = int(limit) - int(usage) + sum(map(int, cached))
            yield Limit("the container's memory limit", max(free, 0), int(limit))
        if group == base:
            return


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
