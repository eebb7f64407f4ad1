"""The worker, as a real process against a server that speaks the platform's calls."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from app.serve import worker
from tests.serve.platform import KEY, Platform
from tests.serve.worker_process import ROOT, START


def error_of(report: dict[str, Any]) -> dict[str, str]:
    """The error of a report; a caller sees nothing but a code and a sentence."""
    assert set(report) == {"error"}, report
    error = json.loads(report["error"])
    assert set(error) == {"code", "message"}
    for secret in ("Traceback", "/srv", str(ROOT), KEY, "bucket-secret"):
        assert secret not in report["error"]
    return error


# ------------------------------------------------------------------ the SDK


def test_the_sdk_is_the_one_whose_insides_we_know() -> None:
    """When this fails, read what changed, run the tests below, then note the new version and hashes."""
    import runpod
    from runpod.serverless.modules import rp_fitness, rp_http, rp_job, rp_scale

    sources = {module: inspect.getsource(module) for module in (rp_scale, rp_job, rp_http, rp_fitness)}
    hashes = {
        module.__name__.rpartition(".")[2]: hashlib.sha256(source.encode()).hexdigest()[:12]
        for module, source in sources.items()
    }
    assert runpod.__version__ == worker.SDK
    assert hashes == {
        "rp_scale": "42d855bb17ff",
        "rp_job": "46e51db31fc8",
        "rp_http": "0da3784eecf5",
        "rp_fitness": "90770dbc7de6",
    }


# ------------------------------------------------------------------ jobs


def test_jobs_of_every_kind(start: Any, platform: Platform) -> None:
    running = start()
    good = platform.put({"task": "fake", "steps": 3})
    assert platform.final(good) == {"output": {"done": good}}

    unknown = error_of(platform.final(platform.put({"tusk": "fake"})))
    assert unknown == {"code": "request_invalid", "message": "task is missing; it may be fake."}
    assert error_of(platform.final(platform.put(["no", "object"])))["code"] == "request_invalid"
    coded = error_of(platform.final(platform.put({"task": "fake", "fail": "coded"})))
    assert coded["code"] == "clip_damaged"
    broken = platform.put({"task": "fake", "fail": "hard"})
    assert error_of(platform.final(broken))["code"] == "internal_error"
    assert error_of(platform.final(platform.put({"task": "fake", "bytes": True})))["code"] == "internal_error"

    again = platform.put({"task": "fake", "fail": "hard"}, job_id=good)
    platform.until(lambda: len(platform.finals(again)) == 2)
    assert platform.finals(again)[1] == {"output": {"done": good}}, "a known id is not worked on again"
    assert "/srv/secret/place broke" in running.log(), "the log knows what the caller must not"
    assert KEY not in running.log()
    assert platform.keys == {KEY}


def test_a_worker_with_several_cards_takes_as_many_jobs(start: Any, platform: Platform) -> None:
    running = start(slots=2)
    jobs = [platform.put({"task": "fake", "steps": 60, "seconds": 0.05}) for _ in range(3)]
    platform.until(lambda: len([job for job in jobs if platform.reports.get(job)]) == 2)  # they tell progress
    platform.until(lambda: all(platform.finals(job) for job in jobs), 30)
    assert [platform.final(job) for job in jobs] == [{"output": {"done": job}} for job in jobs]
    both = [platform.put({"task": "fake", "steps": 40, "seconds": 0.05}) for _ in range(2)]
    platform.until(lambda: all(platform.reports.get(job) for job in both))
    running.terminate()
    assert [platform.final(job, 20) for job in both] == [{"output": {"done": job}} for job in both]


def test_progress_is_in_order_and_never_after_the_result(start: Any, platform: Platform) -> None:
    start()
    platform.slow = 0.1  # each report takes longer than a step
    job = platform.put({"task": "fake", "steps": 60, "seconds": 0.02})
    platform.final(job)
    time.sleep(0.4)
    reports = platform.reports[job]
    percents = [each.body["output"]["percent"] for each in reports[:-1]]
    assert len(percents) >= 3
    assert percents == sorted(percents)
    assert [each.final for each in reports] == [False] * len(percents) + [True]
    assert set(reports[0].body["output"]) == {"step", "percent", "eta_seconds"}


def test_a_stream_is_sent_piece_by_piece(start: Any, platform: Platform) -> None:
    start()
    job = platform.put({"task": "fake", "steps": 4, "seconds": 0.03, "stream": True})
    final = platform.final(job)
    pieces = [each.body["output"] for each in platform.reports[job] if each.kind == "job-stream"]
    assert pieces == [{"number": n, "frame": n, "data": ""} for n in range(4)]
    assert final == {"output": {"done": job}}
    assert platform.reports[job][-1].query["isStream"] == ["true"]

    failed = platform.put({"task": "fake", "steps": 2, "stream": True, "fail": "coded"})
    assert error_of(platform.final(failed))["code"] == "clip_damaged"


def test_a_cancelled_job_stops_and_the_worker_lives_on(start: Any, platform: Platform) -> None:
    start()
    job = platform.put({"task": "fake", "steps": 1000, "seconds": 0.02})
    platform.until(lambda: job in platform.reports, what="progress")
    platform.stop(job)
    following = platform.put({"task": "fake"})
    began = time.monotonic()
    assert platform.final(following) == {"output": {"done": following}}
    assert time.monotonic() - began < 4
    assert not platform.finals(job), "the platform knows that it cancelled the job"


def test_a_result_outlives_an_outage_of_the_platform(start: Any, platform: Platform) -> None:
    start()
    platform.down = True
    job = platform.put({"task": "fake"})
    platform.until(lambda: job in platform.taken)
    time.sleep(5)  # the SDK alone gives up after four
    assert not platform.finals(job)
    platform.down = False
    assert platform.final(job, 20) == {"output": {"done": job}}
    time.sleep(0.2)
    assert len(platform.finals(job)) == 1


def test_after_memory_ran_out_the_worker_is_replaced(start: Any, platform: Platform) -> None:
    running = start()
    report = dict(platform.final(platform.put({"task": "fake", "memory": True})))
    assert report.pop("stopPod") is True
    assert error_of(report)["code"] == "out_of_memory"
    assert running.wait() == 0


def test_when_the_inference_thread_dies_the_job_fails_and_the_worker_is_replaced(
    start: Any, platform: Platform
) -> None:
    running = start()
    last = platform.put({"task": "fake", "no_threads": True})
    assert platform.final(last) == {"output": {"done": last}}
    report = dict(platform.final(platform.put({"task": "fake"})))
    assert report.pop("stopPod") is True
    assert error_of(report)["code"] == "worker_died"
    assert running.wait() == 0
    assert "can't start new thread" in running.log()


def test_a_worker_that_can_do_no_job_leaves_it_to_others(start: Any, platform: Platform) -> None:
    running = start(lost=1.0)
    assert running.wait() == 0
    job = platform.put({"task": "fake"})
    assert platform.waiting() == [job]


# ------------------------------------------------------------------ a worker that was killed


def test_a_job_that_killed_its_worker_is_reported_once_by_the_next(
    start: Any, platform: Platform, tmp_path: Path
) -> None:
    journal = str(tmp_path / "journal")
    first = start(journal=journal)
    done = platform.put({"task": "fake"})
    platform.final(done)
    job = platform.put({"task": "fake", "steps": 1000, "seconds": 0.02, "stream": True})
    platform.until(lambda: job in platform.reports, what="a piece")
    first.kill()
    for _ in range(2):
        second = start(journal=journal)
        assert error_of(platform.final(job))["code"] == "worker_died"
        following = platform.put({"task": "fake"})
        assert platform.final(following) == {"output": {"done": following}}
        time.sleep(0.1)
        second.kill()
    assert len(platform.finals(job)) == len(platform.finals(done)) == 1
    again = platform.put({"task": "fake"}, job_id=job)
    start(journal=journal)
    platform.until(lambda: len(platform.finals(again)) == 2)
    assert error_of(platform.finals(again)[1])["code"] == "worker_died", "it is not run again"


def test_a_result_that_could_not_be_reported_is_not_lost_with_its_worker(
    start: Any, platform: Platform, tmp_path: Path
) -> None:
    journal = tmp_path / "journal"
    first = start(journal=str(journal))
    platform.down = True
    job = platform.put({"task": "fake"})
    platform.until(lambda: '"COMPLETED"' in journal.read_text())
    first.kill()
    platform.down = False
    for _ in range(2):
        next_one = start(journal=str(journal))
        assert platform.final(job) == {"output": {"done": job}}
        time.sleep(0.1)
        next_one.terminate()
        assert next_one.wait() == 0
    assert len(platform.finals(job)) == 1


def test_what_sigterm_ended_is_not_reported_again(start: Any, platform: Platform, tmp_path: Path) -> None:
    journal = str(tmp_path / "journal")
    first = start(journal=journal, grace=0.2)
    job = platform.put({"task": "fake", "steps": 1, "seconds": 30})
    platform.until(lambda: job in platform.reports, what="progress")
    first.terminate()
    assert first.wait() == 0
    start(journal=journal)
    following = platform.put({"task": "fake"})
    platform.final(following)
    assert [error_of(each)["code"] for each in platform.finals(job)] == ["worker_stopping"]


# ------------------------------------------------------------------ children


def test_children_and_pings(start: Any, platform: Platform) -> None:
    """A child of a job inherits no secret; the heartbeat names the job, and ends with the worker."""
    running = start()
    names = platform.final(platform.put({"task": "fake", "environment": True}))["output"]["names"]
    assert {"PATH", "RUNPOD_POD_ID", "HOME_URL"} <= set(names)
    assert "QUEUE_URL" not in names
    assert not [name for name in names if "KEY" in name or "TOKEN" in name or "SECRET" in name]

    job = platform.put({"task": "fake", "steps": 25, "seconds": 0.1})
    platform.until(lambda: [job] in [ping.get("job_id") for ping in platform.pings], what="a ping")
    platform.final(job)
    running.terminate()
    assert running.wait() == 0
    time.sleep(0.1)
    count = len(platform.pings)
    time.sleep(1.2)
    assert len(platform.pings) == count


# ------------------------------------------------------------------ SIGTERM


def test_idle_it_exits_at_once_and_hears_of_no_job(start: Any, platform: Platform) -> None:
    running = start()
    running.terminate()
    time.sleep(0.1)
    job = platform.put({"task": "fake"})
    assert running.wait() == 0
    assert running.seconds < 1
    assert platform.waiting() == [job]


def test_the_running_job_finishes_and_no_other_is_taken(start: Any, platform: Platform) -> None:
    running = start()
    job = platform.put({"task": "fake", "steps": 40, "seconds": 0.03})
    platform.until(lambda: job in platform.reports, what="progress")
    running.terminate()
    other = platform.put({"task": "fake"})
    assert running.wait() == 0
    assert platform.finals(job) == [{"output": {"done": job}}]
    assert platform.waiting() == [other]


def test_beyond_the_grace_the_job_is_reported(start: Any, platform: Platform) -> None:
    running = start(grace=0.3)
    job = platform.put({"task": "fake", "steps": 1, "seconds": 30})  # asks nothing for 30 s
    platform.until(lambda: job in platform.reports, what="progress")
    running.terminate()
    assert running.wait() == 0
    assert running.seconds < 2
    assert [error_of(each)["code"] for each in platform.finals(job)] == ["worker_stopping"]


@pytest.mark.parametrize("delay", [0.0, 0.02, 0.2], ids=lambda delay: f"answer after {delay} s")
def test_no_job_is_lost_in_the_moment_of_sigterm(start: Any, platform: Platform, delay: float) -> None:
    """Jobs are handed out around SIGTERM, at random moments: each that was taken is reported exactly once."""
    moments = random.Random(delay)
    taken = 0
    for _ in range(12):
        running = start()
        platform.delay = delay
        offset = moments.uniform(-0.01, 0.01)
        if offset < 0:
            running.terminate()
            time.sleep(-offset)
        job = platform.put({"task": "fake", "steps": 2, "seconds": 0.01})
        if offset >= 0:
            time.sleep(offset)
            running.terminate()
        assert running.wait() == 0
        assert running.seconds < 2
        platform.delay = 0.0
        left = platform.waiting()
        assert (job in platform.taken) != (job in left)
        expected = [{"output": {"done": job}}] if job in platform.taken else []
        assert platform.finals(job) == expected, running.log()
        taken += job in platform.taken
    assert taken, "no moment was tried in which the job was taken"


# ------------------------------------------------------------------ boot


def test_no_job_is_taken_before_the_boot_is_over(start: Any, platform: Platform) -> None:
    job = platform.put({"task": "fake"})
    start(boot=0.6, polls=False)
    time.sleep(0.4)
    assert job not in platform.taken
    assert platform.final(job) == {"output": {"done": job}}


def test_a_failed_boot_is_reported_with_its_reason(start: Any, platform: Platform) -> None:
    reason = "seedvr2_ema_3b.pth holds 135 bytes, a pointer of git LFS; expected 13.6 GB."
    before, job = len(platform.pings), platform.put({"task": "fake"})
    running = start(reason=reason, boot=0.1, polls=False)
    assert running.wait() == 1
    ping = platform.pings[before]
    assert ping["status"] == ["unhealthy"]
    assert ping["check"] == ["checkpoints"]
    assert reason in ping["reason"][0]
    assert platform.waiting() == [job], "jobs wait for a worker that is whole"


def test_sigterm_while_it_boots_cancels_the_boot(start: Any) -> None:
    running = start(boot=60, polls=False)
    time.sleep(0.3)
    running.terminate()
    assert running.wait() == 0
    assert running.seconds < 1
    assert "partial files removed" in running.log()


def test_sigterm_at_any_moment_of_the_start(start: Any, platform: Platform) -> None:
    moments = random.Random(7)
    for _ in range(10):
        job = platform.put({"task": "fake", "seconds": 0.01})
        running = start(boot=0.05, polls=False)
        time.sleep(moments.uniform(0.0, 0.15))
        running.terminate()
        assert running.wait() in (0, -signal.SIGTERM)  # by the signal itself: before Python could catch it
        assert running.seconds < 1
        left = platform.waiting()
        assert (job in platform.taken) != (job in left)
        assert len(platform.finals(job)) == (job in platform.taken), running.log()
        platform.until(lambda running=running: not running.left(), what="the end of its children")


def test_the_boot_is_the_last_check() -> None:
    """The SDK's own checks run beside the boot, not after it."""
    registered: list[Any] = []
    registered += [worker.boot_is_last(None, registered.append), print]  # type: ignore[arg-type]
    registered[0]()
    assert [check.__name__ for check in registered] == ["seedpod", "print", "checkpoints"]


def test_a_staged_file_does_not_fail_the_disk_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """Staging keeps 10% free, as much as the SDK wants; what is written meanwhile must not fail it."""
    from runpod.serverless.modules import rp_system_fitness as checks

    from app.boot.places import default_places

    ours = worker.SDK_SETTINGS["RUNPOD_MIN_DISK_PERCENT"]
    assert all(100 * place.keep > float(ours) for place in default_places().order)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=100, used=92, free=8))
    try:
        for percent, refused in ((ours, False), ("10", True)):
            monkeypatch.setenv("RUNPOD_MIN_DISK_PERCENT", percent)
            importlib.reload(checks)
            with pytest.raises(RuntimeError, match="disk space") if refused else nullcontext():
                checks._check_disk_space()
    finally:
        monkeypatch.undo()
        importlib.reload(checks)


# ------------------------------------------------------------------ process 1


@pytest.mark.skipif(os.geteuid() != 0, reason="a process namespace of its own needs root")
@pytest.mark.parametrize("boot", [0.0, 60.0], ids=["idle", "booting"])
def test_sigterm_reaches_process_1(platform: Platform, environment: dict[str, str], boot: float) -> None:
    command = [sys.executable, "-m", "tests.serve.worker_process", json.dumps({"boot": boot})]
    outer = subprocess.Popen(
        ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", *command],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        if boot:
            time.sleep(0.5)  # the SDK is being imported
        else:
            platform.until(lambda: platform.polls, START, "a poll of the worker")
        children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()
        inner = int(children[0])
        assert "NSpid:" in (status := Path(f"/proc/{inner}/status").read_text())
        assert next(line for line in status.splitlines() if line.startswith("NSpid:")).split()[-1] == "1"
        began = time.monotonic()
        os.kill(inner, 15)
        assert outer.wait(10) == 0
        assert time.monotonic() - began < 2
        assert outer.stdout is not None
        lines = [json.loads(line) for line in outer.stdout.read().splitlines()]  # nothing else is there
        assert boot or "stopping: no new job is taken" in [line["message"] for line in lines]
        assert boot or "runpod" in {line["logger"] for line in lines}
        assert "debug" not in {line["level"] for line in lines}, "the SDK's debug lines hold payloads"
    finally:
        outer.kill()
        outer.wait()
