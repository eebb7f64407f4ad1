"""SeedVR2's VAE: the original's numbers, slices equal to the whole, and its tensors' names."""

import json
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from app.errors import ConfigError
from app.models.autoencoder_kl import current_name
from app.models.seedvr2.vae import VideoVAE
from app.models.seedvr2.vae_config import VAEConfig, recognise_vae, vae_tensors
from tests.seeded import randn, weight

GOLDEN = Path(__file__).parents[1] / "golden"
TINY = VAEConfig(block_out_channels=(8, 16, 16, 32), layers_per_block=1, norm_num_groups=4, latent_channels=4)
CONFIGS = [
    TINY,
    VAEConfig.published(),
    replace(TINY, temporal_scale_num=0),
    replace(TINY, temporal_scale_num=3, layers_per_block=3, out_channels=4),
    replace(TINY, block_out_channels=(32, 64), temporal_scale_num=1, latent_channels=7),
    replace(TINY, block_out_channels=(64,), temporal_scale_num=0, in_channels=1),
]


def build(config: VAEConfig) -> VideoVAE:
    vae = VideoVAE(config).eval()
    vae.load_state_dict({name: weight(name, shape) for name, shape in vae_tensors(config).items()})
    return vae


def clip(config: VAEConfig, frames: int, height: int = 16, width: int = 24, batch: int = 1) -> Tensor:
    return randn(f"clip{frames}", batch, config.in_channels, frames, height, width).clamp(-1, 1)


def error(out: Tensor, reference: Tensor) -> float:
    assert out.shape == reference.shape
    return float((out - reference).norm() / reference.norm())


def slices(total: int, cuts: set[int]) -> list[slice]:
    """[0, total) cut at `cuts`."""
    edges = [0, *sorted(cuts), total]
    return [slice(a, b) for a, b in pairwise(edges)]


@torch.inference_mode()
def test_golden():
    with safe_open(GOLDEN / "seedvr2_vae.safetensors", "pt") as golden:
        about = golden.metadata()
        config = VAEConfig.from_original(json.loads(about["config"]))
        vae = build(config)
        for i, case in enumerate(json.loads(about["cases"])):
            x = randn(case["x"], 1, 3, case["t"], case["h"], case["w"]).clamp(-1, 1)
            mean, logvar = vae.encode(x)
            assert error(mean, golden.get_tensor(f"mean{i}")) < 1e-5
            assert error(logvar, golden.get_tensor(f"logvar{i}")) < 1e-5
            assert error(vae.decode(mean), golden.get_tensor(f"dec{i}")) < 1e-5


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_tensors_are_the_modules_own(config):
    with torch.device("meta"):
        own = {name: tuple(t.shape) for name, t in VideoVAE(config).state_dict().items()}
    assert vae_tensors(config) == own


def test_tensors_of_the_published_checkpoint():
    stored = json.loads((GOLDEN / "keys" / "seedvr2_vae.json").read_text())["tensors"]
    assert vae_tensors(VAEConfig.published()) == {name: tuple(shape) for name, shape in stored.items()}


def test_older_attention_names():
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for name in vae_tensors(TINY):
        assert current_name(name) == name
        for new, old in older.items():
            assert current_name(name.replace(f".{new}.", f".{old}.")) == name


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_recognised_from_its_tensors(config):
    assert recognise_vae(vae_tensors(config), config.norm_num_groups) == config


def test_published_is_recognised_without_help():
    assert recognise_vae(vae_tensors(VAEConfig.published())) == VAEConfig.published()


@pytest.mark.parametrize(
    "missing", ["encoder.conv_in.weight", "decoder.conv_in.weight", "decoder.conv_out.weight"]
)
def test_another_checkpoint_is_refused(missing):
    shapes = vae_tensors(TINY)
    del shapes[missing]
    with pytest.raises(ConfigError, match=missing) as refused:
        recognise_vae(shapes, 4)
    assert refused.value.code == "vae_not_recognised"


@pytest.mark.parametrize(
    ("change", "code", "names"),
    [
        ({"use_quant_conv": True}, "vae_config_unsupported", "use_quant_conv"),
        ({"act_fn": "gelu"}, "vae_config_unsupported", "act_fn"),
        ({"time_receptive_field": "half"}, "vae_config_unsupported", "time_receptive_field"),
        ({"down_block_types": ["AttnDownBlock3D"] * 4}, "vae_config_unsupported", "down_block_types"),
        ({"up_block_types": ["UpDecoderBlock3D"] * 3}, "vae_config_unsupported", "up_block_types"),
        ({"slots": 4}, "vae_config_unknown", "slots"),
        ({"norm_num_groups": 3}, "vae_config_invalid", "norm_num_groups"),
        ({"temporal_scale_num": -1}, "vae_config_invalid", "temporal_scale_num"),
    ],
)
def test_configuration_of_another_model_is_refused(change, code, names):
    original = {"block_out_channels": [8, 16, 16, 32], "norm_num_groups": 4, "temporal_scale_num": 2}
    with pytest.raises(ConfigError, match=names) as refused:
        VAEConfig.from_original(original | change)
    assert refused.value.code == code


def test_configuration_may_ask_for_more_temporal_halvings_than_there_are():
    original = {"block_out_channels": [8, 16], "norm_num_groups": 4, "temporal_scale_num": 2}
    assert VAEConfig.from_original(original).temporal_scale_num == 1


@given(
    latents=st.integers(1, 6),
    cuts=st.sets(st.integers(1, 5)),
    time=st.integers(0, 3),
    batch=st.integers(1, 2),
)
@settings(max_examples=25, deadline=None)
@torch.inference_mode()
def test_slices_equal_the_whole(latents, cuts, time, batch):
    config = replace(TINY, temporal_scale_num=time)
    vae = build(config)
    x = clip(config, config.frames_for(latents), batch=batch)
    mean, _ = vae.encode(x)
    parts = slices(latents, {c for c in cuts if c < latents})
    frames = [config.frames_for(p.stop) - (config.frames_for(p.start) if p.start else 0) for p in parts]
    ends = list(accumulate(frames))

    state = vae.new_state()
    sliced = [vae.encode_slice(x[:, :, end - n : end], state) for n, end in zip(frames, ends, strict=True)]
    assert [s.shape[2] for s in sliced] == [p.stop - p.start for p in parts]
    assert error(torch.cat(sliced, dim=2), mean) < 1e-5

    decoded = [vae.decode_slice(mean[:, :, p], state) for p in parts]
    assert [d.shape[2] for d in decoded] == frames
    assert error(torch.cat(decoded, dim=2), vae.decode(mean)) < 1e-5


@torch.inference_mode()
def test_clips_in_turn_do_not_mix():
    vae = build(TINY)
    first, second = clip(TINY, 9), clip(TINY, 9).flip(2)
    states = [vae.new_state(), vae.new_state()]
    parts = [[], []]
    for frames in (slice(0, 5), slice(5, 9)):
        for i, x in enumerate((first, second)):
            parts[i].append(vae.encode_slice(x[:, :, frames], states[i]))
    for i, x in enumerate((first, second)):
        assert error(torch.cat(parts[i], dim=2), vae.encode(x)[0]) < 1e-5


@torch.inference_mode()
def test_batch_equals_each_clip():
    vae = build(TINY)
    x = clip(TINY, 5, batch=3)
    mean, logvar = vae.encode(x)
    decoded = vae.decode(mean)
    for i in range(3):
        one_mean, one_logvar = vae.encode(x[i : i + 1])
        assert error(mean[i : i + 1], one_mean) < 1e-5
        assert error(logvar[i : i + 1], one_logvar) < 1e-5
        assert error(decoded[i : i + 1], vae.decode(one_mean)) < 1e-5


@torch.inference_mode()
def test_inputs_are_left_as_they_were():
    vae = build(TINY)
    x = clip(TINY, 5)
    kept = x.clone()
    mean, _ = vae.encode(x)
    assert torch.equal(x, kept)
    kept = mean.clone()
    vae.decode(mean)
    assert torch.equal(mean, kept)


def test_full_hd_passes_on_meta():
    """The path that devices other than the CPU take, at the size people use: shapes and slices only."""
    with torch.device("meta"):
        vae = VideoVAE(VAEConfig.published()).half()
        frames = torch.empty(1, 3, 9, 1088, 1920, dtype=torch.float16)
    state = vae.new_state()
    mean = torch.cat([vae.encode_slice(x, state) for x in frames.split([5, 4], dim=2)], dim=2)
    assert mean.shape == (1, 16, 3, 136, 240)
    decoded = torch.cat([vae.decode_slice(z, state) for z in mean.split([1, 2], dim=2)], dim=2)
    assert decoded.shape == frames.shape
    assert decoded.dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_sixteen_bits(dtype):
    vae = build(TINY)
    x = clip(TINY, 5)
    mean, _ = vae.encode(x)
    frames = vae.decode(mean)
    vae.to(dtype)
    low, _ = vae.encode(x.to(dtype))
    assert low.dtype == dtype
    assert error(low.float(), mean) < (0.03 if dtype == torch.bfloat16 else 0.004)
    assert error(vae.decode(mean.to(dtype)).float(), frames) < (0.03 if dtype == torch.bfloat16 else 0.004)


@pytest.mark.parametrize(
    ("shape", "names"),
    [
        ((1, 3, 5, 20, 16), "20x16"),
        ((1, 3, 5, 16, 4), "16x4"),
        ((1, 3, 5, 0, 16), "0x16"),
        ((1, 3, 4, 16, 16), "4 frames.*up to 5"),
        ((1, 3, 0, 16, 16), "0 frames.*up to 1"),
        ((1, 4, 5, 16, 16), r"\(1, 4, 5, 16, 16\)"),
        ((3, 5, 16, 16), r"\(3, 5, 16, 16\)"),
    ],
)
def test_wrong_frames_are_refused(shape, names):
    vae = VideoVAE(TINY)
    with pytest.raises(ValueError, match=names):
        vae.encode(torch.zeros(shape))
    with pytest.raises(ValueError, match=names):
        vae.encode_slice(torch.zeros(shape), vae.new_state())


@torch.inference_mode()
def test_wrong_later_slice_is_refused():
    vae = build(TINY)
    state = vae.new_state()
    vae.encode_slice(clip(TINY, 5), state)
    with pytest.raises(ValueError, match=r"5 frames.*multiple of 4"):
        vae.encode_slice(clip(TINY, 5), state)


@pytest.mark.parametrize("shape", [(1, 3, 2, 4, 4), (4, 2, 4, 4), (1, 4, 0, 4, 4)])
def test_wrong_latents_are_refused(shape):
    vae = VideoVAE(TINY)
    with pytest.raises(ValueError, match="decodes"):
        vae.decode(torch.zeros(shape))


@pytest.mark.parametrize(("frames", "latents"), [(1, 1), (5, 2), (121, 31)])
def test_frames_and_latents(frames, latents):
    config = VAEConfig.published()
    assert config.latents_for(frames) == latents
    assert config.frames_for(latents) == frames
    assert (
        config.latents_holding(frames) == config.latents_holding(frames - 1 if frames > 1 else 1) == latents
    )
