"""The log: both formats, the job's id, and no secret anywhere."""

from __future__ import annotations

import io
import json
import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import SecretStr

from app import logs

KEY = "rp_9f8e7d/6c+5b=="
log = logging.getLogger("app.test")


@pytest.fixture(autouse=True)
def restored_root() -> Iterator[None]:
    """The root logger as it was: other tests share it."""
    root = logging.getLogger()
    level = root.level
    yield
    root.setLevel(level)
    root.handlers[:] = [each for each in root.handlers if each.get_name() != "app.logs"]


def as_json(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_json_lines_hold_time_level_message_and_what_was_added() -> None:
    stream = io.StringIO()
    logs.setup("json", stream)
    log.warning("staged %s", "vae.pth", extra={"seconds": 1.5, "bytes": 12})
    (line,) = as_json(stream)
    assert line.pop("time").endswith("Z")
    assert line == {
        "level": "warning", "message": "staged vae.pth", "logger": "app.test", "seconds": 1.5, "bytes": 12
    }  # fmt: skip


def test_a_line_of_a_job_holds_its_id_and_others_do_not() -> None:
    stream = io.StringIO()
    logs.setup("json", stream)

    def inside() -> None:
        with logs.of_job("job-1"):
            log.info("in")
        log.info("after")

    thread = threading.Thread(target=inside)
    with logs.of_job("job-0"):
        thread.start()
        thread.join()
        log.info("beside")
    assert [line.get("job") for line in as_json(stream)] == ["job-1", None, "job-0"]


def test_human_lines() -> None:
    stream = io.StringIO()
    logs.setup("human", stream)
    with logs.of_job("abc"):
        log.info("frames: %d", 3)
        log.error("gone")
    first, second = stream.getvalue().splitlines()
    assert first[8:] == " [abc] frames: 3"
    assert second[8:] == " error [abc] gone"


@pytest.mark.parametrize(("hosted", "json_lines"), [(True, True), (False, False)])
def test_auto_is_json_where_hosted(hosted: bool, json_lines: bool) -> None:
    stream = io.StringIO()
    logs.setup("auto", stream, hosted=hosted)
    log.info("hello")
    assert stream.getvalue().startswith("{") == json_lines


def test_setup_twice_writes_once() -> None:
    first, second = io.StringIO(), io.StringIO()
    logs.setup("human", first)
    logs.setup("human", second)
    log.info("hello")
    assert not first.getvalue()
    assert second.getvalue().count("hello") == 1


@pytest.mark.parametrize("format", ["json", "human"])
@pytest.mark.parametrize(
    "say",
    [
        lambda: log.info("key %s", KEY),
        lambda: log.info("key " + KEY),
        lambda: log.info("key %s", SecretStr(KEY)),
        lambda: log.info("all", extra={"headers": {"auth": [f"Bearer {KEY}"], KEY: 1}}),
        lambda: log.info("all", extra={"key": SecretStr(KEY)}),
        lambda: log.info("url https://host/?key=%s", "rp_9f8e7d%2F6c%2B5b%3D%3D"),
        lambda: log.info("%r", {"key": KEY}),
        lambda: log.info("%d of %d", KEY),
        lambda: log.info("%d", SecretStr(KEY)),
    ],
)
def test_a_secret_is_masked_wherever_it_is(say: Any, format: Any, capsys: pytest.CaptureFixture[str]) -> None:
    logging.getLogger().handlers.clear()  # the test runner's own raises where a real one does not
    stream = io.StringIO()
    logs.setup(format, stream, secrets=[SecretStr(KEY), None, ""])
    say()
    assert stream.getvalue()
    printed = stream.getvalue() + "".join(capsys.readouterr())
    assert KEY not in printed
    assert "9f8e7d" not in printed


def test_a_secret_is_masked_in_a_traceback() -> None:
    stream = io.StringIO()
    logs.setup("json", stream, secrets=[KEY])
    try:
        raise ValueError(f"denied for {KEY}")
    except ValueError as error:
        log.exception("failed: %s", error)
    (line,) = as_json(stream)
    assert "ValueError: denied for **********" in line["traceback"]
    assert line["message"] == "failed: denied for **********"


def test_a_secret_with_quotes_and_a_secret_within_a_secret() -> None:
    mask = logs.Mask(['pa"ss\\word', "word1234", "word1234-long"])
    assert mask(json.dumps({"a": 'pa"ss\\word'})) == '{"a": "**********"}'
    assert mask("word1234-long word1234") == "********** **********"


def test_a_short_word_is_no_secret() -> None:
    assert logs.Mask(["a", "1"])("a 1") == "a 1"


def test_what_is_printed_to_a_log_stream_is_logged() -> None:
    stream = io.StringIO()
    logs.setup("json", stream)
    print("restore: 3 frames", file=logs.LogStream("app.other"), flush=True)
    (line,) = as_json(stream)
    assert (line["message"], line["logger"]) == ("restore: 3 frames", "app.other")
