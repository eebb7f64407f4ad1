"""A file into a model on a card, beside a plain read to the host, and torch's and safetensors' own ways.

The file lies in memory (/dev/shm) where it fits, and was read before: it is the way to the card that is
measured, no disk.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from app.boot.checkpoint import give_back, load
from benchmarks.card.bench import Bench
from benchmarks.machine import ratios, spread
from benchmarks.measure import host_peak, in_turns, reset_host_peak, seconds

WIDTH = 4096
ROUNDS = 5
READ, COPY, OWN, THEIRS = "read to the host", "copy to the card", "seedpod", "load_file"
HEAD = ("way", "GB/s", "time / read and copy", "host, peak / file")


def rows(nbytes: int, bench: Bench) -> list[list[str]]:
    """Every way in turns, and each once more alone for the host's memory."""
    device = bench.spot.device
    with tempfile.TemporaryDirectory(dir=memory_with_room(nbytes)) as temporary:
        path = Path(temporary) / "weights.safetensors"
        width = min(WIDTH, int((nbytes / 2) ** 0.5))
        layers = max(1, nbytes // (2 * width * width))
        weight = torch.randn(width, width).bfloat16()
        save_file({f"{i}.weight": weight.clone() for i in range(layers)}, path)
        size = path.stat().st_size
        host = torch.empty(size, dtype=torch.uint8)

        def build() -> nn.Module:
            return nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers))

        def own() -> nn.Module:
            with torch.inference_mode(False):  # the readers are threads of their own, which it is not in
                return load(build, path, "safetensors", device=device)

        ways: dict[str, Callable[[], object]] = {
            READ: lambda: path.open("rb").readinto(host.numpy().data),
            COPY: lambda: host.to(device, copy=True),
            OWN: own,
            THEIRS: lambda: load_file(path, device=str(device)),
        }
        for way in ways.values():
            way()
        taken = in_turns(ways, 60.0, str(device), most=ROUNDS)
        peaks = {name: host_peak_of(way, device) for name, way in ways.items()}
    both = [one + other for one, other in zip(taken[READ], taken[COPY], strict=True)]
    return [
        [
            name,
            spread([size / 1e9 / each for each in took]),
            spread(ratios(took, both)),
            f"{peaks[name] / size:.2f}",
        ]
        for name, took in taken.items()
    ]


def memory_with_room(nbytes: int) -> str | None:
    """/dev/shm where the file fits there (a container's may be small), else the system's temporary folder."""
    shm = Path("/dev/shm")
    return str(shm) if os.access(shm, os.W_OK) and shutil.disk_usage(shm).free > 1.2 * nbytes else None


def host_peak_of(way: Callable[[], object], device: torch.device) -> int:
    """Bytes of the host's memory that a way takes at its peak."""
    give_back()
    before = reset_host_peak()
    seconds(way, str(device))
    return host_peak() - before
