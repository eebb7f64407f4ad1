"""Training: it learns, it goes on with the same bits, and refuses what it cannot use."""

import csv
import shutil
from copy import deepcopy
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from app.device import Placement
from app.errors import ConfigError, InputError
from app.models.latents import load
from app.models.latents.sd_config import SDConfig
from app.models.latents.train import CodebookAverage, Recipe, Trainer
from app.models.latents.vqvae_config import VQConfig
from app.models.source import Loading, Source
from app.progress import Silent
from tests.models.latents.small import clip
from tools import train_latents
from tools.training_data import Data

VQ = Recipe(model=asdict(VQConfig(width=8, inner=4, blocks=1, codes=16, dim=4)), rate=3e-3)
VAE = Recipe(kind="vae", model=asdict(replace(SDConfig.nano(), block_out_channels=(8, 8))))
SMALL = ["--width", "4", "--codes", "8", "--dim", "2", "--batch", "1", "--frames", "5", "--size", "16"]


def batch(recipe, seed=0):
    x = clip(5, 16, 16).transpose(0, 1)[None].roll(seed, -1)
    return x if recipe.kind == "vqvae" else x[:, :, 0]


def smooth():
    """Something to learn: a ramp of colours."""
    ramp = torch.linspace(-1, 1, 16)
    return torch.stack([ramp.expand(5, 16, 16), ramp[:, None].expand(5, 16, 16), torch.zeros(5, 16, 16)])[
        None
    ]


@pytest.mark.parametrize("recipe", [VQ, replace(VQ, codebook="loss"), VAE], ids=["ema", "loss", "vae"])
def test_learns(recipe):
    if recipe.kind == "vae":
        pytest.importorskip("diffusers", reason="diffusers is not installed: a VAE needs it")
    trainer, x = Trainer(recipe), smooth()
    x = x if recipe.kind == "vqvae" else x[:, :, 0]
    losses = [trainer.step(x)["reconstruction"] for _ in range(80)]
    assert losses[-1] < losses[0] / 3


@pytest.mark.parametrize("recipe", [VQ, replace(VQ, codebook="loss"), VAE], ids=["ema", "loss", "vae"])
def test_goes_on_with_the_same_bits(recipe, tmp_path):
    if recipe.kind == "vae":
        pytest.importorskip("diffusers", reason="diffusers is not installed: a VAE needs it")
    whole = Trainer(recipe)
    for i in range(3):
        whole.step(batch(recipe, i))
    torch.save(whole.state(), tmp_path / "state.pt")
    expected = [whole.step(batch(recipe, i)) for i in range(3, 6)]
    torch.rand(7)  # what others draw does not matter
    again = Trainer.of(torch.load(tmp_path / "state.pt", weights_only=True))
    assert [again.step(batch(recipe, i)) for i in range(3, 6)] == expected
    ours, theirs = again.module.state_dict(), whole.module.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_codebook_average_by_hand():
    codebook = torch.nn.Parameter(torch.tensor([[0.0], [10.0]]))
    average = CodebookAverage(codebook, replace(VQ, decay=0.5, dead=0.0))
    vectors, indices = torch.tensor([[1.0], [3.0], [8.0]]), torch.tensor([0, 0, 1])
    assert average.update(vectors, indices, torch.Generator()) == 2
    # Half of counts 2 and 1, half of sums 4 and 8: quotients 2 and 8.
    assert average.counts.tolist() == [1.0, 0.5] and average.sums.tolist() == [[2.0], [4.0]]
    assert torch.allclose(codebook, torch.tensor([[2.0], [8.0]]), rtol=1e-4)
    average.update(torch.tensor([[6.0]]), torch.tensor([0]), torch.Generator())
    assert average.counts.tolist() == [1.0, 0.25]  # (1 + 1) / 2
    assert torch.allclose(codebook, torch.tensor([[4.0], [8.0]]), rtol=1e-4)  # (2 + 6) / 2


def test_dead_codes_begin_anew_at_vectors_of_the_batch():
    codebook = torch.nn.Parameter(torch.full((4, 2), 100.0))
    average = CodebookAverage(codebook, replace(VQ, codebook="loss", decay=0.5, dead=0.1))
    vectors = torch.randn(20, 2)
    average.update(vectors, torch.zeros(20, dtype=torch.int64), torch.Generator().manual_seed(0))
    assert codebook[0].tolist() == [100.0, 100.0]
    assert all(any(torch.equal(code, vector) for vector in vectors) for code in codebook[1:])
    assert average.counts.tolist() == [10.0, 1.0, 1.0, 1.0]


def test_export_is_loaded_by_the_family(tmp_path):
    trainer = Trainer(VQ)
    trainer.step(batch(VQ))
    (path,) = trainer.export(tmp_path)
    cpu = Loading(Placement(torch.device("cpu"), torch.float32, torch.float32), 1, Silent())
    codec = load.load_vqvae_codec(None, {"vae": Source(path, "safetensors", path)}, cpu)
    trainer.module.eval()
    with torch.no_grad():
        assert torch.equal(codec.module.encode(batch(VQ)), trainer.module.encode(batch(VQ)))


def test_a_loss_that_is_no_number_ends_it_before_the_weights_change():
    trainer = Trainer(VQ)
    before = deepcopy(trainer.module.state_dict())
    with pytest.raises(InputError, match="smaller rate") as caught:
        trainer.step(torch.full((1, 3, 5, 16, 16), float("nan")))
    assert caught.value.code == "training_diverged" and trainer.steps == 0
    assert all(torch.equal(before[name], x) for name, x in trainer.module.state_dict().items())


@pytest.mark.parametrize(
    "change", [{"version": 0}, {"module": {}}, {"recipe": "{}x"}, {"recipe": '{"y": 1}'}, {"average": None}]
)
def test_refuses_another_state(change):
    with pytest.raises(ConfigError) as caught:
        Trainer.of(Trainer(VQ).state() | change)
    assert caught.value.code == "training_state_invalid"


def test_batches_depend_on_step_and_seed_alone():
    clips = tuple(np.random.default_rng(i).integers(0, 255, (9, 20, 30, 3), np.uint8) for i in range(3))
    data = Data(clips, "")
    one = data.batch(5, 1, 4, 5, 16)
    assert one.shape == (4, 3, 5, 16, 16) and one.min() >= -1 and one.max() <= 1
    assert torch.equal(data.batch(5, 1, 4, 5, 16), one)
    assert not torch.equal(data.batch(6, 1, 4, 5, 16), one)
    assert not torch.equal(data.batch(5, 2, 4, 5, 16), one)


@pytest.fixture
def videos(tmp_path, short_clip):
    folder = tmp_path / "videos"
    folder.mkdir()
    shutil.copy(short_clip, folder / "a.mp4")
    (folder / "notes.txt").write_text("no clip")
    return folder


def train(*arguments):
    return train_latents.main([str(argument) for argument in arguments])


def test_command_line_goes_on_with_the_same_bits(tmp_path, videos, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(whole, "--data", videos, "--steps", 6, *SMALL) == 0
    assert train(parts, "--data", videos, "--steps", 2, *SMALL) == 0
    assert train(parts, "--resume", "--steps", 6) == 0
    assert "passed over: notes.txt" in capsys.readouterr().err
    assert (whole / "losses.csv").read_text() == (parts / "losses.csv").read_text()
    first, second = (load_file(folder / "vqvae.safetensors") for folder in (whole, parts))
    assert all(torch.equal(first[name], second[name]) for name in first)
    with (whole / "losses.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == list("123456")
    assert not list(whole.glob(".*"))


def test_patterns_are_trained_on(tmp_path):
    assert train(tmp_path / "out", "--steps", 1, *SMALL) == 0


def test_stops_after_some_minutes(tmp_path, videos):
    assert train(tmp_path / "out", "--data", videos, "--minutes", 0.005, *SMALL) == 0
    assert (tmp_path / "out/vqvae.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        ([], 64, "OUT"),
        (["out", "--steps", "0"], 64, "a whole number from 1"),
        (["out", "--steps", "1.5"], 64, "a whole number from 1"),
        (["out", "--minutes", "nan"], 64, "a number from 0.001"),
        (["out", "--rate", "-1"], 64, "a number from 1e-08 to 1"),
        (["out", "--kind", "gan"], 64, "invalid choice"),
        (["out", "--frames", "6"], 64, "takes 4 k + 1"),
        (["out", "--size", "18"], 64, "multiple of 4"),
        (["out", "--kind", "vae", "--codes", "8"], 64, "--codes is for --kind vqvae"),
        (["out", "--kind", "vae", "--frames", "5"], 64, "--frames is for --kind vqvae"),
        (["out", "--divergence", "1"], 64, "--divergence is for --kind vae"),
        (["out", "--kind", "vae", "--width", "6"], 64, "multiples of 4"),
        (["out", "--device", "abacus"], 64, "try cpu"),
        (["out", "--resume"], 64, "no training to go on with"),
        (["out", "--data", "nowhere"], 65, "is no folder"),
        (["out", "--data", "empty"], 65, "holds 0 files"),
        (["out", "--data", "videos", "--frames", "33"], 65, "none is a clip of 33 frames"),
        (["done", "--data", "videos"], 64, "add --resume"),
        (["done", "--resume", "--rate", "0.1"], 64, "keeps what it began with"),
        (["broken", "--resume"], 78, "expected the state of a training"),
    ],
    ids=str,
)
def test_refuses(arguments, status, words, tmp_path, videos, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name, content in (("done", b"x"), ("broken", b"not a checkpoint")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "training.pt").write_bytes(content)
    assert train(*arguments) == status
    assert words in capsys.readouterr().err


def test_refuses_other_frames_than_it_began_with(tmp_path, videos, capsys):
    assert train(tmp_path / "out", "--data", videos, "--steps", 1, *SMALL) == 0
    shutil.copy(videos / "a.mp4", videos / "b.mp4")
    assert train(tmp_path / "out", "--resume", "--steps", 2) == 65
    assert "other frames" in capsys.readouterr().err
