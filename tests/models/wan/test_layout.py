from dataclasses import replace
from typing import Any

import pytest
import torch

from app.errors import InputError
from app.models.wan.config import TransformerConfig
from app.models.wan.layout import Conditions, Layout, check
from tests.models.wan.small import IMAGE, SIZE, SMALL, latents, pose, prompt

LAYOUT = Layout(6, *SIZE)


@pytest.mark.parametrize(
    ("layout", "given", "blocks"),
    [
        (Layout(9, *SIZE), 0, ([], [3, 3, 3])),
        (Layout(6, *SIZE), 3, ([3], [3, 3])),
        (Layout(7, *SIZE, independent_first=True), 0, ([], [1, 3, 3])),
        (Layout(1, *SIZE, independent_first=True), 0, ([], [1])),
        (Layout(6, *SIZE, independent_first=True), 1, ([1], [3, 3])),
        (Layout(6, *SIZE, independent_first=True), 4, ([1, 3], [3, 3])),
        (Layout(4, *SIZE, block=1), 2, ([1, 1], [1, 1, 1, 1])),
    ],
)
def test_blocks(layout: Layout, given: int, blocks: tuple[list[int], list[int]]) -> None:
    assert layout.blocks(given) == blocks


@pytest.mark.parametrize(
    ("layout", "given", "message"),
    [
        (Layout(8, *SIZE), 0, "the clip to make has 8 latent frames, expected a multiple of 3"),
        (Layout(0, *SIZE), 0, "frames is 0"),
        (Layout(-3, *SIZE), 0, "-3 latent frames"),
        (Layout(6, *SIZE), 4, "the start has 4 latent frames, expected a multiple of 3"),
        (Layout(6, *SIZE, independent_first=True), 0, "has 6 latent frames, expected 1 and a multiple of 3"),
        (Layout(7, *SIZE, independent_first=True), 1, "the clip to make has 7"),
        (Layout(6, *SIZE, independent_first=True), 3, "the start has 3 latent frames, expected 1 and"),
    ],
)
def test_frames_that_are_not_blocks_are_refused(layout: Layout, given: int, message: str) -> None:
    with pytest.raises(InputError, match=message) as refused:
        layout.capacity(given)
    assert refused.value.code == "frames_not_blocks"


@pytest.mark.parametrize(
    ("layout", "given", "capacity"),
    [
        (Layout(9, *SIZE), 0, 9),
        (Layout(9, *SIZE), 6, 15),
        (Layout(21, *SIZE), 0, 21),
        (Layout(240, *SIZE), 0, 21),
        (Layout(240, *SIZE), 21, 21),
        (Layout(240, *SIZE, window=60, sink=3), 0, 60),
        (Layout(9, *SIZE, window=60), 0, 9),
        (Layout(3, *SIZE), 0, 0),
        (Layout(21, *SIZE, block=21), 0, 0),
        (Layout(3, *SIZE), 3, 6),
        (Layout(60, *SIZE, block=30), 0, 30),
        (Layout(60, *SIZE, sink=20), 0, 23),
    ],
)
def test_frames_of_the_cache(layout: Layout, given: int, capacity: int) -> None:
    assert layout.capacity(given) == capacity


@pytest.mark.parametrize(("window", "sink"), [(2, 0), (0, 0), (5, 3), (-1, 0)])
def test_a_window_without_room_for_a_block_is_refused(window: int, sink: int) -> None:
    with pytest.raises(InputError, match=f"the window is {window} latent frames, the sink {sink}") as refused:
        Layout(9, *SIZE, window=window, sink=sink).capacity()
    assert refused.value.code == "window_too_small"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": {3: prompt()}}, "no prompt begins at frame 0"),
        (
            {"initial": torch.zeros(1, 16, 3, 6, 4)},
            r"expected \(1, 16, 3, 4, 6\)",
        ),
        ({"initial": torch.zeros(2, 16, 3, *SIZE)}, "initial is"),
        ({"initial": torch.zeros(1, 16, 0, *SIZE)}, "initial holds no frame"),
        ({"y": torch.zeros(1, 20, 6, *SIZE)}, "takes no condition y"),
        ({"pose": torch.zeros(1, 20, 6, 2, 3)}, "pose is"),
        ({"guidance": 3.0}, "needs a negative prompt"),
    ],
)
def test_conditions_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    good = Conditions({0: prompt()})
    check(SMALL, LAYOUT, good)
    with pytest.raises(ValueError, match=message):
        check(SMALL, LAYOUT, replace(good, **change))


@pytest.mark.parametrize("frames", [3, 5, 7, 9])
def test_poses_of_another_length_are_refused(frames: int) -> None:
    check(SMALL, LAYOUT, Conditions({0: prompt()}, pose=pose(6)))
    check(SMALL, LAYOUT, Conditions({0: prompt()}, latents("initial", 3), pose=pose(9)))
    with pytest.raises(InputError, match=f"{frames} latent frames, and the clip has 6") as refused:
        check(SMALL, LAYOUT, Conditions({0: prompt()}, pose=pose(frames)))
    assert refused.value.code == "pose_length"


def test_poses_for_a_model_that_was_not_trained_for_them_are_refused() -> None:
    with pytest.raises(ValueError, match="not trained for poses"):
        check(TransformerConfig(), Layout(6, 4, 6), Conditions({0: prompt()}, pose=pose(6)))


def test_a_model_of_images_needs_its_condition() -> None:
    with pytest.raises(ValueError, match="takes a condition y"):
        check(IMAGE, LAYOUT, Conditions({0: prompt()}))


def test_sizes_that_are_no_patches_are_refused() -> None:
    with pytest.raises(ValueError, match="5x6 do not divide"):
        check(SMALL, Layout(6, 5, 6), Conditions({0: prompt()}))
