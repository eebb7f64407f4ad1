"""Predicted against measured on a CPU, where tensors can be counted; what is chosen, and what is refused."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import pytest
import torch

from app.errors import UnavailableError
from app.memory import SLACK, Need, Room
from app.models.latents.fitting import Estimate, Task, fit
from benchmarks.memory_autoencode import CASES, card_estimate, measured, predicted
from tests.models.latents.small import CODECS, codec

GB = 10**9


@pytest.mark.parametrize("name", CASES)
def test_predicted_peaks_are_those_measured(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    if "sd-vae" in name:
        pytest.importorskip("diffusers")
    case = CASES[name]
    expected, found = predicted(case), measured(case)
    with capsys.disabled():
        print(f"\n{name}: predicted {expected / 1e6:.1f} MB, measured {found / 1e6:.1f} MB")
    assert 0.9 < expected / found < 1.1


@pytest.mark.parametrize("name", CODECS)
def test_a_codec_is_left_alone(name: str) -> None:
    own = codec(name)
    before = {key: tensor.data_ptr() for key, tensor in own.module.state_dict().items()}
    batch = getattr(own, "batch", None)
    estimate = Estimate(own, "cuda")
    need = estimate.need(Task(32, 48, 9, edited=True), 2 if estimate.is_image else None)
    assert need.device > estimate.weights and need.host > 0
    assert {key: tensor.data_ptr() for key, tensor in own.module.state_dict().items()} == before
    assert getattr(own, "batch", None) == batch
    assert all(tensor.device.type == "cpu" for tensor in own.module.parameters())


def test_frames_at_once_are_counted_wherever_memory_ended_before() -> None:
    own = copy.copy(codec("sd-vae"))
    task = Task(32, 48, 9)
    need = Estimate(own, "cpu").need(task, 8)
    own.most = 1
    assert Estimate(own, "cpu").need(task, 8) == need and own.most == 1


def test_memory_does_not_grow_with_a_clip_and_does_with_what_it_should() -> None:
    estimate = Estimate(codec("wan-vae"), "cpu")
    need = {frames: estimate.need(Task(64, 96, frames)).device for frames in (1, 9, 17, 400, None)}
    assert need[1] < need[9] <= need[17] == need[400] == need[None]
    assert estimate.need(Task(128, 96)).device > 1.5 * need[None]
    edited = estimate.need(Task(64, 96, edited=True)).device
    changed = estimate.need(Task(64, 96, edited=True, changed=True)).device
    assert need[None] < edited and changed - edited == estimate.weights


@dataclass
class Linear:
    """A codec of images of 1 GB whose frame takes 2."""

    is_image: bool = True
    device: str = "cuda"
    asked: list[int | None] = field(default_factory=list)

    def need(self, task: Task, batch: int | None = None) -> Need:
        self.asked.append(batch)
        return Need(GB + 2 * GB * (batch or 1), 0)


@pytest.mark.parametrize(
    ("free", "frames", "batch"), [(200, None, 64), (100, None, 32), (200, 5, 5), (6, None, 2), (3.1, 9, 1)]
)
def test_as_many_frames_at_once_as_fit(free: float, frames: int | None, batch: int) -> None:
    room = Room(int(free * SLACK * GB), 0, apart=False)
    found = fit(Linear(), Task(1080, 1920, frames), room)
    assert found.batch == batch
    assert found.way == f"{batch} frame{'s' if batch > 1 else ''} at once" and found.way in str(found)


def test_a_codec_of_video_takes_a_latent_at_a_time_or_is_refused() -> None:
    video = Linear(is_image=False)
    assert fit(video, Task(1080, 1920), Room(int(3 * SLACK * GB), 0, apart=False)).batch is None
    assert video.asked == [None]
    with pytest.raises(UnavailableError) as caught:
        fit(video, Task(1080, 1920), Room(GB, 0, apart=False))
    assert caught.value.code == "memory_short"
    for part in ("A clip of 1920x1080 takes up to 3.3 GB of the machine's 1.0 GB", "a latent at a time",
                 "smaller short_side"):  # fmt: skip
        assert part in caught.value.message, part


def test_the_published_sizes_by_arithmetic() -> None:
    """1080p through Wan's VAE fits 24 GiB, whatever the clip's length."""
    need = card_estimate("wan-vae").need(Task(1080, 1920))
    assert 4 * GB < need.device < 24 * GB
    assert torch.float16.itemsize * 126_892_531 == card_estimate("wan-vae").weights
