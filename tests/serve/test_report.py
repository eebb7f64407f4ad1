"""Reports reach a platform that is away for a while, and are told from those that nobody took."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from aiohttp import ClientSession, web

from app.serve import report
from app.serve.report import UndeliveredError, patient_session

Answer = Callable[[], Awaitable[int]]


async def hang() -> int:
    await asyncio.sleep(5)
    return 200


def status(number: int) -> Answer:
    async def answer() -> int:
        return number

    return answer


async def drop() -> int:
    raise ConnectionResetError


def posted(*answers: Answer) -> tuple[int, int]:
    """The status of a POST to a server that gives these answers, the last one again and again; and how often
    it was asked."""
    asked = 0

    async def handle(request: web.Request) -> web.Response:
        nonlocal asked
        asked += 1
        try:
            return web.Response(status=await answers[min(asked, len(answers)) - 1]())
        except ConnectionResetError:
            assert request.transport is not None
            request.transport.close()
            raise

    async def main() -> int:
        app = web.Application()
        app.router.add_post("/", handle)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        assert site._server is not None
        port = site._server.sockets[0].getsockname()[1]  # type: ignore[attr-defined]
        try:
            async with ClientSession() as like, patient_session(like) as session:
                return (await session.post(f"http://127.0.0.1:{port}/", data="result")).status
        finally:
            await runner.cleanup()

    return asyncio.run(main()), asked


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "PAUSES", (0.01,))
    monkeypatch.setattr(report, "OUTAGE", 1.0)
    monkeypatch.setattr(report, "ANSWER", 0.1)


@pytest.mark.parametrize("answer", [hang, drop, status(500), status(503), status(429)])
def test_it_is_offered_again_until_it_is_taken(answer: Answer) -> None:
    assert posted(answer, answer, status(200)) == (200, 3)


@pytest.mark.parametrize("number", [200, 400, 404])
def test_an_answer_that_lasts_is_the_answer(number: int) -> None:
    assert posted(status(number)) == (number, 1)


@pytest.mark.parametrize("answer", [drop, status(503)])
def test_what_nobody_takes_is_told(answer: Answer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "OUTAGE", 0.05)
    with pytest.raises(UndeliveredError):
        posted(answer)


def test_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "OUTAGE", 0.05)

    async def main() -> None:
        async with ClientSession() as like, patient_session(like) as session:
            await session.post("http://127.0.0.1:9/", data="result")

    with pytest.raises(UndeliveredError):
        asyncio.run(main())
