"""The image, built once, and what its tests share. Run them with `make image-test`, in one process.

With SEEDPOD_TEST_TARGET=gpu it is the image with CUDA's libraries, on a machine without a card: gigabytes to
download, and more of them to unpack.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.image.engine import Engine, NoEngineError, debian_base, pip_files

REPOSITORY = Path(__file__).resolve().parents[2]
TARGET = os.environ.get("SEEDPOD_TEST_TARGET", "cpu")  # of the Dockerfile: cpu or gpu
IMAGE = f"seedpod:{TARGET}"
STRANGER = 12345  # a user that neither the image nor its volumes know

# What docs/deploy.md tells a careful person to say.
HARDENED = ("--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--security-opt", "no-new-privileges")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Building the image counts for the first test that needs it."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.timeout(2400))


@dataclass(frozen=True)
class Built:
    """The image's name, how it was built, and how long that took."""

    name: str
    context: Path
    arguments: tuple[str, ...]
    seconds: float
    base_bytes: int


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    try:
        running = Engine().__enter__()
    except NoEngineError as reason:
        warnings.warn(f"THE IMAGE IS NOT TESTED: {reason}", stacklevel=1)
        pytest.skip(f"THE IMAGE IS NOT TESTED: {reason}")
    try:
        yield running
    finally:
        for container in running.run("ps", "-aq").stdout.split():
            running.run("rm", "-f", "-v", container, check=False)
        running.__exit__()


@pytest.fixture(scope="session")
def image(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The target, built on a Debian made here."""
    made = tmp_path_factory.mktemp("base")
    engine.run("import", debian_base(REPOSITORY / "build" / "image"), "base:clean")
    copies = pip_files(made, [sys.executable, "-m", "pip"], wheels=TARGET == "cpu")
    (made / "Dockerfile").write_text("FROM base:clean\n" + copies)
    engine.run("build", "-t", "base:build", made, timeout=300)
    context = tmp_path_factory.mktemp("context")
    copy_tracked(context)
    arguments = ("--build-arg", "BASE_IMAGE=base:clean", "--build-arg", "BUILD_IMAGE=base:build",
                 "--build-arg", "TORCH_INDEX=")  # fmt: skip
    began = time.monotonic()
    engine.run("build", "--target", TARGET, "-t", IMAGE, *arguments, context, timeout=1800)
    seconds = time.monotonic() - began
    size = int(engine.run("image", "inspect", "-f", "{{.Size}}", "base:clean").stdout)
    return Built(IMAGE, context, arguments, seconds, size)


def copy_tracked(folder: Path) -> None:
    """Copy the checkout as it is now to `folder`, without what git ignores."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name in filter(None, listed.stdout.split("\0")):
        if (REPOSITORY / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, folder / name)


@pytest.fixture
def volume(nano_volume: Path, tmp_path: Path) -> Path:
    """A copy of nano's volume that belongs to STRANGER."""
    root = tmp_path / "volume"
    shutil.copytree(nano_volume, root)
    root.chmod(0o755)
    give(root)
    return root


def give(folder: Path, user: int = STRANGER) -> None:
    """Make `folder` and all in it belong to `user`, and its parents open to pass through."""
    for path in (folder, *folder.rglob("*")):
        shutil.chown(path, user, user)
    for parent in folder.parents:
        if parent == Path("/tmp") or parent == Path("/"):
            break
        parent.chmod(parent.stat().st_mode | 0o111)


@pytest.fixture
def container(engine: Engine, image: Built) -> Iterator[Callable[..., str]]:
    """Start a container in the background; returns its id. It is removed afterwards."""
    started: list[str] = []

    def start(*options: str | Path, command: tuple[str, ...] = ()) -> str:
        name = engine.run("run", "-d", *options, image.name, *command).stdout.strip()
        started.append(name)
        return name

    yield start
    for name in started:
        engine.run("rm", "-f", "-v", name, check=False)


def health(engine: Engine, name: str) -> tuple[str, str]:
    """The container's health, and what the last check said."""
    line = engine.run(
        "inspect", "-f", "{{.State.Health.Status}}|{{range .State.Health.Log}}{{.Output}}{{end}}", name
    ).stdout
    status, _, said = line.partition("|")
    return status, said


def wait_for_health(engine: Engine, name: str, expected: str, seconds: float = 90) -> str:
    """Wait until the container has this health; returns what the checks said."""
    until = time.monotonic() + seconds
    while (found := health(engine, name))[0] != expected:
        assert time.monotonic() < until, f"{found}, expected {expected}; {engine.run('logs', name).stderr}"
        time.sleep(0.5)
    return found[1]


def address(engine: Engine, name: str) -> str:
    """Where the host reaches the container's published port."""
    return "http://" + engine.run("port", name, "8000/tcp").stdout.split()[0]
