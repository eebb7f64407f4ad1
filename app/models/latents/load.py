"""From the files of a codec to a `Codec`."""

from __future__ import annotations

import importlib
from collections.abc import Mapping

import torch

from app.boot.checkpoint import load
from app.boot.tensorfile import read_index, rename_tensors
from app.errors import ConfigError, UnavailableError
from app.models.autoencoder_kl import current_name
from app.models.latents import parts
from app.models.latents.codecs import ImageCodec, SeedVR2Codec, VQCodec, WanCodec
from app.models.latents.sd_config import SDConfig, read_config
from app.models.latents.vqvae import VQVAE
from app.models.seedvr2.vae import VideoVAE
from app.models.source import Loading, Source
from app.models.wan.vae import WanVAE


def load_seedvr2_codec(variant: str | None, files: Mapping[str, Source], loading: Loading) -> SeedVR2Codec:
    """SeedVR2's VAE as a codec. Part: vae.

    Raises:
        ConfigError: The file's tensors are not the VAE's, or the variant is not known.
        FileError: It cannot be read.
    """
    file, placement = files["vae"], loading.placement
    config = parts.seedvr2_config(variant, rename_tensors(read_index(file.now(), file.format), current_name))
    vae = load(
        lambda: VideoVAE(config), file.now(), file.format,
        device=placement.device, dtype=placement.conv_dtype, rename=current_name,
        readers=loading.readers, progress=loading.progress,
    )  # fmt: skip
    return SeedVR2Codec(vae)


def load_wan_codec(variant: str | None, files: Mapping[str, Source], loading: Loading) -> WanCodec:
    """Wan's VAE as a codec. Part: vae. Raises as `load_seedvr2_codec`."""
    file, placement = files["vae"], loading.placement
    config = parts.wan_config(variant, read_index(file.now(), file.format))
    vae = load(
        lambda: WanVAE(config), file.now(), file.format,
        device=placement.device, dtype=placement.conv_dtype,
        readers=loading.readers, progress=loading.progress,
    )  # fmt: skip
    return WanCodec(vae)


def load_vqvae_codec(variant: str | None, files: Mapping[str, Source], loading: Loading) -> VQCodec:
    """A VQ-VAE as a codec. Part: vae. Raises as `load_seedvr2_codec`."""
    file = files["vae"]
    config = parts.vqvae_config(variant, read_index(file.now(), file.format))
    vqvae = load(
        lambda: VQVAE(config), file.now(), file.format,
        device=loading.placement.device,
        dtype=torch.float32,  # rounding must not change which code is nearest, and the network is small
        readers=loading.readers, progress=loading.progress,
    )  # fmt: skip
    return VQCodec(vqvae)


def load_sd_codec(variant: str | None, files: Mapping[str, Source], loading: Loading) -> ImageCodec:
    """Stable Diffusion's VAE, or any AutoencoderKL, as a codec. Parts: vae, config (its config.json).

    Raises:
        ConfigError: The tensors are not those of the configuration, or that is not one.
        UnavailableError: `package_missing`: diffusers is not installed.
        FileError: A file cannot be read.
    """
    file, placement = files["vae"], loading.placement
    config = read_config(files["config"].now())
    wanted = parts.choose("sd-vae", parts.SD, variant)
    if wanted is not None and config != wanted:
        raise ConfigError(
            "vae_config_unsupported",
            f"{files['config'].now()} is not the configuration of variant {variant!r} of family sd-vae; "
            f"expected {wanted}: name no variant, and then the file decides.",
        )
    vae = load(
        lambda: build_autoencoder_kl(config), file.now(), file.format,
        device=placement.device,
        dtype=torch.float32 if config.force_upcast else placement.conv_dtype,
        rename=current_name, readers=loading.readers, progress=loading.progress,
    )  # fmt: skip
    return ImageCodec(vae, config)


def build_autoencoder_kl(config: SDConfig) -> torch.nn.Module:
    """diffusers' AutoencoderKL of this configuration.

    Raises:
        UnavailableError: `package_missing`.
    """
    try:
        autoencoder_kl = importlib.import_module("diffusers").AutoencoderKL
    except ImportError as error:
        raise UnavailableError(
            "package_missing",
            "Stable Diffusion's VAE runs through the package diffusers, which is not installed "
            f"({error}); expected it: pip install 'seedpod[latents]'.",
        ) from error
    arguments = {key: value for key, value in config.to_dict().items() if not key.startswith("_")}
    vae: torch.nn.Module = autoencoder_kl(**arguments)
    return vae
