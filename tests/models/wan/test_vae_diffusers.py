"""Wan's VAE equals diffusers' AutoencoderKLWan on the same random weights."""

import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from app.models.wan.vae import WanVAE
from app.models.wan.vae_config import VAEConfig, up_layers
from tests.golden import draw
from tests.seeded import randn

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: no peer to compare with")

NANO = VAEConfig.nano()
RENAMED = {  # ours -> theirs
    r"^conv1\.": "quant_conv.",
    r"^conv2\.": "post_quant_conv.",
    r"^(en|de)coder\.conv1\.": r"\1coder.conv_in.",
    r"\.head\.0\.": ".norm_out.",
    r"\.head\.2\.": ".conv_out.",
    r"\.middle\.0\.": ".mid_block.resnets.0.",
    r"\.middle\.1\.": ".mid_block.attentions.0.",
    r"\.middle\.2\.": ".mid_block.resnets.1.",
    r"\.downsamples\.": ".down_blocks.",
    r"\.residual\.0\.": ".norm1.",
    r"\.residual\.2\.": ".conv1.",
    r"\.residual\.3\.": ".norm2.",
    r"\.residual\.6\.": ".conv2.",
    r"\.shortcut\.": ".conv_shortcut.",
}


def their_name(name: str, config: VAEConfig) -> str:
    """The decoder's stages are blocks of their own there, not one list of layers."""
    if found := re.match(r"decoder\.upsamples\.(\d+)\.", name):
        stage, layer = divmod(int(found[1]), config.num_res_blocks + 2)
        kind = "upsamplers.0" if layer > config.num_res_blocks else f"resnets.{layer}"
        name = f"decoder.up_blocks.{stage}.{kind}." + name[found.end() :]
    for ours, theirs in RENAMED.items():
        name = re.sub(ours, theirs, name)
    return name


def peers(config: VAEConfig) -> tuple[WanVAE, torch.nn.Module]:
    ours = draw(WanVAE(config), "peer/")
    theirs = diffusers.AutoencoderKLWan(
        base_dim=config.dim,
        z_dim=config.z_dim,
        dim_mult=list(config.dim_mult),
        num_res_blocks=config.num_res_blocks,
        temperal_downsample=list(config.temporal_downsample),
    )
    theirs.load_state_dict({their_name(k, config): v for k, v in ours.state_dict().items()})
    return ours, theirs.eval()


def error(out: Tensor, reference: Tensor) -> float:
    assert out.shape == reference.shape
    return float((out - reference).norm() / reference.norm())


@pytest.mark.parametrize(
    "config",
    [
        NANO,
        replace(NANO, num_res_blocks=2, temporal_downsample=(True, False, True)),
        replace(NANO, dim_mult=(1, 2), temporal_downsample=(True,)),
    ],
    ids=str,
)
@pytest.mark.parametrize("latents", [1, 2, 5])
@torch.inference_mode()
def test_equals_diffusers(config, latents):
    ours, theirs = peers(config)
    mean, std = torch.tensor([config.latents_mean, config.latents_std]).view(2, 1, 16, 1, 1, 1)
    # Theirs takes four frames at a time whatever the factor of time.
    x = randn("x", 1, 3, 1 + 4 * (latents - 1), 16, 32).clamp(-1, 1)
    z = ours.encode(x)
    assert error(z, (theirs.encode(x).latent_dist.mean - mean) / std) < 1e-5
    assert error(ours.decode(z).clamp(-1, 1), theirs.decode(z * std + mean).sample) < 1e-5


def test_every_layer_of_the_published_vae_has_a_peer():
    config = VAEConfig.published()
    with torch.device("meta"):
        ours, theirs = WanVAE(config), diffusers.AutoencoderKLWan()
    assert {their_name(name, config): t.shape for name, t in ours.state_dict().items()} == {
        name: t.shape for name, t in theirs.state_dict().items()
    }
    assert len(list(up_layers(config))) == 15
