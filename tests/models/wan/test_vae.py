"""Wan's VAE: slices equal to the whole, and equal to diffusers' AutoencoderKLWan. Goldens: test_golden.py."""

from copy import deepcopy
from dataclasses import replace
from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from app.models.wan.vae import ChannelNorm, Upsample, WanVAE
from app.models.wan.vae_config import VAEConfig, decode_bytes, encode_bytes
from tests.golden import draw
from tests.seeded import randn

NANO = VAEConfig.nano()
SMALL = replace(NANO, dim=4)
TIMES = [(False, True, True), (True, True, False), (False, False, True), (False, False, False)]


def build(config: VAEConfig) -> WanVAE:
    vae = draw(WanVAE(config), "wan/")
    assert isinstance(vae, WanVAE)
    return vae


def clip(frames: int, height: int = 16, width: int = 24, batch: int = 1) -> Tensor:
    return randn(f"clip{frames}", batch, 3, frames, height, width).clamp(-1, 1)


def error(out: Tensor, reference: Tensor) -> float:
    assert out.shape == reference.shape
    return float((out.float() - reference).norm() / reference.norm())


@given(
    latents=st.integers(1, 6),
    cuts=st.sets(st.integers(1, 5)),
    times=st.sampled_from(TIMES),
    batch=st.integers(1, 2),
)
@settings(max_examples=25, deadline=None)
@torch.inference_mode()
def test_slices_equal_the_whole(latents, cuts, times, batch):
    config = replace(SMALL, temporal_downsample=times)
    vae = build(config)
    x = clip(config.frames_for(latents), batch=batch)
    z = vae.encode(x)
    assert z.shape == (batch, 16, latents, 2, 3)
    edges = [0, *sorted(c for c in cuts if c < latents), latents]
    frames = [0] + [config.frames_for(edge) for edge in edges[1:]]

    state = vae.new_state()
    sliced = [vae.encode(x[:, :, a:b], state) for a, b in pairwise(frames)]
    assert [part.shape[2] for part in sliced] == [b - a for a, b in pairwise(edges)]
    assert error(torch.cat(sliced, dim=2), z) < 1e-5

    decoded = [vae.decode(z[:, :, a:b], state) for a, b in pairwise(edges)]
    assert [part.shape[2] for part in decoded] == [b - a for a, b in pairwise(frames)]
    assert error(torch.cat(decoded, dim=2), vae.decode(z)) < 1e-5


@torch.inference_mode()
def test_a_frame_does_not_depend_on_later_ones():
    vae = build(NANO)
    z = randn("z", 1, 16, 5, 2, 3)
    changed = z.clone()
    changed[:, :, 3:] += 1
    same = 1 + 2 * 4  # frames of the first three latents
    assert error(vae.decode(changed)[:, :, :same], vae.decode(z)[:, :, :same]) < 1e-6


@torch.inference_mode()
def test_clips_in_turn_do_not_mix():
    vae = build(NANO)
    clips = [randn("first", 1, 16, 4, 2, 3), randn("second", 1, 16, 4, 2, 3)]
    states = [vae.new_state(), vae.new_state()]
    parts = [
        [vae.decode(z[:, :, i : i + 1], s) for z, s in zip(clips, states, strict=True)] for i in range(4)
    ]
    for z, decoded in zip(clips, zip(*parts, strict=True), strict=True):
        assert error(torch.cat(decoded, dim=2), vae.decode(z)) < 1e-5


@torch.inference_mode()
def test_streams_equal_the_whole():
    vae = build(NANO)
    x = clip(17)
    z = vae.encode(x)
    for latents in (1, 2, 3):
        for lengths in ([17], [1, 4, 4, 4, 4], [2, 3, 5, 7], [1] * 17):
            coded = list(vae.encode_stream(x.split(lengths, dim=2), latents))
            assert max(part.shape[2] for part in coded) == latents
            assert error(torch.cat(coded, dim=2), z) < 1e-5
        frames = list(vae.decode_stream(z.split([3, 2], dim=2), latents=latents))
        assert error(torch.cat(frames, dim=2), vae.decode(z)) < 1e-5


@torch.inference_mode()
def test_a_stream_goes_on_from_a_start():
    """Frames that are given are encoded, and only what follows them is decoded."""
    vae = build(NANO)
    z = randn("z", 1, 16, 5, 2, 3)
    state = vae.new_state()
    given_frames = vae.decode(z[:, :, :2], state)
    rest = list(vae.decode_stream([z[:, :, 2:3], z[:, :, 3:]], state))
    assert [part.shape[2] for part in rest] == [4, 4, 4]
    assert error(torch.cat([given_frames, *rest], dim=2), vae.decode(z)) < 1e-5


@torch.inference_mode()
def test_a_stream_takes_no_more_than_it_gives():
    """A frame leaves before later ones are asked for."""
    vae = build(NANO)
    asked = []

    def blocks():
        for i in range(3):
            asked.append(i)
            yield randn(f"block{i}", 1, 16, 1, 2, 3)

    for i, _ in enumerate(vae.decode_stream(blocks())):
        assert asked == list(range(i + 1))


@torch.inference_mode()
def test_state_does_not_grow_with_the_clip():
    vae = build(NANO)
    state = vae.new_state()

    def kept() -> int:
        tails = [state.tail(module) for module in vae.modules()]
        return sum(tail.untyped_storage().nbytes() for tail in tails if tail is not None)

    sizes = []
    for i in range(6):
        vae.decode(randn(f"{i}", 1, 16, 1, 2, 3), state)
        sizes.append(kept())
    assert sizes[1:] == [sizes[1]] * 5
    assert sizes[0] <= sizes[1]


@torch.inference_mode()
def test_latents_are_normalised_channel_by_channel():
    """The same weights with other statistics give latents that differ by just these."""
    plain = replace(NANO, latents_mean=(0.0,) * 16, latents_std=(1.0,) * 16)
    x = clip(5)
    mean, std = (
        torch.tensor(values).view(1, 16, 1, 1, 1) for values in (NANO.latents_mean, NANO.latents_std)
    )
    raw = build(plain).encode(x)
    z = build(NANO).encode(x)
    assert error(z, (raw - mean) / std) < 1e-6
    assert error(build(NANO).decode(z), build(plain).decode(raw)) < 1e-5


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 1e-2), (torch.bfloat16, 6e-2)])
@torch.inference_mode()
def test_sixteen_bits(dtype, bound):
    x = clip(9)
    vae = build(NANO)
    z = vae.encode(x)
    y = vae.decode(z)
    low = build(NANO).to(dtype)
    coded = low.encode(x)
    frames = low.decode(z)
    assert coded.dtype == torch.float32
    assert frames.dtype == dtype
    assert 0 < error(coded, z) < bound
    assert 0 < error(frames, y) < bound


@torch.inference_mode()
def test_a_copy_is_a_copy():
    """Layers that are reached in two ways are still the same layers after a copy."""
    vae = build(NANO)
    z = randn("z", 1, 16, 2, 2, 3)
    y = vae.decode(z)
    other = deepcopy(vae)
    for parameter in vae.parameters():
        parameter.zero_()
    assert error(other.decode(z), y) == 0
    assert vae.decode(z).abs().max() == 0


@torch.inference_mode()
def test_black_is_finite():
    """Zeros everywhere, as in a norm of nothing."""
    vae = build(NANO)
    for parameter in vae.parameters():
        parameter.zero_()
    assert vae.decode(torch.zeros(1, 16, 2, 2, 3)).abs().max() == 0
    assert vae.half().encode(torch.zeros(1, 3, 5, 16, 16)).isfinite().all()


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 5, 16), "got"),
        ((1, 4, 5, 16, 16), "got"),
        ((1, 3, 5, 16, 20), "16x20"),
        ((1, 3, 5, 12, 16), "12x16"),
        ((1, 3, 5, 0, 16), "0x16"),
        ((1, 3, 0, 16, 16), "0 frames"),
        ((1, 3, 4, 16, 16), "up to 5"),
        ((1, 3, 6, 16, 16), "up to 9"),
    ],
)
def test_clips_that_cannot_be_encoded(shape, message):
    with pytest.raises(ValueError, match=message):
        build(NANO).encode(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(1, 16, 2, 2), (1, 15, 2, 2, 2), (1, 16, 0, 2, 2), (1, 16, 2, 0, 2)])
def test_latents_that_cannot_be_decoded(shape):
    with pytest.raises(ValueError, match="decodes"):
        build(NANO).decode(torch.zeros(shape))


@torch.inference_mode()
def test_later_slices_that_cannot_be_encoded():
    vae = build(NANO)
    state = vae.new_state()
    vae.encode(clip(1), state)
    for frames in (0, 1, 5):
        with pytest.raises(ValueError, match="multiple of 4"):
            vae.encode(clip(9)[:, :, :frames], state)


@pytest.mark.parametrize("lengths", [[4], [1, 4, 2], [], [1, 1, 1]])
@torch.inference_mode()
def test_streams_of_clips_that_cannot_be_encoded(lengths):
    pieces = [clip(9)[:, :, :length] for length in lengths]
    with pytest.raises(ValueError, match="4 k"):
        list(build(NANO).encode_stream(pieces))


def test_enlarging_equals_repeating_pixels_and_convolving():
    up = Upsample(6, time=False).requires_grad_(False)
    conv = up.resample["1"]
    x = randn("x", 2, 6, 3, 5, 7)
    frames = x.transpose(1, 2).flatten(0, 1)
    plain = torch.nn.functional.interpolate(frames, scale_factor=2, mode="nearest")
    plain = conv(plain).view(2, 3, 3, 10, 14).transpose(1, 2)
    assert error(up(x, None), plain) < 1e-6


def test_norm_equals_the_definition():
    norm = ChannelNorm(12, 1, 1, 1).requires_grad_(False)
    norm.gamma.copy_(randn("gamma", 12, 1, 1, 1))
    x = randn("x", 2, 12, 3, 5, 7).to(memory_format=torch.channels_last_3d) * 300
    exact = torch.nn.functional.silu(torch.nn.functional.normalize(x.double(), dim=1) * 12**0.5 * norm.gamma)
    for dtype, bound in [(torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 6e-3)]:
        low = norm.to(dtype)
        out = torch.empty_like(x, dtype=dtype)
        low.silu(x.to(dtype), out)
        assert error(out, exact) < bound


@pytest.mark.parametrize("latents", [1, 3])
@torch.inference_mode()
def test_memory_is_as_estimated(latents):
    vae, (height, width) = build(NANO), (96, 160)
    z, x = torch.zeros(1, 16, latents, height // 8, width // 8), torch.zeros(1, 3, 4 * latents, height, width)

    def decode() -> None:
        for _ in vae.decode_stream([z, z], latents=latents):
            pass

    def encode() -> None:
        for _ in vae.encode_stream([x[:, :, :1], x, x], latents):
            pass

    for run, estimate in ((decode, decode_bytes), (encode, encode_bytes)):
        expected = estimate(NANO, height, width, latents=latents, item=4)
        assert 0.9 * expected < peak(run) < 1.2 * expected


def peak(run) -> int:
    """The most bytes that `run` holds at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
