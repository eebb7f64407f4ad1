"""The server in its container: health, signals, and volumes that are wrong."""

from __future__ import annotations

import base64
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.image.conftest import HARDENED, STRANGER, Built, address, give, health, wait_for_health
from tests.image.engine import Engine

Start = Callable[..., str]
PORT = ("-p", "127.0.0.1::8000")
NANO = ("-e", "SEEDPOD_ROOTS=/opt/nano")


def call(url: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=100) as answer:
            text = answer.read()
            return answer.status, json.loads(text) if text.startswith((b"{", b"[")) else text
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read() or b"null")


def submit(url: str, clip: Path, scale: float = 1) -> str:
    source = {"base64": base64.b64encode(clip.read_bytes()).decode()}
    status, answer = call(f"{url}/run", {"input": {"task": "restore", "source": source, "scale": scale}})
    assert status == 200, answer
    return str(answer["id"])


def wait_for(url: str, job: str, expected: str, seconds: float = 90) -> Any:
    until = time.monotonic() + seconds
    while (answer := call(f"{url}/status/{job}")[1])["status"] != expected:
        assert time.monotonic() < until, answer
        assert answer["status"] in ("IN_QUEUE", "IN_PROGRESS"), answer
        time.sleep(0.2)
    return answer


def test_a_hardened_server_is_healthy_and_does_a_job(
    engine: Engine, image: Built, container: Start, short_clip: Path
) -> None:
    name = container(*HARDENED, *PORT, *NANO, "--user", f"{STRANGER}:{STRANGER}")
    assert health(engine, name)[0] == "starting"
    wait_for_health(engine, name, "healthy")
    url = address(engine, name)
    assert call(f"{url}/ping")[0] == 200
    answer = wait_for(url, submit(url, short_clip), "COMPLETED")
    assert answer["output"]["result"]["kind"] == "inline"
    first = engine.run("top", name, "-o", "pid,args").stdout.splitlines()[1]
    assert "tini" in first
    assert engine.run("diff", name).stdout == ""  # nothing of the root file system was written
    assert "Traceback" not in engine.run("logs", name).stderr


@pytest.mark.parametrize("delay", [0.0, 0.4, 1.5])
def test_stops_at_once_while_it_boots(engine: Engine, container: Start, delay: float) -> None:
    name = container(*HARDENED, *NANO)
    time.sleep(delay)
    stopped(engine, name, within=8)


def test_lets_a_job_finish_that_has_time(
    engine: Engine, image: Built, container: Start, short_clip: Path, tmp_path: Path
) -> None:
    give(tmp_path)
    name = container(*HARDENED, *PORT, *NANO, "--user", f"{STRANGER}:{STRANGER}",
                     "-e", "SEEDPOD_OUTPUT=/output", "-v", f"{tmp_path}:/output")  # fmt: skip
    wait_for_health(engine, name, "healthy")
    job = submit(address(engine, name), short_clip, scale=2)
    wait_for(address(engine, name), job, "IN_PROGRESS")
    stopped(engine, name, within=25)
    made = list(tmp_path.rglob("*.mp4"))
    assert len(made) == 1
    assert made[0].stat().st_uid == STRANGER


def test_gives_up_a_job_that_has_no_time(engine: Engine, image: Built, container: Start) -> None:
    name = container(*HARDENED, *PORT, *NANO, "-e", "SEEDPOD_GRACE_SECONDS=1")
    wait_for_health(engine, name, "healthy")
    url = address(engine, name)
    wait_for(url, submit(url, image.context / "examples" / "clip.mp4", scale=4), "IN_PROGRESS")
    stopped(engine, name, within=10)


def stopped(engine: Engine, name: str, within: float) -> None:
    began = time.monotonic()
    engine.run("stop", "-t", "60", name)
    seconds = time.monotonic() - began
    state = engine.run("inspect", "-f", "{{.State.ExitCode}} {{.State.OOMKilled}}", name).stdout.split()
    log = engine.run("logs", name).stderr
    assert seconds < within, log
    assert state in (["0", "false"], ["143", "false"]), log
    assert "Traceback" not in log


# ------------------------------------------------------------------ wrong volumes


def nothing(volume: Path) -> None:
    for path in sorted(volume.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


def cut_off(volume: Path) -> None:
    file = volume / "nano" / "seedvr2" / "ema_vae.pth"
    file.write_bytes(file.read_bytes()[:100_000])


def another_model(volume: Path) -> None:
    folder = volume / "nano" / "seedvr2"
    (folder / "seedvr2_ema_nano.pth").write_bytes((folder / "ema_vae.pth").read_bytes())


def closed(volume: Path) -> None:
    (volume / "nano" / "seedvr2" / "ema_vae.pth").chmod(0)


def shut(volume: Path) -> None:
    volume.chmod(0o700)


@pytest.mark.parametrize(
    ("spoil", "code", "names"),
    [
        (nothing, "checkpoint_missing", "seedvr2_ema_nano.pth"),
        (cut_off, "checkpoint_size", "ema_vae.pth"),
        (another_model, "checkpoint_size", "seedvr2_ema_nano.pth"),
        (closed, "", "ema_vae.pth"),
        (shut, "checkpoint_missing", "seedvr2_ema_nano.pth"),
    ],
)
def test_a_wrong_volume_is_told_by_status_message_and_health(
    engine: Engine, image: Built, container: Start, volume: Path,
    spoil: Callable[[Path], None], code: str, names: str,
) -> None:  # fmt: skip
    spoil(volume)
    mount = ("-v", f"{volume}:/workspace:ro")
    done = engine.run("run", "--rm", *HARDENED, *mount, image.name, "check", "nano", "--json", check=False)
    assert done.returncode == 78, done.stdout + done.stderr
    assert code in done.stdout
    name = container(*HARDENED, *PORT, *mount, "-e", "SEEDPOD_MODELS=nano")
    said = wait_for_health(engine, name, "unhealthy")
    assert names in said
    status, answer = call(f"{address(engine, name)}/ping")
    assert (status, answer["error"]["code"]) == (503, "boot_failed")
    assert "Traceback" not in engine.run("logs", name).stderr


def test_a_setting_that_makes_no_sense_ends_the_container(engine: Engine, image: Built) -> None:
    done = engine.run("run", "--rm", "-e", "SEEDPOD_STAGE=ram", image.name, check=False)
    assert done.returncode == 78
    assert "SEEDPOD_STAGE is 'ram'" in done.stderr
