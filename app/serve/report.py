"""A session for results, which outlives an outage of the platform's API.

The SDK tries three times within four seconds and then drops the result of a job that may have taken ten
minutes. It does not know what it sends.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Final

from aiohttp import ClientError, ClientHandlerType, ClientRequest, ClientResponse, ClientSession

OUTAGE: Final = 300.0  # seconds that a result is offered again
PAUSES: Final = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0)  # seconds between tries; the last for all further ones
_AGAIN: Final = {408, 425, 429}  # and 500 to 599
_log = logging.getLogger(__name__)


def patient_session(like: ClientSession) -> ClientSession:
    """A session with the headers and timeouts of `like`, that asks again while nobody answers, or with an
    answer that will not last."""
    return ClientSession(headers=like.headers, timeout=like.timeout, middlewares=(_patiently,))


async def _patiently(request: ClientRequest, handler: ClientHandlerType) -> ClientResponse:
    end = time.monotonic() + OUTAGE
    tries = 0
    while True:
        pause = PAUSES[min(tries, len(PAUSES) - 1)]
        last = time.monotonic() + pause > end
        try:
            response = await handler(request)
            if last or not (response.status in _AGAIN or response.status >= 500):
                return response
            reason = f"status {response.status}"
            response.release()
        except (ClientError, OSError) as error:
            if last:
                raise
            reason = type(error).__name__
        tries += 1
        _log.warning("a report did not reach the platform (%s); again in %.1f s", reason, pause)
        await asyncio.sleep(pause)
