"""What a figure was measured on, in a line. No figure without it."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path


def about() -> str:
    """Processor, cores, memory, system, card, Python and torch."""
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cards = (
        f", {torch.cuda.get_device_name()} (CUDA {torch.version.cuda})" if torch.cuda.is_available() else ""
    )
    if torch.backends.mps.is_available():
        cards += ", Metal"
    return (
        f"{_processor()}, {cores} cores ({torch.get_num_threads()} threads), {memory:.0f} GiB{cards}; "
        f"{sys.platform}, Python {platform.python_version()}, torch {torch.__version__}; "
        f"load {os.getloadavg()[0]:.1f}"
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
