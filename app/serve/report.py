"""A session for results and pieces of streams, which outlives an outage of the platform's API.

The SDK tries three times within four seconds and then drops the result of a job that may have taken ten
minutes, with a line in the log. It does not know what it sends.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Final

from aiohttp import (
    ClientError,
    ClientHandlerType,
    ClientRequest,
    ClientResponse,
    ClientSession,
    ClientTimeout,
)

OUTAGE: Final = 300.0  # seconds that a result is offered again
CONNECT: Final = 10.0  # seconds to connect
ANSWER: Final = 60.0  # seconds without a byte, after which a connection counts as dead
PAUSES: Final = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0)  # seconds between tries; the last for all further ones
_AGAIN: Final = {408, 425, 429}  # and 500 to 599
_log = logging.getLogger(__name__)


class UndeliveredError(Exception):
    """Nobody took it. No `ClientError`: that, the SDK's sender would swallow."""


def patient_session(like: ClientSession) -> ClientSession:
    """A session with the headers of `like`, that asks again while nobody answers, or with an answer that
    will not last; after five minutes it raises `UndeliveredError`."""
    timeout = ClientTimeout(total=None, sock_connect=CONNECT, sock_read=ANSWER)
    return ClientSession(headers=like.headers, timeout=timeout, middlewares=(_patiently,))


async def _patiently(request: ClientRequest, handler: ClientHandlerType) -> ClientResponse:
    end = time.monotonic() + OUTAGE
    tries = 0
    while True:
        pause = PAUSES[min(tries, len(PAUSES) - 1)]
        last = time.monotonic() + pause > end
        try:
            response = await handler(request)
            if not (response.status in _AGAIN or response.status >= 500):
                return response
            reason = f"status {response.status}"
            response.release()
        except (ClientError, OSError) as error:
            reason = type(error).__name__
        if last:
            raise UndeliveredError(reason)
        tries += 1
        _log.warning("a report did not reach the platform (%s); again in %.1f s", reason, pause)
        await asyncio.sleep(pause)
