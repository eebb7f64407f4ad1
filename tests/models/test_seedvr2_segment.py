import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from app.models.seedvr2.restore import RestoreOptions
from app.models.seedvr2.segment import (
    OVERLAP,
    SHORTEST,
    Span,
    decoder_reach,
    encoder_reach,
    segment,
    segments,
    spans,
)
from app.models.seedvr2.vae import VideoVAE
from app.models.seedvr2.vae_config import VAEConfig
from tests import seeded
from tests.golden import draw
from tests.models.nano import SMALL, moving, restorer

NANO = SMALL.vae


@given(st.integers(1, 400), st.integers(SHORTEST, 40))
def test_windows_share_two_latents_and_are_even(latents: int, longest: int) -> None:
    windows = spans(latents, longest)
    assert windows[0].start == 0
    assert windows[-1].stop == latents
    lengths = [window.stop - window.start for window in windows]
    assert max(lengths) <= longest
    assert max(lengths) - min(lengths) <= 1
    assert all(a.stop - b.start == OVERLAP for a, b in pairwise(windows))


def test_as_few_windows_as_will_do() -> None:
    assert spans(31, 31) == [Span(0, 31)]
    assert spans(32, 31) == [Span(0, 17), Span(15, 32)]
    assert len(spans(31 + 29, 31)) == 2
    assert len(spans(31 + 29 + 1, 31)) == 3


def test_a_window_too_short_to_share_is_refused() -> None:
    with pytest.raises(ValueError, match="4 latents is too short; it takes 5"):
        spans(9, 4)
    assert spans(3, 4) == [Span(0, 3)]


# ------------------------------------------------------------------ segments


@given(st.integers(1, 2000), st.integers(SHORTEST, 40), st.data())
def test_a_segment_has_all_that_its_frames_depend_on(frames: int, longest: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, frames - 1))
    stop = data.draw(st.integers(start + 1, frames))
    part = segment(frames, Span(start, stop), longest, NANO)
    whole = spans(NANO.latents_holding(frames), longest)
    assert [window for window in whole if window in part.windows] == list(part.windows)
    # the decoder: every wanted frame's latent, with its past
    assert part.decoded.start in (0, -(-start // 4) - decoder_reach(NANO))
    assert part.decoded.stop == -(-(stop - 1) // 4) + 1
    # each decoded latent from every window that sees it
    for window in whole:
        if window.start < part.decoded.stop and window.stop > part.decoded.start:
            assert window in part.windows
    # the encoder: every latent of these windows, with its past
    assert part.encoded.start in (0, part.windows[0].start - encoder_reach(NANO))
    assert part.encoded.stop == part.windows[-1].stop
    assert part.read.start == 4 * part.encoded.start
    assert part.read.stop == min(4 * part.encoded.stop - 3, frames)


def test_a_whole_shot_is_a_segment() -> None:
    whole = segment(100, Span(0, 100), 9, NANO)
    assert whole.read == Span(0, 100)
    assert whole.encoded == whole.decoded == Span(0, 26)
    assert list(whole.windows) == spans(26, 9)


def test_no_more_is_read_than_it_takes() -> None:
    """A minute's middle ten seconds, as published: 37 latents back for the decoder, in a window that begins
    at most 31 before, 28 more for the encoder; and the window that the last latent lies in."""
    config = VAEConfig.published()
    part = segment(1500, Span(625, 875), 31, config)
    assert part.decoded == Span(157 - 37, 220)
    assert [len(window) for window in part.windows] == [31, 31, 30, 31]
    assert part.read == Span(4 * (part.windows[0].start - 28), 4 * part.windows[-1].stop - 3)


@pytest.mark.parametrize("made", [Span(0, 0), Span(-1, 3), Span(5, 11), Span(10, 11)])
def test_frames_that_are_not_of_the_shot_are_refused(made: Span) -> None:
    with pytest.raises(ValueError, match="no part of a shot of 10"):
        segment(10, made, 5, NANO)


def test_segments_cover_a_run_of_frames_over_cuts() -> None:
    parts = segments(150, 420, [100, 180, 400, 500], 9, NANO)
    assert [(part.frames, part.made) for part in parts] == [
        (80, Span(50, 80)),
        (220, Span(0, 220)),
        (100, Span(0, 20)),
    ]
    assert all(a.read.stop == a.frames and b.read.start == 0 for a, b in pairwise(parts))


@pytest.mark.parametrize(
    ("config", "encoder", "decoder"),
    [
        (VAEConfig.published(), 28, 37),
        (NANO, 20, 29),
        (VAEConfig((8, 8), layers_per_block=1, norm_num_groups=4, temporal_scale_num=1), 18, 24),
        (VAEConfig((8, 8, 8), layers_per_block=1, norm_num_groups=4, temporal_scale_num=0), 24, 40),
    ],
)
def test_the_reach_is_exact(config: VAEConfig, encoder: int, decoder: int) -> None:
    """A clip's later part, as a clip of its own: different before the reach, the same bits from there on."""
    assert (encoder_reach(config), decoder_reach(config)) == (encoder, decoder)
    narrow = VAEConfig(
        (8,) * config.stages, config.layers_per_block, 4, temporal_scale_num=config.temporal_scale_num
    )
    vae, skip = draw(VideoVAE(narrow), "reach/"), 2
    count, side, factor = skip + max(encoder, decoder) + 2, 2 * config.spatial_factor, config.temporal_factor
    frames = seeded.randn("reach/frames", 1, 3, 1 + factor * (count - 1), side, side).tanh()
    latents = seeded.randn("reach/latents", 1, 16, count, 2, 2)
    with torch.inference_mode():
        for slices, whole, part, reach in (
            (_encoded, _encoded(vae, frames), frames[:, :, factor * skip :], encoder),
            (_decoded, _decoded(vae, latents), latents[:, :, skip:], decoder),
        ):
            same = [
                torch.equal(a[:, :, -1], b[:, :, -1])
                for a, b in zip(slices(vae, part), whole[skip:], strict=True)
            ]
            assert not any(same[: reach - 1])
            assert all(same[reach:])


def _encoded(vae: VideoVAE, frames: Tensor) -> list[Tensor]:
    state, factor = vae.new_state(), vae.config.temporal_factor
    return [vae.encode_slice(x, state) for x in (frames[:, :, :1], *frames[:, :, 1:].split(factor, 2))]


def _decoded(vae: VideoVAE, latents: Tensor) -> list[Tensor]:
    state = vae.new_state()
    return [vae.decode_slice(z, state) for z in latents.split(1, 2)]


def restored(frames: list[np.ndarray], count: int, start: int, stop: int, options: RestoreOptions) -> Tensor:
    part = segment(count, Span(start, stop), options.window, NANO)
    read = frames[part.read.start : part.read.stop]
    with torch.inference_mode():
        return torch.cat(list(restorer().restore_segment(iter(read), part, options, 7)))


def test_segments_are_what_the_whole_shot_gives_there() -> None:
    """Bit for bit: their noise, windows, fades, the VAE's past, colours and the shot's end."""
    options = RestoreOptions(height=16, width=32, window=7, color="wavelet", condition_noise=0.1, seed=5)
    frames = moving(250, 16, 32)
    whole = restored(frames, 250, 0, 250, options)
    for start, stop in ((0, 30), (150, 225), (226, 227), (249, 250)):
        part = restored(frames, 250, start, stop, options)
        assert torch.equal(part, whole[start:stop]), (start, stop)
    last = segment(250, Span(249, 250), options.window, NANO)
    assert last.read.start > 20  # and not by doing all of it again


def test_planning_needs_no_torch() -> None:
    code = "import sys, app.models.seedvr2.segment; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True)
