"""What others put in the way of a file is neither written through nor waited for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from app.boot.regular import create_anew, open_regular, open_to_append


def test_a_planted_link_is_replaced_and_its_target_kept(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    for name in ("new", "more"):
        (tmp_path / name).symlink_to(victim)
    with os.fdopen(create_anew(tmp_path / "new"), "w") as file:
        file.write("new")
    with open_to_append(tmp_path / "more", 10) as appended:
        appended.write(b"more")
    assert victim.read_text() == "mine"
    assert (tmp_path / "new").read_text() == "new"
    assert (tmp_path / "more").read_text() == "more"


def test_a_hard_link_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "new").hardlink_to(tmp_path / "victim")
    os.close(create_anew(tmp_path / "new"))
    assert (tmp_path / "victim").read_text() == "mine"


def test_appending_goes_on(tmp_path: Path) -> None:
    for text in (b"one", b"two"):
        with open_to_append(tmp_path / "a", 10) as file:
            file.write(text)
    assert (tmp_path / "a").read_bytes() == b"onetwo"


def test_pipes_and_folders_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a file"):
        open_regular(tmp_path / "pipe")
    with pytest.raises(OSError):
        open_to_append(tmp_path / "pipe", 10)
    with pytest.raises(IsADirectoryError):
        open_regular(tmp_path)
