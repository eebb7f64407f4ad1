"""What many tests need: a volume with the nano model, a short clip, and the command line in-process."""

from __future__ import annotations

import os

if (
    "PYTEST_XDIST_WORKER" in os.environ
):  # several processes share the cores: threads would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import subprocess
from collections.abc import Callable
from pathlib import Path

import imageio_ffmpeg
import pytest

import entrypoint
from app.boot.manifest import read_manifest
from tools import make_nano


@pytest.fixture(scope="session")
def nano_volume(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A volume that holds the checkpoints of nano's SeedVR2. Tests that change files copy it."""
    root = tmp_path_factory.mktemp("volume")
    make_nano.main(root, ["seedvr2"])
    return root


@pytest.fixture
def any_nano(tmp_path: Path) -> Path:
    """A manifest of one's own whose nano files may have any size and hash: what a test made of them is then
    judged by what the files hold, and their staged copies are no other process's."""
    path, known = tmp_path / "any_nano.toml", read_manifest()
    lines = []
    for name in known.models["nano"].parts.values():
        entry = known.files[name]
        lines += [f'[file."{name}"]', f'path = "{entry.path}"', f'format = "{entry.format}"']
        lines += [f"stage = {str(entry.stage).lower()}"]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="session")
def wan_volume(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A volume that holds the checkpoints of nano's Wan. Tests that change files copy it."""
    root = tmp_path_factory.mktemp("wan-volume")
    make_nano.main(root, ["wan"])
    return root


@pytest.fixture(scope="session")
def latents_volume(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A volume that holds nano's codecs and its other models. Tests that change files copy it."""
    root = tmp_path_factory.mktemp("latents-volume")
    make_nano.main(root)
    return root


@pytest.fixture(scope="session")
def short_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten frames of 48x32 at 30000/1001 frames per second, with a tone."""
    path = tmp_path_factory.mktemp("clips") / "short.mp4"
    subprocess.run(
        [
            imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error",
            "-f", "lavfi", "-i", "testsrc2=size=48x32:rate=30000/1001",
            "-f", "lavfi", "-i", "sine=frequency=440",
            "-frames:v", "10", "-shortest", "-pix_fmt", "yuv420p", str(path),
        ],
        check=True,
    )  # fmt: skip
    return path


@pytest.fixture
def seedpod(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., tuple[int, str, str]]:
    """Run a command in this process: (exit status, stdout, stderr). Keywords are settings."""

    def run(*arguments: str | Path, **settings: str | Path) -> tuple[int, str, str]:
        environment = {"HOME": str(tmp_path / "home"), "SEEDPOD_CACHE": str(tmp_path / "cache")}
        environment |= {key: str(value) for key, value in settings.items()}
        capfd.readouterr()
        status = entrypoint.main([str(argument) for argument in arguments], environment)
        out, err = capfd.readouterr()
        return status, out, err

    return run
