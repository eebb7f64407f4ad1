"""Bad input, through the command line: each case ends in one sentence that names the thing, its value,
what was expected and what to do, with a stable code and exit status, and leaves no partial output."""

from __future__ import annotations

import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.boot.volumes import sparse

DIT = "nano/seedvr2/seedvr2_ema_nano.pth"
VAE = "nano/seedvr2/ema_vae.pth"
Volume = Path
Seedpod = Callable[..., tuple[int, str, str]]


@pytest.fixture
def volume(nano_volume: Path, tmp_path: Path) -> Path:
    """A volume of one's own, to break."""
    return Path(shutil.copytree(nano_volume, tmp_path / "volume"))


def refused(outcome: tuple[int, str, str], status: int, code: str, *parts: str) -> None:
    """One sentence with this code, exit status and content, and no traceback."""
    found, out, err = outcome
    assert "Traceback" not in err
    assert found == status, err
    text = " ".join((out + err).split())
    assert code in text
    for part in parts:
        assert part in text, f"{part!r} is not in: {text}"


# ------------------------------------------------------------------ checkpoints


def truncated(volume: Volume) -> None:
    path = volume / DIT
    os.truncate(path, path.stat().st_size // 2)


def lfs_pointer(volume: Volume) -> None:
    (volume / DIT).write_text(
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{'ab' * 32}\nsize 7083078\n"
    )


def html_page(volume: Volume) -> None:
    (volume / DIT).write_text("<!DOCTYPE html><html><head><title>Sign in</title></head><body>…</body></html>")


class Bomb:
    """A pickle that would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.path}",))


def runs_code(volume: Volume) -> None:
    torch.save({"weight": Bomb(volume / "bang")}, volume / DIT)


def bare_pickle(volume: Volume) -> None:
    (volume / DIT).write_bytes(pickle.dumps({"weight": Bomb(volume / "bang")}))


def empty(volume: Volume) -> None:
    (volume / DIT).write_bytes(b"")


def folder(volume: Volume) -> None:
    (volume / DIT).unlink()
    (volume / DIT).mkdir()


def gone(volume: Volume) -> None:
    (volume / DIT).rename(volume / "seedvr2_ema_nano.pth")


def edited(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Volume], None]:
    def edit(volume: Volume) -> None:
        state = torch.load(volume / DIT, weights_only=True)
        change(state)
        torch.save(state, volume / DIT)

    return edit


def other_zip(volume: Volume) -> None:
    with zipfile.ZipFile(volume / DIT, "w") as archive:
        archive.writestr("readme.txt", "not a checkpoint")


def safetensors_as_torch(volume: Volume) -> None:
    save_file({"weight": torch.zeros(2)}, volume / DIT)


def vae_as_dit(volume: Volume) -> None:
    shutil.copy(volume / VAE, volume / DIT)


def link_outside(volume: Volume) -> None:
    elsewhere = volume.parent / "elsewhere.pth"
    shutil.move(volume / DIT, elsewhere)
    (volume / DIT).symlink_to(elsewhere)


def two_prompts(volume: Volume) -> None:
    torch.save({"a": torch.zeros(3, 64), "b": torch.zeros(3, 64)}, volume / "nano/seedvr2/pos_emb.pt")


def wide_prompt(volume: Volume) -> None:
    torch.save(torch.zeros(58, 5120), volume / "nano/seedvr2/pos_emb.pt")


CHECKPOINTS: list[tuple[Callable[[Volume], None], str, list[str]]] = [
    (truncated, "checkpoint_truncated", ["seedvr2_ema_nano.pth"]),
    (lfs_pointer, "checkpoint_lfs_pointer", ["7,083,078"]),
    (html_page, "checkpoint_html", ["Sign in"]),
    (runs_code, "checkpoint_unsafe", ["system"]),
    (bare_pickle, "checkpoint_", ["seedvr2_ema_nano.pth"]),
    (empty, "checkpoint_empty", ["seedvr2_ema_nano.pth"]),
    (folder, "checkpoint_not_file", ["folder"]),
    (gone, "checkpoint_missing", ["tried", "ema_vae.pth", "seedvr2_ema_nano.pth"]),
    (edited(lambda s: s.pop("blocks.1.mlp.txt.proj_in.weight")), "checkpoint_tensors",
     ["blocks.1.mlp.txt.proj_in.weight"]),
    (edited(lambda s: s.update(surplus=torch.zeros(3))), "checkpoint_tensors", ["surplus"]),
    (edited(lambda s: s.update({"vid_out.proj.bias": torch.zeros(63)})), "checkpoint_tensors",
     ["vid_out.proj.bias", "63", "64"]),
    (other_zip, "checkpoint_not_torch", ["seedvr2_ema_nano.pth"]),
    (safetensors_as_torch, "checkpoint_not_torch", ["safetensors"]),
    (vae_as_dit, "checkpoint_tensors", ["not a SeedVR2 transformer"]),
    (link_outside, "checkpoint_link_outside", ["elsewhere.pth"]),
    (two_prompts, "checkpoint_tensors", ["2 tensors"]),
    (wide_prompt, "checkpoint_tensors", ["58x5120", "64"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("spoil", "code", "parts"), CHECKPOINTS, ids=[getattr(c[0], "__name__", "") for c in CHECKPOINTS]
)
def test_checkpoints(
    spoil: Callable[[Volume], None],
    code: str,
    parts: list[str],
    volume: Path,
    seedpod: Seedpod,
    short_clip: Path,
    tmp_path: Path,
    any_nano: Path,
) -> None:
    spoil(volume)
    output = tmp_path / "out.mp4"
    settings = {"SEEDPOD_ROOTS": volume, "SEEDPOD_MANIFEST": any_nano}
    refused(seedpod("check", "nano", **settings), 78, code, *parts)
    outcome = seedpod("run", "restore", short_clip, "-o", output, "--model", "nano", **settings)
    refused(outcome, 78, code, *parts)
    assert not (volume / "bang").exists()
    assert not output.exists()


def known_hash(volume: Path) -> Path:
    """A manifest that knows nano's size, and a hash that its file does not have."""
    path = volume / "mine.toml"
    size = (volume / DIT).stat().st_size
    path.write_text(
        f'[file."nano/seedvr2_ema_nano.pth"]\npath = "{DIT}"\nformat = "torch"\nsize = {size}\n'
        f'sha256 = "{"0" * 64}"\nstage = true\n'
        f'[file."nano/seedvr2_ema_nano.pth".superseded]\n"{"1" * 64}" = "first weights"\n'
    )
    return path


def test_right_size_and_wrong_hash(volume: Path, seedpod: Seedpod, short_clip: Path, tmp_path: Path) -> None:
    settings = {"SEEDPOD_ROOTS": volume, "SEEDPOD_MANIFEST": known_hash(volume)}
    refused(seedpod("check", "nano", "--full", **settings), 78, "checkpoint_hash", "0000")
    output = tmp_path / "out.mp4"
    run = ("run", "restore", short_clip, "-o", output, "--model", "nano")
    refused(seedpod(*run, **settings), 78, "checkpoint_hash", "0000")  # remembered from the full check
    fresh = {"SEEDPOD_CACHE": tmp_path / "fresh"}
    refused(
        seedpod(*run, **settings, **fresh), 78, "checkpoint_hash", "0000"
    )  # in place: before it is loaded
    fresh = {"SEEDPOD_CACHE": tmp_path / "other", "SEEDPOD_STAGE": "shm"}
    refused(seedpod(*run, **settings, **fresh), 78, "stage_hash_mismatch", "0000")  # while it is staged
    assert not output.exists()


def test_the_superseded_3b_has_the_right_size(volume: Path, seedpod: Seedpod) -> None:
    import hashlib

    manifest = known_hash(volume)
    digest = hashlib.sha256((volume / DIT).read_bytes()).hexdigest()
    manifest.write_text(manifest.read_text().replace("1" * 64, digest))
    settings = {"SEEDPOD_ROOTS": volume, "SEEDPOD_MANIFEST": manifest}
    refused(seedpod("check", "nano", "--full", **settings), 78, "checkpoint_superseded", "first weights")


def test_the_3b_in_the_place_of_the_7b(volume: Path, seedpod: Seedpod) -> None:
    sparse(volume / "SeedVR/ckpts/SeedVR2-7B/seedvr2_ema_7b.pth", 13566090228)
    outcome = seedpod("check", "seedvr2-7b", SEEDPOD_ROOTS=volume)
    refused(outcome, 78, "checkpoint_size", "seedvr2_ema_3b.pth", "13,566,090,228", "32,958,774,606")


# ------------------------------------------------------------------ manifest and settings

MANIFESTS = [
    ("colour = 1", "manifest_key", ["colour"]),
    ('[file.a]\npath = "/a.pth"\nformat = "torch"', "manifest_path", ["/a.pth", "line 2"]),
    ('[file.a]\npath = "../a.pth"\nformat = "torch"', "manifest_path", ["../a.pth"]),
    ('[file.a]\npath = "a.pth"\nformat = "pickle"', "manifest_value", ["pickle", "safetensors"]),
    ('[file.a]\npath = "a"\nformat = "torch"\n[file.b]\npath = "a"\nformat = "torch"', "manifest_same_path",
     ["a", "b"]),
    ('[file.a]\npath = "a"\nformat = "torch"\nsha256 = "xyz"', "manifest_value", ["sha256", "xyz"]),
    ('[file.a]\npath = "a"\nformat = "torch"\nsize = -1', "manifest_value", ["size", "-1"]),
    ('[model.m]\ntask = "restore"\nfamily = "seedvr2"\n[model.m.parts]\ndit = "nowhere"',
     "manifest_unknown_file", ["nowhere"]),
    ("[file.a\n", "manifest_toml", ["line 1"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "code", "parts"), MANIFESTS, ids=[m[1] + str(i) for i, m in enumerate(MANIFESTS)]
)
def test_manifests(text: str, code: str, parts: list[str], seedpod: Seedpod, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    refused(seedpod("check", SEEDPOD_MANIFEST=path), 78, code, "mine.toml", *parts)


@pytest.mark.parametrize(
    ("settings", "code", "parts"),
    [
        ({"SEEDPOD_STAGE": "ram"}, "settings_invalid", ["SEEDPOD_STAGE", "ram", "shm"]),
        ({"SEEDPOD_ROOT": "/workspace"}, "settings_unknown", ["SEEDPOD_ROOT ", "SEEDPOD_ROOTS"]),
        ({"SEEDPOD_ROOTS": "workspace"}, "settings_invalid", ["SEEDPOD_ROOTS", "workspace", "absolute"]),
        ({"SEEDPOD_MODELS": "seedvr3"}, "model_unknown", ["seedvr3", "seedvr2-3b"]),
        ({"SEEDPOD_MANIFEST": "/nowhere/models.toml"}, "manifest_unreadable", ["/nowhere/models.toml"]),
        ({"SEEDPOD_READERS": "0"}, "settings_invalid", ["SEEDPOD_READERS", "0"]),
    ],
)
def test_settings(settings: dict[str, str], code: str, parts: list[str], seedpod: Seedpod) -> None:
    refused(seedpod("check", **settings), 78, code, *parts)


def test_a_family_and_a_variant_that_nobody_knows(volume: Path, seedpod: Seedpod, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    parts = '[model.m.parts]\ndit = "nano/seedvr2_ema_nano.pth"\n'
    path.write_text(f'[model.m]\ntask = "restore"\nfamily = "seedvr9"\n{parts}')
    settings = {"SEEDPOD_ROOTS": volume, "SEEDPOD_MANIFEST": path}
    refused(seedpod("check", "m", **settings), 78, "model_family_unknown", "seedvr9", "seedvr2")
    path.write_text(f'[model.m]\ntask = "restore"\nfamily = "seedvr2"\n{parts}')
    refused(seedpod("check", "m", **settings), 78, "model_parts_wrong", "vae")
    path.write_text(f'[model.m]\ntask = "generate"\nfamily = "seedvr2"\n{parts}')
    refused(seedpod("check", "m", **settings), 78, "model_task_wrong", "generate", "restore")


# ------------------------------------------------------------------ clips, outputs and parameters


def no_file(folder: Path) -> Path:
    return folder / "nothing.mp4"


def a_folder(folder: Path) -> Path:
    return folder


def an_empty_file(folder: Path) -> Path:
    (folder / "empty.mp4").touch()
    return folder / "empty.mp4"


def a_text(folder: Path) -> Path:
    (folder / "text.mp4").write_text("These are not the frames you are looking for.\n" * 50)
    return folder / "text.mp4"


def a_web_page(folder: Path) -> Path:
    (folder / "page.mp4").write_text("<!DOCTYPE html><html><title>404</title></html>")
    return folder / "page.mp4"


def half_a_clip(folder: Path) -> Path:
    data = (folder / "short.mp4").read_bytes()
    (folder / "half.mp4").write_bytes(data[: len(data) // 2])
    return folder / "half.mp4"


def half_a_picture(folder: Path) -> Path:
    from PIL import Image

    Image.effect_noise((64, 64), 80).save(folder / "whole.png")
    data = (folder / "whole.png").read_bytes()
    (folder / "half.png").write_bytes(data[: len(data) // 2])
    return folder / "half.png"


CLIPS = [
    (no_file, "input_missing", ["nothing.mp4"]),
    (a_folder, "input_is_folder", []),
    (an_empty_file, "input_empty", ["empty.mp4"]),
    (a_text, "input_not_video", ["text.mp4"]),
    (a_web_page, "input_not_video", ["page.mp4"]),
    (half_a_clip, "input_", ["half.mp4"]),
    (half_a_picture, "input_damaged", ["half.png"]),
]


@pytest.mark.parametrize(("make", "code", "parts"), CLIPS, ids=[clip[0].__name__ for clip in CLIPS])
def test_clips(
    make: Callable[[Path], Path],
    code: str,
    parts: list[str],
    nano_volume: Path,
    short_clip: Path,
    seedpod: Seedpod,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "clips"
    folder.mkdir()
    shutil.copy(short_clip, folder / "short.mp4")
    source = make(folder)
    output = tmp_path / f"out{source.suffix or '.mp4'}"
    outcome = seedpod("run", "restore", source, "-o", output, SEEDPOD_ROOTS=nano_volume)
    refused(outcome, 65, code, *parts)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name not in ("cache", "home")) == ["clips"]


@pytest.mark.parametrize(
    ("arguments", "status", "code", "parts"),
    [
        (["--scale", "0"], 64, "request_invalid", ["scale", "0"]),
        (["--scale", "2", "--height", "64"], 64, "request_invalid", ["more than one way"]),
        (["--colour", "lab"], 64, "usage", ["--colour"]),
        (["--color", "auto"], 64, "request_invalid", ["auto", "wavelet"]),
        (["--window", "3"], 64, "request_invalid", ["window", "3", "5"]),
        (["--model", "seedvr2"], 78, "model_unknown", ["seedvr2-3b"]),
        (["--model", "seedvr2-3b"], 78, "checkpoint_missing", ["seedvr2_ema_3b.pth", "tried"]),
        (["--scale", "0.1"], 64, "size_invalid", ["4x4", "16"]),
        (["--scale", "16", "--codec", "png"], 65, "output_too_large", ["768x512", "SEEDPOD_MAX_PIXELS"]),
    ],
)
def test_parameters(
    arguments: list[str],
    status: int,
    code: str,
    parts: list[str],
    nano_volume: Path,
    short_clip: Path,
    seedpod: Seedpod,
    tmp_path: Path,
) -> None:
    output = tmp_path / "out.mp4"
    settings = {"SEEDPOD_ROOTS": nano_volume, "SEEDPOD_MAX_PIXELS": str(512 * 512)}
    refused(seedpod("run", "restore", short_clip, "-o", output, *arguments, **settings), status, code, *parts)
    assert not output.exists()


@pytest.mark.parametrize(
    ("output", "status", "code"),
    [
        ("nowhere/out.mp4", 74, "output_folder_missing"),
        ("out.txt", 64, "output_suffix"),
        ("out", 64, "output_suffix"),
        ("folder.mp4", 74, "output_is_folder"),
    ],
)
def test_outputs(
    output: str, status: int, code: str, nano_volume: Path, short_clip: Path, seedpod: Seedpod, tmp_path: Path
) -> None:
    (tmp_path / "folder.mp4").mkdir()
    outcome = seedpod("run", "restore", short_clip, "-o", tmp_path / output, SEEDPOD_ROOTS=nano_volume)
    refused(outcome, status, code)


def test_the_source_is_never_the_output(
    nano_volume: Path, short_clip: Path, seedpod: Seedpod, tmp_path: Path
) -> None:
    clip = Path(shutil.copy(short_clip, tmp_path / "clip.mp4"))
    before = clip.read_bytes()
    outcome = seedpod("run", "restore", clip, "-o", clip, SEEDPOD_ROOTS=nano_volume)
    refused(outcome, 64, "output_is_input", "clip.mp4")
    assert clip.read_bytes() == before


@pytest.mark.parametrize(
    "arguments",
    [["dance"], ["run"], ["run", "restore"], ["fetch"], ["convert", "nano", "--dtype", "int8"]],
)
def test_a_command_line_that_makes_no_sense(arguments: list[str], seedpod: Seedpod) -> None:
    refused(seedpod(*arguments), 64, "usage", "--help")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["run", "restore", "a.mp4", "-o", "b.mp4", "--heigth=9"], "did you mean --height?"),
        (["run", "generate", "a", "red", "fox", "-o", "b.mp4"], "needs quotes"),
        (["run", "generate", "a", "-o", "b.mp4", "--changes", "red"], "expected SECOND: PROMPT"),
    ],
)
def test_a_slip_on_the_command_line_is_named(arguments: list[str], word: str, seedpod: Seedpod) -> None:
    status, _, err = seedpod(*arguments)
    assert status == 64
    assert word in err


def test_a_task_whose_models_lack_files_says_which(
    nano_volume: Path, seedpod: Seedpod, tmp_path: Path
) -> None:
    root = tmp_path / "volume"
    shutil.copytree(nano_volume, root)
    (root / "nano/wan/google/umt5-nano/tokenizer.json").unlink(missing_ok=True)
    outcome = seedpod("run", "generate", "a", "-o", tmp_path / "b.mp4", SEEDPOD_ROOTS=root)
    refused(outcome, 78, "models_incomplete", "nano-wan lacks ")
    assert "tokenizer.json" in outcome[2] and "seedvr2" not in outcome[2]


def test_a_volume_without_any_file_is_told_at_the_end(seedpod: Seedpod, tmp_path: Path) -> None:
    status, out, _ = seedpod("check", SEEDPOD_ROOTS=tmp_path / "none")
    assert status == 78
    assert out.endswith(f"under {tmp_path / 'none'} (no such folder); is SEEDPOD_ROOTS right?\n")


def test_a_device_that_is_not_there(
    nano_volume: Path, short_clip: Path, seedpod: Seedpod, tmp_path: Path
) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    output = tmp_path / "out.mp4"
    settings = {"SEEDPOD_ROOTS": nano_volume, "SEEDPOD_DEVICE": "cuda"}
    refused(seedpod("run", "restore", short_clip, "-o", output, **settings), 69, "device_unavailable", "cuda")
    assert not output.exists()


def test_errors_are_listed_in_the_documents() -> None:
    from tools import make_docs

    for path, text in make_docs.documents().items():
        assert path.read_text() == text, f"{path.name} is stale: run python tools/make_docs.py"
    listed = make_docs.error_table()
    assert not [code for _, code, _ in CHECKPOINTS if not code.endswith("_") and f"`{code}`" not in listed]
