"""The official runpod client against the local server, unchanged: run, poll, stream, cancel, health, purge;
blocking and asynchronous. And the examples, as they are told to be used."""

from __future__ import annotations

import asyncio
import base64
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
import runpod
from runpod.http_client import ClientSession

from app.job.payload import PAYLOADS
from app.job.payload import validate as validate_restore
from app.serve.reporter import Reporter
from tests.serve.local_server import SECRET_PATH, Served, lifecycle, serving

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "serve"
KEY = "a key"
LONG = 50_000  # steps of a job that ends only when it is stopped


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """A server with a key, where the client looks for it."""
    with serving(api_key=KEY) as server:
        # The client reads RUNPOD_ENDPOINT_BASE_URL when it is imported; the examples below are given that.
        monkeypatch.setattr(runpod, "endpoint_url_base", f"{server.url}/v2")
        yield server


@pytest.fixture
def endpoint(served: Served) -> runpod.Endpoint:
    return runpod.Endpoint("local", api_key=KEY)


def test_run_and_poll(endpoint: runpod.Endpoint) -> None:
    job = endpoint.run({"steps": 3})
    assert job.output(timeout=10) == {"counted": 3, "nothing": None}
    assert job.status() == "COMPLETED"


def test_run_sync(endpoint: runpod.Endpoint) -> None:
    assert endpoint.run_sync({"input": {"steps": 3}}) == {"counted": 3, "nothing": None}


def test_run_sync_polls_on_where_the_server_stops_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(sync_wait_seconds=0.05) as served:
        monkeypatch.setattr(runpod, "endpoint_url_base", f"{served.url}/v2")
        output = runpod.Endpoint("local", api_key="any").run_sync({"steps": 200}, timeout=10)
    assert output["counted"] == 200


def test_stream(endpoint: runpod.Endpoint) -> None:
    job = endpoint.run({"steps": 1200, "pieces": 100})
    seen = [(piece["step"], job.status()) for piece in job.stream()]
    assert [step for step, _ in seen] == list(range(100))
    assert seen[0][1] == "IN_PROGRESS"  # it came while the job ran
    assert job.status() == "COMPLETED"


def test_cancel(endpoint: runpod.Endpoint) -> None:
    job = endpoint.run({"steps": LONG})
    assert job.cancel() == {"id": job.job_id, "status": "CANCELLED"}
    assert job.status() == "CANCELLED" and job.output() is None
    assert endpoint.run_sync({"steps": 1})["counted"] == 1


def test_a_failed_job(endpoint: runpod.Endpoint) -> None:
    job = endpoint.run({"fail": True})
    assert job.output(timeout=10) is None and job.status() == "FAILED"


def test_health_and_purge(endpoint: runpod.Endpoint) -> None:
    first, second = endpoint.run({"steps": LONG}), endpoint.run({"steps": LONG})
    while first.status() == "IN_QUEUE":
        time.sleep(0.01)
    assert endpoint.health()["jobs"]["inQueue"] == 1
    assert endpoint.purge_queue() == {"removed": 1, "status": "completed"}
    assert second.status() == "CANCELLED"
    first.cancel()


def test_refusals(endpoint: runpod.Endpoint, served: Served) -> None:
    with pytest.raises(RuntimeError, match="401"):
        runpod.Endpoint("local", api_key="wrong").health()
    with pytest.raises(requests.HTTPError, match="422"):
        endpoint.run({"steps": -1})
    with pytest.raises(requests.HTTPError, match="404"):
        runpod.Endpoint("other", api_key=KEY).health()
    with pytest.raises(requests.HTTPError, match="413"):
        endpoint.run({"note": "x" * 11_000_000})
    assert len(endpoint.run_sync({"note": "x" * 11_000_000})) == 2  # runsync takes 20 MB


def test_eight_clients_at_once(served: Served) -> None:
    def ask(steps: int) -> Any:
        return runpod.Endpoint("local", api_key=KEY).run_sync({"steps": steps})["counted"]

    with ThreadPoolExecutor(8) as clients:
        assert list(clients.map(ask, range(24))) == list(range(24))


def test_the_asynchronous_client(served: Served) -> None:
    async def main() -> None:
        async with ClientSession() as session:
            endpoint = runpod.AsyncioEndpoint("local", session, api_key=KEY)
            assert (await endpoint.health())["workers"]["ready"] == 1

            done, streamed = await endpoint.run({"steps": 3}), await endpoint.run({"steps": 3, "pieces": 3})
            assert (await done.output(timeout=10))["counted"] == 3 and await done.status() == "COMPLETED"
            assert [piece["step"] async for piece in streamed.stream()] == [0, 1, 2]

            running, waiting = await endpoint.run({"steps": LONG}), await endpoint.run({"steps": LONG})
            while await running.status() == "IN_QUEUE":
                await asyncio.sleep(0.01)
            assert await endpoint.purge_queue() == {"removed": 1, "status": "completed"}
            assert await waiting.status() == "CANCELLED"
            assert await running.cancel() == {"id": running.job_id, "status": "CANCELLED"}
            assert await running.status() == "CANCELLED"

    asyncio.run(main())


# ------------------------------------------------------------------ the examples


CLIP = b"a clip, as far as anybody knows"


def restored(job_id: str, payload: Mapping[str, Any], reporter: Reporter) -> Mapping[str, Any]:
    """A job with the form of a real one: its result is its source, backwards."""
    if payload["height"] == 17:
        raise RuntimeError(SECRET_PATH)
    reporter.start("restore", 2, "frames")
    reporter.advance(1)
    time.sleep(0.3)
    source = payload["source"]
    content = base64.b64decode(source["base64"]) if "base64" in source else CLIP
    return {"result": {"kind": "inline", "base64": base64.b64encode(content[::-1]).decode()}}


@pytest.fixture
def restoring() -> Iterator[Served]:
    with serving(lifecycle(restored), api_key=KEY, validate=validate_restore, payloads=PAYLOADS) as server:
        yield server


def example(served: Served, *command: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {
        "PATH": os.environ["PATH"],
        "RUNPOD_ENDPOINT_BASE_URL": f"{served.url}/v2",
        "RUNPOD_API_KEY": KEY,
        "ENDPOINT_URL": served.url,
        "SEEDPOD_API_KEY": KEY,
    }
    return subprocess.run(
        [str(part) for part in command], env=environment, capture_output=True, text=True, timeout=60
    )


def test_the_example_client(restoring: Served, tmp_path: Path) -> None:
    clip, output = tmp_path / "clip.mp4", tmp_path / "restored.mp4"
    clip.write_bytes(CLIP)
    ran = example(restoring, sys.executable, EXAMPLES / "client.py", clip, output, "--height", "720")
    assert ran.returncode == 0, ran.stderr
    assert output.read_bytes() == CLIP[::-1]

    ran = example(restoring, sys.executable, EXAMPLES / "client.py", clip, tmp_path / "no", "--height", "17")
    assert ran.returncode == 1 and "[internal_error]" in ran.stderr and not (tmp_path / "no").exists()


@pytest.mark.skipif(not (shutil.which("curl") and shutil.which("jq")), reason="needs curl and jq")
def test_the_example_with_curl(restoring: Served, tmp_path: Path) -> None:
    output = tmp_path / "restored.mp4"
    ran = example(restoring, EXAMPLES / "curl.sh", "https://example.com/clip.mp4", output, "720")
    assert ran.returncode == 0, ran.stderr
    assert output.read_bytes() == CLIP[::-1]

    ran = example(restoring, EXAMPLES / "curl.sh", "clip.mp4", tmp_path / "no", "17")
    assert ran.returncode == 1 and "internal_error" in ran.stderr and not (tmp_path / "no").exists()
    ran = example(restoring, EXAMPLES / "curl.sh", "clip.mp4", tmp_path / "no", "1")
    assert ran.returncode == 1 and "height is" in ran.stderr
