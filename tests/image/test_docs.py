"""Every command of docs/deploy.md is run here, or says what it needs that is not here."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.image.conftest import STRANGER, Built, give
from tests.image.engine import Engine

DEPLOY = Path(__file__).resolve().parents[2] / "docs" / "deploy.md"
BLOCKS = re.findall(r"^```sh ?(\S*)\n(.*?)^```$", DEPLOY.read_text(), re.MULTILINE | re.DOTALL)

# `build` is run with a base image of our own by the fixture `image`, `compose` by test_compose.
ELSEWHERE = {"build", "compose", "needs-gpu", "needs-gigabytes", "needs-runpod"}


def test_every_block_is_run_or_says_why_not() -> None:
    assert {kind for kind, _ in BLOCKS} == {"", *ELSEWHERE}
    assert len(BLOCKS) == DEPLOY.read_text().count("```") / 2


@pytest.mark.parametrize("script", [text for kind, text in BLOCKS if not kind])
def test_a_block_does_what_it_says(
    engine: Engine, image: Built, volume: Path, short_clip: Path, script: str
) -> None:
    shutil.copy(short_clip, volume / "in.mp4")
    give(volume)
    script = script.replace("$(id -u):$(id -g)", f"{STRANGER}:{STRANGER}")  # the tests themselves are root
    script = script.replace("seedpod:cpu", image.name)
    done = subprocess.run(
        ["bash", "-euxc", script],
        cwd=volume,
        env=engine.environment(),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    for made in re.findall(r"-o (\S+\.mp4)", script):
        assert (volume / made).stat().st_uid == STRANGER
    assert engine.run("ps", "-aq").stdout == ""
