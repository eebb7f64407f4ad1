"""The local server's process: uvicorn around the app, and what happens when it is asked to stop.

It does not know what a job is, or how one is asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

import uvicorn

from app.errors import InternalError, UnavailableError
from app.serve.lifecycle import Lifecycle
from app.serve.stop import Stop, leave

if TYPE_CHECKING:
    import threading

    from fastapi import FastAPI

log = logging.getLogger(__name__)

LOOK = 0.5  # seconds between two looks at whether jobs can run
LINGER = 2  # seconds that open connections have to end when the process stops


class Boot(Protocol):
    """What must be given up when the process stops."""

    cancel: threading.Event


class _Server(uvicorn.Server):
    """Leaves signals to `Stop`."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve_on_desk(
    app: FastAPI, lifecycle: Lifecycle, boot: Boot, stop: Stop, *, host: str, port: int, grace: float
) -> None:
    """Serve until the process is asked to stop; the running job then has `grace` seconds. Ends with status
    70 where no job can run any more. Never returns; main thread only.

    Raises:
        UnavailableError: `port_unavailable`: the address cannot be listened on.
    """
    try:
        listening = socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET
        )
    except OSError as error:
        raise UnavailableError(
            "port_unavailable",
            f"{host}:{port} cannot be listened on: {error.strerror}. Set SEEDPOD_HOST and SEEDPOD_PORT to an "
            "address that is free.",
        ) from None
    log.info("listening on http://%s:%d", host, listening.getsockname()[1])
    config = uvicorn.Config(
        app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=LINGER
    )
    asyncio.run(_serve(_Server(config), listening, lifecycle, boot, stop, grace))
    leave(InternalError.exit_status if lifecycle.dead else 0)


async def _serve(
    server: _Server, listening: socket.socket, lifecycle: Lifecycle, boot: Boot, stop: Stop, grace: float
) -> None:
    loop = asyncio.get_running_loop()
    asked = asyncio.Event()
    stop.then(lambda: loop.call_soon_threadsafe(asked.set))
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    stopping = asyncio.create_task(asked.wait())
    dying = asyncio.create_task(_dead(lifecycle))
    await asyncio.wait({serving, stopping, dying}, return_when=asyncio.FIRST_COMPLETED)
    if lifecycle.dead:
        log.critical("no job can run here any more; start the server again")
    if asked.is_set() or lifecycle.dead:
        log.info("stopping")
        boot.cancel.set()
        await lifecycle.drain(grace)
        lifecycle.close()
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # whom it cuts off now is no error
        server.should_exit = True
    await serving


async def _dead(lifecycle: Lifecycle) -> None:
    """Return when no job can run any more."""
    while not lifecycle.dead:
        await asyncio.sleep(LOOK)
