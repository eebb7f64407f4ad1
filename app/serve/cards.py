"""Which cards each process of a server gets. Torch-free: the process that serves never loads it.

It does not know what runs on a card.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import suppress

from app.errors import UnavailableError
from app.settings import Settings


def count_cards() -> int:
    """The CUDA cards that this process may use; 0 without CUDA's driver."""
    with suppress(OSError):
        driver = ctypes.CDLL("libcuda.so.1")
        found = ctypes.c_int()
        if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(found)) == 0:
            return found.value
    return 0


def share_out(settings: Settings, count: Callable[[], int] = count_cards) -> list[str | None]:
    """The CUDA_VISIBLE_DEVICES of each process that is to work; None where it is not to be set.

    Raises:
        UnavailableError: `device_unavailable`: there are fewer cards than are asked for.
    """
    here = count() if settings.device in ("auto", "cuda") else 0
    each = settings.sp_size
    processes = max(here // each, 1) if settings.gpus == "auto" else int(settings.gpus)
    if here == 0:  # on the CPU, or on one card that is named, as many as are asked for
        return [None] * processes
    if processes * each > here:
        raise UnavailableError(
            "device_unavailable",
            f"SEEDPOD_GPUS is {settings.gpus} and SEEDPOD_SP_SIZE {each}, which takes {processes * each} "
            f"cards, and this machine shows {here}; ask for fewer, or run the container with --gpus all.",
        )
    names = settings.visible.split(",") if settings.visible else [str(number) for number in range(here)]
    return [",".join(names[first : first + each]) for first in range(0, processes * each, each)]
