"""nano-vae: how its training begins and goes on, and what the weights that ship can do."""

import hashlib
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from app.boot.manifest import read_manifest
from app.models.latents.load import build_autoencoder_kl
from app.models.latents.pixels import from_bytes
from app.models.latents.sd_config import SDConfig, read_config
from tests.models.latents.small import clip, decoded, encoded, error
from tools import train_nano_vae as nano
from tools.make_nano import TRAINED
from tools.measure_nano import clips
from tools.nano_data import scene
from tools.training_data import Data, digest

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: nano-vae needs it")

FOLDER = TRAINED / "latents" / "sd-vae"
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def shipped():
    return nano.shipped()


@pytest.fixture(scope="module")
def unseen():
    return list(clips())


def test_shipped_weights_reconstruct_what_they_were_not_trained_on(shipped, unseen):
    """The main figure: 30 dB on average, on the example and on drawn scenes. Every sixth frame of each."""
    found = {name: nano.reconstruction(shipped, part[::6]) for name, part in unseen}
    assert len(found) == 9
    psnr = [quality.psnr for quality in found.values()]
    assert np.mean(psnr) > 30 and found["examples/clip.mp4"].psnr > 30, found
    assert min(psnr) > 24 and np.mean([quality.ssim for quality in found.values()]) > 0.9


def test_shipped_latents_are_of_about_unit_variance(shipped, unseen):
    z = torch.cat([encoded(shipped, from_bytes(part[::9])).flatten(1) for _, part in unseen], 1)
    assert z.shape[0] == shipped.facts.channels == 16 and shipped.facts.spatial == 4
    assert (z.mean(1).abs() < 1).all() and 0.7 < z.std() < 1.4
    assert ((z.std(1) > 0.3) & (z.std(1) < 3)).all()


def test_shipped_files_are_those_of_the_manifest():
    manifest = read_manifest()
    total = 0
    for part, name in (("vae", WEIGHTS), ("config", "config.json")):
        entry = manifest.files[manifest.models["nano-vae"].parts[part]]
        content = (FOLDER / name).read_bytes()
        assert entry.size == len(content) and entry.sha256 == hashlib.sha256(content).hexdigest()
        total += len(content)
    assert total < 2_000_000
    assert {tensor.dtype for tensor in load_file(FOLDER / WEIGHTS).values()} == {torch.float16}
    assert read_config(FOLDER / "config.json") == SDConfig.nano()


def test_diffusers_itself_loads_the_shipped_folder(shipped):
    theirs = diffusers.AutoencoderKL.from_pretrained(FOLDER).eval()
    x = clip(2, 32, 48)
    with torch.no_grad():
        mean = theirs.encode(x).latent_dist.mode()
        assert error(encoded(shipped, x), mean.transpose(0, 1)) < 1e-5
        assert error(decoded(shipped, mean.transpose(0, 1)), theirs.decode(mean).sample) < 1e-5


# ------------------------------------------------------------------ the training


@pytest.fixture
def begun():
    torch.manual_seed(0)
    vae = build_autoencoder_kl(SDConfig.nano()).eval().requires_grad_(False)
    nano.begin_linear(vae)
    return vae


def test_begins_linear(begun):
    x, y = clip(2, 32, 32)

    def through(x):
        z = begun.encode(x[None]).latent_dist.mean
        return torch.cat([z.flatten(), begun.decode(z).sample.flatten()])

    with torch.no_grad():
        nothing = through(torch.zeros_like(x))
        sum_, parts = through(x + y) - nothing, through(x) + through(y) - 2 * nothing
        assert parts.norm() > 1 and error(sum_, parts) < 0.02
        with nano.straight(begun):
            along = through(x)
        assert torch.equal(along, through(x))


def test_branches_are_left_out_and_come_back(begun):
    for parameter in begun.parameters():
        parameter.add_(0.05)
    x = clip(1, 32, 32)
    before = begun.encode(x).latent_dist.mean
    with nano.straight(begun):
        assert error(begun.encode(x).latent_dist.mean, before) > 0.01
    assert torch.equal(begun.encode(x).latent_dist.mean, before)


def test_normalised_latents_and_the_same_pictures(begun):
    x = clip(4, 32, 32)
    before = begun.encode(x).latent_dist
    pictures = begun.decode(before.mean).sample
    data = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    nano.normalise(begun, Data((data,), ""))
    z = begun.encode(from_bytes(data)).latent_dist.mean
    assert z.mean((0, 2, 3)).abs().max() < 1e-4 and (z.std((0, 2, 3)) - 1).abs().max() < 1e-4
    after = begun.encode(x).latent_dist
    assert error(begun.decode(after.mean).sample, pictures) < 1e-4
    ratio = (after.std / before.std).mean((0, 2, 3)) * before.mean.std((0, 2, 3))  # deviations go along
    assert torch.allclose(ratio, after.mean.std((0, 2, 3)), rtol=1e-3)


@pytest.fixture
def few(monkeypatch):
    """A training of four steps, two of them without branches, on two small scenes."""
    clips = tuple(scene(seed, 2, 64, 64) for seed in range(2))
    monkeypatch.setattr(nano, "scenes", lambda seeds, progress: Data(clips, digest(clips)))
    for name, value in {"STEPS": 4, "STRAIGHT": 2, "BATCH": 1, "CROP": 16}.items():
        monkeypatch.setattr(nano, name, value)


def test_goes_on_with_the_same_bits_and_exports(few, tmp_path, capsys):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    # STEPS decides the rate, --steps where to stop.
    assert nano.main(["train", str(whole), "--steps", "4", "--device", "cpu"]) == 0
    for steps in ("1", "3", "4"):
        assert nano.main(["train", str(halves), "--steps", steps, "--device", "cpu"]) == 0
    assert (whole / "losses.csv").read_text() == (halves / "losses.csv").read_text()
    for folder in (whole, halves):
        assert nano.main(["export", str(folder), "--into", str(folder)]) == 0
    files = [folder / "latents" / "sd-vae" / WEIGHTS for folder in (whole, halves)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert hashlib.sha256(files[0].read_bytes()).hexdigest() in capsys.readouterr().out
    assert json.loads((files[0].parent / "config.json").read_text())["latent_channels"] == 16
    assert nano.shipped(halves).facts.channels == 16


def test_refuses_to_go_on_with_other_scenes(few, tmp_path, monkeypatch, capsys):
    assert nano.main(["train", str(tmp_path), "--steps", "1", "--device", "cpu"]) == 0
    clips = (scene(9, 2, 64, 64),)
    monkeypatch.setattr(nano, "scenes", lambda seeds, progress: Data(clips, digest(clips)))
    assert nano.main(["train", str(tmp_path), "--steps", "2", "--device", "cpu"]) == 65
    assert "other photographs" in capsys.readouterr().err
