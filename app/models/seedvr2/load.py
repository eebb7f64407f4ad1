"""From the files of a SeedVR2 model to a `Restorer`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from app.boot.checkpoint import give_back, load, load_tensor
from app.boot.manifest import Format
from app.boot.tensorfile import read_index, rename_tensors
from app.device import Placement, free_bytes
from app.models.autoencoder_kl import current_name
from app.models.seedvr2.config import DiTConfig
from app.models.seedvr2.dit import DiT
from app.models.seedvr2.memory import block_bytes, rest_bytes
from app.models.seedvr2.offload import place_blocks
from app.models.seedvr2.parallel import SharedDiT
from app.models.seedvr2.parts import DROPPED, dit_config, vae_config
from app.models.seedvr2.restore import Restorer
from app.models.seedvr2.steps import PLAIN, compiled
from app.models.seedvr2.tiles import HOST
from app.models.seedvr2.vae import VideoVAE
from app.models.source import Loading, Source
from app.nn.compiled import Compiler
from app.nn.float8 import Product, keep_in_float8
from app.progress import Progress, Silent

LEAST: Final = 2 * 10**9  # bytes that the VAE and the smallest work take beside a transformer


def load_restorer(variant: str | None, files: Mapping[str, Source], loading: Loading) -> Restorer:
    """Load the four parts, one at a time; between them memory is given back.

    Raises:
        ConfigError: A file's tensors are not the model's, or its steps cannot be compiled.
        FileError: A file cannot be read.
    """
    placement, readers, progress = loading.placement, loading.readers, loading.progress
    dit_file, vae_file = files["dit"], files["vae"]
    how = dit_file.format, variant, placement.dtype, placement.float8, readers, loading.compiler
    dit: DiT | SharedDiT
    if loading.ranks is not None:
        dit = SharedDiT.load(load_dit, loading.ranks, dit_file.path, *how)
    elif _fits(dit_config(variant, read_index(dit_file.path, dit_file.format)), placement):
        dit = load_dit(dit_file.path, placement.device, *how, progress)
    else:
        dit = load_dit(dit_file.path, HOST, *how, progress, works_on=placement.device)
        place_blocks(dit, placement.device, stream=True)
    give_back()
    vae_index = rename_tensors(read_index(vae_file.path, vae_file.format), current_name)
    vae_shape = vae_config(variant, vae_index)
    vae = load(
        lambda: VideoVAE(vae_shape), vae_file.path, vae_file.format,
        device=placement.device, dtype=placement.conv_dtype,
        rename=current_name, readers=readers, progress=progress,
    )  # fmt: skip
    give_back()
    return Restorer(
        dit=dit,
        vae=vae,
        positive=_prompt(files["positive"], placement),
        negative=_prompt(files["negative"], placement),
        float8=placement.float8,
    )


def load_dit(
    path: Path,
    device: torch.device,
    format: Format,
    variant: str | None,
    dtype: torch.dtype,
    float8: Product | None,
    readers: int,
    compiler: Compiler | None = None,
    progress: Progress | None = None,
    *,
    works_on: torch.device | None = None,
) -> DiT:
    """The transformer; on every card that works on a job. `works_on`: where, if it waits elsewhere."""
    shape = dit_config(variant, read_index(path, format))
    steps = PLAIN if compiler is None else compiled(shape, works_on or device, dtype, compiler)

    def build() -> DiT:
        dit = DiT(shape)
        dit.steps = steps
        keep_in_float8(dit.blocks, float8)
        return dit

    dit: DiT = load(
        build, path, format,
        device=device, dtype=dtype,
        dropped=DROPPED, recompute=("blocks.*.attn.rope.rope.freqs",),
        readers=readers, progress=progress or Silent(),
    )  # fmt: skip
    return dit


def _fits(shape: DiTConfig, placement: Placement) -> bool:
    """Whether a transformer can lie on the device; each job decides anew whether it is worth it."""
    if placement.device.type != "cuda":
        return True
    blocks = sum(block_bytes(shape, placement.dtype, placement.float8))
    return blocks + rest_bytes(shape, placement.dtype) + LEAST <= free_bytes(placement.device)


def _prompt(file: Source, placement: Placement) -> Tensor:
    """A prompt's embedding, (tokens, width), where the transformer is and of its type."""
    embedding = load_tensor(file.path, file.format)
    embedding = embedding[0] if embedding.ndim == 3 else embedding
    return embedding.to(device=placement.device, dtype=placement.dtype or torch.float32)
