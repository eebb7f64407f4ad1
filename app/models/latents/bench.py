"""How fast a codec is on the devices of a machine, in each type and batch size, on a generated pattern.

A row a combination; one that the device cannot do says why. Figures are medians. It measures a codec that is
loaded and knows nothing of files.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn

from app.models.latents.codec import Codec
from app.models.latents.codecs import ImageCodec
from app.models.latents.fit import Fit
from app.models.latents.patterns import pattern
from app.models.latents.pixels import from_bytes

TYPES: Final = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
    "mps": (torch.float32, torch.float16),
}
BATCHES: Final = (1, 4, 16)  # of codecs of images; those of videos take a latent at a time


@dataclass(frozen=True)
class Speed:
    """One combination. `encode`, `decode`: frames per second. `psnr`: of what came back, in dB. `memory`:
    bytes of the device at most, where it tells. `failed`: why there is nothing else."""

    device: str
    dtype: str
    batch: int | None
    encode: float = 0.0
    decode: float = 0.0
    psnr: float = 0.0
    memory: int | None = None
    failed: str = ""


def devices() -> list[torch.device]:
    """Those of this machine: the CPU, and a card where there is one."""
    found = [torch.device("cpu")]
    if torch.cuda.is_available():
        found.append(torch.device("cuda", 0))
    if torch.backends.mps.is_available():
        found.append(torch.device("mps"))
    return found


def measure_all(
    codec: Codec, side: int, frames: int, repeats: int, only: Sequence[str] = ()
) -> Iterator[Speed]:
    """Every combination, one after the other. `only`: these types of devices ("cpu", "cuda", "mps").

    codec: on the CPU, in float32; it stays as it is. side: of the square frames of the pattern, in pixels.
    """
    clip = from_bytes(np.stack([*pattern("circle", frames, side, side)]))
    for device in devices():
        if only and device.type not in only:
            continue
        # Another type changes which entry of a codebook is nearest, so such codecs run in float32 alone.
        types = TYPES[device.type] if codec.facts.codebook is None else (torch.float32,)
        for dtype in types:
            batches = (
                [count for count in BATCHES if count <= frames] if isinstance(codec, ImageCodec) else [None]
            )
            for batch in batches:
                yield _measured(codec, clip, device, dtype, batch, repeats)


def _measured(
    codec: Codec, clip: Tensor, device: torch.device, dtype: torch.dtype, batch: int | None, repeats: int
) -> Speed:
    name = str(dtype).removeprefix("torch.")
    try:
        own = copy.deepcopy(codec)
        nn.Module.to(own.module, device, dtype)  # diffusers' own warns of types that it would not choose
        if isinstance(own, ImageCodec):
            own.batch = batch
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        fit = Fit(clip.shape[2], clip.shape[3], codec.facts)
        fitted = [*fit.frames(iter([clip]))]
        encoding, latents = _timed(lambda: [*own.encode(iter(fitted))], device, repeats)
        decoding, decoded = _timed(lambda: [*own.decode(iter(latents))], device, repeats)
        back = torch.cat([frames.cpu().float() for frames in decoded])[: len(clip)].clamp(-1, 1)
        error = float((back[:, :, : clip.shape[2], : clip.shape[3]] - clip).square().mean())
        psnr = 10 * float(np.log10(4 / max(error, 1e-12))) if error == error else float("nan")
        memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        count = len(clip)
        return Speed(str(device), name, batch, count / encoding, count / decoding, psnr, memory)
    except (RuntimeError, NotImplementedError, TypeError, MemoryError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        return Speed(str(device), name, batch, failed=reason[0][:100])


def _timed(
    work: Callable[[], list[Tensor]], device: torch.device, repeats: int
) -> tuple[float, list[Tensor]]:
    """Median seconds after a first, unmeasured run, and what it gives."""
    made = work()
    seconds = []
    for _ in range(repeats):
        _wait(device)
        begin = time.perf_counter()
        made = work()
        _wait(device)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds), made


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    if device.type == "mps":
        torch.mps.synchronize()


def show(title: str, speeds: Iterator[Speed], caption: str) -> None:
    """Print a table, with what it was measured on."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for place, name in enumerate(("device", "type", "batch", "encode", "decode", "PSNR", "memory")):
        table.add_column(name, justify="left" if place < 2 else "right")
    for speed in speeds:
        batch = "a latent" if speed.batch is None else str(speed.batch)
        row = [speed.device, speed.dtype, batch]
        if speed.failed:
            row.append(f"no: {speed.failed}")
        else:
            memory = "" if speed.memory is None else f"{speed.memory / 1e9:.2f} GB"
            rates = (f"{rate:.3g} frames/s" for rate in (speed.encode, speed.decode))
            row += [*rates, f"{speed.psnr:.1f} dB", memory]
        table.add_row(*row)
    Console(width=120).print(table)
