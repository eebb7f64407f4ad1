"""The training of nano's SeedVR2: its material, its passes against the product's, and how it goes on."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch

from app.boot.manifest import read_manifest
from app.errors import InputError
from app.models.seedvr2.dit import DiT
from app.models.seedvr2.restore import RestoreOptions
from app.models.seedvr2.vae import SCALE, VideoVAE
from tests.golden import draw
from tools.make_nano import TRAINED as TRAINED_FILES
from tools.measure_nano import clips, compared, nano, restored, seam, spoiled, through
from tools.nano_data import scene, stacked
from tools.nano_forward import decode, encode, velocity
from tools.nano_start import start_dit
from tools.train_nano import TRAINED, Settings, linear_code, parse, signed, training

SMALL = Settings("vae", steps=4, clips=2, frames=3, height=96, width=96, span=3, crop=32, batch=1, rate=1e-3)


@pytest.fixture(scope="module")
def data() -> dict[str, np.ndarray]:
    return stacked(range(2), 3, 96, 96, lambda done: None)


def test_the_encoder_stays_a_linear_code(data: dict[str, np.ndarray], tmp_path: Path) -> None:
    vae = cast(VideoVAE, training(SMALL, data, tmp_path).model)
    clips = signed(data["clean"])
    with torch.no_grad():
        plain = encode(vae, clips).permute(0, 2, 3, 4, 1) * SCALE
    assert (linear_code(vae)(clips) - plain).square().mean() < 1e-4 * plain.square().mean()


def test_heads_begin_by_looking_at_their_neighbours() -> None:
    """A change of one token moves, through the first layer's attention, the six tokens around it."""
    dit = DiT(TRAINED.dit)
    start_dit(dit, torch.randn(500, 64))
    block = dit.blocks[0]
    projection = block.attn.proj_out.video
    projection.weight.data = torch.eye(192, 216)
    noise, low = torch.zeros(5, 10, 10, 16), torch.randn(5, 10, 10, 16)
    other = low.clone()
    other[2, 4:6, 4:6] += 1.0
    dit.requires_grad_(False)
    plan = dit.plan(5, 10, 10, 3)
    made = [
        dit(torch.cat([noise, x, torch.ones_like(x[..., :1])], -1), torch.randn(3, 64), 1000.0, plan) + x
        for x in (low, other)
    ]
    moved = (made[1] - made[0]).square().mean(-1).view(5, 5, 2, 5, 2).mean((2, 4))
    near = moved[2, 2, 1] + moved[2, 2, 3] + moved[2, 1, 2] + moved[2, 3, 2]
    assert near > 0.5 * (moved.sum() - moved[2, 2, 2] - moved[:, 2, 2].sum())


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


def test_a_plain_run_is_the_one_that_trained_what_ships() -> None:
    options = parse(["dit", "out", "--batch", "3"])
    assert (options["steps"], options["batch"], options["rate"]) == (1800, 3, 5e-4)
    assert parse(["vae", "out"])["steps"] == 150


def test_another_training_is_not_gone_on_with(data: dict[str, np.ndarray], tmp_path: Path) -> None:
    training(SMALL, data, tmp_path).save(tmp_path)
    with pytest.raises(InputError, match="same settings") as raised:
        training(replace(SMALL, steps=9), data, tmp_path)
    assert raised.value.code == "training_differs"


def test_a_transformer_needs_an_autoencoder(data: dict[str, np.ndarray], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"vae\.pt is not there"):
        training(replace(SMALL, part="dit"), data, tmp_path)


# ---------------------------------------------------------------- the weights that ship


def test_the_manifest_knows_the_weights_that_ship() -> None:
    files = {path.name: path for path in (TRAINED_FILES / "seedvr2").iterdir()}
    manifest = read_manifest()
    for name in manifest.models["nano"].parts.values():
        entry = manifest.files[name]
        content = files.pop(entry.path.name).read_bytes()
        assert (entry.size, entry.sha256) == (len(content), hashlib.sha256(content).hexdigest()), name
    assert not files
    whole = sum(path.stat().st_size for path in TRAINED_FILES.rglob("*") if path.is_file())
    assert whole <= 12_000_000


def test_they_are_in_16_bits() -> None:
    for name in ("seedvr2_ema_nano.pth", "ema_vae.pth"):
        kinds = {x.dtype for x in torch.load(TRAINED_FILES / "seedvr2" / name, weights_only=True).values()}
        assert kinds == {torch.float16}


@pytest.fixture(scope="module")
def page() -> dict[str, list[float]]:
    """The table of docs/nano.md: bicubic's PSNR and SSIM, nano's, the gains, the VAE's PSNR of each clip."""
    rows = {}
    for line in (Path(__file__).parents[1] / "docs" / "nano.md").read_text().splitlines():
        name, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| ") and line.endswith(" dB |") and cells[0]:
            rows[name] = [float(x) for x in re.findall(r"[-+]?\d+\.\d+", " ".join(cells[1:]))]
    return rows


def test_nano_restores_as_its_page_says(page: dict[str, list[float]]) -> None:
    restorer = nano()
    for name, clean in islice(clips(), 2, 9, 6):  # scenes 100001 and 100007: the others take too long here
        poor = spoiled(clean)
        row = compared(name, clean, poor, restored(restorer, poor, RestoreOptions(*clean.shape[1:3])))
        found = [row.before.psnr, row.before.ssim, row.after.psnr, row.after.ssim, *row.gain]
        assert found == pytest.approx(page[name][:6], abs=0.15), name  # x264 differs by its threads
        assert row.gain[0] > 0.5 and row.gain[1] > 0.01
        assert through(restorer.vae, clean) == pytest.approx(page[name][6], abs=0.2)


def test_the_pages_means_are_those_of_its_rows(page: dict[str, list[float]]) -> None:
    text = (Path(__file__).parents[1] / "docs" / "nano.md").read_text()
    decibels, likeness, alone = (sum(row[i] for row in page.values()) / len(page) for i in (4, 5, 6))
    assert len(page) == 9 and decibels > 1.0 and likeness > 0.01 and min(row[6] for row in page.values()) > 30
    told = [float(x) for x in re.findall(r"[-+]?\d+\.\d+", re.search(r"\| mean .*", text)[0])]  # type: ignore[index]
    assert told == pytest.approx([decibels, likeness, alone], abs=0.06)


def test_no_seam_where_windows_meet() -> None:
    """On decoded frames, in steps of 255: windows of 6 latents against one window of the whole clip."""
    _, clean = next(islice(clips(), 5, 6))
    options = RestoreOptions(*clean.shape[1:3], window=6)
    poor = spoiled(clean)
    row = compared("", clean, poor, restored(nano(), poor, options))
    at, alone = seam(nano(), row, options)
    assert at < 1.05 * alone
