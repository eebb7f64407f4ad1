"""From the files of a Wan model to a `Generator`."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from app.boot.checkpoint import give_back, load
from app.device import Placement
from app.memory import Need, Room
from app.models.source import Loading, Source
from app.models.wan.clip import ImageEncoder, load_image_encoder
from app.models.wan.config import current_name, tensors
from app.models.wan.embeddings import EmbeddingCache
from app.models.wan.generate import Generator
from app.models.wan.parts import OPTIONAL, Abilities, abilities
from app.models.wan.pose import PoseEmbedder
from app.models.wan.pose_config import pose_name
from app.models.wan.steps import PLAIN, compiled
from app.models.wan.text import stored_bytes, text_encoder
from app.models.wan.transformer import Transformer
from app.models.wan.vae import WanVAE
from app.models.wan.vae_config import vae_tensors
from app.models.wan.variants import Variant, variant
from app.nn.float8 import keep_in_float8, matrix_bytes


def load_generator(variant_name: str | None, files: Mapping[str, Source], loading: Loading) -> Generator:
    """Load the transformer and the VAE, one at a time; between them memory is given back. The text encoder,
    pose embedders and image encoder are read when they are first needed.

    Raises:
        ConfigError: A file's tensors are not the model's, or the tokenizer is not, or the transformer's
            steps cannot be compiled.
        FileError: A file cannot be read.
    """
    wanted, placement = variant(variant_name), loading.placement
    source = files["transformer"]
    able = abilities(variant_name, source.now(), source.format, [part for part in OPTIONAL if part in files])

    steps = PLAIN
    if loading.compiler is not None:
        steps = compiled(able.config, placement.device, placement.dtype, loading.compiler)

    def build() -> Transformer:
        transformer = Transformer(able.config)
        transformer.steps = steps
        keep_in_float8(transformer.blocks, placement.float8)
        return transformer

    def load_transformer(section: str | None) -> Transformer:
        return load(
            build, source.now(), source.format,
            device=placement.device, dtype=placement.dtype, section=section, rename=current_name,
            readers=loading.readers, progress=loading.progress,
        )  # fmt: skip

    def load_pose() -> PoseEmbedder:
        pose = files["pose"]
        loaded = load(
            PoseEmbedder, pose.now(), pose.format,
            device=placement.device, dtype=placement.dtype, rename=pose_name,
            readers=loading.readers, progress=loading.progress,
        )  # fmt: skip
        pose.done()
        return loaded

    def load_clip() -> ImageEncoder:
        clip = files["clip"]
        loaded = load_image_encoder(
            wanted.clip, clip,
            device=placement.device, dtype=placement.dtype,
            readers=loading.readers, progress=loading.progress,
        )  # fmt: skip
        clip.done()
        return loaded

    text = text_encoder(
        wanted.text, files["t5"], files["tokenizer"].now(),
        device=_text_place(wanted, able, files["t5"], placement), cache=EmbeddingCache(loading.cache),
        weights_sha256=files["t5"].sha256,
        readers=loading.readers, progress=loading.progress,
    )  # fmt: skip
    if loading.eager and loading.text_encoder != "release":
        text.prepare()
        files["t5"].done()
        if loading.text_encoder == "host":
            text.offload()
        give_back()
    transformer = load_transformer(default_section(able))
    give_back()
    vae_file = files["vae"]
    vae = load(
        lambda: WanVAE(wanted.vae), vae_file.now(), vae_file.format,
        device=placement.device, dtype=placement.conv_dtype,
        readers=loading.readers, progress=loading.progress,
    )  # fmt: skip
    give_back()
    return Generator(
        able=able,
        transformer=transformer,
        vae=vae,
        text=text,
        load_transformer=load_transformer,
        load_pose=load_pose,
        load_clip=load_clip,
        text_stays=loading.text_encoder,
        text_read=files["t5"].done,
        clip=wanted.clip,
    )


def _text_place(wanted: Variant, able: Abilities, source: Source, placement: Placement) -> torch.device:
    """Where T5 computes: on the host where the card has no room for it beside the transformer and the VAE."""
    if placement.device.type != "cuda" or not source.now().exists():
        return placement.device
    others = sum(_nbytes(name, shape, placement) for name, shape in tensors(able.config).items())
    others += sum(map(math.prod, vae_tensors(wanted.vae).values())) * placement.conv_dtype.itemsize
    room = Room.on(placement.device, own=0)
    return placement.device if room.holds(Need(stored_bytes(source) + others, 0)) else torch.device("cpu")


def _nbytes(name: str, shape: tuple[int, ...], placement: Placement) -> int:
    """Bytes of a transformer's tensor: matrices of its blocks may lie in 8 bits."""
    if placement.float8 is not None and name.startswith("blocks.") and len(shape) == 2:
        return matrix_bytes(shape)
    return math.prod(shape) * placement.dtype.itemsize


def default_section(able: Abilities) -> str | None:
    """The state dict that a model is loaded from unless a job asks for another: EMA where there is one."""
    return able.sections[0] if able.sections else None
