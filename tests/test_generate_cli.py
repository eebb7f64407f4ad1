"""Generate from the outside, with nano: check, stage, run, signals, a server; and what is read for it."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from app.boot.manifest import read_manifest
from app.video.probe import probe
from app.video.read import read_frames
from tests.models.wan.nano import image_transformer, one_section
from tests.serve.test_server import server

ROOT = Path(__file__).resolve().parents[1]
Seedpod = Callable[..., tuple[int, str, str]]
SMALL = ("--height", "32", "--width", "48")
T5 = "models_t5_nano.pth"


def frames_in(path: Path) -> int:
    return sum(1 for _ in read_frames(path, probe(path)))


def made(outcome: tuple[int, str, str]) -> dict[str, Any]:
    status, out, err = outcome
    assert status == 0, err
    return dict(json.loads(out))


def test_the_whole_path(wan_volume: Path, seedpod: Seedpod, tmp_path: Path) -> None:
    """Check, stage into memory, make a clip of the copies, repeat it without the text encoder."""
    settings = {"SEEDPOD_ROOTS": wan_volume, "SEEDPOD_STAGE": "shm"}
    status, out, err = seedpod("check", "nano-wan", "--full", **settings)
    assert status == 0 and "Nothing wrong with nano-wan." in out, err
    status, out, err = seedpod("stage", "nano-wan", **settings)
    assert status == 0 and T5 in out, err
    for line in out.splitlines():
        Path(line.split(" -> ")[1].split(" (")[0]).unlink()

    output = tmp_path / "a.mp4"
    status, out, err = seedpod("run", "generate", "a cat", *SMALL, "--frames", "21", "-o", output, **settings)
    first = made((status, out, err))
    assert first["frames"] == frames_in(output) == 21 and first["model"] == "nano-wan"
    assert [line.split()[1] for line in err.splitlines() if line.startswith("load ")] == [
        "self_forcing_nano.pt:", "Wan_VAE.pth:", f"{T5}:",
    ]  # fmt: skip
    assert not list(Path("/dev/shm").glob(f"*/*{T5}*"))  # it was read once, and given back
    outcome = seedpod(
        "run", "generate", "a cat", *SMALL, "--frames", "21", "-o", tmp_path / "b.mp4", **settings
    )
    made(outcome)
    assert T5 not in outcome[2]  # neither staged nor loaded
    assert (tmp_path / "b.mp4").read_bytes() == output.read_bytes()


@pytest.mark.parametrize("stage", ["off", "shm"])
def test_a_repeated_prompt_never_touches_t5(
    stage: str, wan_volume: Path, seedpod: Seedpod, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"SEEDPOD_ROOTS": wan_volume, "SEEDPOD_STAGE": stage}
    run = ("run", "generate", "a cat", *SMALL, "--frames", "9", "-o", tmp_path / "a.mp4")
    made(seedpod(*run, **settings))
    content = (tmp_path / "a.mp4").read_bytes()

    def poisoned(*arguments: Any, **options: Any) -> Any:
        pytest.fail("T5 was read")

    monkeypatch.setattr("app.models.wan.text.load", poisoned)
    made(seedpod(*run, **settings))
    assert (tmp_path / "a.mp4").read_bytes() == content
    with pytest.raises(pytest.fail.Exception, match="T5 was read"):
        seedpod(*run[:2], "another", *run[3:], **settings)


def test_another_process_and_another_cache_make_the_same_clip(
    wan_volume: Path, seedpod: Seedpod, tmp_path: Path
) -> None:
    run = ["run", "generate", "a cat", *SMALL, "--frames", "9", "--seed"]
    for name, seed in (("here", "3"), ("other", "4")):
        made(seedpod(*run, seed, "-o", tmp_path / f"{name}.mp4", SEEDPOD_ROOTS=wan_volume))
    environment = {
        "PATH": os.environ["PATH"], "SEEDPOD_ROOTS": str(wan_volume), "HOME": str(tmp_path / "home"),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, str(ROOT / "entrypoint.py"), *run, "3", "-o", str(tmp_path / "there.mp4")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    here, there, other = ((tmp_path / f"{name}.mp4").read_bytes() for name in ("here", "there", "other"))
    assert here == there != other


@pytest.mark.parametrize(
    ("number", "keep", "status"),
    [(signal.SIGINT, True, 130), (signal.SIGTERM, True, 130), (signal.SIGTERM, False, 143)],
)
def test_signals(number: int, keep: bool, status: int, wan_volume: Path, tmp_path: Path) -> None:
    output = tmp_path / "out" / "a.mp4"
    output.parent.mkdir()
    command = [sys.executable, str(ROOT / "entrypoint.py"), "run", "generate", "a cat", "-o", str(output)]
    command += [*SMALL, "--seconds", "3000", "--window", "6", "--keep-partial", str(keep)]
    environment = {
        "PATH": os.environ["PATH"], "SEEDPOD_ROOTS": str(wan_volume), "HOME": str(tmp_path),
        "SEEDPOD_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    end = time.monotonic() + 60
    # The encoder holds frames back, so the file says nothing for a while: T5's load comes just before.
    while not list((tmp_path / "cache/embeddings").glob("*.safetensors")):
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.02)
    time.sleep(0.7)
    process.send_signal(number)
    begin = time.monotonic()
    out, err = process.communicate(timeout=30)
    assert time.monotonic() - begin < 5
    assert process.returncode == status, err
    assert "Traceback" not in err
    if not keep:
        assert out == "" and list(output.parent.iterdir()) == []
        return
    result = json.loads(out)
    assert result["whole"] is False
    assert result["frames"] == frames_in(output) > 8
    assert list(output.parent.iterdir()) == [output]


def test_pictures_on_the_command_line(wan_volume: Path, seedpod: Seedpod, tmp_path: Path) -> None:
    settings = {"SEEDPOD_ROOTS": wan_volume}
    Image.effect_noise((96, 64), 50).convert("RGB").save(tmp_path / "start.png")
    run = ("run", "generate", "a cat", *SMALL)
    first, on, posed = (tmp_path / f"{name}.mp4" for name in ("first", "on", "posed"))
    assert made(seedpod(*run, "--start", tmp_path / "start.png", "--frames", "25", "-o", first, **settings))
    answer = made(seedpod(*run, "--start", first, "--frames", "12", "-o", on, **settings))
    assert frames_in(on) == 12
    assert any("the last 21 frames" in note for note in answer["notes"])
    status, out, err = seedpod(
        *run, "--pose", first, "--start", tmp_path / "start.png", "-o", posed, **settings
    )
    assert made((status, out, err))["frames"] == 25
    assert "load pose.ckpt" in err and "clip" not in err
    changed = seedpod(*run, "--changes", "0.6: a dog", "--changes", "1:a fox", "--seconds", "2",
                      "-o", tmp_path / "c.mp4", **settings)  # fmt: skip
    assert made(changed)["frames"] == 32


def own_model(volume: Path, transformer: Path, variant: str) -> Path:
    """A manifest with a model of one's own: another transformer, the other files nano's."""
    manifest = volume / "mine.toml"
    manifest.write_text(f"""
[file."mine.pt"]
path = "{transformer.relative_to(volume)}"
format = "torch"
[model.mine]
task = "generate"
family = "wan"
variant = "{variant}"
[model.mine.parts]
transformer = "mine.pt"
vae = "nano/Wan_VAE.pth"
t5 = "nano/models_t5_nano.pth"
tokenizer = "nano/tokenizer.json"
[model.mine.optional]
pose = "nano/pose.ckpt"
clip = "nano/models_clip_nano.pth"
""")
    return manifest


@pytest.fixture
def volume(wan_volume: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(wan_volume, tmp_path / "volume"))


def test_a_model_of_ones_own_that_conditions_on_an_image(
    volume: Path, seedpod: Seedpod, tmp_path: Path
) -> None:
    manifest = own_model(volume, image_transformer(volume / "i2v.pt"), "nano-many")
    settings = {"SEEDPOD_ROOTS": volume, "SEEDPOD_MANIFEST": manifest}
    run = ("run", "generate", "a cat", *SMALL, "--model", "mine", "--frames", "13", "--steps", "3")
    status, _, err = seedpod(*run, "-o", tmp_path / "a.mp4", **settings)
    assert status == 64 and "image_missing" in err and "load " not in err
    Image.effect_noise((96, 64), 50).convert("RGB").save(tmp_path / "start.png")
    outcome = seedpod(*run, "-o", tmp_path / "a.mp4", "--start", tmp_path / "start.png", **settings)
    assert made(outcome)["frames"] == frames_in(tmp_path / "a.mp4") == 13
    assert "models_clip_nano" in outcome[2] and "pose.ckpt" not in outcome[2]


def test_poses_without_pose_proj_are_refused_before_anything_is_staged_or_loaded(
    volume: Path, seedpod: Seedpod, tmp_path: Path
) -> None:
    made(seedpod("run", "generate", "a cat", *SMALL, "--frames", "9", "-o", tmp_path / "p.mp4",
                 SEEDPOD_ROOTS=volume))  # fmt: skip
    plain = one_section(volume, volume / "plain.pt", "generator_ema", without="pose_proj")
    settings = {"SEEDPOD_ROOTS": volume, "SEEDPOD_MANIFEST": own_model(volume, plain, "nano")}
    run = ("run", "generate", "a cat", *SMALL, "--model", "mine", "-o", tmp_path / "a.mp4")
    status, _, err = seedpod(*run, "--pose", tmp_path / "p.mp4", **settings)
    assert status == 64 and "[pose_refused]" in err and "pose_proj" in err
    assert "stage" not in err and "load " not in err
    made(seedpod(*run, "--frames", "9", **settings))  # without poses it does its work


def test_the_base_model_is_no_part_of_the_distilled_one() -> None:
    manifest = read_manifest()
    distilled, base = manifest.models["self-forcing"], manifest.models["wan-t2v"]
    assert base.parts["transformer"] not in {*distilled.parts.values(), *distilled.optional.values()}


def test_a_server_makes_and_streams(wan_volume: Path, tmp_path: Path) -> None:
    settings = {
        "SEEDPOD_ROOTS": wan_volume, "SEEDPOD_MODELS": "nano-wan", "SEEDPOD_OUTPUT": tmp_path / "out",
        "SEEDPOD_STAGE": "shm",
    }  # fmt: skip
    (tmp_path / "out").mkdir()
    payload = {"task": "generate", "prompt": "a cat", "height": 32, "width": 48, "frames": 33}
    with server(tmp_path, **settings) as running:
        running.until(200)
        log = running.log.read_text()
        assert log.index(f"load {T5}") < log.index("load self_forcing_nano.pt") < log.index("load Wan_VAE")
        assert not list(Path("/dev/shm").glob(f"*/*{T5}*"))
        answer = running.run({**payload, "stream": True})
        assert answer["status"] == "COMPLETED", answer
        output = answer["output"]
        assert isinstance(output, dict)
        content = (tmp_path / "out" / output["result"]["path"]).read_bytes()
        stream = httpx.get(f"{running.url}/stream/{answer['id']}", timeout=10).json()["stream"]
        pieces = [base64.b64decode(piece["output"]["base64"]) for piece in stream]
        assert b"".join(pieces) == content
        refused = httpx.post(f"{running.url}/run", json={"input": {**payload, "frames": "x"}})
        assert refused.status_code == 422
        wrong = running.run({**payload, "frames": 80})
        assert wrong["status"] == "FAILED" and "81" in str(wrong["error"])
        assert running.log.read_text().count(f"load {T5}") == 1  # at the boot, not with the jobs
        status, _ = running.stop()
        assert status == 0
