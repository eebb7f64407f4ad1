"""The local server: RunPod's endpoint API, in front of a lifecycle. What works here works there.

Every answer that is not 2xx is `{"error": {"code", "message"}}`. Knows nothing of video or of models: what
a payload may be is given to it.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from ipaddress import ip_address
from typing import Annotated, Any, Final, Literal, Protocol
from urllib.parse import urlsplit

from fastapi import APIRouter, Depends, FastAPI, Path, Query, Request, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel

from app import __version__
from app.errors import UnavailableError, UsageError
from app.serve.body import check_type, parse_run, read_body
from app.serve.lifecycle import Lifecycle
from app.serve.metrics import Metrics
from app.serve.openapi import describe, refusals, run_body
from app.serve.outcome import without_paths
from app.serve.record import Record
from app.serve.refusals import answered, install_handlers
from app.serve.schemas import (
    HealthAnswer,
    JobAnswer,
    PurgeAnswer,
    ReadyAnswer,
    StatusAnswer,
    StreamAnswer,
    health_answer,
    job_answer,
    status_answer,
    stream_answer,
)

MAX_BODY_BYTES: Final = 10_000_000  # of `run`, as on the platform; `runsync` takes twice as much
SYNC_WAIT_SECONDS: Final = 90.0  # as on the platform
CANCEL_WAIT: Final = 1.0  # seconds for a running job to stop; the official client waits three for the answer
DAY: Final = 86_400.0
# Names that nobody can have lead elsewhere: those that are not public, and those of the platform's gateways.
TRUSTED_NAMES: Final = (".localhost", ".local", ".internal", ".runpod.ai", ".runpod.net")

DESCRIPTION: Final = (
    "RunPod's endpoint API on your own machine: under `/v2/<endpoint>`, where the official client looks for "
    "it, and without that prefix. A job is queued and runs alone; jobs that come while the worker boots wait "
    "for it."
)

Validate = Callable[[Mapping[str, Any]], BaseModel]
JobId = Annotated[str, Path(description="The id that `run` or `runsync` answered.", examples=["clip-1"])]
Wait = Annotated[
    int | None, Query(ge=1000, le=300_000, description="Milliseconds to wait for the job to end.")
]
_bearer = HTTPBearer(auto_error=False, description="The key of SEEDPOD_API_KEY.")


class BootState(Protocol):
    """How the boot goes. `reason` tells why it failed; `seconds` it took, or has taken so far; `workers` how
    many processes are in each state."""

    @property
    def state(self) -> Literal["booting", "ready", "failed"]: ...
    @property
    def reason(self) -> str | None: ...
    @property
    def seconds(self) -> float: ...
    @property
    def workers(self) -> Mapping[str, int]: ...


def create_app(
    lifecycle: Lifecycle,
    boot_state: BootState,
    *,
    validate: Validate,
    payloads: Mapping[str, type[BaseModel]],
    api_key: str | None = None,
    endpoint: str = "local",
    max_body_bytes: int = MAX_BODY_BYTES,
    sync_wait_seconds: float = SYNC_WAIT_SECONDS,
) -> FastAPI:
    """The server's ASGI app.

    Args:
        validate: Checks a payload before it is queued; raises UsageError.
        payloads: The models that `validate` checks against, by task, for the OpenAPI page.
        api_key: If given, every call but /ping, /docs and /openapi.json needs `Authorization: Bearer <key>`;
            if not, they answer only under an address or a local name.
        endpoint: The endpoint's id, as clients name it.
        max_body_bytes: Of a `run` request; `runsync` takes twice as much.
        sync_wait_seconds: How long `runsync` waits where the request does not say.
    """
    app = FastAPI(
        title="Seedpod", version=__version__, description=DESCRIPTION, redoc_url=None, redirect_slashes=False
    )
    install_handlers(app)
    api = Api(lifecycle, boot_state, validate, max_body_bytes, sync_wait_seconds)
    calls = _calls(api, run_body(payloads))
    guard = [Depends(_asked_by_its_own_name if api_key is None else _authorized(api_key))]
    refused = refusals(421 if api_key is None else 401)
    known = [*guard, Depends(_is_endpoint(endpoint))]
    app.include_router(
        calls, prefix="/v2/{endpoint_id}", dependencies=known, responses={**refused, **refusals(404)}
    )
    app.include_router(calls, dependencies=guard, responses=refused)
    app.include_router(_probe(api))
    app.include_router(_figures(api), dependencies=guard, responses=refused)
    app.openapi = lambda: describe(app, payloads, endpoint)  # type: ignore[method-assign]
    return app


class Api:
    """The calls, one method each."""

    def __init__(
        self,
        lifecycle: Lifecycle,
        boot: BootState,
        validate: Validate,
        max_body_bytes: int,
        sync_wait_seconds: float,
    ) -> None:
        self._lifecycle, self._boot, self._validate = lifecycle, boot, validate
        self._max_body_bytes, self._sync_wait_seconds = max_body_bytes, sync_wait_seconds
        self._metrics = Metrics(lifecycle, boot)
        self._watching: set[asyncio.Task[None]] = set()

    async def run(self, request: Request) -> Response:
        """Queue a job, and answer at once with its id."""
        return answered(job_answer(await self._submit(request, self._max_body_bytes)))

    async def runsync(self, request: Request, wait: Wait = None) -> Response:
        """Queue a job, and answer when it has ended, or with where it stands when the wait is over: it goes
        on, and `status` tells the rest."""
        record = await self._submit(request, 2 * self._max_body_bytes)
        seconds = self._sync_wait_seconds if wait is None else wait / 1000
        return answered(status_answer(await self._lifecycle.wait(record.id, seconds)))

    async def status(self, job_id: JobId) -> Response:
        """Where a job stands; its result, or why there is none, once it has ended."""
        return answered(status_answer(self._known(job_id)))

    async def stream(self, job_id: JobId) -> Response:
        """The pieces of a job's output that were made since the last call; each is given once. All are given
        when the status is final and the list is empty."""
        record = self._known(job_id)  # first: a piece that comes after this look is at worst given next time
        return answered(stream_answer(record, self._lifecycle.take_pieces(job_id)))

    async def cancel(self, job_id: JobId) -> Response:
        """Cancel a job. One that runs stops at its next step; one that has ended stays as it is."""
        self._known(job_id)
        self._lifecycle.cancel(job_id)
        return answered(job_answer(await self._lifecycle.wait(job_id, CANCEL_WAIT)))

    async def purge_queue(self) -> Response:
        """Cancel every job that waits. The one that runs goes on."""
        return answered(PurgeAnswer(removed=self._lifecycle.purge()))

    async def health(self) -> Response:
        """How many jobs there are, and what the worker does."""
        return answered(health_answer(self._lifecycle.counts(), self._boot.workers))

    async def ping(self) -> Response:
        """Whether the worker can take jobs, for load balancers; needs no key."""
        if self._lifecycle.draining:
            raise UnavailableError("draining", "The worker is stopping and takes no new job.")
        self._check_boot()
        if self._boot.state == "booting":
            return Response(status_code=204)
        return answered(ReadyAnswer(seconds=round(self._boot.seconds, 3)))

    async def metrics(self) -> Response:
        """Figures for Prometheus."""
        return Response(self._metrics.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _submit(self, request: Request, limit: int) -> Record:
        check_type(request.headers.get("content-type", ""))
        asked = parse_run(await read_body(request.stream(), limit))
        self._validate(asked.payload)
        self._check_boot()
        new = asked.job_id is None or self._lifecycle.get(asked.job_id) is None
        record = self._lifecycle.submit(asked.payload, asked.job_id)
        if new:
            task = asyncio.create_task(self._observe(record.id))
            self._watching.add(task)  # a task that nobody holds may be collected before it is done
            task.add_done_callback(self._watching.discard)
        return record

    async def _observe(self, job_id: str) -> None:
        """Count a job when it has ended."""
        with suppress(UsageError):  # it ended, and was forgotten, before this began
            while not (record := await self._lifecycle.wait(job_id, DAY)).state.final:
                continue
            self._metrics.observe(record)

    def _check_boot(self) -> None:
        if self._boot.state == "failed":
            reason = without_paths(self._boot.reason or "the log tells why.")
            raise UnavailableError("boot_failed", f"The worker did not boot, and takes no jobs: {reason}")

    def _known(self, job_id: str) -> Record:
        record = self._lifecycle.get(job_id)
        if record is None:
            raise UsageError(
                "job_unknown",
                f"Job {job_id[:128]!r} is not known here; expected the id of a job that was submitted to "
                "this worker and has not ended long ago.",
            )
        return record


def _calls(api: Api, body: dict[str, Any]) -> APIRouter:
    """RunPod's calls."""
    router = APIRouter(tags=["jobs"], redirect_slashes=False)
    submitting = refusals(400, 413, 415, 422, 429, 503)
    router.post("/run", response_model=JobAnswer, responses=submitting, openapi_extra=body)(api.run)
    router.post("/runsync", response_model=StatusAnswer, responses=submitting, openapi_extra=body)(
        api.runsync
    )
    # One route answers; an operation of the page cannot have two methods, so the other two describe it.
    router.api_route("/status/{job_id}", methods=["GET", "POST"], include_in_schema=False)(api.status)
    router.get("/status/{job_id}", response_model=StatusAnswer, responses=refusals(404))(api.status)
    router.post("/status/{job_id}", response_model=StatusAnswer, responses=refusals(404))(api.status)
    router.get("/stream/{job_id}", response_model=StreamAnswer, responses=refusals(404))(api.stream)
    router.post("/cancel/{job_id}", response_model=JobAnswer, responses=refusals(404))(api.cancel)
    router.post("/purge-queue", response_model=PurgeAnswer)(api.purge_queue)
    router.get("/health", response_model=HealthAnswer)(api.health)
    return router


def _probe(api: Api) -> APIRouter:
    router = APIRouter(tags=["worker"])
    booting: dict[int | str, dict[str, Any]] = {204: {"description": "Booting."}}
    router.get("/ping", response_model=ReadyAnswer, responses={**booting, **refusals(503)})(api.ping)
    return router


def _figures(api: Api) -> APIRouter:
    router = APIRouter(tags=["worker"])
    text: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}
    router.get("/metrics", response_class=Response, responses=text)(api.metrics)
    return router


async def _asked_by_its_own_name(request: Request) -> None:
    """Without a key, a web page could have its own name lead to this machine, and its scripts then ask here
    as if this were their site: nobody but a browser is fooled by that, and it sends the page's name."""
    host = request.headers.get("host", "")[:300]
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        name = host
    if "." not in name or name.endswith(TRUSTED_NAMES):
        return
    try:
        ip_address(name)
    except ValueError:
        raise UsageError(
            "host_refused",
            f"The request is for the host {name[:80]!r}; without a key, expected an address, localhost or "
            "another name without dots. Set SEEDPOD_API_KEY to serve under any name.",
        ) from None


def _authorized(api_key: str) -> Callable[..., Awaitable[None]]:
    async def check(given: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]) -> None:
        if given is None or not hmac.compare_digest(given.credentials.encode(), api_key.encode()):
            raise UsageError(
                "unauthorized",
                "The key is missing or wrong; expected the header Authorization: Bearer <key>, with the key "
                "that this server was started with.",
            )

    return check


def _is_endpoint(endpoint: str) -> Callable[..., Awaitable[None]]:
    async def check(endpoint_id: Annotated[str, Path(description="The endpoint's id.")]) -> None:
        if endpoint_id != endpoint:
            raise UsageError(
                "endpoint_unknown",
                f"Endpoint {endpoint_id[:80]!r} is not served here; expected {endpoint!r}.",
            )

    return check
