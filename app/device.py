"""Which device and number types models run on, and how much memory a device has free."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from app.boot.places import memory_limits
from app.errors import ConfigError, UnavailableError
from app.nn.float8 import Product

UNKNOWN: Final = 0.5  # of the machine's memory is taken to be free where no kernel tells, as on macOS
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8": torch.bfloat16,  # what is computed with; matrices lie in 8 bits
}
SCALED_FROM: Final = (8, 9)  # compute capability of the first cards (Ada) that multiply 8 bits by 8 bits


@dataclass(frozen=True)
class Placement:
    """A device, the type of transformers on it, and that of convolutional autoencoders.

    Autoencoders run in float16 where transformers run in 16 bits: bfloat16's eight bits leave 129 levels
    of brightness, and SeedVR2's and Wan's never overflow float16. float8: how products are made of the
    matrices of transformers' blocks, where these lie in 8 bits.
    """

    device: torch.device
    dtype: torch.dtype
    conv_dtype: torch.dtype
    float8: Product | None = None


def place(device: str, dtype: str, *, metal: bool = False) -> Placement:
    """The placement that the settings `device` and `dtype` ask for.

    metal: whether "auto" takes Apple's Metal where there is no CUDA; only what was written with it in mind
    should.

    Raises:
        UnavailableError: `device_unavailable`: the device is not there, or torch cannot use it.
        ConfigError: `float8_unavailable`: the device has no float8.
    """
    chosen = torch.device(_auto(metal) if device == "auto" else device)
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise UnavailableError(
            "device_unavailable",
            f"SEEDPOD_DEVICE is {device}, and this machine shows {torch.cuda.device_count()} CUDA devices; "
            "run the container with --gpus all, or set SEEDPOD_DEVICE=cpu.",
        )
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise UnavailableError(
            "device_unavailable",
            f"This machine shows {torch.cuda.device_count()} CUDA devices, which torch {torch.__version__} "
            f"cannot use: {_obstacle()}; use a machine with a newer driver, or set SEEDPOD_DEVICE=cpu.",
        )
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise UnavailableError(
            "device_unavailable",
            "SEEDPOD_DEVICE is mps, and this machine has no Metal device; set SEEDPOD_DEVICE=cpu.",
        )
    fast = torch.bfloat16 if chosen.type == "cuda" else torch.float32
    wanted = fast if dtype == "auto" else DTYPES[dtype]
    half = chosen.type == "cuda" and wanted != torch.float32
    eight = _product(chosen) if dtype == "float8" else None
    if chosen.type == "cuda":
        # What runs in float32 needs it, in 16 bits too (the VQ-VAE, VAEs that overflow float16), and
        # convolutions would round to 10 bits (TF32) by default.
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False
    return Placement(chosen, wanted, torch.float16 if half else torch.float32, eight)


def _product(device: torch.device) -> Product:
    """How products are made of matrices in 8 bits."""
    if device.type == "mps":
        raise ConfigError(
            "float8_unavailable",
            "SEEDPOD_DTYPE is float8, which Metal does not have; set SEEDPOD_DTYPE=bfloat16, or "
            "SEEDPOD_DEVICE=cpu.",
        )
    able = device.type == "cuda" and torch.cuda.get_device_capability(device) >= SCALED_FROM
    return "scaled" if able else "widened"


def _auto(metal: bool) -> str:
    if torch.cuda.device_count():  # those that the driver shows: to pass over one that is paid for is no help
        return "cuda"
    return "mps" if metal and torch.backends.mps.is_available() else "cpu"


def _obstacle() -> str:
    """Why torch cannot use the CUDA devices that the driver shows."""
    init: Callable[[], None] = torch.cuda.init
    try:
        init()
    except RuntimeError as error:
        return str(error).partition(". ")[0]
    return "CUDA does not start"


def free_bytes(device: torch.device) -> int:
    """Memory of `device` that can be taken now, what torch keeps for itself included."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    limits = memory_limits(Path("/proc"), Path("/sys/fs/cgroup"))
    if not limits:
        return int(UNKNOWN * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return min(limit.free for limit in limits)
