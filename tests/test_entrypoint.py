"""Commands from the outside: what a person types, and what a machine reads."""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import entrypoint
from app.settings import Settings, variable
from tests.boot.hub_server import COMMIT, HubServer

REPOSITORY = Path(__file__).resolve().parents[1]
Seedpod = Callable[..., tuple[int, str, str]]
NANO = Path("nano/seedvr2")


def test_it_runs_from_any_folder_and_without_an_environment(nano_volume: Path, tmp_path: Path) -> None:
    environment = {"SEEDPOD_ROOTS": str(nano_volume), "PATH": os.environ["PATH"]}
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "entrypoint.py"), "check", "nano"],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Nothing wrong with nano." in done.stdout


@pytest.mark.parametrize(
    "command", ["", "check", "fetch", "stage", "convert", "serve", "run restore", "run generate",
                "run autoencode", "bench autoencode"],
)  # fmt: skip
def test_every_command_has_help(command: str) -> None:
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "entrypoint.py"), *command.split(), "--help"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    assert "usage: entrypoint.py" in done.stdout


@pytest.mark.parametrize(("number", "status"), [(errno.ENOSPC, 74), (errno.EDQUOT, 74), (errno.EACCES, 70)])
def test_a_disk_that_is_full_is_no_fault_of_ours(
    number: int, status: int, seedpod: Seedpod, monkeypatch: pytest.MonkeyPatch
) -> None:
    def command(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(entrypoint, "parsed", lambda _: argparse.Namespace(command=command))
    found, _, err = seedpod("check")
    assert found == status
    assert ("no_space" in err) == (status == 74)


def test_check_imports_nothing_heavy(nano_volume: Path) -> None:
    code = f"""
import sys, entrypoint
assert entrypoint.main(["check", "nano"], {{"SEEDPOD_ROOTS": {str(nano_volume)!r}}}) == 0
heavy = {{"torch", "numpy", "huggingface_hub", "imageio", "imageio_ffmpeg", "PIL", "safetensors", "einops"}}
found = heavy & set(sys.modules)
assert not found, found
"""
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)


def test_check_speaks_json(nano_volume: Path, seedpod: Seedpod) -> None:
    status, out, _ = seedpod("check", "nano", "--json", SEEDPOD_ROOTS=nano_volume)
    assert status == 0
    report = json.loads(out)
    assert report["ok"] is True
    assert {file["part"] for file in report["files"]} == {"dit", "vae", "positive", "negative"}
    status, out, _ = seedpod("check", "seedvr2-3b", "--json", SEEDPOD_ROOTS=nano_volume)
    assert status == 78
    assert json.loads(out)["ok"] is False


def test_stage_then_run_uses_the_copy(
    nano_volume: Path, short_clip: Path, seedpod: Seedpod, tmp_path: Path, any_nano: Path
) -> None:
    settings = {"SEEDPOD_ROOTS": nano_volume, "SEEDPOD_STAGE": "shm", "SEEDPOD_MANIFEST": any_nano}
    status, out, err = seedpod("stage", "nano", **settings)
    assert status == 0, err
    copy = Path(out.split(" -> ")[1].split(" (")[0])
    try:
        assert copy.read_bytes() == (nano_volume / NANO / "seedvr2_ema_nano.pth").read_bytes()
        status, _, err = seedpod("run", "restore", short_clip, "-o", tmp_path / "out.mp4", **settings)
        assert status == 0, err
        assert "staged already" in err
        assert copy.exists()  # a copy that was there before stays
    finally:
        copy.unlink()
    status, _, err = seedpod("run", "restore", short_clip, "-o", tmp_path / "out.mp4", **settings)
    assert status == 0, err
    assert not copy.exists()  # its own it gives back


def test_a_copy_vouches_for_no_other_source(nano_volume: Path, seedpod: Seedpod, tmp_path: Path) -> None:
    """A source that was replaced after it was staged is not taken for verified because its copy is."""
    volume = Path(shutil.copytree(nano_volume, tmp_path / "volume"))
    source = volume / NANO / "seedvr2_ema_nano.pth"
    data = source.read_bytes()
    (tmp_path / "mine.toml").write_text(
        f'[file."nano/seedvr2_ema_nano.pth"]\npath = "{NANO}/seedvr2_ema_nano.pth"\nformat = "torch"\n'
        f'size = {len(data)}\nsha256 = "{hashlib.sha256(data).hexdigest()}"\nstage = true\n'
    )
    settings = {
        "SEEDPOD_ROOTS": volume, "SEEDPOD_MANIFEST": tmp_path / "mine.toml", "SEEDPOD_STAGE": "shm",
    }  # fmt: skip
    status, out, err = seedpod("stage", "nano", **settings)
    assert status == 0, err
    copy = Path(out.split(" -> ")[1].split(" (")[0])
    try:
        middle = len(data) // 2  # in the values of some tensor
        source.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
        seedpod("stage", "nano", **settings)
        status, out, _ = seedpod("check", "nano", "--full", **settings)
        assert status == 78, out
        assert "checkpoint_hash" in out
    finally:
        copy.unlink()


def test_convert_then_check_prefers_the_small_file(
    nano_volume: Path, seedpod: Seedpod, tmp_path: Path, any_nano: Path
) -> None:
    volume = Path(shutil.copytree(nano_volume, tmp_path / "volume"))
    vae = volume / NANO / "ema_vae.pth"
    wide = {name: x.float() for name, x in torch.load(vae, weights_only=True).items()}
    torch.save(wide, vae)
    settings = {"SEEDPOD_ROOTS": volume, "SEEDPOD_MANIFEST": any_nano}
    status, out, err = seedpod("convert", "nano", "--dtype", "bf16", **settings)
    assert status == 0, err
    made = Path(out.strip())
    assert made.name == "seedvr2_ema_nano.bf16.safetensors"
    master = torch.load(volume / NANO / "seedvr2_ema_nano.pth", weights_only=True)
    for name, tensor in load_file(made).items():
        assert torch.equal(tensor, master[name] if name.endswith("freqs") else master[name].bfloat16())
    status, out, err = seedpod("convert", "nano", "--dtype", "fp16", "--part", "vae", **settings)
    assert status == 0, err
    status, out, _ = seedpod("check", "nano", "--json", **settings)
    taken = {file["part"]: Path(file["path"]).name for file in json.loads(out)["files"]}
    assert status == 0
    assert taken["dit"] == "seedvr2_ema_nano.bf16.safetensors"
    assert taken["vae"] == "ema_vae.fp16.safetensors"


def test_fetch_then_run(nano_volume: Path, short_clip: Path, seedpod: Seedpod, tmp_path: Path) -> None:
    """A model of one's own manifest, from a hub to a restored clip, through the settings alone."""
    sources = sorted((nano_volume / NANO).iterdir())
    parts = {
        "seedvr2_ema_nano.pth": "dit",
        "ema_vae.pth": "vae",
        "pos_emb.pt": "positive",
        "neg_emb.pt": "negative",
    }
    text = ""
    for source in sources:
        data = source.read_bytes()
        text += (
            f'[file."mine/{source.name}"]\npath = "mine/{source.name}"\nformat = "torch"\n'
            f'size = {len(data)}\nsha256 = "{hashlib.sha256(data).hexdigest()}"\n'
            f'repo = "owner/model"\nrevision = "{COMMIT}"\nfilename = "{source.name}"\n'
        )
    text += '[model.mine]\ntask = "restore"\nfamily = "seedvr2"\nvariant = "nano"\n[model.mine.parts]\n'
    text += "".join(f'{part} = "mine/{name}"\n' for name, part in parts.items())
    (tmp_path / "mine.toml").write_text(text)
    (tmp_path / "volume").mkdir()
    with HubServer(files={source.name: source.read_bytes() for source in sources}, token="hf_secret") as hub:
        settings = {
            "SEEDPOD_ROOTS": tmp_path / "volume", "SEEDPOD_MANIFEST": tmp_path / "mine.toml",
            "HF_ENDPOINT": hub.endpoint, "HF_TOKEN": "hf_wrong",
        }  # fmt: skip
        status, out, err = seedpod("fetch", "mine", **settings)
        assert status == 78
        assert "fetch_denied" in err
        assert "hf_wrong" not in out + err
        settings["HF_TOKEN"] = "hf_secret"
        status, out, err = seedpod("fetch", "mine", **settings)
        assert status == 0, err
        assert "hf_secret" not in out + err
        assert len(out.splitlines()) == 4
        asked = len(hub.requests)
        assert seedpod("fetch", "mine", **settings)[1] == "Nothing is missing.\n"
        assert len(hub.requests) == asked
    status, out, err = seedpod("check", "mine", "--full", **settings)
    assert status == 0, out
    status, out, err = seedpod("run", "restore", short_clip, "-o", tmp_path / "out.mp4", **settings)
    assert status == 0, err
    assert json.loads(out)["model"] == "mine"


def test_a_missing_model_is_fetched_where_that_is_allowed(
    seedpod: Seedpod, short_clip: Path, tmp_path: Path
) -> None:
    (tmp_path / "volume").mkdir()
    with HubServer() as hub:  # a hub without the repository
        status, _, err = seedpod(
            "run", "restore", short_clip, "-o", tmp_path / "out.mp4", "--model", "seedvr2-3b",
            SEEDPOD_ROOTS=tmp_path / "volume", SEEDPOD_FETCH="missing", HF_ENDPOINT=hub.endpoint,
        )  # fmt: skip
    assert status == 78
    assert "fetch_denied" in err  # what the hub says of a repository that it does not show
    assert "SeedVR2-3B" in err and "HF_TOKEN" in err


def test_a_sheet_shows_before_and_after(
    nano_volume: Path, short_clip: Path, seedpod: Seedpod, tmp_path: Path
) -> None:
    from PIL import Image

    run = ("run", "restore", short_clip, "-o", tmp_path / "out.mp4", "--scale", "2")
    status, _, err = seedpod(*run, "--sheet", tmp_path / "sheet.png", SEEDPOD_ROOTS=nano_volume)
    assert status == 0, err
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 2 * 96
        assert sheet.height > 3 * 64


@pytest.mark.parametrize(
    ("sheet", "status", "code"),
    [
        ("in.png", 64, "sheet_refused"),
        ("out.png", 64, "sheet_refused"),
        ("sheet.jpg", 64, "sheet_refused"),
        ("nowhere/sheet.png", 74, "sheet_write_failed"),
    ],
)
def test_a_sheet_never_takes_the_place_of_a_clip(
    sheet: str, status: int, code: str, nano_volume: Path, seedpod: Seedpod, tmp_path: Path
) -> None:
    from PIL import Image

    Image.new("RGB", (32, 32)).save(tmp_path / "in.png")
    before = (tmp_path / "in.png").read_bytes()
    run = ("run", "restore", tmp_path / "in.png", "-o", tmp_path / "out.png", "--sheet", tmp_path / sheet)
    found, _, err = seedpod(*run, SEEDPOD_ROOTS=nano_volume)
    assert found == status
    assert code in err
    assert (tmp_path / "in.png").read_bytes() == before
    assert not (tmp_path / "out.png").exists()


def test_sigterm_cleans_up_as_ctrl_c_does(nano_volume: Path, tmp_path: Path) -> None:
    interrupted(nano_volume, tmp_path, signal.SIGTERM, 143)


def test_several_models_and_none_named(
    nano_volume: Path, short_clip: Path, seedpod: Seedpod, tmp_path: Path
) -> None:
    (tmp_path / "mine.toml").write_text(
        '[model.other]\ntask = "restore"\nfamily = "seedvr2"\nvariant = "nano"\n[model.other.parts]\n'
        'dit = "nano/seedvr2_ema_nano.pth"\nvae = "nano/ema_vae.pth"\n'
        'positive = "nano/pos_emb.pt"\nnegative = "nano/neg_emb.pt"\n'
    )
    settings = {"SEEDPOD_ROOTS": nano_volume, "SEEDPOD_MANIFEST": tmp_path / "mine.toml"}
    status, _, err = seedpod("run", "restore", short_clip, "-o", tmp_path / "out.mp4", **settings)
    assert status == 64
    assert "model_ambiguous" in err and "nano" in err and "other" in err
    settings["SEEDPOD_MODELS"] = "other"
    status, out, err = seedpod("run", "restore", short_clip, "-o", tmp_path / "out.mp4", **settings)
    assert status == 0, err
    assert json.loads(out)["model"] == "other"


def interrupted(volume: Path, folder: Path, number: signal.Signals, expected: int) -> None:
    """A restoration that a signal ends leaves nothing, and says so with its exit status."""
    environment = os.environ | {"SEEDPOD_ROOTS": str(volume), "SEEDPOD_CACHE": str(folder / "cache")}
    process = subprocess.Popen(
        [sys.executable, str(REPOSITORY / "entrypoint.py"), "run", "restore",
         str(REPOSITORY / "examples" / "clip.mp4"), "-o", str(folder / "out.mp4")],
        env=environment, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("find cuts"):
            break
    time.sleep(1.0)
    process.send_signal(number)
    said = process.stderr.read()
    assert process.wait(30) == expected, said
    assert "interrupted" in said
    assert [path.name for path in folder.iterdir() if path.name != "cache"] == []


def test_interrupting_leaves_nothing(nano_volume: Path, tmp_path: Path) -> None:
    interrupted(nano_volume, tmp_path, signal.SIGINT, 130)


def test_the_settings_table_is_complete() -> None:
    table = (REPOSITORY / "docs" / "settings.md").read_text()
    assert all(f"`{variable(name)}`" in table for name in Settings.model_fields)
