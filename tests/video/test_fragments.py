"""Pieces of an MP4 that play as they arrive."""

from __future__ import annotations

import time
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch import Tensor

from app.errors import FileError, InternalError, UsageError
from app.video.fragments import FragmentWriter
from app.video.probe import probe
from app.video.read import read_frames

RATE = Fraction(16)


def frames(count: int, height: int = 64, width: int = 96) -> Tensor:
    """A bar that moves over a gradient, (count, 3, height, width) in [-1, 1]."""
    gradient = torch.linspace(-1, 1, width).expand(count, 3, height, width).clone()
    for number in range(count):
        gradient[number, 0, :, number * 3 % width] = 1
    return gradient


def decoded(path: Path) -> Tensor:
    info = probe(path)
    return torch.stack([torch.from_numpy(frame) for frame in read_frames(path, info)])


def test_the_first_piece_plays_before_the_second_is_made(tmp_path: Path) -> None:
    clip = frames(21)
    begun = tmp_path / "begun.mp4"
    with FragmentWriter(tmp_path / "clip.mp4", 96, 64, RATE) as writer:
        writer.write(clip[:9])
        first = writer.take()
        begun.write_bytes(first)
        assert probe(begun).rate == RATE
        assert len(decoded(begun)) == 8
        writer.write(clip[9:])
        second = writer.take()
        assert not (tmp_path / "clip.mp4").exists()
    whole = (tmp_path / "clip.mp4").read_bytes()
    assert whole[: len(first) + len(second)] == first + second  # what remains is the index at the end
    shown = decoded(tmp_path / "clip.mp4")
    assert shown.shape[0] == 21
    difference = shown.permute(0, 3, 1, 2) / 127.5 - 1 - clip
    assert difference.abs().mean() < 0.05


def test_a_piece_comes_at_once(tmp_path: Path) -> None:
    with FragmentWriter(tmp_path / "clip.mp4", 96, 64, RATE) as writer:
        writer.write(frames(2))
        writer.take()
        begin = time.monotonic()
        writer.write(frames(1))
        assert writer.take()
        assert time.monotonic() - begin < 1


def test_nothing_is_left_of_a_stream_that_is_stopped(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), FragmentWriter(tmp_path / "clip.mp4", 96, 64, RATE) as writer:
        writer.write(frames(3))
        writer.take()
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_no_frame_is_a_fault(tmp_path: Path) -> None:
    with pytest.raises(InternalError, match="No frame"), FragmentWriter(tmp_path / "c.mp4", 96, 64, RATE):
        pass
    assert list(tmp_path.iterdir()) == []


def test_other_containers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\.mkv"):
        FragmentWriter(tmp_path / "clip.mkv", 96, 64, RATE)


def test_a_dead_encoder_is_told(tmp_path: Path) -> None:
    with (
        pytest.raises(FileError, match="could not be encoded"),
        FragmentWriter(tmp_path / "clip.mp4", 96, 64, RATE) as writer,
    ):
        assert writer._child is not None
        writer._child.kill()
        for _ in range(50):
            writer.write(frames(9))
            writer.take()
    assert list(tmp_path.iterdir()) == []
