"""Memory of a clip through a codec and back: predicted against measured, and by arithmetic.

`python -m benchmarks.memory autoencode` prints it; see there for what is measured and how.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from app.errors import UnavailableError
from app.memory import Room
from app.models.latents.autoencode import Session
from app.models.latents.codec import Codec
from app.models.latents.codecs import ImageCodec, SeedVR2Codec, VQCodec, WanCodec
from app.models.latents.edit_request import Noise
from app.models.latents.fitting import CHUNK, Estimate, Task, fit
from app.models.latents.load import build_autoencoder_kl
from app.models.latents.pixels import to_bytes
from app.models.latents.sd_config import SDConfig
from app.models.latents.vqvae import VQVAE
from app.models.latents.vqvae_config import VQConfig
from app.models.seedvr2.vae import VideoVAE
from app.models.seedvr2.vae_config import VAEConfig as SeedVR2Config
from app.models.seedvr2.variants import VARIANTS
from app.models.wan.vae import WanVAE
from app.models.wan.vae_config import VAEConfig
from app.nn.allocations import Allocations
from benchmarks.cases import ready

GB = 10**9
SIZES = {"1080p": (1080, 1920), "2160p": (2160, 3840)}


def _sd(config: SDConfig, dtype: torch.dtype, device: str) -> ImageCodec:
    return ImageCodec(ready(lambda: build_autoencoder_kl(config), dtype, device), config)


def _seedvr2(config: SeedVR2Config, dtype: torch.dtype, device: str) -> SeedVR2Codec:
    return SeedVR2Codec(ready(lambda: VideoVAE(config), dtype, device))


def _wan(config: VAEConfig, dtype: torch.dtype, device: str) -> WanCodec:
    return WanCodec(ready(lambda: WanVAE(config), dtype, device))


def _vq(config: VQConfig, dtype: torch.dtype, device: str) -> VQCodec:
    return VQCodec(ready(lambda: VQVAE(config), dtype, device))


NARROW_SD = SDConfig(block_out_channels=(32, 64, 64), norm_num_groups=8)
NARROW: dict[str, Callable[[torch.dtype, str], Codec]] = {
    "seedvr2-vae": partial(_seedvr2, VARIANTS["nano"].vae),
    "wan-vae": partial(_wan, VAEConfig(dim=32, num_res_blocks=1)),
    "vqvae": partial(_vq, VQConfig.nano()),
    "sd-vae": partial(_sd, NARROW_SD),
}
PUBLISHED: dict[str, tuple[Callable[[torch.dtype, str], Codec], torch.dtype]] = {
    "seedvr2-vae": (partial(_seedvr2, SeedVR2Config.published()), torch.float16),
    "wan-vae": (partial(_wan, VAEConfig.published()), torch.float16),
    "sd-vae": (partial(_sd, SDConfig.published()), torch.float32),  # it overflows float16
}


@dataclass(frozen=True)
class Case:
    """A clip through a codec on the CPU; `batch`: frames at once."""

    codec: str
    task: Task
    batch: int | None = None


CASES = {
    "seedvr2-vae, 17 frames of 160x118": Case("seedvr2-vae", Task(118, 160, 17)),
    "wan-vae, 17 frames of 160x118": Case("wan-vae", Task(118, 160, 17)),
    "wan-vae, the same, edited": Case("wan-vae", Task(118, 160, 17, edited=True)),
    "vqvae, 17 frames of 160x118": Case("vqvae", Task(118, 160, 17)),
    "sd-vae, an image of 320x240": Case("sd-vae", Task(240, 320, 1), 1),
    "sd-vae, 17 frames of 160x118, 4 at once": Case("sd-vae", Task(118, 160, 17), 4),
}


# ------------------------------------------------------------------ measured


def predicted(case: Case) -> int:
    """Bytes that the clip is said to take."""
    return Estimate(NARROW[case.codec](torch.float32, "cpu"), "cpu").need(case.task, case.batch).device


def measured(case: Case) -> int:
    """Bytes of the weights, and the most that tensors hold beside them while the clip passes."""
    codec, task = NARROW[case.codec](torch.float32, "cpu"), case.task
    if isinstance(codec, ImageCodec):
        codec.batch = case.batch
    weights = sum(parameter.nbytes for parameter in codec.module.parameters())
    edits = [Noise(kind="noise", strength=0.1)] if task.edited else []
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode(), Allocations("cpu") as counted:
        session = Session(
            codec, partial(_frames, task), (task.height, task.width), Path(folder), fit=task.fit
        )
        for moment in session.moments(session.latents(edits)):
            for frame in (moment.reconstructed, moment.edited):
                if frame is not None:
                    to_bytes(frame[None])
            del moment, frame
    return weights + int(counted.peak)


def _frames(task: Task) -> Iterator[Tensor]:
    for first in range(0, task.frames or 0, CHUNK):
        yield torch.rand(min(CHUNK, (task.frames or 0) - first), 3, task.height, task.width)


# ------------------------------------------------------------------ by arithmetic

HEAD = ["clip", "card", "at once", "card's GB", "host's GB"]


def card_estimate(name: str) -> Estimate:
    """Of a published codec as it runs on a card."""
    build, dtype = PUBLISHED[name]
    return Estimate(build(dtype, "meta"), "cuda")


def published(rooms: dict[int, Room]) -> list[list[str]]:
    """What is chosen for the published codecs: rows of the table."""
    rows = []
    for name in PUBLISHED:
        estimate = card_estimate(name)
        for size, (height, width) in SIZES.items():
            for gib, room in rooms.items():
                start = [f"{name}, {size}", f"{gib} GiB"]
                try:
                    found = fit(estimate, Task(height, width), room)
                except UnavailableError:
                    rows.append([*start, "does not fit", "-", "-"])
                    continue
                need = found.need
                rows.append([*start, found.way.removesuffix(" at once").removesuffix(" at a time"),
                             f"{need.device / GB:.1f}", f"{need.host / GB:.1f}"])  # fmt: skip
    return rows
