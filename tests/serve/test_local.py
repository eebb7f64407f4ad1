"""The local server's API: statuses, errors, limits, keys, ping, metrics; over HTTP, as a caller meets it."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from app.errors import UsageError
from app.serve import local
from app.serve.body import parse_run, read_body
from app.serve.reporter import Reporter
from tests.serve.local_server import SECRET_PATH, FakeBoot, Served, lifecycle, serving

LONG = 50_000  # steps of a job that ends only when it is stopped
JSON = {"Content-Type": "application/json"}


@pytest.fixture
def served() -> Iterator[Served]:
    with serving() as server:
        yield server


@pytest.fixture(scope="module")
def refusing() -> Iterator[Served]:
    """For requests that leave no trace."""
    with serving() as server:
        yield server


def code_of(answer: requests.Response) -> str:
    """The code of an error; nothing else is in the answer but a sentence."""
    told = answer.json()
    assert list(told) == ["error"] and list(told["error"]) == ["code", "message"], told
    assert "Traceback" not in told["error"]["message"] and "/var/" not in told["error"]["message"]
    return str(told["error"]["code"])


# ------------------------------------------------------------------ jobs


@pytest.mark.parametrize("prefix", ["", "/v2/local"])
def test_a_job_from_run_to_its_result(served: Served, prefix: str) -> None:
    submitted = served.post(f"{prefix}/run", json={"input": {"steps": 3}})
    assert submitted.status_code == 200
    assert submitted.json().keys() == {"id", "status"} and submitted.json()["status"] == "IN_QUEUE"
    job_id = submitted.json()["id"]
    served.until(job_id, "COMPLETED")
    got, posted = (
        served.get(f"{prefix}/status/{job_id}").json(),
        served.post(f"{prefix}/status/{job_id}").json(),
    )
    assert got == posted
    assert got["id"] == job_id and got["output"] == {"counted": 3, "nothing": None}
    assert got["executionTime"] >= 6 and got["delayTime"] >= 0 and "error" not in got


def test_runsync_waits_for_the_result_and_not_longer_than_it_says(served: Served) -> None:
    done = served.post("/runsync", json={"input": {"steps": 3}}).json()
    assert done["status"] == "COMPLETED" and done["output"]["counted"] == 3

    begin = time.monotonic()
    going = served.post("/runsync?wait=1000", json={"input": {"steps": LONG}}).json()
    assert 1.0 <= time.monotonic() - begin < 30.0  # the job would take 100
    assert going["status"] == "IN_PROGRESS" and going["output"]["step"] == "restore"
    assert served.post(f"/cancel/{going['id']}").json()["status"] == "CANCELLED"

    for wait in ("999", "300001", "soon"):
        assert served.post(f"/runsync?wait={wait}", json={"input": {}}).status_code == 422


def test_runsync_waits_as_long_as_the_server_says_by_default() -> None:
    with serving(sync_wait_seconds=0.05) as served:
        assert served.post("/runsync", json={"input": {"steps": 500}}).json()["status"] == "IN_PROGRESS"


def test_progress_is_the_output_of_a_job_in_progress_and_never_goes_back(served: Served) -> None:
    job_id = served.submit(steps=150)
    seen = []
    while (status := served.status(job_id))["status"] != "COMPLETED":
        if "output" in status:
            seen.append(status["output"]["percent"])
    assert len(set(seen)) > 3 and seen == sorted(seen)
    assert status["output"]["counted"] == 150


def test_an_id_of_the_callers_is_kept_and_its_job_runs_once(served: Served) -> None:
    first = served.post("/runsync", json={"id": "mine-1", "input": {"steps": 2}}).json()
    again = served.post("/runsync", json={"id": "mine-1", "input": {"steps": 3}}).json()
    assert first["id"] == "mine-1" and again == first
    refused = served.post("/run", json={"id": "../up", "input": {}})
    assert refused.status_code == 422 and code_of(refused) == "job_id_invalid"


def test_a_failed_job_tells_its_code_and_nothing_of_the_container(served: Served) -> None:
    failed = served.post("/runsync", json={"input": {"fail": True}})
    assert failed.status_code == 200 and failed.json()["status"] == "FAILED"
    told = json.loads(failed.json()["error"])
    assert told["code"] == "internal_error" and "output" not in failed.json()
    assert SECRET_PATH not in failed.text and "Traceback" not in failed.text


def test_the_stream_gives_each_piece_once_while_the_job_runs(served: Served) -> None:
    job_id = served.submit(steps=100, pieces=100)
    calls: list[dict[str, Any]] = []
    while not calls or calls[-1]["status"] != "COMPLETED" or calls[-1]["stream"]:
        calls.append(served.get(f"/stream/{job_id}").json())
        assert calls[-1].keys() == {"status", "stream"}
    pieces = [piece["output"] for call in calls for piece in call["stream"]]
    assert pieces == [{"number": step, "step": step} for step in range(100)]
    assert sum(bool(call["stream"]) for call in calls) > 2  # not all at once
    assert served.get(f"/stream/{job_id}").json() == {"status": "COMPLETED", "stream": []}


def test_cancel_ends_a_running_job_and_a_waiting_one_and_leaves_ended_ones(served: Served) -> None:
    running, waiting = served.submit(steps=LONG), served.submit(steps=LONG)
    served.until(running, "IN_PROGRESS")
    for job_id in (waiting, running):
        assert served.post(f"/cancel/{job_id}").json() == {"id": job_id, "status": "CANCELLED"}
        assert json.loads(served.status(job_id)["error"])["code"] == "job_cancelled"
    done = served.post("/runsync", json={"input": {}}).json()["id"]
    assert served.post(f"/cancel/{done}").json()["status"] == "COMPLETED"


def test_purge_cancels_what_waits_only(served: Served) -> None:
    running, *waiting = [served.submit(steps=LONG) for _ in range(4)]
    served.until(running, "IN_PROGRESS")
    assert served.post("/purge-queue").json() == {"removed": 3, "status": "completed"}
    assert {served.status(job_id)["status"] for job_id in waiting} == {"CANCELLED"}
    assert served.status(running)["status"] == "IN_PROGRESS"
    served.post(f"/cancel/{running}")


def test_health_counts_jobs_and_the_worker(served: Served) -> None:
    served.post("/runsync", json={"input": {}})
    served.post("/runsync", json={"input": {"fail": True}})
    running = served.submit(steps=LONG)
    served.submit(steps=LONG)
    served.until(running, "IN_PROGRESS")
    health = served.get("/health").json()
    assert health["jobs"] == {"completed": 1, "failed": 1, "inProgress": 1, "inQueue": 1, "retried": 0}
    assert {name for name, number in health["workers"].items() if number} == {"ready", "running"}
    served.post("/purge-queue")
    served.post(f"/cancel/{running}")
    idle = served.get("/health").json()["workers"]
    assert {name for name, number in idle.items() if number} == {"ready", "idle"}


class Cards(FakeBoot):
    """Four cards, of which one does not work."""

    @property
    def workers(self) -> Mapping[str, int]:
        return {"ready": 2, "failed": 1, "booting": 1}


def test_health_and_metrics_with_a_card_down() -> None:
    with serving(boot=Cards()) as served:
        running = served.submit(steps=LONG)
        served.until(running, "IN_PROGRESS")
        workers = served.get("/health").json()["workers"]
        assert {name: number for name, number in workers.items() if number} == {
            "idle": 1, "initializing": 1, "ready": 2, "running": 1, "unhealthy": 1,
        }  # fmt: skip
        figures = served.get("/metrics").text
        for state, number in Cards().workers.items():
            assert f'seedpod_workers{{state="{state}"}} {number}.0' in figures
        served.post(f"/cancel/{running}")


def test_eight_clients_get_their_own_results(served: Served) -> None:
    def ask(steps: int) -> Any:
        return served.post("/runsync", json={"input": {"steps": steps}}).json()["output"]["counted"]

    with ThreadPoolExecutor(8) as clients:
        assert list(clients.map(ask, range(24))) == list(range(24))


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/status/nope", 404, "job_unknown"),
        ("POST", "/status/nope", 404, "job_unknown"),
        ("GET", "/stream/nope", 404, "job_unknown"),
        ("POST", "/cancel/nope", 404, "job_unknown"),
        ("GET", "/v2/other/health", 404, "endpoint_unknown"),
        ("POST", "/v2/other/purge-queue", 404, "endpoint_unknown"),
        ("GET", "/nope", 404, "not_found"),
        ("GET", "/run/", 404, "not_found"),
        ("GET", "/run", 405, "method_not_allowed"),
        ("DELETE", "/status/nope", 405, "method_not_allowed"),
    ],
)
def test_calls_that_lead_nowhere(refusing: Served, method: str, path: str, status: int, code: str) -> None:
    answer = requests.request(method, refusing.url + path, timeout=10)
    assert (answer.status_code, code_of(answer)) == (status, code)


BAD_BODIES = {
    "nothing": (b"", 400, "request_not_json"),
    "no JSON": (b"steps=1", 400, "request_not_json"),
    "cut short": (b'{"input": {', 400, "request_not_json"),
    "not UTF-8": (b'{"input": {"note": "\xff"}}', 400, "request_not_json"),
    "half a character": (b'{"input": {"note": "\\ud800"}}', 400, "request_not_json"),
    "NaN": (b'{"input": {"steps": NaN}}', 400, "request_not_json"),
    "deep": (b"[" * 100_000, 400, "request_not_json"),
    "a huge number": (b'{"input": {"steps": ' + b"9" * 5000 + b"}}", 400, "request_not_json"),
    "a list": (b"[]", 422, "request_invalid"),
    "no input": (b"{}", 422, "request_invalid"),
    "input is null": (b'{"input": null}', 422, "request_invalid"),
    "input is text": (b'{"input": "steps"}', 422, "request_invalid"),
    "id is a number": (b'{"id": 1, "input": {}}', 422, "request_invalid"),
    "id is null": (b'{"id": null, "input": {}}', 422, "request_invalid"),
    "a webhook": (b'{"input": {}, "webhook": "http://localhost/"}', 422, "request_invalid"),
    "out of bounds": (b'{"input": {"steps": -1}}', 422, "request_invalid"),
    "an unknown field": (b'{"input": {"stepz": 1}}', 422, "request_invalid"),
}


@pytest.mark.parametrize("name", BAD_BODIES)
def test_bodies_that_are_refused_before_they_are_queued(refusing: Served, name: str) -> None:
    content, status, code = BAD_BODIES[name]
    for path in ("/run", "/runsync", "/v2/local/run"):
        answer = refusing.post(path, data=content, headers=JSON)
        assert (answer.status_code, code_of(answer)) == (status, code), answer.text
    assert sum(refusing.jobs.counts().values()) == 0


def test_a_body_must_say_that_it_is_json(served: Served) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        answer = served.post("/run", data=b'{"input": {}}', headers={"Content-Type": kind})
        assert (answer.status_code, code_of(answer)) == (415, "request_not_json_type")
    charset = {"Content-Type": "application/json; charset=utf-8"}
    assert served.post("/run", data=b'{"input": {}}', headers=charset).status_code == 200


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_beyond_the_limit_is_refused_and_runsync_takes_twice_as_much(chunked: bool) -> None:
    def sent(path: str, size: int) -> int:
        content = b'{"input": {"note": "%s"}}'
        content %= b"x" * (size - len(content) + 2)
        data: Any = iter([content[:1000], content[1000:]]) if chunked else content
        return served.post(path, data=data, headers=JSON).status_code

    with serving(max_body_bytes=1_000_000) as served:
        assert sent("/run", 1_000_000) == 200
        assert sent("/run", 1_000_001) == 413
        assert sent("/runsync", 2_000_000) == 200
        assert sent("/runsync", 2_000_001) == 413
        assert sent("/run", 8_000_000) == 413  # more than fits into the sockets: the refusal still arrives


def test_what_is_too_large_is_not_read_on() -> None:
    given = 0

    async def endless() -> Any:
        nonlocal given
        while True:
            given += 1_000
            yield b"x" * 1_000

    with pytest.raises(UsageError, match=r"more than 2\.0 kB"):
        asyncio.run(read_body(endless(), 2_000))
    assert given == 3_000


def test_a_client_that_leaves_in_the_middle_of_its_body_disturbs_nobody(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as client, caplog.at_level(logging.ERROR):
        client.sendall(
            b"POST /run HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
        )
        client.close()
        assert served.post("/runsync", json={"input": {}}).json()["status"] == "COMPLETED"
    assert not caplog.records and sum(served.jobs.counts().values()) == 1


def test_a_client_that_does_not_wait_for_its_result_does_not_end_its_job(served: Served) -> None:
    with pytest.raises(requests.Timeout):
        requests.post(f"{served.url}/runsync", json={"id": "left", "input": {"steps": 300}}, timeout=0.2)
    assert served.until("left", "COMPLETED")["output"]["counted"] == 300


def test_a_fault_of_ours_is_answered_without_its_text(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> Any:
        raise RuntimeError(SECRET_PATH)

    jobs = lifecycle()
    with serving(jobs) as served, caplog.at_level(logging.ERROR):
        monkeypatch.setattr(jobs, "purge", broken)
        answer = served.post("/purge-queue")
    assert answer.status_code == 500 and code_of(answer) == "internal_error"
    assert SECRET_PATH not in answer.text and SECRET_PATH in caplog.text  # the log has it


def test_a_full_queue_is_told() -> None:
    with serving(lifecycle(max_queued=1)) as served:
        running = served.submit(steps=LONG)
        served.until(running, "IN_PROGRESS")
        served.submit()
        answer = served.post("/run", json={"input": {}})
        assert (answer.status_code, code_of(answer)) == (429, "queue_full")
        served.post(f"/cancel/{running}")


# ------------------------------------------------------------------ key


def test_with_a_key_only_ping_and_the_pages_are_open() -> None:
    with serving(api_key="right") as served:
        calls = served.get("/openapi.json").json()["paths"]
        for path, methods in calls.items():
            url = path.format(endpoint_id="local", job_id="nope")
            for method in methods:
                for key in (None, "Bearer wrong", "Bearer", "Basic right", "right", "Bearer right2"):
                    headers = {} if key is None else {"Authorization": key}
                    answer = requests.request(method, served.url + url, headers=headers, timeout=10)
                    if path == "/ping":
                        assert answer.status_code == 200
                    else:
                        assert (answer.status_code, code_of(answer)) == (401, "unauthorized"), (path, key)
                        assert answer.headers["WWW-Authenticate"] == "Bearer"
        assert served.get("/docs").status_code == 200
        assert served.get("/health", headers={"Authorization": "Bearer right"}).status_code == 200
        assert served.get("/health", headers={"Authorization": "bearer right"}).status_code == 200


def test_the_key_is_looked_at_before_anything_else() -> None:
    with serving(api_key="right") as served:
        for answer in (
            served.get("/v2/other/health"),
            served.post("/run", data=b"x"),
            served.post("/runsync?wait=1", json={"input": {}}),
        ):
            assert answer.status_code == 401


@pytest.mark.parametrize(
    ("host", "answered"),
    [
        ("127.0.0.1:8000", True),
        ("192.168.1.7", True),
        ("[::1]:8000", True),
        ("localhost:8000", True),
        ("LOCALHOST", True),
        ("seedpod:8000", True),  # as other containers know it
        ("desk.local", True),
        ("abc123.api.runpod.ai", True),
        ("runpod.ai.pages.example", False),
        ("", True),
        ("pages.example:8000", False),
        ("127.0.0.1.pages.example", False),
        ("localhost.pages.example", False),
        ("pages.example.", False),
        ("[::1", True),  # no name at all
    ],
)
def test_no_page_of_the_web_can_ask_under_its_own_name(host: str, answered: bool, refusing: Served) -> None:
    for call in (requests.get, requests.post):
        path = "/v2/local/health" if call is requests.get else "/v2/local/purge-queue"
        answer = call(refusing.url + path, headers={"Host": host}, timeout=10)
        assert answer.status_code == (200 if answered else 421), answer.text
        assert answered or code_of(answer) == "host_refused"
    assert refusing.get("/ping", headers={"Host": host}).status_code == 200


def test_with_a_key_it_may_have_any_name() -> None:
    with serving(api_key="right") as served:
        headers = {"Host": "clips.example", "Authorization": "Bearer right"}
        assert served.get("/health", headers=headers).status_code == 200


# ------------------------------------------------------------------ boot


def test_ping_tells_how_the_boot_goes_and_jobs_wait_for_it() -> None:
    booted = threading.Event()

    def run(job_id: str, payload: Any, reporter: Reporter) -> Any:
        booted.wait(10)
        return {"done": True}

    boot = FakeBoot("booting")
    with serving(lifecycle(run), boot) as served:
        booting = served.get("/ping")
        assert booting.status_code == 204 and booting.content == b""
        assert served.get("/health").json()["workers"]["initializing"] == 1
        job_id = served.post("/run", json={"input": {}}).json()["id"]
        boot.state = "ready"
        booted.set()
        ready = served.get("/ping")
        assert ready.status_code == 200 and ready.json() == {"state": "ready", "seconds": 1.5}
        assert served.until(job_id, "COMPLETED")["output"] == {"done": True}


def test_a_failed_boot_is_told_with_its_reason_and_takes_no_jobs() -> None:
    reason = "model.pth is missing under /workspace/checkpoints/model.pth; expected 12 GB."
    with serving(boot=FakeBoot("failed", reason)) as served:
        for answer in (served.get("/ping"), served.post("/run", json={"input": {}})):
            assert (answer.status_code, code_of(answer)) == (503, "boot_failed")
            assert "model.pth is missing" in answer.text and "/workspace" not in answer.text
        assert served.get("/health").json()["workers"]["unhealthy"] == 1


def test_a_server_that_drains_takes_no_jobs_and_still_gives_results(served: Served) -> None:
    done = served.post("/runsync", json={"id": "done", "input": {}}).json()
    asyncio.run(served.jobs.drain(1.0))
    for answer in (served.get("/ping"), served.post("/run", json={"input": {}})):
        assert (answer.status_code, code_of(answer)) == (503, "draining")
    assert served.status("done") == done


# ------------------------------------------------------------------ metrics


def test_metrics_are_what_prometheus_reads(served: Served) -> None:
    for payload in ({"steps": 20}, {"steps": 20}, {"fail": True}):
        served.post("/runsync", json={"input": payload})
    served.post("/runsync", json={"id": "mine", "input": {}})
    served.post("/runsync", json={"id": "mine", "input": {}})  # the same job: counted once
    running = served.submit(steps=LONG)
    served.until(running, "IN_PROGRESS")
    served.submit(steps=LONG)
    served.post("/purge-queue")
    served.submit(steps=LONG)
    answer = served.get("/metrics")
    assert answer.headers["Content-Type"].startswith("text/plain; version=")
    values = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }
    assert values["seedpod_jobs_total", "COMPLETED"] == 3
    assert values["seedpod_jobs_total", "FAILED"] == 1
    assert values["seedpod_jobs_total", "CANCELLED"] == 1
    assert values["seedpod_jobs_total", "TIMED_OUT"] == 0
    assert values["seedpod_jobs_waiting",] == 1 and values["seedpod_jobs_running",] == 1
    assert values["seedpod_job_run_seconds_count",] == 4  # what was purged never ran
    assert 0.08 <= values["seedpod_job_run_seconds_sum",] < 10
    assert values["seedpod_job_wait_seconds_count",] == 5
    assert values["seedpod_ready",] == 1 and values["seedpod_boot_seconds",] == 1.5
    assert values["process_resident_memory_bytes",] > 10_000_000
    served.post("/purge-queue")
    served.post(f"/cancel/{running}")


# ------------------------------------------------------------------ what it costs


def test_the_local_server_needs_neither_runpod_nor_torch() -> None:
    heavy = (
        f"import sys, {local.__name__}; print([m for m in ('runpod', 'torch', 'boto3') if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_a_body_is_taken_apart_without_its_input_being_looked_at() -> None:
    asked = parse_run(b'{"id": "a", "input": {"anything": [1, null]}}')
    assert (asked.job_id, asked.payload) == ("a", {"anything": [1, None]})
    assert parse_run(b'{"input": {}}').job_id is None
