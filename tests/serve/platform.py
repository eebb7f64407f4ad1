"""A job server that speaks the platform's calls, as runpod 1.12.0 makes them.

    GET  job-take/$ID                  long poll: 200 with a job, or 204
    GET  job-take-batch/$ID            long poll: 200 with a list of jobs, or 204
    GET  job-stop/$ID                  long poll: the jobs to stop, or 204
    POST job-done/$RUNPOD_POD_ID/$ID   progress (status IN_PROGRESS), then the result
    POST job-stream/$RUNPOD_POD_ID/$ID a piece of a stream
    GET  ping/$RUNPOD_POD_ID           heartbeat, and a fitness check that failed

and those of callers, as its documentation has them: POST run, GET and POST status/$ID, GET stream/$ID, POST
cancel/$ID.

On bare sockets, so that it knows what a web framework hides: whether the worker still listened when a job
was handed out. A job is handed out only to a connection whose other half is open at that moment.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, urlsplit

KEY = "rpa_a_secret_of_the_worker"
WORKER = "worker-1"
POLL = 5.0  # seconds that a poll is held open
LARGEST_PIECE = 1_000_000  # bytes of a piece of a stream, with its envelope
LARGEST_RESULT = 20_000_000


@dataclass
class Report:
    """A POST of the worker."""

    kind: str  # job-done or job-stream
    body: dict[str, Any]
    query: dict[str, list[str]]
    time: float = field(default_factory=time.monotonic)
    given: bool = False  # a piece, to a caller

    @property
    def final(self) -> bool:
        return self.kind == "job-done" and self.body.get("status") != "IN_PROGRESS"


class Platform:
    """The server, in a thread. Its methods may be called from any other.

    `delay` holds back each answer to job-take after the job was given away; `slow` holds back the answer
    to each report; while `down` is set, reports are answered with 503.
    """

    def __init__(self) -> None:
        self.delay = self.slow = 0.0
        self.down = False
        self.taken: list[str] = []
        self.reports: dict[str, list[Report]] = {}
        self.pings: list[dict[str, list[str]]] = []
        self.keys: set[str] = set()
        self.polls = 0  # that are open
        self.cancelled: set[str] = set()
        self._jobs: list[dict[str, Any]] = []
        self._stops: list[str] = []
        self._loop = asyncio.new_event_loop()
        started = threading.Event()
        self._thread = threading.Thread(target=self._serve, args=(started,), daemon=True)
        self._thread.start()
        started.wait()

    # -------------------------------------------------------------- for tests

    def environment(self) -> dict[str, str]:
        """What the platform sets for a worker."""
        base = f"http://127.0.0.1:{self.port}/v2/endpoint"
        return {
            "RUNPOD_WEBHOOK_GET_JOB": f"{base}/job-take/$ID?gpu=none",
            "RUNPOD_WEBHOOK_POST_OUTPUT": f"{base}/job-done/$RUNPOD_POD_ID/$ID?gpu=none",
            "RUNPOD_WEBHOOK_POST_STREAM": f"{base}/job-stream/$RUNPOD_POD_ID/$ID?gpu=none",
            "RUNPOD_WEBHOOK_PING": f"{base}/ping/$RUNPOD_POD_ID",
            "RUNPOD_PING_INTERVAL": "1000",
            "RUNPOD_AI_API_KEY": KEY,
            "RUNPOD_POD_ID": WORKER,
            "RUNPOD_ENDPOINT_ID": "endpoint",
        }

    def put(self, payload: Any, job_id: str | None = None) -> str:
        """Queue a job; returns its id."""
        job_id = job_id or uuid.uuid4().hex
        self._call(self._add, self._jobs, {"id": job_id, "input": payload})
        return job_id

    def stop(self, job_id: str) -> None:
        """Cancel a job that a worker runs."""
        self._call(self._add, self._stops, job_id)

    def waiting(self) -> list[str]:
        """The jobs that nobody has taken; none of them is handed out any more."""

        async def take_back() -> list[str]:
            left = [job["id"] for job in self._jobs]
            self._jobs.clear()
            return left

        return self._call(take_back)

    def finals(self, job_id: str) -> list[dict[str, Any]]:
        """Every final report of a job."""
        return [each.body for each in self.reports.get(job_id, []) if each.final]

    def final(self, job_id: str, seconds: float = 10.0) -> dict[str, Any]:
        """The final report of a job, once it is there."""
        self.until(lambda: self.finals(job_id), seconds, f"a final report of {job_id}")
        return self.finals(job_id)[0]

    def until(self, condition: Callable[[], object], seconds: float = 10.0, what: str = "it") -> None:
        """Wait for a condition."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"{what} did not come within {seconds} s"
            time.sleep(0.005)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    # -------------------------------------------------------------- the server

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(function(*arguments), self._loop).result(10)

    async def _add(self, queue: list[Any], item: Any) -> None:
        queue.append(item)

    def _serve(self, started: threading.Event) -> None:
        async def begin() -> asyncio.Server:
            return await asyncio.start_server(self._connection, "127.0.0.1", 0, limit=64 << 20)

        async def end() -> None:
            server.close()
            connections = asyncio.all_tasks() - {asyncio.current_task()}
            for each in connections:
                each.cancel()
            await asyncio.gather(*connections, return_exceptions=True)

        server = self._loop.run_until_complete(begin())
        self.port = server.sockets[0].getsockname()[1]
        started.set()
        self._loop.run_forever()
        self._loop.run_until_complete(end())
        self._loop.close()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in head[1:] if line)}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                self.keys.add(headers.get("authorization", ""))
                status, answer = await self._answer(head[0].split(" ")[1], body, reader)
                data = json.dumps(answer).encode() if answer is not None else b""
                writer.write(
                    f"HTTP/1.1 {status} -\r\nContent-Type: application/json\r\n"
                    f"Content-Length: {len(data)}\r\n\r\n".encode()
                    + data
                )
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _answer(self, target: str, body: bytes, reader: asyncio.StreamReader) -> tuple[int, Any]:
        url = urlsplit(target)
        _, _, _, call, *names = url.path.split("/")
        query = parse_qs(url.query)
        if call in ("job-take", "job-take-batch"):
            self.polls += 1
            job = await self._poll(self._jobs, reader)
            self.polls -= 1
            if job is None:
                return 204, None
            more = int(query["batch_size"][0]) - 1 if call == "job-take-batch" else 0
            jobs = [job, *self._jobs[:more]]
            del self._jobs[:more]
            self.taken += [each["id"] for each in jobs]
            await asyncio.sleep(self.delay)
            return 200, jobs if call == "job-take-batch" else job
        if call == "job-stop":
            stopped = await self._poll(self._stops, reader)
            return (200, {"jobsToStop": [stopped]}) if stopped else (204, None)
        if call == "ping":
            self.pings.append(query)
            return 200, {}
        if call in ("run", "status", "stream", "cancel"):
            return 200, await self._asked(call, body, *names)
        if self.down:
            return 503, {}
        if len(body) > (LARGEST_PIECE if call == "job-stream" else LARGEST_RESULT):
            return 413, {}
        await asyncio.sleep(self.slow)
        self.reports.setdefault(names[1], []).append(Report(call, json.loads(body), query))
        return 200, {}

    async def _asked(self, call: str, body: bytes, job_id: str = "") -> dict[str, Any]:
        """A caller's call, and its answer."""
        if call == "run":
            job_id = uuid.uuid4().hex
            await self._add(self._jobs, {"id": job_id, "input": json.loads(body)["input"]})
            return {"id": job_id, "status": "IN_QUEUE"}
        if call == "cancel":
            await self._add(self._stops, job_id)
            self.cancelled.add(job_id)
            return {"id": job_id, "status": "CANCELLED"}
        reports = self.reports.get(job_id, [])
        told = [each.body for each in reports if each.kind == "job-done"]
        if call == "status":
            return {**(told[-1] if told else {}), "id": job_id, "status": self._status(job_id)}
        new = [each for each in reports if each.kind == "job-stream" and not each.given]
        for each in new:
            each.given = True
        return {"status": self._status(job_id), "stream": [each.body for each in new]}

    def _status(self, job_id: str) -> str:
        finals = self.finals(job_id)
        if job_id in self.cancelled:
            return "CANCELLED"
        if finals:
            return "FAILED" if "error" in finals[0] else "COMPLETED"
        return "IN_PROGRESS" if job_id in self.taken else "IN_QUEUE"

    async def _poll(self, queue: list[Any], reader: asyncio.StreamReader) -> Any:
        """The next item of a queue, given only to a worker that still listens; None after a while."""
        end = time.monotonic() + POLL
        while not reader.at_eof() and time.monotonic() < end:
            if queue:
                return queue.pop(0)
            await asyncio.sleep(0.003)
        return None
