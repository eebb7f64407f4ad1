from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from app.models.latents.compare import Board, differences, side_by_side
from app.models.latents.patterns import pattern
from app.video.probe import probe
from app.video.write import VideoWriter


def test_clips_stand_beside_each_other_untouched_under_their_names() -> None:
    clips = [list(pattern("rainbow", 3, 48, 64, seed)) for seed in range(3)]
    board = Board(["original", "reconstructed", "edited"], 48, 64)
    shown = list(side_by_side(board, clips))
    assert len(shown) == 3
    for n, frame in enumerate(shown):
        assert frame.shape == (board.height, board.width, 3) and not any(side % 2 for side in frame.shape[:2])
        for i, clip in enumerate(clips):
            assert np.array_equal(frame[14 : 14 + 48, i * 68 : i * 68 + 64], clip[n])
    assert np.array_equal(shown[0][:14], shown[1][:14]) and shown[0][:14].max() > 200  # the names


def test_a_clip_that_is_over_holds_and_another_size_is_resized() -> None:
    short, small = list(pattern("circle", 1, 32, 32)), list(pattern("noise", 4, 16, 16))
    board = Board(["a", "b"], 32, 32)
    shown = list(side_by_side(board, [short, small]))
    assert len(shown) == 4
    assert all(np.array_equal(frame[14:46, :32], short[0]) for frame in shown)


def test_a_clip_without_frames_is_refused() -> None:
    with pytest.raises(ValueError, match="no frames"):
        list(side_by_side(Board(["a", "b"], 32, 32), [pattern("circle", 1, 32, 32), []]))


def test_a_board_becomes_a_video(tmp_path: Path) -> None:
    board = Board(["original", "\x00<b>" * 90], 33, 47)
    path = tmp_path / "beside.mp4"
    clips = [pattern("circle", 4, 33, 47), pattern("text", 4, 33, 47)]
    with VideoWriter(path, board.width, board.height, Fraction(8)) as writer:
        for frame in side_by_side(board, clips):
            writer.write(frame[None])
    info = probe(path)
    assert (info.height, info.width, info.frames) == (board.height, board.width, 4)


def test_differences_are_around_grey_and_clipped() -> None:
    first = [np.array([[[10, 100, 200]]], np.uint8)]
    second = [np.array([[[10, 110, 100]]], np.uint8)]
    assert [frame.tolist() for frame in differences(first, second)] == [[[[128, 168, 0]]]]
