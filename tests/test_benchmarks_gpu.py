"""`benchmarks.gpu` on a card that is not there: where one is, it must not fail for silly reasons."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from app.device import place
from app.models.seedvr2.config import DiTConfig, config_3b, config_7b
from app.models.seedvr2.dit import DiT
from app.models.seedvr2.restore import RestoreOptions
from app.models.seedvr2.vae import VideoVAE
from app.models.wan.config import VARIANTS as WAN
from app.models.wan.layout import Layout
from app.models.wan.transformer import Transformer
from app.models.wan.vae import WanVAE
from app.models.wan.vae_config import VAEConfig
from benchmarks import gpu
from benchmarks.card import generate, restore
from benchmarks.card.bench import Bench, drawn
from benchmarks.models import flops
from tests.card import card
from tests.models.nano import SMALL

ROOT = Path(__file__).resolve().parents[1]
NANO = SMALL
CPU = torch.device("cpu")
# What a bare machine with a card has not: see the module's own words.
LACKING = (
    "pydantic",
    "pydantic_settings",
    "ftfy",
    "imageio_ffmpeg",
    "diffusers",
    "boto3",
    "fastapi",
    "runpod",
)


def test_every_table_on_a_card(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    cuda = {
        "reset_peak_memory_stats": lambda device=None: None,
        "max_memory_allocated": lambda device=None: 10**9,
        "max_memory_reserved": lambda device=None: 2 * 10**9,
        "get_device_name": lambda device=None: "a card",
    }
    for name, function in cuda.items():
        monkeypatch.setattr(torch.cuda, name, function)
    with card(monkeypatch):
        assert gpu.main(["--device", "cuda", "--sizes", "tiny"]) == 0
    printed = capsys.readouterr()
    assert "NOT MEASURED" not in printed.err and "not measured" not in printed.out
    assert "bfloat16" in printed.out and "1 (2)" in printed.out and "a card" in printed.out
    for title in ("Generate, four steps", "block by block", "UMT5", "Loading", "Restore, one step"):
        assert title in printed.out


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++: nothing can be compiled here")
def test_compiled_steps_beside_plain_ones(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--device", "cpu", "--sizes", "tiny", "--compile", "--only", "compile", "--seconds", "250"]
    assert gpu.main(words) == 0
    printed = capsys.readouterr().out
    assert "compiled / plain" in printed and "not measured" not in printed
    for row in ("nano 16p, 5 latents", "nano 30p, 5 latents", "3 of 3 latents", "3 of 21 latents"):
        assert row in printed


def test_without_a_card_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 69
    printed = capsys.readouterr()
    assert "NOT MEASURED" in printed.err and "no CUDA card" in printed.err
    assert printed.out == ""


def test_needs_no_package_that_a_machine_with_a_card_lacks() -> None:
    code = f"""
import sys
class Lacking:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {LACKING}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Lacking())
from benchmarks.gpu import main
sys.exit(main(["--device", "cpu", "--sizes", "tiny", "--only", "restore", "--seconds", "0"]))
"""
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 1, ran.stderr
    assert ran.stdout.count("not measured: no time was left") == 2
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried"), ValueError("odd\nmore")]
)
def test_what_fails_takes_nothing_with_it(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    attempt = gpu.Attempts(Bench(place("cpu", "auto"), 1.0, time.perf_counter() + 100), failures := [])

    def fail() -> list[list[str]]:
        raise error

    (row,) = attempt("7B", 4, fail)
    assert row == ["7B", f"not measured: {str(error).splitlines()[0]}", "", ""]
    assert attempt("3B", 2, lambda: [["3B", "1"]]) == [["3B", "1"]]
    assert len(failures) == 1
    assert ("Traceback" in capsys.readouterr().err) == isinstance(error, ValueError)


@torch.inference_mode()
@pytest.mark.parametrize(
    "config", [NANO.dit, config_3b(dim=64, heads=2, head_dim=32, layers=7, separate=3, text_dim=16),
               config_7b(dim=64, heads=2, head_dim=32, layers=8, text_dim=16)],
)  # fmt: skip
def test_a_pass_has_the_operations_that_are_told(config: DiTConfig) -> None:
    model = drawn(lambda: DiT(config), CPU, None)
    size, text = (5, 4, 6), torch.randn(restore.TEXT, config.text_dim)
    plan = model.plan(*size, restore.TEXT)
    real = flops(lambda: model(torch.randn(*size, config.in_channels), text, 500.0, plan))
    assert restore.transformer(config, *size) == real


@torch.inference_mode()
def test_a_clip_has_the_operations_that_are_told() -> None:
    vae = drawn(lambda: VideoVAE(NANO.vae), CPU, None)
    states = vae.new_state(), vae.new_state()
    clips = [torch.randn(1, 3, frames, 32, 48) for frames in (1, 4, 4)]
    encode = sum(flops(partial(vae.encode_slice, clip, states[0])) for clip in clips)
    decode = sum(flops(partial(vae.decode_slice, torch.randn(1, 16, 1, 4, 6), states[1])) for _ in clips)
    assert restore.slices(NANO.vae, 3, 4, 6) == (encode, decode)
    told = restore.operations(NANO, RestoreOptions(height=30, width=40, steps=2), 9)
    assert (told.encode, told.decode) == (encode, decode)
    assert told.transformer == 2 * restore.transformer(NANO.dit, 3, 4, 6)


@torch.inference_mode()
def test_a_block_has_the_operations_that_are_told() -> None:
    config, layout = WAN["nano"], Layout(9, 4, 6)
    model = drawn(lambda: Transformer(config), CPU, None)
    cross = model.cross(torch.randn(1, config.text_length, config.text_dim))
    cache = model.cache(4, 6, 9)
    for first in (0, 3, 6):
        plan = model.plan(3, 4, 6, start=first, cache=cache)
        x, times = torch.randn(1, 16, 3, 4, 6), torch.full((1, 3), 500.0)
        real = flops(lambda x=x, times=times, plan=plan: model(x, times, cross, plan, cache))
        assert generate.pass_operations(config, layout, 3, first + 3) == real
    vae = drawn(lambda: WanVAE(VAEConfig.nano()), CPU, None)
    state = vae.new_state()
    real = [flops(lambda: vae.decode(torch.randn(1, 16, 3, 4, 6), state)) for _ in range(2)]
    assert generate.decode_operations(VAEConfig.nano(), layout) == real


def test_drawn_weights_are_all_there() -> None:
    for build in (lambda: DiT(NANO.dit), lambda: Transformer(WAN["nano"]), lambda: VideoVAE(NANO.vae)):
        model = drawn(build, CPU, torch.bfloat16)
        tensors = [*model.parameters(), *model.buffers()]
        assert not any(tensor.is_meta for tensor in tensors)
        assert all(tensor.isfinite().all() for tensor in tensors)
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
