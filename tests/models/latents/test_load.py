"""Codecs from their files: what `check` says of them, what is loaded, and what the nano ones must give."""

import json
import os
import stat
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from app.boot.tensorfile import read_index
from app.device import Placement, free_bytes
from app.errors import ConfigError, SeedpodError, UnavailableError
from app.models.autoencoder_kl import current_name
from app.models.latents import load, parts
from app.models.latents.codecs import ImageCodec
from app.models.latents.memory import frames_at_once
from app.models.latents.sd_config import SDConfig, read_config, recognise, sd_tensors
from app.models.source import Loading, Source
from app.progress import Silent
from tests.models.latents.small import clip, codec, decoded, encoded, error
from tests.models.nano import SMALL
from tools import nano_latents

CPU = Loading(Placement(torch.device("cpu"), torch.float32, torch.float32), 1, Silent())
SD_CONFIGS = [
    SDConfig.nano(),
    SDConfig.published(),
    SDConfig(block_out_channels=(32,), use_quant_conv=False),
    SDConfig(block_out_channels=(32, 64), latent_channels=16, layers_per_block=3, use_post_quant_conv=False),
    SDConfig(block_out_channels=(8, 16), norm_num_groups=8, mid_block_add_attention=False, shift_factor=0.1),
]


@pytest.fixture(scope="module")
def nano(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents")
    nano_latents.write(folder)
    return folder


def source(path):
    formats = {".pth": "torch", ".json": "data"}
    format = formats.get(path.suffix, "safetensors")
    return Source(path, format, path)


def sd_files(nano):
    names = {"vae": "diffusion_pytorch_model.safetensors", "config": "config.json"}
    return {part: source(nano / "sd-vae" / name) for part, name in names.items()}


def blocks(x, temporal=1):
    """Mean colours of 4 x 4 pixels, and of `temporal` frames after the first."""
    means = F.avg_pool2d(x, 4)
    return torch.cat([means[:1], means[1:].unflatten(0, (-1, temporal)).mean(1)])


def test_nano_vqvae_keeps_rounded_mean_colours(nano):
    own, x = load.load_vqvae_codec("nano", {"vae": source(nano / "vqvae.safetensors")}, CPU), clip(9)
    assert own.facts.codebook == 512 and own.facts.temporal == 4
    y = decoded(own, encoded(own, x))
    assert torch.equal(y[1:5], y[1:2].expand(4, -1, -1, -1))
    colours = blocks(y, 4)
    assert (colours - blocks(x, 4)).abs().max() < 0.126  # half of a level of eight
    assert torch.allclose(F.interpolate(colours[:1], scale_factor=4), y[:1], atol=1e-5)


def test_nano_files_are_the_same_every_time_and_anyone_may_read_them(nano, tmp_path):
    nano_latents.write(tmp_path)
    files = [path.relative_to(nano) for path in sorted(nano.rglob("*")) if path.is_file()]
    assert len(files) == 3
    for name in files:
        assert (tmp_path / name).read_bytes() == (nano / name).read_bytes()
        assert (nano / name).stat().st_mode & stat.S_IRGRP


@pytest.mark.parametrize("name", ["seedvr2-vae", "wan-vae", "vqvae"])
def test_loaded_equals_the_network(name, tmp_path, monkeypatch):
    own = codec(name)
    path = tmp_path / "vae.safetensors"
    save_file({key: value.clone() for key, value in own.module.state_dict().items()}, path)
    loader = {
        "seedvr2-vae": load.load_seedvr2_codec,
        "wan-vae": load.load_wan_codec,
        "vqvae": load.load_vqvae_codec,
    }[name]
    # A SeedVR2 VAE's number of groups is in no file: its variant tells.
    monkeypatch.setitem(parts.SEEDVR2, "small", SMALL.vae)
    loaded = loader("small" if name == "seedvr2-vae" else None, {"vae": source(path)}, CPU)
    assert loaded.facts == own.facts
    x = clip(5)
    assert error(encoded(loaded, x), encoded(own, x)) < 1e-6
    assert not any(parameter.requires_grad for parameter in loaded.module.parameters())


def test_any_autoencoder_kl_folder_is_loaded(tmp_path):
    """One that diffusers itself saved, with names of the attention as sd-vae-ft-mse has them."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: nothing to compare with")
    theirs = diffusers.AutoencoderKL(
        block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=2, latent_channels=5,
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
        scaling_factor=0.5, shift_factor=0.25,
    ).eval()  # fmt: skip
    theirs.save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    tensors = load_file(weights)
    for new_name, old_name in old.items():
        tensors = {name.replace(new_name, old_name): x for name, x in tensors.items()}
    save_file(tensors, weights)
    own = load.load_sd_codec(None, {"vae": source(weights), "config": source(tmp_path / "config.json")}, CPU)
    x = clip(2)
    with torch.no_grad():
        mean = theirs.encode(x).latent_dist.mode()
        assert error(encoded(own, x), ((mean - 0.25) * 0.5).transpose(0, 1)) < 1e-5
        assert error(decoded(own, encoded(own, x)), theirs.decode(mean).sample) < 1e-4


def test_normalised_by_the_statistics_of_channels():
    config = replace(
        SDConfig.nano(),
        latent_channels=2,
        latents_mean=(1.0, -1.0),
        latents_std=(2.0, 4.0),
        scaling_factor=0.5,
    )
    own = ImageCodec(nn.Linear(1, 1), config)
    z = torch.tensor([3.0, 3.0]).view(1, 2, 1, 1)
    assert own._scaled(z).flatten().tolist() == [0.5, 0.5]
    assert torch.equal(own._unscaled(own._scaled(z)), z)


@pytest.mark.parametrize("config", SD_CONFIGS, ids=str)
def test_tensors_and_configuration_are_those_of_diffusers(config):
    pytest.importorskip("diffusers", reason="diffusers is not installed: nothing to compare with")
    with torch.device("meta"):
        theirs = load.build_autoencoder_kl(config).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in theirs.items()}
    assert sd_tensors(config) == shapes
    assert sd_tensors(recognise(shapes)) == shapes
    assert SDConfig.from_original(json.loads(json.dumps(config.to_dict()))) == config


def test_the_published_configuration():
    """What stabilityai/sd-vae-ft-mse's config.json holds; the rest is diffusers' default."""
    published = {
        "_class_name": "AutoencoderKL", "_diffusers_version": "0.4.2", "act_fn": "silu",
        "block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4,
        "in_channels": 3, "latent_channels": 4, "layers_per_block": 2, "norm_num_groups": 32,
        "out_channels": 3, "sample_size": 256, "up_block_types": ["UpDecoderBlock2D"] * 4,
    }  # fmt: skip
    config = SDConfig.from_original(published)
    assert config == SDConfig.published()
    assert (config.scaling_factor, config.spatial_factor) == (0.18215, 8)
    parameters = sum(torch.Size(shape).numel() for shape in sd_tensors(config).values())
    assert parameters == 83_653_863
    assert 0 < 334_643_276 - 4 * parameters < 2**16  # the published file is these and a header
    assert current_name("encoder.mid_block.attentions.0.proj_attn.bias").endswith("to_out.0.bias")


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        (b"", "vae_config_not_json", "expected a JSON object"),
        (b"[1]", "vae_config_not_json", "holds a list"),
        (b"\xff\xfe", "vae_config_not_json", "expected a JSON object"),
        (b"[" * 100_000, "vae_config_not_json", "expected a JSON object"),
        (b" " * 2_000_000, "vae_config_not_json", "larger than"),
        (b"<html>", "vae_config_not_json", "expected a JSON object"),
        ({"_class_name": "AutoencoderTiny"}, "vae_config_unsupported", "_class_name"),
        ({"act_fn": "mish"}, "vae_config_unsupported", "expected 'silu'"),
        ({"in_channels": 1}, "vae_config_unsupported", "in_channels"),
        ({"down_block_types": ["DownEncoderBlock2D"]}, "vae_config_unsupported", "for each stage"),
        ({"x" * 10: 1}, "vae_config_unknown", "xxxxxxxxxx"),
        ({"block_out_channels": []}, "vae_config_invalid", "1 to 16"),
        ({"block_out_channels": 32}, "vae_config_invalid", "1 to 16"),
        ({"block_out_channels": [30] * 3}, "vae_config_invalid", "multiples of norm_num_groups"),
        ({"block_out_channels": [10**9] * 3}, "vae_config_invalid", "whole numbers"),
        ({"layers_per_block": "2"}, "vae_config_invalid", "layers_per_block"),
        ({"latent_channels": True}, "vae_config_invalid", "latent_channels"),
        ({"norm_num_groups": 0}, "vae_config_invalid", "norm_num_groups"),
        ({"scaling_factor": 0}, "vae_config_invalid", "a number above 0"),
        ({"scaling_factor": None}, "vae_config_invalid", "a number above 0"),
        ({"shift_factor": "0"}, "vae_config_invalid", "shift_factor"),
        ({"latents_mean": [0.0] * 4}, "vae_config_invalid", "both of"),
        ({"latents_mean": [0.0] * 3, "latents_std": [1.0] * 4}, "vae_config_invalid", "latents_mean"),
        ({"latents_mean": [0.0] * 4, "latents_std": [0.0] * 4}, "vae_config_invalid", "above 0"),
        ({"use_quant_conv": 1}, "vae_config_invalid", "true or false"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refuses_wrong_configurations(content, code, words, tmp_path):
    path = tmp_path / "config.json"
    right = SDConfig(block_out_channels=(16, 16, 16), norm_num_groups=4).to_dict()
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(right | content).encode())
    with pytest.raises(ConfigError) as caught:
        read_config(path)
    assert caught.value.code == code and words in caught.value.message and str(path) in caught.value.message


def test_refuses_a_configuration_that_is_not_there(tmp_path):
    with pytest.raises(SeedpodError) as caught:
        read_config(tmp_path / "config.json")
    assert caught.value.code == "file_unreadable"


def test_configuration_and_weights_must_belong_together(nano, tmp_path):
    pytest.importorskip("diffusers", reason="diffusers is not installed: Stable Diffusion's VAE needs it")
    config = tmp_path / "config.json"
    config.write_text(json.dumps(replace(SDConfig.nano(), latent_channels=8).to_dict()))
    files = sd_files(nano) | {"config": source(config)}
    with pytest.raises(ConfigError, match="does not fit the model"):
        load.load_sd_codec(None, files, CPU)
    with pytest.raises(ConfigError, match="name no variant"):
        load.load_sd_codec("nano", files, CPU)


def test_says_that_diffusers_is_missing(nano, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UnavailableError, match="pip install") as caught:
        load.load_sd_codec(None, sd_files(nano), CPU)
    assert caught.value.code == "package_missing"


def test_what_check_says(nano, tmp_path):
    sd, vq = nano / "sd-vae/diffusion_pytorch_model.safetensors", nano / "vqvae.safetensors"
    indices = {path: read_index(path, "safetensors") for path in (sd, vq)}
    for variant in (None, "nano"):
        assert parts.sd_contents(variant, "vae", indices[sd]) == []
        assert parts.vqvae_contents(variant, "vae", indices[vq]) == []
    for contents, wrong, word in [
        (parts.sd_contents, vq, "not an AutoencoderKL"),
        (parts.vqvae_contents, sd, "not a VQ-VAE"),
        (parts.wan_contents, sd, "not a Wan VAE"),
        (parts.seedvr2_contents, vq, "not a SeedVR2 VAE"),
    ]:
        (sentence,) = contents(None, "vae", indices[wrong])
        assert word in sentence
        with pytest.raises(ConfigError) as caught:
            contents("no-such", "vae", indices[wrong])
        assert caught.value.code == "model_variant_unknown"
    less = load_file(sd)
    del less["decoder.conv_norm_out.bias"]
    save_file(less, tmp_path / "less.safetensors")
    (sentence,) = parts.sd_contents(None, "vae", read_index(tmp_path / "less.safetensors", "safetensors"))
    assert "decoder.conv_norm_out.bias" in sentence
    assert parts.sd_contents("published", "vae", indices[sd])


def test_batches_by_memory(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert frames_at_once(10**9, cpu, free=8 * 10**9) == 4
    assert frames_at_once(1, cpu, free=8 * 10**9) == 8
    assert frames_at_once(10**12, cpu, free=8 * 10**9) == 1
    assert frames_at_once(10**9, cuda, free=80 * 10**9) == 40
    assert free_bytes(cpu) > 0
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    monkeypatch.setattr("app.device.memory_limits", lambda proc, cgroup: [])
    assert free_bytes(cpu) == total // 2, "where nobody tells, a large machine is not taken for a small one"
