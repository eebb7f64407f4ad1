"""What Wan's files must hold, and what a model can do by its files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from app.boot.tensorfile import read_index
from app.errors import ConfigError
from app.models.wan.parts import abilities, contents
from tests.models.wan.nano import FILES, image_transformer, one_section


def file(volume: Path, part: str) -> Path:
    return volume / "nano/wan" / FILES[part]


@pytest.mark.parametrize("part", ["transformer", "vae", "t5", "pose", "clip"])
def test_nanos_files_are_right(part: str, wan_volume: Path) -> None:
    assert contents("nano", part, read_index(file(wan_volume, part), "torch")) == []


@pytest.mark.parametrize("part", ["transformer", "vae", "t5", "pose", "clip"])
@pytest.mark.parametrize("other", ["transformer", "vae", "t5", "pose", "clip"])
def test_a_file_of_another_part_is_told(part: str, other: str, wan_volume: Path) -> None:
    if part != other:
        assert contents("nano", part, read_index(file(wan_volume, other), "torch"))


def test_another_width_is_told_in_one_sentence_before_the_tensors(wan_volume: Path) -> None:
    told = contents("self-forcing-1.3b", "transformer", read_index(file(wan_volume, "transformer"), "torch"))
    assert "expected 30 of width 1536" in told[0]


def test_each_set_of_weights_is_looked_at(wan_volume: Path, tmp_path: Path) -> None:
    whole = torch.load(file(wan_volume, "transformer"), weights_only=True)
    del whole["generator"]["model.head.head.bias"]
    torch.save(whole, tmp_path / "broken.pt")
    told = contents("nano", "transformer", read_index(tmp_path / "broken.pt", "torch"))
    assert len(told) == 1 and told[0].startswith("generator: ") and "head.head.bias" in told[0]


def test_a_file_of_other_sections_says_which(tmp_path: Path) -> None:
    torch.save({"critic": {"a": torch.zeros(2)}}, tmp_path / "critic.pt")
    told = contents("nano", "transformer", read_index(tmp_path / "critic.pt", "torch"))
    assert told == [
        "It holds the sections critic, expected generator_ema or generator, or the tensors themselves."
    ]


def test_abilities_are_those_of_the_file(wan_volume: Path, tmp_path: Path) -> None:
    whole = abilities("nano", file(wan_volume, "transformer"), "torch", ["pose"])
    assert whole.sections == ("generator_ema", "generator")
    assert (whole.sampling, whole.image, whole.takes_pose) == ("few", False, True)
    assert whole.has == {"pose"} and whole.multiple == 16

    only = abilities("nano-many", one_section(wan_volume, tmp_path / "a.pt", "generator"), "torch", [])
    assert only.sections == ("generator",) and only.sampling == "many"

    bare = one_section(wan_volume, tmp_path / "b.pt", None, without="pose_proj")
    able = abilities("nano", bare, "torch", [])
    assert able.sections == () and not able.takes_pose

    able = abilities("nano", image_transformer(tmp_path / "c.pt"), "torch", ["clip"])
    assert able.image and able.takes_pose and able.config.in_channels == 36


def test_what_is_no_transformer_has_no_abilities(wan_volume: Path) -> None:
    with pytest.raises(ConfigError, match="not a Wan transformer") as caught:
        abilities("nano", file(wan_volume, "vae"), "torch", [])
    assert caught.value.code == "checkpoint_tensors"
