"""How many frames a Wan clip may have."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as some

from app.errors import UsageError
from app.models.wan.length import Length, Start, latent_of, length, usable


@pytest.mark.parametrize(
    ("frames", "start", "given_latents", "expected"),
    [
        (9, "nothing", 0, Length(0, 3, 3, 9)),  # three latents: one block
        (81, "nothing", 0, Length(0, 21, 3, 81)),
        (177, "nothing", 0, Length(0, 45, 3, 177)),
        (13, "image", 0, Length(1, 3, 3, 13)),
        (85, "image", 0, Length(1, 21, 3, 85)),
        (12, "clip", 6, Length(6, 3, 3, 12)),
        (84, "clip", 18, Length(18, 21, 3, 84)),
    ],
)
def test_lengths_in_blocks(frames: int, start: Start, given_latents: int, expected: Length) -> None:
    assert length(frames, start, blocks=True, given=given_latents) == expected


@pytest.mark.parametrize(("frames", "latents"), [(1, 1), (5, 2), (81, 21), (129, 33)])
def test_lengths_at_once(frames: int, latents: int) -> None:
    made = length(frames, "nothing", blocks=False)
    assert made == Length(0, latents, latents, frames)
    assert made.at_once


def test_a_first_block_is_the_whole_clip_only_without_a_past() -> None:
    assert length(9, "nothing", blocks=True).at_once
    assert not length(13, "image", blocks=True).at_once
    assert not length(12, "clip", blocks=True, given=3).at_once


@pytest.mark.parametrize(
    ("frames", "start", "blocks", "parts"),
    [
        (80, "nothing", True, ["frames is 80", "12 n + 9", "69 or 81"]),
        (8, "nothing", True, ["frames is 8", "such as 9"]),
        (81, "image", True, ["frames is 81", "12 n + 1 ", "73 or 85"]),
        (81, "clip", True, ["frames is 81", "12 n frames", "72 or 84"]),
        (80, "nothing", False, ["at once", "4 n + 1", "77 or 81"]),
    ],
)
def test_what_fits_no_block_is_refused_with_what_does(
    frames: int, start: Start, blocks: bool, parts: list[str]
) -> None:
    with pytest.raises(UsageError) as caught:
        length(frames, start, blocks=blocks)
    assert caught.value.code == "frames_not_blocks"
    for part in parts:
        assert part in caught.value.message


STARTS = some.sampled_from(["nothing", "image", "clip"])


@given(some.integers(1, 5000), STARTS, some.booleans())
def test_the_next_longer_is_the_shortest_that_holds_them(frames: int, start: Start, blocks: bool) -> None:
    if start != "nothing":
        blocks = True
    made = length(frames, start, blocks=blocks, exact=False)
    assert made.frames >= frames
    step = 12 if blocks else 4
    first = {"nothing": 9, "image": 13, "clip": 12}[start] if blocks else 1
    assert made.frames == first or made.frames - step < frames
    assert length(made.frames, start, blocks=blocks) == made
    own = 4 * made.made - 3 if start == "nothing" else 4 * made.made + (start == "image")
    assert made.frames == own


@given(some.integers(0, 3000))
def test_what_can_be_gone_on_from_is_whole_blocks_and_leaves_room_for_one(frames: int) -> None:
    used = usable(frames)
    assert used <= frames
    if frames < 9:
        assert used == 0
        return
    latents, rest = divmod(used + 3, 4)
    assert rest == 0 and latents % 3 == 0 and 3 <= latents <= 18
    assert latents == 18 or used + 12 > frames


@given(some.integers(0, 5000))
def test_a_latent_holds_four_frames_but_for_the_first(frame: int) -> None:
    latent = latent_of(frame)
    assert (latent == 0) == (frame == 0)
    if frame:
        assert 4 * latent - 3 <= frame <= 4 * latent
