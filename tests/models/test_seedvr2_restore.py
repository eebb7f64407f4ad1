from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from app.errors import InternalError
from app.models.seedvr2 import sampler
from app.models.seedvr2.restore import RestoreOptions, _Work
from app.models.seedvr2.segment import Span, segment, spans
from app.models.seedvr2.vae import SCALE
from app.models.seedvr2.windowed import in_windows, noise
from app.timing import Stopwatch
from app.video.frames import Crop, pad_reflect_black, resize, to_unit, unpad
from tests import seeded
from tests.models.nano import moving, restorer

OPTIONS = RestoreOptions(height=48, width=64, color="none", window=6)


def restored(frames: list[np.ndarray], options: RestoreOptions = OPTIONS, shot: int = 0) -> Tensor:
    with torch.inference_mode():
        return torch.cat(list(restorer().restore_shot(iter(frames), len(frames), options, shot)))


@pytest.mark.parametrize("count", [1, 2, 5, 6, 17])
def test_as_many_frames_as_came(count: int) -> None:
    out = restored(moving(count))
    assert out.shape == (count, 3, 48, 64)
    assert out.dtype == torch.float32
    assert out.min() >= -1
    assert out.max() <= 1


def test_slicing_in_time_changes_nothing() -> None:
    frames = moving(22)
    whole = restored(frames, replace(OPTIONS, slice=99))
    for slice_ in (1, 4):
        sliced = restored(frames, replace(OPTIONS, slice=slice_))
        assert (sliced - whole).norm() / whole.norm() < 1e-5


def test_one_window_equals_the_plain_path() -> None:
    """Whole clip encoded, restored in one pass and decoded, as the original does it."""
    frames, model = moving(17), restorer()
    with torch.inference_mode():
        x = resize(to_unit(np.stack(frames)), 48, 64) * 2 - 1
        x = pad_reflect_black(x)[0].transpose(0, 1)[None]
        low = model.vae.encode(x)[0][0].permute(1, 2, 3, 0) * SCALE
        start = noise(OPTIONS.seed, "noise", 0, Span(0, len(low)), *low.shape[1:3])
        condition = sampler.condition(low)
        plan = model.dit.plan(*low.shape[:3], len(model.positive))
        velocity = model.dit(torch.cat([start, condition], -1), model.positive, 1000.0, plan)
        z = ((start - velocity) / SCALE).permute(3, 0, 1, 2)[None]
        plain = unpad(model.vae.decode(z)[0].transpose(0, 1), Crop(48, 64)).clamp(-1, 1)
    out = restored(frames)
    assert (out - plain).norm() / plain.norm() < 1e-5


def rms(x: Tensor) -> Tensor:
    """Root mean square of each latent frame."""
    return x.square().mean((1, 2, 3)).sqrt()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_window_seam_is_softer_than_a_hard_switch(seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    """The largest step that the change of window adds to the motion of a single pass.

    Two windows restore the two latents they share, A and B. From one latent to the next the result moves
    as each window's own pass moves, and beyond that by the change of the mixture times (B - A); a hard
    switch takes all of (B - A) at once. Single passes are drawn from the transformer's drawn weights; a
    decoder with drawn weights jumps from frame to frame by itself, so the step is taken on latents.
    """
    whole = segment(45, Span(0, 45), OPTIONS.window, restorer().vae.config)
    run = _Work(restorer(), replace(OPTIONS, seed=seed), 0, whole, lambda: None, Stopwatch()).velocity
    low = seeded.randn(f"seam/{seed}", 12, 6, 8, 16)
    before, after = spans(12, 7)
    at = slice(after.start, before.stop)
    with torch.inference_mode():
        joined = torch.cat(list(in_windows(iter([low]), [before, after], run)))
        a, b = torch.zeros_like(low), torch.zeros_like(low)
        a[: before.stop] = run(low[: before.stop], before)
        b[after.start :] = run(low[after.start :], after)
    weight = torch.zeros(12)  # of the later window
    weight[after.start :] = 1
    weight[at] = ((joined - a) * (b - a)).sum((1, 2, 3))[at] / (b - a).square().sum((1, 2, 3))[at]
    mixed = torch.lerp(a, b, weight.view(-1, 1, 1, 1))
    torch.testing.assert_close(joined, mixed, rtol=1e-4, atol=1e-4)  # nothing but a mixture of the two
    shared = rms(b - a)[at]
    changes = weight.diff()[at.start - 1 : at.stop]
    added = max(c.abs().item() * shared[min(i, 1)].item() for i, c in enumerate(changes))
    hard = shared.max().item()
    with capsys.disabled():
        print(f"\nseam, seed {seed}: adds {added:.4f}, hard switch {hard:.4f}, ratio {added / hard:.2f}")
    assert hard > 0.01
    assert added <= 0.6 * hard


def test_a_shot_knows_nothing_of_its_neighbours_but_its_number() -> None:
    frames = moving(9)
    assert torch.equal(restored(frames, shot=3), restored(frames, shot=3))
    assert not torch.equal(restored(frames, shot=3), restored(frames, shot=4))


def test_memory_holds_windows_not_the_shot() -> None:
    """However long the shot: no more than a window and two slices of source frames are read ahead."""
    read = 0

    def source() -> Iterator[np.ndarray]:
        nonlocal read
        for frame in moving(1) * 400:
            read += 1
            yield frame

    ahead = 0
    with torch.inference_mode():
        stream = restorer().restore_shot(source(), 400, replace(OPTIONS, height=16, width=16, slice=1))
        for written, _ in enumerate(stream):
            ahead = max(ahead, read - written)
            if written == 120:
                break
    assert ahead <= 4 * (OPTIONS.window + 2)


@pytest.mark.parametrize("color", ["wavelet", "adain", "lab"])
def test_colour_repair_brings_the_picture_back_to_the_source(color: str) -> None:
    frames = moving(5)
    source = resize(to_unit(np.stack(frames)), 48, 64) * 2 - 1
    plain, repaired = restored(frames), restored(frames, replace(OPTIONS, color=color))
    distance = [(x.mean((2, 3)) - source.mean((2, 3))).abs().mean() for x in (repaired, plain)]
    assert distance[0] < 0.5 * distance[1]


def test_crop_cuts_to_sixteen_as_the_original() -> None:
    out = restored(moving(2), replace(OPTIONS, height=50, width=70, fit="crop", color="wavelet"))
    assert out.shape == (2, 3, 48, 64)


def test_guidance_and_steps_reach_the_sampler() -> None:
    frames = moving(2)
    plain = restored(frames)
    for other in (
        replace(OPTIONS, steps=2),
        replace(OPTIONS, guidance=3.0),
        replace(OPTIONS, condition_noise=0.3),
        replace(OPTIONS, seed=1),
    ):
        assert not torch.equal(restored(frames, other), plain)


def test_a_miscounted_shot_is_our_fault() -> None:
    with pytest.raises(InternalError, match="10 frames held 9"):
        list(restorer().restore_shot(iter(moving(9)), 10, OPTIONS))


def test_stopping_between_steps() -> None:
    calls = 0

    def stop() -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), torch.inference_mode():
        list(restorer().restore_shot(iter(moving(30)), 30, OPTIONS, on_step=stop))
