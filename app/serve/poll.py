"""One long poll at a time, that can be ended without losing what the server hands out in that moment.

Cancelling a request drops the connection with whatever is on its way: the server has given a job away, and
nobody has it. Here only our half of the connection is closed. A server that has answered by then is heard
to the end; one that has not sees that nobody waits, and keeps the job. It does not know what a job is.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TypeVar

from aiohttp import AddrInfoType, ClientSession, TCPConnector

T = TypeVar("T")

LINGER = 0.5  # seconds that an answer may still take after we hung up


class Poll:
    """A session of its own for the polls, since hanging up closes all its connections."""

    def __init__(self, like: ClientSession) -> None:
        """A session with the headers and timeouts of `like`."""
        self._sockets: list[socket.socket] = []
        self._session = ClientSession(
            connector=TCPConnector(limit=0, socket_factory=self._socket),
            headers=like.headers,
            timeout=like.timeout,
        )
        self._hung_up = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    async def __call__(self, request: Callable[[ClientSession], Awaitable[T]], seconds: float) -> T | None:
        """What `request` gives, or None if it gave nothing in `seconds`, or before `hang_up`."""
        if self._hung_up.is_set():
            return None
        self._idle.clear()
        asking = asyncio.ensure_future(request(self._session))
        ending = asyncio.ensure_future(self._hung_up.wait())
        try:
            await asyncio.wait({asking, ending}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if asking.done():
                return asking.result()
            self._close_our_half()
            with suppress(Exception):  # the server closed its half, too
                return await asyncio.wait_for(asking, LINGER)
            return None
        finally:
            asking.cancel()
            ending.cancel()
            self._idle.set()

    async def hang_up(self) -> None:
        """End the poll that is going on, and return when it has returned; later ones do not begin."""
        self._hung_up.set()
        await self._idle.wait()
        await self._session.close()

    def _socket(self, address: AddrInfoType) -> socket.socket:
        family, kind, protocol, _, _ = address
        made = socket.socket(family, kind, protocol)
        self._sockets = [each for each in self._sockets if each.fileno() != -1] + [made]
        return made

    def _close_our_half(self) -> None:
        for each in self._sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_WR)
