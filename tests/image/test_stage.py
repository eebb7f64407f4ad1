"""Staging in a container: its own /dev/shm, its own memory limit, and a volume that is not a local disk."""

from __future__ import annotations

import shutil
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.image.conftest import Built
from tests.image.engine import Engine, search_path

LARGE = 100_000_000  # bytes: more than Docker's /dev/shm, which has 64 MiB


@pytest.fixture(scope="module")
def slow_volume(wan_volume: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """nano-wan's volume with a large transformer, on a file system that is not local: through FUSE, as
    network volumes are."""
    if shutil.which("fuse-overlayfs", path=search_path()) is None or not Path("/dev/fuse").exists():
        pytest.skip("fuse-overlayfs is not installed, or there is no /dev/fuse")
    folder = tmp_path_factory.mktemp("slow")
    shutil.copytree(wan_volume, folder / "lower")
    (folder / "lower").chmod(0o755)
    pad(folder / "lower" / "nano" / "wan" / "self_forcing_nano.pt")
    mounted = folder / "mounted"
    mounted.mkdir()
    subprocess.run(
        ["fuse-overlayfs", "-o", f"lowerdir={folder / 'lower'},allow_other", mounted],
        check=True, env={"PATH": search_path()},
    )  # fmt: skip
    yield mounted
    subprocess.run(["umount", "-l", mounted], check=True)


def pad(checkpoint: Path) -> None:
    """Make a checkpoint large; its tensors stay what they are."""
    with zipfile.ZipFile(checkpoint, "a") as archive:
        top = archive.namelist()[0].split("/")[0]
        archive.writestr(f"{top}/padding", bytes(LARGE))


def stage(engine: Engine, image: Built, volume: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return engine.run(
        "run", "--rm", *options, "-v", f"{volume}:/workspace:ro", image.name, "stage", "nano-wan", check=False
    )


def test_a_small_shm_is_passed_over_and_told(engine: Engine, image: Built, slow_volume: Path) -> None:
    done = stage(engine, image, slow_volume)
    assert done.returncode == 0, done.stderr
    assert "/tmp/" in line_of(done.stdout)
    assert "fuse" in line_of(done.stdout)
    done = stage(engine, image, slow_volume, "-e", "SEEDPOD_STAGE=shm")
    assert done.returncode == 74
    assert "/dev/shm" in done.stderr
    assert "67.1 MB" in done.stderr  # the room there is, in the message


def test_a_large_shm_is_used(engine: Engine, image: Built, slow_volume: Path) -> None:
    done = stage(engine, image, slow_volume, "--shm-size", "400m")
    assert done.returncode == 0, done.stderr
    assert "/dev/shm/" in line_of(done.stdout)


def test_memory_that_the_container_may_not_use_is_not_counted_on(
    engine: Engine, image: Built, slow_volume: Path
) -> None:
    options = ("--memory", "96m", "--shm-size", "400m", "--read-only", "--tmpfs", "/tmp")
    done = stage(engine, image, slow_volume, *options)
    assert done.returncode == 0, done.stderr
    assert "in place" in line_of(done.stdout)
    assert "the container's memory limit leaves" in line_of(done.stdout)


def test_a_local_volume_is_read_where_it_is(engine: Engine, image: Built, wan_volume: Path) -> None:
    wan_volume.parent.chmod(0o755)
    wan_volume.chmod(0o755)
    done = stage(engine, image, wan_volume)
    assert done.returncode == 0, done.stderr
    assert "local already" in line_of(done.stdout)


def line_of(text: str) -> str:
    return next(line for line in text.splitlines() if "self_forcing_nano.pt" in line)
