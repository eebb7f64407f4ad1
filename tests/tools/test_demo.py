"""What the demo does beside running commands."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from app.boot.copies import Copy
from tools.demo import COLUMNS, GAP, ROWS, contact_sheet, give_back


def test_a_contact_sheet_shows_a_clip_from_its_first_frame_to_its_last(tmp_path: Path) -> None:
    from fractions import Fraction

    from app.video.write import VideoWriter

    clip, sheet = tmp_path / "clip.mp4", tmp_path / "sheet.png"
    shades = np.linspace(16, 240, 30).astype(np.uint8)
    with VideoWriter(clip, 32, 16, Fraction(16)) as writer:
        writer.write(np.broadcast_to(shades[:, None, None, None], (30, 16, 32, 3)).copy())
    contact_sheet(clip, sheet)
    pixels = np.asarray(Image.open(sheet))
    assert pixels.shape == (ROWS * (16 + GAP) + GAP, COLUMNS * (32 + GAP) + GAP, 3)
    middles = pixels[GAP + 8 :: 16 + GAP, GAP + 16 :: 32 + GAP, 0].astype(int).ravel()
    expected = [shades[place * 29 // 11] for place in range(12)]
    assert np.abs(middles - expected).max() <= 3


def test_copies_are_given_back_and_what_stayed_in_place_is_not_touched(tmp_path: Path) -> None:
    source, copy = tmp_path / "model.pth", tmp_path / "copy-model.pth"
    for path in (source, copy, Copy(copy, "").record):
        path.write_bytes(b"weights")
    give_back(
        f"{source} -> {source} (in place: it is small)\n{source} -> {copy} (copied to {copy} from ext4)\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == [source.name]
