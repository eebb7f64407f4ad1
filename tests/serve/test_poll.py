"""A long poll that ends while the server hands something out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import pytest
from aiohttp import ClientError, ClientSession

from app.serve.poll import LINGER, Poll
from tests.serve.platform import Platform


@pytest.fixture(scope="module")
def platform() -> Iterator[Platform]:
    server = Platform()
    yield server
    server.close()


def poll_once(platform: Platform, seconds: float, *, hang_up_after: float | None = None) -> Any:
    """What one poll of job-take gives."""
    address = platform.environment()["RUNPOD_WEBHOOK_GET_JOB"]

    async def ask(session: ClientSession) -> Any:
        async with session.get(address) as response:
            return await response.json() if response.status == 200 else None

    async def main() -> Any:
        async with ClientSession() as like:
            poll = Poll(like)
            if hang_up_after is not None:
                asyncio.get_running_loop().call_later(
                    hang_up_after, lambda: asyncio.ensure_future(poll.hang_up())
                )
            try:
                return await poll(ask, seconds)
            finally:
                await poll.hang_up()

    return asyncio.run(main())


@pytest.mark.parametrize("hang_up_after", [None, 0.05], ids=["too long", "hung up"])
def test_what_is_on_its_way_is_heard(platform: Platform, hang_up_after: float | None) -> None:
    platform.delay = 0.2
    job = platform.put({})
    seconds = 5.0 if hang_up_after else 0.05
    assert poll_once(platform, seconds, hang_up_after=hang_up_after) == {"id": job, "input": {}}


@pytest.mark.parametrize("hang_up_after", [None, 0.05], ids=["too long", "hung up"])
def test_a_server_with_nothing_to_say_is_not_waited_for(
    platform: Platform, hang_up_after: float | None
) -> None:
    seconds = 5.0 if hang_up_after else 0.05
    began = time.monotonic()
    assert poll_once(platform, seconds, hang_up_after=hang_up_after) is None
    assert time.monotonic() - began < 0.05 + LINGER
    platform.until(lambda: not platform.polls, 0.5, "the end of the poll")
    job = platform.put({})
    time.sleep(0.02)
    assert platform.waiting() == [job]


def test_an_error_is_told(platform: Platform) -> None:
    async def fail(session: ClientSession) -> Any:
        raise ClientError("no route")

    async def main() -> None:
        async with ClientSession() as like:
            poll = Poll(like)
            with pytest.raises(ClientError, match="no route"):
                await poll(fail, 1.0)
            await poll.hang_up()
            assert await poll(fail, 1.0) is None, "after hanging up nothing is asked"

    asyncio.run(main())
