"""Autoencode from the outside, with nano's codecs: run, batches, bench, a worker's choice, memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from app.boot.manifest import read_manifest
from app.boot.verify import select_models
from app.models.registry import FAMILIES
from app.video.probe import probe
from app.video.read import read_frames
from tests.job.test_autoencode import clip_of

ROOT = Path(__file__).resolve().parents[1]
Seedpod = Callable[..., tuple[int, str, str]]
CODECS = [
    name
    for name, model in read_manifest().models.items()
    if model.task == "autoencode" and name.startswith("nano")
]


def made(outcome: tuple[int, str, str]) -> Any:
    status, out, err = outcome
    assert status == 0, err
    return json.loads(out)


def run(seedpod: Seedpod, volume: Path, *arguments: str | Path) -> tuple[int, str, str]:
    return seedpod("run", "autoencode", *arguments, SEEDPOD_ROOTS=volume, SEEDPOD_STAGE="off")


@pytest.mark.parametrize("model", CODECS)
def test_every_codec(
    model: str, latents_volume: Path, short_clip: Path, seedpod: Seedpod, tmp_path: Path
) -> None:
    if read_manifest().models[model].family == "sd-vae":
        pytest.importorskip("diffusers")
    out = tmp_path / "out"
    arguments = (short_clip, "-o", out, "--model", model, "--report", "false", "--frames", "6")
    result = made(run(seedpod, latents_volume, *arguments, "--edits", "noise strength=0.2 seed=4",
                      "--weights", "noise layers=*decoder* strength=0.01"))  # fmt: skip
    assert (result["frames"], result["width"], result["height"]) == (6, 48, 32)
    assert result["device"] == "cpu, float32" and result["model"] == model
    assert sum(1 for _ in read_frames(out / "edited.mp4", probe(out / "edited.mp4"))) == 6


def test_the_codec_that_needs_nothing_is_the_one_unasked(
    latents_volume: Path, short_clip: Path, seedpod: Seedpod, tmp_path: Path
) -> None:
    result = made(run(seedpod, latents_volume, short_clip, "-o", tmp_path / "out", "--report", "no"))
    assert result["model"] == "nano-vqvae" and result["reconstructed"]["psnr"] > 10


def test_progress_counts_each_frame_once(
    latents_volume: Path, short_clip: Path, seedpod: Seedpod, tmp_path: Path
) -> None:
    arguments = (short_clip, "-o", tmp_path / "out", "--edits", "noise strength=0.2", "--report", "false")
    _, _, err = run(seedpod, latents_volume, *arguments)
    told = {line.split(":")[0]: line for line in err.splitlines()}
    assert " 10 frames" in told["encode"] and " 10 frames" in told["decode"], err


def test_a_batch_with_one_that_is_no_clip(
    latents_volume: Path, short_clip: Path, seedpod: Seedpod, tmp_path: Path
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.mp4").write_bytes(short_clip.read_bytes())
    Image.new("RGB", (20, 30), (200, 90, 30)).save(folder / "b.png")
    (folder / "c.mp4").write_text("no clip\n" * 99)
    status, out, err = run(seedpod, latents_volume, folder, "-o", tmp_path / "out", "--report", "false")
    listed = json.loads(out)
    assert status == 65 and "c.mp4" in err and "input_not_video" in err
    assert [each["clip"] for each in listed] == ["a.mp4", "b.png", "c.mp4"]
    assert listed == json.loads((tmp_path / "out/results.json").read_text())
    several = made(run(seedpod, latents_volume, folder / "a.mp4", folder / "b.png", "-o", tmp_path / "two",
                       "--report", "false"))  # fmt: skip
    assert [each["result"]["frames"] for each in several] == [10, 1]


def test_weights_of_another_model_are_loaded_for_it(
    latents_volume: Path, short_clip: Path, seedpod: Seedpod, tmp_path: Path
) -> None:
    itself = "interpolate amount=0.5 other=nano-vqvae"
    result = made(run(seedpod, latents_volume, short_clip, "-o", tmp_path / "a", "--report", "false",
                      "--weights", itself))  # fmt: skip
    assert result["edited"] == result["reconstructed"]
    status, _, err = run(seedpod, latents_volume, short_clip, "-o", tmp_path / "b", "--report", "false",
                         "--weights", "interpolate amount=0.5 other=nano-wan-vae")  # fmt: skip
    assert status == 64 and "weights_other_differs" in err and not (tmp_path / "b").exists()
    status, _, err = run(seedpod, latents_volume, short_clip, "-o", tmp_path / "b", "--report", "false",
                         "--weights", "interpolate amount=0.5 other=nano-wan")  # fmt: skip
    assert status == 64 and "model_wrong_task" in err


def test_bench(latents_volume: Path, seedpod: Seedpod) -> None:
    arguments = ("--size", "16", "--frames", "5", "--repeats", "1")
    status, out, err = seedpod("bench", "autoencode", *arguments, SEEDPOD_ROOTS=latents_volume)
    assert status == 0, err
    assert "nano-vqvae" in out and "float32" in out and "frames/s" in out and "torch 2" in out
    status, out, _ = seedpod(
        "bench", "autoencode", "--model", "nano-wan-vae", *arguments, SEEDPOD_ROOTS=latents_volume
    )
    assert status == 0 and "bfloat16" in out
    status, _, err = seedpod("bench", "autoencode", "--size", "0", SEEDPOD_ROOTS=latents_volume)
    assert status == 64 and "16 to 4096" in err


def test_a_worker_boots_a_codec_of_every_task_without_diffusers(latents_volume: Path, tmp_path: Path) -> None:
    """Of a full volume: one model a task, none of which needs the optional packages."""
    selection = select_models(read_manifest(), None, [latents_volume])
    assert sorted(selection.located) == ["nano", "nano-vqvae", "nano-wan"]
    blocked = """
import sys
for name in ("diffusers", "sklearn", "matplotlib"):
    sys.modules[name] = None
from app import chain
from app.boot.manifest import read_manifest
from app.boot.verify import select_models
from app.progress import Silent
from app.settings import load_settings
settings = load_settings({"SEEDPOD_ROOTS": sys.argv[1], "SEEDPOD_STAGE": "off"})
manifest = read_manifest()
selection = select_models(manifest, None, settings.roots)
hashes = chain.hash_record(settings)
for loaded in chain.load_staged(settings, manifest, selection, hashes, Silent(), Silent()):
    print(loaded.task)
"""
    done = subprocess.run(
        [sys.executable, "-c", blocked, str(latents_volume)],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split()) == ["autoencode", "generate", "restore"] and len(FAMILIES) == 6


MEASURE = """
import resource, sys
sys.path.insert(0, ".")
import entrypoint
status = entrypoint.main(sys.argv[1:], {"SEEDPOD_ROOTS": sys.argv.pop(1), "SEEDPOD_STAGE": "off"})
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)
sys.exit(status)
"""


def test_memory_does_not_grow_with_the_clip(latents_volume: Path, tmp_path: Path) -> None:
    peaks = []
    for frames in (40, 400):
        source = clip_of(tmp_path / f"{frames}.mp4", frames, 64, 96)
        arguments = ["run", "autoencode", str(source), "-o", str(tmp_path / f"out-{frames}"),
                     "--model", "nano-vqvae", "--edits", "smooth sigma=1", "--report", "false"]  # fmt: skip
        script = MEASURE.replace(
            "entrypoint.main(sys.argv[1:], {", "(lambda env: entrypoint.main(sys.argv[1:], env))({"
        )
        done = subprocess.run([sys.executable, "-c", script, str(latents_volume), *arguments],
                              cwd=ROOT, capture_output=True, text=True)  # fmt: skip
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stderr.split()[-1]))
    assert peaks[1] < 1.15 * peaks[0], peaks
