"""Bad input to generate, through the command line: each case ends in one sentence that names the thing, its
value, what was expected and what to do, with a stable code and exit status; nothing is left, nothing is
staged or loaded for it, and what it was given is as it was."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.models.wan.nano import FILES, one_section
from tests.test_bad_input import refused

Seedpod = Callable[..., tuple[int, str, str]]
MODEL = ("--model", "nano-wan", "--height", "32", "--width", "48")


def contents_of(folder: Path) -> dict[str, str]:
    """Every file below, and its hash."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def begun(outcome: tuple[int, str, str]) -> list[str]:
    """What it says of files that it staged or loaded."""
    return [line for line in outcome[2].splitlines() if line.startswith(("stage ", "load "))]


@dataclass
class Case:
    """Arguments (with the folder's files by name), what is expected, and what is spoiled before."""

    arguments: Sequence[str]
    status: int
    code: str
    parts: Sequence[str] = ()
    prompt: str = "a cat"
    output: str = "out.mp4"
    spoil: Callable[[Path], None] = field(default=lambda folder: None)


def page(folder: Path) -> None:
    (folder / "start.png").write_text("<!DOCTYPE html><html><title>Sign in</title></html>")


def text(folder: Path) -> None:
    (folder / "start.png").write_text("a picture of a cat\n" * 40)


def cut(folder: Path) -> None:
    os.truncate(folder / "start.png", (folder / "start.png").stat().st_size // 2)


def empty(folder: Path) -> None:
    (folder / "start.png").write_bytes(b"")


def pose_text(folder: Path) -> None:
    (folder / "pose.mp4").write_text("left arm up, right arm down\n" * 40)


def folder_there(folder: Path) -> None:
    (folder / "out.mp4").mkdir()


START = ("--start", "{start.png}", "--frames", "13")
POSE = ("--pose", "{pose.mp4}")
REQUESTS = {
    "empty prompt": Case([], 64, "request_invalid", ["prompt is ''", "at least 1"], prompt=""),
    "blank prompt": Case([], 64, "prompt_empty", ["empty", "what moves"], prompt=" \n\t "),
    "blank once entities are read": Case([], 64, "prompt_empty", ["&nbsp;"], prompt="&nbsp;"),
    "huge prompt": Case([], 64, "request_invalid", ["20,001 characters", "20000"], prompt="x" * 20_001),
    "lone surrogate": Case([], 64, "request_invalid", ["unicode"], prompt="a \udcff cat"),
    "NUL": Case([], 64, "prompt_invalid", ["character 2", "U+0000", "remove"], prompt="a\0b"),
    "NUL in the negative prompt": Case(
        ["--negative-prompt", "a\0b", "--guidance", "3"], 64, "prompt_invalid", ["U+0000"]
    ),
    "frames that fit no block": Case(["--frames", "80"], 64, "frames_not_blocks", ["80", "69 or 81"]),
    "frames that fit no block after an image": Case(
        ["--start", "{start.png}", "--frames", "81"], 64, "frames_not_blocks", ["73 or 85", "12 n + 1"]
    ),
    "frames 0": Case(["--frames", "0"], 64, "request_invalid", ["frames is '0'"]),
    "frames in words": Case(["--frames", "many"], 64, "request_invalid", ["frames is 'many'", "integer"]),
    "seconds 0": Case(["--seconds", "0"], 64, "request_invalid", ["seconds is '0'", "greater than 0"]),
    "seconds nan": Case(["--seconds", "nan"], 64, "request_invalid", ["seconds is 'nan'"]),
    "a day of seconds": Case(
        ["--seconds", "86400"], 65, "output_too_large", ["1,382,400", "SEEDPOD_MAX_FRAMES"]
    ),
    "frames and seconds": Case(["--frames", "9", "--seconds", "1"], 64, "request_invalid", ["one way"]),
    "height no multiple": Case(["--height", "40"], 64, "size_invalid", ["height is 40", "32 or 48"]),
    "too large": Case(
        ["--height", "4096", "--width", "4096"], 65, "output_too_large", ["16,777,216", "SEEDPOD_MAX_PIXELS"]
    ),
    "negative size": Case(["--width", "-16"], 64, "request_invalid", ["width is '-16'"]),
    "rate 0": Case(["--rate", "0"], 64, "request_invalid", ["rate is '0'"]),
    "change too late": Case(
        ["--frames", "9", "--changes", "5: a dog"], 64, "change_too_late", ["second 5", "0.56"]
    ),
    "changes out of order": Case(
        ["--changes", "2: a dog", "--changes", "1: a fox"], 64, "request_invalid", ["not in order", "later"]
    ),
    "a change without a second": Case(["--changes", "a dog"], 64, "request_invalid", ["SECOND: PROMPT"]),
    "sink as large as the window": Case(
        ["--window", "6", "--sink", "6"], 64, "request_invalid", ["sink of 6", "window of 6", "at most 3"]
    ),
    "negative prompt without guidance": Case(
        ["--negative-prompt", "blurred"], 64, "negative_refused", ["guidance", "above 1"]
    ),
    "too many steps": Case(["--steps", "50"], 64, "steps_refused", ["50", "16"]),
    "unknown field": Case(["--speed", "2"], 64, "usage", ["--speed"]),
    "unknown codec": Case(["--codec", "gif"], 64, "request_invalid", ["codec is 'gif'", "h264"]),
    "unknown model": Case(["--model", "sora"], 78, "model_unknown", ["sora", "nano-wan"]),
    "seed too large": Case(["--seed", str(2**63)], 64, "request_invalid", ["seed is"]),
}  # fmt: skip
FILES_GIVEN = {
    "start is a web page": Case(START, 65, "input_not_video", ["start.png", "web page"], spoil=page),
    "start is text": Case(START, 65, "input_", ["start.png"], spoil=text),
    "start is cut off": Case(START, 65, "input_", ["start.png"], spoil=cut),
    "start is empty": Case(START, 65, "input_", ["start.png"], spoil=empty),
    "start is not there": Case(["--start", "{none.png}"], 65, "input_", ["none.png"]),
    "start is a folder": Case(["--start", "."], 65, "input_", ["folder"]),
    "start is the output": Case(
        ["--start", "{clip.mp4}"], 64, "output_is_input", ["clip.mp4", "another output"], output="clip.mp4"
    ),
    "the poses are the output": Case(
        ["--pose", "{clip.mp4}"], 64, "output_is_input", ["clip.mp4"], output="clip.mp4"
    ),
    "pose is text": Case(POSE, 65, "input_", ["pose.mp4"], spoil=pose_text),
    "poses of a length that fits no block": Case(POSE, 65, "pose_length", ["10 frames", "9 or 21"]),
    "poses of another length": Case(
        [*POSE, "--frames", "21"], 65, "pose_length", ["10 pose frames", "21", "one pose for each frame"]
    ),
    "a reference pose without poses": Case(
        ["--reference", "{start.png}", "--frames", "9"], 64, "pose_refused", ["leave pose_reference out"]
    ),
    "the output is a folder": Case(["--frames", "9"], 74, "output_is_folder", ["out"], spoil=folder_there),
    "the output's folder is not there": Case(
        ["--frames", "9"], 74, "output_folder_missing", ["nowhere"], output="nowhere/out.mp4"
    ),
    "the output is no video": Case(["--frames", "9"], 64, "output_suffix", [".mp4"], output="out.gif"),
    "the output's name is too long": Case(
        ["--frames", "9"], 74, "output_unwritable", ["choose another"], output="x" * 300 + ".mp4"
    ),
}  # fmt: skip


@pytest.fixture
def given_files(tmp_path: Path, short_clip: Path) -> Path:
    folder = tmp_path / "given"
    folder.mkdir()
    Image.effect_noise((96, 64), 50).convert("RGB").save(folder / "start.png")
    for name in ("clip.mp4", "pose.mp4"):
        shutil.copy(short_clip, folder / name)
    return folder


@pytest.mark.parametrize("name", [*REQUESTS, *FILES_GIVEN])
def test_requests(name: str, wan_volume: Path, given_files: Path, seedpod: Seedpod) -> None:
    case = (REQUESTS | FILES_GIVEN)[name]
    case.spoil(given_files)
    before = contents_of(given_files)
    arguments = [str(given_files / text[1:-1]) if text.startswith("{") else text for text in case.arguments]
    command = ("run", "generate", case.prompt, *MODEL, *arguments, "-o", given_files / case.output)
    outcome = seedpod(*command, SEEDPOD_ROOTS=wan_volume)
    refused(outcome, case.status, case.code, *case.parts)
    assert contents_of(given_files) == before
    assert not begun(outcome)


# ------------------------------------------------------------------ checkpoints


@pytest.fixture
def volume(wan_volume: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(wan_volume, tmp_path / "volume"))


def file(volume: Path, part: str) -> Path:
    return volume / "nano/wan" / FILES[part]


def swapped(part: str, other: str) -> Callable[[Path], None]:
    def swap(volume: Path) -> None:
        shutil.copy(file(volume, other), file(volume, part))

    return swap


def without_generator(volume: Path) -> None:
    torch.save({"critic": {"a": torch.zeros(2)}, "step": 600}, file(volume, "transformer"))


def wider_vae(volume: Path) -> None:
    state = torch.load(file(volume, "vae"), weights_only=True)
    state["conv2.weight"] = torch.zeros(32, 32, 1, 1, 1)
    torch.save(state, file(volume, "vae"))


def short_t5(volume: Path) -> None:
    os.truncate(file(volume, "t5"), file(volume, "t5").stat().st_size // 2)


def no_tokenizer(volume: Path) -> None:
    file(volume, "tokenizer").unlink()


def tokenizer(content: Callable[[str], str]) -> Callable[[Path], None]:
    def write(volume: Path) -> None:
        path = file(volume, "tokenizer")
        path.write_text(content(path.read_text()))

    return write


def of_another_model(content: str) -> str:
    described = json.loads(content)
    described["model"] = {
        "type": "WordLevel", "vocab": {"[UNK]": 0, "[PAD]": 1, "a": 2}, "unk_token": "[UNK]",
    }  # fmt: skip
    described["added_tokens"], described["post_processor"] = [], None
    return json.dumps(described)


def seedvr2(volume: Path) -> None:
    state = {
        "vid_in.proj.weight": torch.zeros(64, 132),
        "blocks.0.attn.proj_qkv.vid.weight": torch.zeros(9, 9),
    }
    torch.save(state, file(volume, "transformer"))


CHECKPOINTS = {
    "seedvr2 as the transformer": (seedvr2, "checkpoint_tensors", ["not a Wan transformer"]),
    "VAE as the transformer": (swapped("transformer", "vae"), "checkpoint_tensors", ["not a Wan"]),
    "VAE as the text encoder": (swapped("t5", "vae"), "checkpoint_tensors", ["models_t5_nano.pth"]),
    "T5 as the VAE": (swapped("vae", "t5"), "checkpoint_tensors", ["Wan_VAE.pth"]),
    "transformer as the VAE": (swapped("vae", "transformer"), "checkpoint_tensors", ["Wan_VAE.pth"]),
    "neither generator nor EMA": (without_generator, "checkpoint_", ["self_forcing_nano.pt"]),
    "VAE of another width": (wider_vae, "checkpoint_tensors", ["conv2.weight", "32x32"]),
    "T5 cut off": (short_t5, "checkpoint_truncated", ["models_t5_nano.pth"]),
    "no tokenizer": (no_tokenizer, "checkpoint_missing", ["tokenizer.json", "tried"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints(name: str, volume: Path, seedpod: Seedpod, tmp_path: Path) -> None:
    spoil, code, parts = CHECKPOINTS[name]
    spoil(volume)
    refused(seedpod("check", "nano-wan", SEEDPOD_ROOTS=volume), 78, code, *parts)
    output = tmp_path / "out.mp4"
    outcome = seedpod("run", "generate", "a cat", *MODEL, "-o", output, SEEDPOD_ROOTS=volume)
    refused(outcome, 78, code, *parts)
    assert not begun(outcome) and not output.exists()


TOKENIZERS = {
    "empty": (lambda content: "", "checkpoint_empty", ["is empty"]),
    "a web page": (lambda content: "<html>Sign in</html>", "checkpoint_html", ["web page"]),
    "cut off": (lambda content: content[:4000], "tokenizer_broken", ["download"]),
    "of another model": (of_another_model, "tokenizer_wrong", ["not the tokenizer of UMT5"]),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers_are_refused_before_anything_is_staged(
    name: str, volume: Path, seedpod: Seedpod, tmp_path: Path
) -> None:
    content, code, parts = TOKENIZERS[name]
    tokenizer(content)(volume)
    outcome = seedpod("run", "generate", "a cat", *MODEL, "-o", tmp_path / "out.mp4", SEEDPOD_ROOTS=volume)
    refused(outcome, 78, code, "tokenizer.json", *parts)
    assert not begun(outcome)
    assert not (tmp_path / "out.mp4").exists()


@pytest.mark.parametrize(
    ("section", "use_ema", "parts"),
    [
        ("generator", "true", ["generator_ema", "it has generator", "leave use_ema out"]),
        ("generator_ema", "false", ["needs generator", "it has generator_ema"]),
        (None, "true", ["one set of weights, without EMA"]),
    ],
)
def test_weights_that_are_not_there(
    section: str | None, use_ema: str, parts: list[str], volume: Path, seedpod: Seedpod, tmp_path: Path
) -> None:
    one_section(volume, file(volume, "transformer"), section)
    run = ("run", "generate", "a cat", *MODEL, "--frames", "9", "-o", tmp_path / "out.mp4")
    outcome = seedpod(*run, "--use-ema", use_ema, SEEDPOD_ROOTS=volume)
    refused(outcome, 64, "weights_missing", *parts)
    assert not begun(outcome) and not (tmp_path / "out.mp4").exists()
    assert seedpod(*run, SEEDPOD_ROOTS=volume)[0] == 0  # without the choice it does its work


def test_a_folder_that_may_not_be_written(wan_volume: Path, seedpod: Seedpod, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    (tmp_path / "locked").mkdir(mode=0o500)
    run = ("run", "generate", "a cat", *MODEL, "--frames", "9", "-o", tmp_path / "locked/out.mp4")
    refused(seedpod(*run, SEEDPOD_ROOTS=wan_volume), 74, "output_unwritable", "may not be written")
