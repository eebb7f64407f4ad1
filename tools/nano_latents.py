"""The nano codecs of the latent laboratory: a Stable Diffusion VAE and a VQ-VAE, weights set by hand.

Both keep of a block of 4 x 4 pixels its mean colour: what they give back is the picture in large pixels. So a
toy shows pictures without training, and what its latents must be is known: channels are red, green, blue, and
one that no decoder reads. Every other layer is there and passes on what it gets.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from app.models.latents.sd_config import SDConfig, sd_tensors
from app.models.latents.vqvae_config import VQConfig, vqvae_tensors

LARGE = 30.0  # beside colours in [-1, 1]: see `_sd_group`
LOGVAR = -20.0
LEVELS = 8  # of each colour, in the codebook

Tensors = dict[str, Tensor]


def write(folder: Path) -> None:
    """Write `sd-vae/config.json`, `sd-vae/diffusion_pytorch_model.safetensors` and `vqvae.safetensors` into
    `folder`. The same bytes every time."""
    sd = folder / "sd-vae"
    sd.mkdir(parents=True, exist_ok=True)
    config = SDConfig.nano()
    (sd / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n")
    (sd / "diffusion_pytorch_model.safetensors").write_bytes(save(sd_vae(config), {"format": "pt"}))
    (folder / "vqvae.safetensors").write_bytes(save(vqvae(VQConfig.nano()), {"format": "pt"}))


def sd_vae(config: SDConfig) -> Tensors:
    """Weights of an AutoencoderKL of three or more resolutions of equal width 16 in 4 groups.

    Each group of 4 channels carries one value v as (v, -v, L, -L): its mean is 0 and its deviation nearly
    L / sqrt(2) whatever v is, so GroupNorm divides by a constant; and silu(u) - silu(-u) = u undoes the
    activation that follows. Residual branches end in zeros.
    """
    assert config.block_out_channels == (16,) * len(config.block_out_channels) and config.norm_num_groups == 4
    tensors = {name: torch.zeros(shape) for name, shape in sd_tensors(config).items()}
    for name, tensor in tensors.items():
        if "norm" in name and name.endswith("weight"):
            tensor.fill_(1)
    large = torch.tensor([0, 0, LARGE, -LARGE] * 4)
    carry = torch.diag(torch.tensor([1.0, 1, 0, 0] * 4))
    spread = torch.zeros(16, 4)  # a value to its group
    for value in range(4):
        spread[4 * value, value], spread[4 * value + 1, value] = 1, -1
    undo = spread.T * LARGE / 2**0.5  # the norm divided by this

    def set_conv(name: str, matrix: Tensor, bias: Tensor, taps: Callable[[Tensor, Tensor], None]) -> None:
        taps(tensors[f"{name}.weight"], matrix)
        tensors[f"{name}.bias"].copy_(bias)

    set_conv("encoder.conv_in", spread[:, :3], large, _centre)
    set_conv("decoder.conv_in", spread, large, _centre)
    for stage in range(len(config.block_out_channels) - 1):
        set_conv(f"encoder.down_blocks.{stage}.downsamplers.0.conv", carry, large, _mean2x2)
        set_conv(f"decoder.up_blocks.{stage}.upsamplers.0.conv", carry, large, _centre)
    logvar = torch.tensor([0.0] * 4 + [LOGVAR] * 4)
    set_conv("encoder.conv_out", torch.cat([undo, torch.zeros(4, 16)]), logvar, _centre)
    set_conv("decoder.conv_out", undo[:3], torch.zeros(3), _centre)
    set_conv("quant_conv", torch.eye(8), torch.zeros(8), _centre)
    set_conv("post_quant_conv", torch.eye(4), torch.zeros(4), _centre)
    return tensors


def vqvae(config: VQConfig) -> Tensors:
    """Weights of a VQ-VAE whose codebook holds 8 x 8 x 8 colours: of each block of pixels in space and time
    the mean colour, rounded. Colours run from 0 to 2 inside, where relu changes nothing."""
    assert config.codes == LEVELS**3 and config.dim >= 3 and config.width >= 3
    tensors = {name: torch.zeros(shape) for name, shape in vqvae_tensors(config).items()}
    level = torch.linspace(-1 + 1 / LEVELS, 1 - 1 / LEVELS, LEVELS)
    tensors["codebook"][:, :3] = torch.cartesian_prod(level, level, level)
    colours = torch.eye(config.width, 3)

    def set_conv(name: str, matrix: Tensor, bias: float, taps: Callable[[Tensor, Tensor], None]) -> None:
        taps(tensors[f"{name}.weight"], matrix)
        tensors[f"{name}.bias"][:3] = bias

    set_conv("encoder.conv_in", colours, 1, _centre)
    set_conv("encoder.conv_out", torch.eye(config.dim, config.width) * _first(config.width), -1, _centre)
    set_conv("decoder.conv_in", torch.eye(config.width, config.dim) * _first(config.dim), 1, _centre)
    set_conv("decoder.conv_out", colours.T, -1, _centre)
    for stage in range(len(config.halves_time)):
        set_conv(f"encoder.down.{stage}", colours @ colours.T, 0, _mean2x2)
        set_conv(f"decoder.up.{stage}", colours @ colours.T, 0, _centre)
    return tensors


def _first(width: int) -> Tensor:
    """1 for the three colours, 0 for the rest."""
    return (torch.arange(width) < 3).float()


def _centre(weight: Tensor, matrix: Tensor) -> None:
    """A kernel that reads its own pixel, of its own frame (the last that a causal one sees)."""
    middle = weight[..., weight.shape[-2] // 2, weight.shape[-1] // 2]
    (middle if weight.ndim == 4 else middle[..., -1]).copy_(matrix)


def _mean2x2(weight: Tensor, matrix: Tensor) -> None:
    """A kernel of stride 2 that reads the mean of its 2 x 2 pixels, and of its two frames if it halves time.

    Of 3 taps, padded behind, the first two; of 4 taps, padded on both sides, the middle two.
    """
    begin = (weight.shape[-1] - 1) // 2 if weight.shape[-1] == 4 else 0
    frames = min(2, weight.shape[2]) if weight.ndim == 5 else 1
    for row in (begin, begin + 1):
        for column in (begin, begin + 1):
            pixel = weight[..., row, column]
            if weight.ndim == 4:
                pixel.copy_(matrix / 4)
            else:
                pixel[..., -frames:].copy_((matrix / (4 * frames))[..., None].expand(*matrix.shape, frames))
