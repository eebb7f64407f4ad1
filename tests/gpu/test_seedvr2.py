"""SeedVR2 on a CUDA card: `python -m pytest -m gpu -s`. Random weights are enough."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
from torch import nn

from app.device import place
from app.memory import KERNELS, SLACK
from app.models.seedvr2.config import config_3b
from app.models.seedvr2.dit import DiT
from app.models.seedvr2.memory import PROMPT, Choice, Task
from app.models.seedvr2.restore import RestoreOptions, Restorer, latent_size
from app.models.seedvr2.vae import VideoVAE
from app.models.seedvr2.vae_config import VAEConfig
from tests import seeded
from tests.models.nano import moving, restorer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="NO CUDA CARD HERE: nothing of the GPU path is tested"
    ),
]


def on_card(dtype: str) -> Restorer:
    """The nano restorer on the card."""
    import copy

    here, spot = restorer(), place("cuda", dtype)
    return Restorer(
        dit=copy.deepcopy(here.dit).to(spot.device, spot.dtype),
        vae=copy.deepcopy(here.vae).to(spot.device, spot.conv_dtype),
        positive=here.positive.to(spot.device, spot.dtype),
        negative=here.negative.to(spot.device, spot.dtype),
    )


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-4), ("bfloat16", 0.1)])
@pytest.mark.parametrize("color", ["none", "lab", "wavelet", "adain"])
def test_the_card_gives_the_cpus_frames(dtype: str, bound: float, color: str) -> None:
    options = RestoreOptions(height=48, width=64, window=6, color=color, guidance=2.0)
    frames = moving(30)
    with torch.inference_mode():
        ours, theirs = (
            torch.cat(list(model.restore_shot(iter(frames), 30, options)))
            for model in (restorer(), on_card(dtype))
        )
    assert (ours - theirs).norm() / ours.norm() < bound


def test_slices_equal_the_whole_in_sixteen_bits() -> None:
    options = RestoreOptions(height=48, width=64, window=6, color="none")
    model = on_card("bfloat16")
    with torch.inference_mode():
        whole, sliced = (
            torch.cat(list(model.restore_shot(iter(moving(22)), 22, replace(options, slice=size))))
            for size in (99, 1)
        )
    assert (whole - sliced).norm() / whole.norm() < 2e-2


def randomise(model: nn.Module) -> None:
    """Small random weights: only time and memory are looked at."""
    with torch.no_grad():
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.02)


@pytest.mark.parametrize(("height", "width"), [(720, 1280), (1080, 1920)])
def test_the_real_3b_restores_a_window(height: int, width: int, capsys: pytest.CaptureFixture[str]) -> None:
    """The published widths with random weights: time and peak memory of nine frames."""
    spot = place("cuda", "auto")
    with torch.device(spot.device):
        dit = DiT(config_3b()).to(spot.dtype)
        vae = VideoVAE(VAEConfig.published()).to(spot.conv_dtype)
    for model in (dit, vae):
        randomise(model)
    prompt = seeded.randn("gpu/prompt", 58, 5120).to(spot.device, spot.dtype)
    model = Restorer(dit.eval(), vae.eval(), prompt, prompt)
    options = RestoreOptions(height=height, width=width, color="wavelet")
    torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    with torch.inference_mode():
        made = list(model.restore_shot(iter(moving(9, height // 4, width // 4)), 9, options))
    seconds = time.perf_counter() - begin
    assert len(made) == 9
    with capsys.disabled():
        print(f"\n{torch.cuda.get_device_name()}: 9 frames of {width}x{height} in {seconds:.1f} s, the first "
              f"time; peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")  # fmt: skip


@pytest.mark.parametrize("tile", [None, 32])
def test_the_card_takes_what_was_predicted(tile: int | None, capsys: pytest.CaptureFixture[str]) -> None:
    """The VAE as published, a small transformer: the peak of two windows at 640x384."""
    config = config_3b(dim=512, heads=4, layers=4, separate=2, text_dim=256)
    spot = place("cuda", "auto")
    with torch.device(spot.device):
        dit, vae = DiT(config).to(spot.dtype), VideoVAE(VAEConfig.published()).to(spot.conv_dtype)
    randomise(dit)
    randomise(vae)
    prompt = seeded.randn("gpu/small", PROMPT, 256).to(spot.device, spot.dtype)
    model = Restorer(dit.eval(), vae.eval(), prompt, prompt)
    options = RestoreOptions(height=384, width=640, window=6, color="wavelet", tile=tile)
    task = Task(10, latent_size(options, vae.config), color="wavelet")
    need = model.estimate.need(task, Choice(6, tile))
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    with torch.inference_mode():
        for _ in model.restore_shot(iter(moving(37, 96, 160)), 37, options):
            pass
    peak = torch.cuda.max_memory_allocated()
    with capsys.disabled():
        print(f"\npredicted {need.device / 1e9:.2f} GB, measured {peak / 1e9:.2f} GB")
    assert peak < need.device * SLACK + KERNELS
    assert peak > 0.7 * need.device


def test_blocks_from_the_host_give_the_same_bits() -> None:
    options = RestoreOptions(height=48, width=64, window=6, color="none")
    model = on_card("bfloat16")
    with torch.inference_mode():
        here, there, again = (
            torch.cat(list(model.restore_shot(iter(moving(30)), 30, replace(options, stream=stream))))
            for stream in (False, True, True)
        )
    assert torch.equal(here, there) and torch.equal(here, again)
