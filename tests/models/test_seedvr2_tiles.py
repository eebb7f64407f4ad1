import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from app.models.seedvr2.restore import RestoreOptions
from app.models.seedvr2.tiles import OVERLAP, SMALLEST, Tiled, Whole, fade, tiles
from app.models.seedvr2.vae import VideoVAE
from app.models.seedvr2.vae_config import VAEConfig
from app.nn.norm import FrameGroupNorm
from tests import seeded
from tests.golden import draw
from tests.models.nano import moving, restorer

SIDE = SMALLEST
CONFIG = VAEConfig(block_out_channels=(8, 16, 16, 16), layers_per_block=1, norm_num_groups=4)
HEIGHT, WIDTH = 24, 72  # latents: two tiles and three rows less than one


def vae() -> VideoVAE:
    return draw(VideoVAE(CONFIG), "tiles/")


def nothing() -> None: ...


@pytest.mark.parametrize(("height", "width"), [(SIDE, SIDE), (33, 47), (100, 240), (274, 480)])
def test_tiles_cover_a_frame_and_their_weights_add_up_to_one(height: int, width: int) -> None:
    for unit in (1, 8):
        total = torch.zeros(height * unit, width * unit)
        for tile in tiles(height, width, SIDE):
            assert len(tile.rows) <= SIDE and len(tile.columns) <= SIDE
            weight = tile.weight(unit, total)
            assert weight.shape == tile.of(total, unit).shape
            tile.of(total, unit).add_(weight)
        torch.testing.assert_close(total, torch.ones_like(total))


def test_weights_leave_a_tiles_own_edge_out_and_change_gently() -> None:
    first, second = (each.columns for each in tiles(SIDE, 2 * SIDE - OVERLAP, SIDE))
    rising = fade(second, 2 * SIDE - OVERLAP, 8)
    assert rising[:16].eq(0).all() and rising[OVERLAP * 8 :].eq(1).all()
    assert rising.diff().max() <= 1 / 32 + 1e-6
    assert first.stop - second.start == OVERLAP


def test_tiles_too_small_are_refused() -> None:
    with pytest.raises(ValueError, match="31 latents are too small"):
        tiles(100, 100, 31)


def picture(kind: str) -> Tensor:
    """(1, 3, 5, HEIGHT * 8, WIDTH * 8): something like a picture, in [-1, 1]."""
    rows, columns = torch.linspace(0, 1, HEIGHT * 8)[:, None], torch.linspace(0, 1, WIDTH * 8)[None]
    smooth = torch.sin(3 * columns + 2 * rows) * 0.5 + 0.3 * torch.cos(9 * rows * columns)
    frames = torch.stack([smooth.roll(4 * i, 1) for i in range(5)])[None, None].repeat(1, 3, 1, 1, 1)
    if kind == "textured":
        frames = frames + 0.2 * seeded.randn("tiles/texture", *frames.shape).clamp(-2, 2)
    return frames.clamp(-1, 1) if kind != "constant" else torch.full_like(frames, 0.3)


def through(coder: Whole | Tiled, x: Tensor, half: str) -> Tensor:
    """A clip in two slices, in one call of a tiled coder and two of a whole one."""
    parts = [x[:, :, :1], x[:, :, 1:]]
    made = [getattr(coder, half)(parts, nothing)] if isinstance(coder, Tiled) else [
        getattr(coder, half)([part], nothing) for part in parts
    ]  # fmt: skip
    return torch.cat([part for run in made for part in run], 2)


def both(model: VideoVAE, x: Tensor, half: str, latents: int) -> tuple[Tensor, Tensor]:
    with torch.inference_mode():
        whole = through(Whole(model, latents), x, half)
        tiled = through(Tiled(model, latents, HEIGHT, WIDTH, SIDE), x, half)
    return whole, tiled


def off(kind: str) -> tuple[float, float]:
    """How far latents and frames are off what whole frames give, relative."""
    model = vae()
    latents, tiled_latents = both(model, picture(kind), "encode", 2)
    frames, tiled_frames = both(model, latents, "decode", 2)
    return (
        ((tiled_latents - latents).norm() / latents.norm()).item(),
        ((tiled_frames - frames).norm() / frames.norm()).item(),
    )


@pytest.mark.parametrize("kind", ["constant", "smooth", "textured"])
def test_tiles_are_whole_frames_but_for_what_normalisations_see(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With statistics that are the same for all tiles nothing is left of where tiles meet."""
    monkeypatch.setattr(FrameGroupNorm, "_normalise", lambda self, x, target: target.copy_(x * 0.5))
    assert max(off(kind)) < 1e-3


@pytest.mark.parametrize("kind", ["constant", "smooth", "textured"])
def test_tiles_give_nearly_what_whole_frames_give(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Small tiles and drawn weights, whose answer to a frame's rim is as strong as to its picture, are as bad
    as it gets: measured, and printed."""
    encoded, decoded = off(kind)
    with capsys.disabled():
        print(f"\ntiles of a {kind} picture: latents off by {encoded:.3f}, frames by {decoded:.3f}")
    assert encoded < 0.45 and decoded < 0.3


@pytest.mark.parametrize("kind", ["smooth", "textured"])
def test_there_is_no_seam(kind: str) -> None:
    """Steps from column to column of what tiles change are no larger where tiles meet than within them."""
    model = vae()
    latents, _ = both(model, picture(kind), "encode", 2)
    frames, tiled = both(model, latents, "decode", 2)
    steps = (tiled - frames).diff(dim=-1).square().mean((0, 1, 2, 3)).sqrt()
    shared = torch.zeros(WIDTH * 8 - 1, dtype=torch.bool)
    spans = [tile.columns for tile in tiles(HEIGHT, WIDTH, SIDE)]
    for before, after in pairwise(spans):
        shared[after.start * 8 : before.stop * 8] = True
    own = (frames.diff(dim=-1)).square().mean((0, 1, 2, 3)).sqrt()
    assert steps[shared].max() < 0.5 * own.mean(), "a seam would be a step beside the picture's own"
    assert steps[shared].mean() < 2 * steps[~shared].mean() + 1e-3 * own.mean()


def test_one_tile_is_the_whole_frame() -> None:
    model = vae()
    x = picture("textured")
    with torch.inference_mode():
        for half, given in (("encode", x), ("decode", seeded.randn("tiles/z", 1, 16, 2, HEIGHT, WIDTH))):
            whole = through(Whole(model, 2), given, half)
            tiled = through(Tiled(model, 2, HEIGHT, WIDTH, 99), given, half)
            assert (whole - tiled).norm() / whole.norm() < 1e-5


def test_runs_of_slices_change_nothing() -> None:
    """What a tile remembers waits between two runs: windows of a long shot meet without a trace."""
    frames = moving(30, 16, 240)
    options = RestoreOptions(height=32, width=480, color="none", window=6, tile=SIDE)
    with torch.inference_mode():
        runs, one = (
            torch.cat(list(restorer().restore_shot(iter(frames), 30, replace(options, slice=slices))))
            for slices in (1, 2)
        )
    assert (runs - one).norm() / one.norm() < 1e-5
    assert math.prod(runs.shape) == 30 * 3 * 32 * 480


def test_a_step_is_told_before_each_slice_of_a_tile() -> None:
    calls = []
    with torch.inference_mode():
        coder = Tiled(vae(), 2, HEIGHT, WIDTH, SIDE)
        coder.decode([torch.zeros(1, 16, 1, HEIGHT, WIDTH)] * 2, lambda: calls.append(1))
    assert len(calls) == 2 * len(coder.tiles)
