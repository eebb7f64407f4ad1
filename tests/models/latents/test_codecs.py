"""Every codec through the one interface: the originals' numbers, whatever the chunks, in little memory."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from app.errors import UnavailableError
from app.models.latents.codecs import ImageCodec, SeedVR2Codec, WanCodec
from app.models.seedvr2.vae import SCALE, VideoVAE
from app.models.seedvr2.vae_config import VAEConfig
from app.models.wan.vae import WanVAE
from app.models.wan.vae_config import VAEConfig as WanVAEConfig
from tests.golden import draw, read_metadata
from tests.models.latents.small import CODECS, clip, codec, cut, decoded, encoded, error
from tests.seeded import randn

GOLDEN = Path(__file__).parents[2] / "golden"


def golden_clip(case):
    return randn(case["x"], 1, 3, case["t"], case["h"], case["w"]).clamp(-1, 1)[0].transpose(0, 1)


def test_seedvr2_has_the_originals_numbers():
    meta = read_metadata(GOLDEN / "seedvr2_vae.safetensors")
    own = SeedVR2Codec(draw(VideoVAE(VAEConfig.from_original(meta["config"])), meta["salt"]))
    with safe_open(GOLDEN / "seedvr2_vae.safetensors", "pt") as golden:
        for i, case in enumerate(meta["cases"]):
            z = encoded(own, golden_clip(case))
            assert error(z / SCALE, golden.get_tensor(f"mean{i}")[0]) < 1e-5
            assert error(decoded(own, z), golden.get_tensor(f"dec{i}")[0].transpose(0, 1)) < 1e-5


def test_wan_has_the_originals_numbers():
    meta = read_metadata(GOLDEN / "wan_vae.safetensors")
    own = WanCodec(draw(WanVAE(WanVAEConfig.from_original(meta["config"])), meta["salt"]))
    with safe_open(GOLDEN / "wan_vae.safetensors", "pt") as golden:
        for i, case in enumerate(meta["cases"]):
            z = encoded(own, golden_clip(case)[: case["t"] - (case["t"] - 1) % 4])
            assert error(z, golden.get_tensor(f"z{i}")[0]) < 1e-5
            assert error(decoded(own, z), golden.get_tensor(f"y{i}")[0].transpose(0, 1)) < 1e-5


def test_wan_equals_diffusers():
    pytest.importorskip("diffusers", reason="diffusers is not installed: no peer to compare with")
    from tests.models.wan.test_vae_diffusers import NANO, peers

    ours, theirs = peers(NANO)
    own, x = WanCodec(ours), clip(9)
    mean, std = torch.tensor([NANO.latents_mean, NANO.latents_std]).view(2, 16, 1, 1, 1)
    with torch.no_grad():
        z = theirs.encode(x.transpose(0, 1)[None]).latent_dist.mean[0]
        y = theirs.decode(z[None]).sample[0].transpose(0, 1)
    assert error(encoded(own, x), (z - mean) / std) < 1e-5
    assert error(decoded(own, (z - mean) / std).clamp(-1, 1), y) < 1e-5


def test_stable_diffusion_equals_diffusers():
    own, x = codec("sd-vae"), clip(5)
    with torch.no_grad():
        z = own.module.encode(x).latent_dist.mode() * own.module.config.scaling_factor
        y = own.module.decode(z / own.module.config.scaling_factor).sample
    assert error(encoded(own, x), z.transpose(0, 1)) < 1e-6
    assert error(decoded(own, z.transpose(0, 1)), y) < 1e-6


@pytest.mark.parametrize("name", CODECS)
def test_chunks_change_nothing(name):
    own = codec(name)
    count = own.facts.frames_for(4)
    x = clip(count)
    z = encoded(own, x)
    assert z.shape == (own.facts.channels, 4, *own.facts.latent_size(16, 24)) and z.dtype == torch.float32
    y = decoded(own, z)
    assert y.shape == (count, 3, 16, 24) and y.dtype == torch.float32
    assert error(encoded(own, *cut(x, [1, 0, 1], 0)), z) < 1e-5
    assert error(encoded(own, *x.split(1)), z) < 1e-5
    assert error(decoded(own, *cut(z, [2, 0], 1)), y) < 1e-5


@pytest.mark.parametrize("name", CODECS)
def test_two_clips_at_once_do_not_mix(name):
    own = codec(name)
    first, second = clip(own.facts.frames_for(3)), clip(own.facts.frames_for(3)).flip(0)
    pairs = list(zip(own.encode(first.split(1)), own.encode(second.split(1)), strict=True))
    assert error(torch.cat([a for a, _ in pairs], 1), encoded(own, first)) < 1e-5
    assert error(torch.cat([b for _, b in pairs], 1), encoded(own, second)) < 1e-5


@pytest.mark.parametrize("name", CODECS)
def test_reads_no_further_than_it_must(name):
    own, read, given, ahead = codec(name), 0, 0, 0

    def frames():
        nonlocal read, ahead
        for _ in range(own.facts.frames_for(24)):
            ahead = max(ahead, read - given)
            read += 1
            yield clip(1)

    for latents in own.encode(frames()):
        given += latents.shape[1] * own.facts.temporal
    assert ahead <= 2 * max(own.facts.temporal, 8)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize(
    "shape", [(1, 3, 15, 24), (1, 3, 16, 1), (1, 4, 16, 24), (3, 16, 24), (1, 3, 0, 24)], ids=str
)
def test_refuses_frames_it_cannot_encode(name, shape):
    with pytest.raises(ValueError, match=r"multiple|takes"):
        list(codec(name).encode([torch.zeros(shape)]))


@pytest.mark.parametrize("name", CODECS)
def test_refuses_what_is_no_clip(name):
    own = codec(name)
    for wrong in ([], [torch.zeros(0, 3, 16, 24)]):
        with pytest.raises(ValueError):
            list(own.encode(wrong))
    with pytest.raises(ValueError, match="unlike those before"):
        list(own.encode([torch.zeros(1, 3, 16, 24), torch.zeros(4, 3, 24, 16)]))
    with pytest.raises(ValueError):
        list(own.decode([]))
    with pytest.raises(ValueError, match="takes"):
        list(own.decode([torch.zeros(own.facts.channels + 1, 1, 4, 4)]))
    if own.facts.temporal > 1:
        with pytest.raises(ValueError, match=r"3 frames|4 k"):
            list(own.encode([torch.zeros(4, 3, 16, 24)]))


@pytest.mark.parametrize("name", CODECS)
def test_what_comes_out_may_be_changed_in_place(name):
    own = codec(name)
    z = next(iter(own.encode([clip(1)])))
    assert not z.requires_grad and not z.is_inference()
    z.add_(1)


def test_vqvae_to_numbers_of_codes_and_back():
    own = codec("vqvae")
    z = encoded(own, clip(5))
    indices = torch.cat(list(own.indices(z.split(1, 1))))
    assert indices.shape == (2, 4, 6) and indices.dtype == torch.int64 and indices.unique().numel() > 1
    assert torch.equal(torch.cat(list(own.latents(indices.split(1))), 1), z)
    # What is not a vector of the codebook is decoded as the nearest one.
    spread = torch.pdist(own.module.codebook / own._std.view(1, -1)).min()
    nudge = spread / 2.5 * torch.nn.functional.normalize(torch.ones_like(z), dim=0)
    assert torch.equal(decoded(own, z + nudge), decoded(own, z))
    for wrong in (torch.tensor([[[32]]]), torch.tensor([[[-1]]]), torch.tensor([[[0.0]]])):
        with pytest.raises(ValueError, match="from 0 to 31"):
            list(own.latents([wrong]))


def test_frames_beyond_memory_pass_in_smaller_batches(monkeypatch):
    own = ImageCodec(codec("sd-vae").module, codec("sd-vae").config, batch=8)
    x, sizes = clip(8), []
    real = own._encode

    def small(batch):
        sizes.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError
        return real(batch)

    monkeypatch.setattr(own, "_encode", small)
    assert error(encoded(own, x), encoded(codec("sd-vae"), x)) < 1e-5
    assert sizes[0] == 8 and max(sizes[3:]) <= 4 and own.most == 2

    def never(batch):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(own, "_encode", never)
    with pytest.raises(UnavailableError, match="resize the clip") as caught:
        encoded(own, x)
    assert caught.value.code == "device_memory"
