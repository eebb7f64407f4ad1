"""The platform's stand-in, and real worker processes for it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serve.platform import Platform
from tests.serve.worker_process import QUICK, ROOT, START, Running, Workers


@pytest.fixture(scope="module")
def platform() -> Iterator[Platform]:
    server = Platform()
    yield server
    server.close()


@pytest.fixture(scope="module")
def environment(platform: Platform) -> dict[str, str]:
    return {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
        "BUCKET_SECRET_ACCESS_KEY": "bucket-secret",
        "HF_TOKEN": "hf_secret",
        "QUEUE_URL": "amqp://me:secret@queue.example/",
        "HOME_URL": "https://example.com/a:b@c",
        **QUICK,
        **platform.environment(),
    }


@pytest.fixture(scope="module")
def workers(environment: dict[str, str]) -> Iterator[Workers]:
    made = Workers(environment)
    yield made
    made.close()


@pytest.fixture
def start(workers: Workers, platform: Platform, tmp_path: Path) -> Iterator[Any]:
    """Starts a worker and waits until it polls."""
    started: list[Running] = []

    def starter(*, polls: bool = True, **options: Any) -> Running:
        running = workers.start(tmp_path / f"log{len(started)}", **options)
        started.append(running)
        if polls:
            platform.until(lambda: platform.polls, START, "a poll of the worker")
        return running

    yield starter
    for running in started:
        running.kill()
    platform.until(lambda: not platform.polls)
    platform.waiting()
    platform.delay = platform.slow = 0.0
    platform.down = False
