"""The Wan VAE's configuration: the published checkpoint's tensors, other configurations, refusals."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from app.errors import ConfigError
from app.models.wan.vae import WanVAE
from app.models.wan.vae_config import MEAN, STD, VAEConfig, recognise_vae, vae_tensors

KEYS = Path(__file__).parents[2] / "golden" / "keys" / "wan_vae.json"
NANO = VAEConfig.nano()
CONFIGS = [
    VAEConfig.published(),
    NANO,
    replace(NANO, temporal_downsample=(True, False, True), num_res_blocks=2),
    replace(NANO, dim_mult=(1, 2, 3), temporal_downsample=(True, True)),
    replace(NANO, dim_mult=(2,), temporal_downsample=()),
    replace(NANO, z_dim=4, latents_mean=MEAN[:4], latents_std=STD[:4]),
]


def test_tensors_of_the_published_checkpoint():
    stored = json.loads(KEYS.read_text())["tensors"]
    assert vae_tensors(VAEConfig.published()) == {name: tuple(shape) for name, shape in stored.items()}
    assert list(vae_tensors(VAEConfig.published())) == list(stored)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_tensors_are_the_modules_own(config):
    with torch.device("meta"):
        own = {name: tuple(t.shape) for name, t in WanVAE(config).state_dict().items()}
    assert vae_tensors(config) == own


@pytest.mark.parametrize("config", [c for c in CONFIGS if c.z_dim == 16], ids=str)
def test_recognised_from_its_tensors(config):
    assert recognise_vae(vae_tensors(config)) == config


@pytest.mark.parametrize(
    "missing",
    [
        "encoder.conv1.weight",
        "conv2.weight",
        "decoder.conv1.weight",
        "encoder.downsamples.0.residual.6.weight",
    ],
)
def test_another_checkpoint_is_refused(missing):
    shapes = vae_tensors(NANO)
    del shapes[missing]
    with pytest.raises(ConfigError, match=missing) as refused:
        recognise_vae(shapes)
    assert refused.value.code == "vae_not_recognised"


def test_the_originals_configuration():
    original = {
        "dim": 96, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_scales": [],
        "temperal_downsample": [False, True, True], "dropout": 0.0,
    }  # fmt: skip
    assert VAEConfig.from_original(original) == VAEConfig.published() == VAEConfig.from_original({})


@pytest.mark.parametrize(
    ("change", "code", "names"),
    [
        ({"attn_scales": [0.5]}, "vae_config_unsupported", "attn_scales"),
        ({"slots": 4}, "vae_config_unknown", "slots"),
        ({"dim": 0}, "vae_config_invalid", "dim"),
        ({"dim": 5, "dim_mult": [1, 3, 4, 4]}, "vae_config_invalid", "dim"),
        ({"num_res_blocks": 0}, "vae_config_invalid", "num_res_blocks"),
        ({"dim_mult": []}, "vae_config_invalid", "dim_mult"),
        ({"dim_mult": [1, 0, 2, 2]}, "vae_config_invalid", "dim_mult"),
        ({"temperal_downsample": [True]}, "vae_config_invalid", "temperal_downsample"),
        ({"z_dim": 4}, "vae_config_invalid", "latents_mean"),
        ({"latents_std": [0.0] * 16}, "vae_config_invalid", "latents_std"),
    ],
)
def test_configuration_of_another_model_is_refused(change, code, names):
    with pytest.raises(ConfigError, match=names) as refused:
        VAEConfig.from_original(change)
    assert refused.value.code == code


def test_frames_and_latents():
    config = VAEConfig.published()
    assert (config.spatial_factor, config.temporal_factor) == (8, 4)
    for latents in range(1, 30):
        assert config.latents_for(config.frames_for(latents)) == latents
    assert config.frames_for(21) == 81
    assert [config.latents_holding(frames) for frames in (1, 2, 5, 6)] == [1, 2, 2, 3]


def test_needs_no_torch():
    code = "import sys, app.models.wan.vae_config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
