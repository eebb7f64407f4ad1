"""The training of nano's SeedVR2: its material, its passes against the product's, and how it goes on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from app.errors import InputError
from app.models.seedvr2.dit import DiT
from app.models.seedvr2.vae import VideoVAE
from tests.golden import draw
from tools.nano_data import scene, stacked
from tools.nano_forward import decode, encode, velocity
from tools.nano_start import start_dit
from tools.train_nano import TRAINED, Settings, signed, training

SMALL = Settings("vae", steps=4, clips=2, frames=3, height=96, width=96, crop=32, batch=1, rate=1e-3)


@pytest.fixture(scope="module")
def data() -> dict[str, np.ndarray]:
    return stacked(range(2), 3, 96, 96, lambda done: None)


def test_material_is_drawn_from_its_seed(data: dict[str, np.ndarray]) -> None:
    assert data["clean"].shape == (2, 3, 96, 96, 3) and data["spoiled"].shape == (2, 3, 48, 48, 3)
    assert np.array_equal(scene(1, 3, 96, 96), data["clean"][1])
    assert not np.array_equal(data["clean"][0], data["clean"][1])
    again = stacked([1], 3, 96, 96, lambda done: None)
    assert np.array_equal(again["spoiled"][0], data["spoiled"][1])


def test_the_autoencoder_trains_with_the_products_numbers() -> None:
    vae = draw(VideoVAE(TRAINED.vae), "train/")
    clips = torch.randn(2, 3, 5, 16, 24).clamp_(-1, 1)
    mean = vae.encode(clips)[0]
    torch.testing.assert_close(encode(vae, clips), mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(decode(vae, mean), vae.decode(mean), rtol=1e-4, atol=1e-4)


def test_the_transformer_trains_with_the_products_numbers() -> None:
    dit = draw(DiT(TRAINED.dit), "train/").requires_grad_(False)
    plan = dit.plan(5, 12, 20, 7)
    prompt, vid = torch.randn(7, 64), torch.randn(2, 5, 12, 20, 33)
    made = velocity(dit, vid, prompt, 1000.0, plan)
    for one, batched in zip(vid, made, strict=True):
        torch.testing.assert_close(batched, dit(one, prompt, 1000.0, plan), rtol=1e-3, atol=1e-3)


def test_the_transformer_begins_as_the_condition_unchanged() -> None:
    dit = DiT(TRAINED.dit)
    start_dit(dit, torch.randn(500, 64))
    dit.requires_grad_(False)
    noise, low = torch.randn(2, 3, 8, 8, 16)
    seen = torch.cat([noise, low, torch.ones(3, 8, 8, 1)], -1)
    made = noise - dit(seen, torch.randn(5, 64), 1000.0, dit.plan(3, 8, 8, 5))
    assert (made - low).square().mean() < 0.01 * low.square().mean()


def test_the_autoencoder_begins_as_a_code(data: dict[str, np.ndarray], tmp_path: Path) -> None:
    clips = signed(data["clean"])

    def lost(vae: VideoVAE) -> float:
        with torch.no_grad():
            return float((decode(vae, encode(vae, clips)) - clips).square().mean() / clips.var())

    assert lost(VideoVAE(TRAINED.vae)) > 0.5  # torch's own start passes nothing through
    assert lost(training(SMALL, data, tmp_path).model) < 0.1


@pytest.mark.parametrize("part", ["vae", "dit"])
def test_it_goes_on_as_if_it_had_never_stopped(
    part: str, data: dict[str, np.ndarray], tmp_path: Path
) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    for folder in (whole, halves):
        folder.mkdir()
        training(SMALL, data, folder).save(folder)  # the transformer needs an autoencoder
    settings = replace(SMALL, part=part)
    straight = training(settings, data, whole)
    straight.run(5, whole)
    first = training(settings, data, halves)
    for _ in range(2):
        first.step()
    first.save(halves)
    second = training(settings, data, halves)
    assert len(second.losses) == 2
    second.run(5, halves)
    assert second.losses == straight.losses and len(straight.losses) == 4
    for name, value in straight.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name


def test_another_training_is_not_gone_on_with(data: dict[str, np.ndarray], tmp_path: Path) -> None:
    training(SMALL, data, tmp_path).save(tmp_path)
    with pytest.raises(InputError, match="same settings") as raised:
        training(replace(SMALL, steps=9), data, tmp_path)
    assert raised.value.code == "training_differs"


def test_a_transformer_needs_an_autoencoder(data: dict[str, np.ndarray], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"vae\.pt is not there"):
        training(replace(SMALL, part="dit"), data, tmp_path)
