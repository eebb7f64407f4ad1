"""What the files of a codec must hold. Torch-free, for `check`.

Families: seedvr2-vae, wan-vae, vqvae (part `vae`) and sd-vae (parts `vae` and `config`, diffusers'
config.json). A variant, where the manifest names one, fixes the shape; without one the tensors decide.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from app.boot.tensorfile import TensorIndex, compare_tensors, rename_tensors
from app.errors import ConfigError
from app.models.autoencoder_kl import current_name
from app.models.latents.sd_config import SDConfig, sd_tensors
from app.models.latents.sd_config import recognise as recognise_sd
from app.models.latents.vqvae_config import VQConfig, recognise_vqvae, vqvae_tensors
from app.models.seedvr2 import vae_config as seedvr2
from app.models.seedvr2.variants import VARIANTS as SEEDVR2_VARIANTS
from app.models.wan import vae_config as wan

PARTS = ("vae",)
SD_PARTS = ("vae", "config")

SEEDVR2 = {"published": seedvr2.VAEConfig.published(), "nano": SEEDVR2_VARIANTS["nano"].vae}
WAN = {"published": wan.VAEConfig.published(), "nano": wan.VAEConfig.nano()}
SD = {"published": SDConfig.published(), "nano": SDConfig.nano()}
VQVAE = {"nano": VQConfig.nano()}

Config = TypeVar("Config")


def shapes_of(index: TensorIndex) -> dict[str, tuple[int, ...]]:
    """name -> shape."""
    return {name: entry.shape for name, entry in index.tensors.items()}


def choose(family: str, variants: Mapping[str, Config], name: str | None) -> Config | None:
    """The variant that a manifest names; None where it names none.

    Raises:
        ConfigError: `model_variant_unknown`.
    """
    if name is None:
        return None
    if name not in variants:
        raise ConfigError(
            "model_variant_unknown",
            f"variant {name!r} of family {family} is not known; the manifest may name {', '.join(variants)}, "
            "or none, and then the tensors decide.",
        )
    return variants[name]


def seedvr2_config(variant: str | None, index: TensorIndex) -> seedvr2.VAEConfig:
    """The VAE that a file must hold, its tensors under the current names."""
    return choose("seedvr2-vae", SEEDVR2, variant) or seedvr2.recognise_vae(shapes_of(index))


def wan_config(variant: str | None, index: TensorIndex) -> wan.VAEConfig:
    """The VAE that a file must hold."""
    return choose("wan-vae", WAN, variant) or wan.recognise_vae(shapes_of(index))


def vqvae_config(variant: str | None, index: TensorIndex) -> VQConfig:
    """The VQ-VAE that a file must hold."""
    return choose("vqvae", VQVAE, variant) or recognise_vqvae(shapes_of(index))


def seedvr2_contents(variant: str | None, part: str, index: TensorIndex) -> list[str]:
    """How the tensors of a file differ from what the codec needs, in sentences; [] is right."""
    own = rename_tensors(index, current_name)
    try:
        return compare_tensors(seedvr2.vae_tensors(seedvr2_config(variant, own)), own)
    except (ValueError, ConfigError) as error:
        return _not_one("a SeedVR2 VAE", error)


def wan_contents(variant: str | None, part: str, index: TensorIndex) -> list[str]:
    """The same for Wan's."""
    try:
        return compare_tensors(wan.vae_tensors(wan_config(variant, index)), index)
    except (ValueError, ConfigError) as error:
        return _not_one("a Wan VAE", error)


def sd_contents(variant: str | None, part: str, index: TensorIndex) -> list[str]:
    """The same for an AutoencoderKL's weights. That they are those of its config.json shows at loading."""
    own = rename_tensors(index, current_name)
    try:
        wanted = choose("sd-vae", SD, variant) or recognise_sd(shapes_of(own))
        return compare_tensors(sd_tensors(wanted), own)
    except (ValueError, ConfigError) as error:
        return _not_one("an AutoencoderKL", error)


def vqvae_contents(variant: str | None, part: str, index: TensorIndex) -> list[str]:
    """The same for a VQ-VAE's."""
    try:
        return compare_tensors(vqvae_tensors(vqvae_config(variant, index)), index)
    except (ValueError, ConfigError) as error:
        return _not_one("a VQ-VAE", error)


def _not_one(what: str, error: Exception) -> list[str]:
    if isinstance(error, ConfigError) and error.code == "model_variant_unknown":
        raise error
    return [f"This is not {what}: {str(error).rstrip('.')}."]
