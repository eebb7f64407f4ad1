"""Any size and length goes into a codec and comes back."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from app.errors import InputError, UsageError
from app.models.latents.codec import Facts
from app.models.latents.fit import HOW, Fit
from app.models.latents.pixels import from_bytes, to_bytes
from tests.models.latents.small import CODECS, clip, codec

VIDEO = Facts("test", 16, 8, 4, 1, 8, "none")


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("size", [(13, 22), (1, 1), (31, 9), (16, 24), (3, 40)], ids=str)
@pytest.mark.parametrize("count", [1, 2, 4, 5, 6])
def test_goes_in_and_comes_back(how, size, count):
    x = clip(count, *size)
    fit = Fit(*size, VIDEO, how)
    inside = torch.cat(list(fit.frames(iter(x.split(3)))))
    assert inside.shape[0] == VIDEO.frames_for(fit.latent_count) and fit.length == count
    assert inside.shape[2] % 8 == inside.shape[3] % 8 == 0
    assert inside.shape[2] - size[0] < 8 and inside.shape[3] - size[1] < 8
    assert (inside[count:] == inside[count - 1]).all()
    back = torch.cat(list(fit.restore(iter(inside.split(2)))))
    assert back.shape == x.shape
    if how != "resize" or size == (16, 24):
        assert torch.equal(back, x)


def test_reflects_or_repeats_the_edge():
    row = torch.arange(6.0).expand(1, 3, 2, 6).contiguous()
    facts = Facts("test", 1, 8, 1, 1, 8, "none")
    (mirrored,) = Fit(2, 6, facts, "reflect").frames([row])
    (repeated,) = Fit(2, 6, facts, "edge").frames([row])
    assert mirrored[0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5, 4, 3]
    assert repeated[0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5, 5, 5]
    column = torch.arange(3.0).view(1, 1, 3, 1).expand(1, 3, 3, 8).contiguous()
    (mirrored,) = Fit(3, 8, facts, "reflect").frames([column])
    assert mirrored[0, 0, :, 0].tolist() == [0, 1, 2, 1, 0, 1, 2, 1]  # longer than the picture


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize(("count", "height", "width"), [(1, 9, 30), (7, 30, 9)])
def test_lazily_through_a_codec(name, count, height, width):
    """Decoding asks for latents, which ask for frames: nobody knows the length before the end."""
    own, x = codec(name), clip(count, height, width)
    fit = Fit(height, width, own.facts)
    out = torch.cat(list(fit.restore(own.decode(own.encode(fit.frames(x.split(1)))))))
    assert out.shape == x.shape
    spooled = Fit(height, width, own.facts)
    latents = list(own.encode(spooled.frames([x])))
    assert sum(z.shape[1] for z in latents) == spooled.latent_count
    assert latents[0].shape[2:] == spooled.latent_size
    again = torch.cat(list(spooled.restore(own.decode(latents))))
    assert torch.allclose(out, again, atol=1e-5)


@settings(max_examples=50, deadline=None)
@given(frames=st.integers(1, 500), temporal=st.sampled_from([1, 2, 4, 8]))
def test_latents_hold_the_frames(frames, temporal):
    facts = Facts("test", 1, 8, temporal, 1, 8, "none")
    latents = facts.latents_holding(frames)
    assert facts.frames_for(latents) >= frames > (facts.frames_for(latents - 1) if latents > 1 else 0)


def test_refuses_what_does_not_fit():
    with pytest.raises(UsageError, match="expected one of reflect, edge, resize"):
        Fit(8, 8, VIDEO, "stretch")
    for side in (0, -1, 10**6):
        with pytest.raises(InputError, match=r"height is"):
            Fit(side, 8, VIDEO)
    with pytest.raises(InputError, match="no frames"):
        list(Fit(8, 8, VIDEO).frames([]))
    with pytest.raises(ValueError, match="8x8"):
        list(Fit(8, 8, VIDEO).frames([torch.zeros(1, 3, 8, 9)]))


def test_every_byte_returns():
    frames = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, -1)
    x = from_bytes(frames)
    assert x.min() == -1 and x.max() == 1 and x.shape == (1, 3, 16, 16)
    assert np.array_equal(to_bytes(x), frames)
    for dtype in (torch.float16, torch.float64):
        assert np.array_equal(to_bytes(x.to(dtype)), frames)
    # Rounded, not cut off, and clipped.
    values = torch.tensor([-1e9, -1.1, -0.999, 0.0, 0.999, 1.1, 1e9]).view(1, 1, 1, 7).expand(1, 3, 1, 7)
    assert to_bytes(values)[0, 0, :, 0].tolist() == [0, 0, 0, 128, 255, 255, 255]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_never_black_for_no_number(value):
    x = torch.zeros(1, 3, 2, 2)
    x[0, 0, 0, 0] = value
    with pytest.raises(InputError, match="no numbers") as caught:
        to_bytes(x)
    assert caught.value.code == "frames_not_finite"
