import io

import pytest

from examples.serve.distribute.show import Show, duration_text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def show_on(stream: io.StringIO) -> str:
    now = iter(range(0, 1000, 5))
    show = Show(stream, lambda: float(next(now)))
    begun = 0.0
    show.step("reading", 5, 100, begun)
    show.step("restoring", 50, 100, begun, ", 3 jobs")
    show.line("part 2 failed")
    for done in range(60, 101, 10):
        show.step("restoring", done, 100, begun, ", 3 jobs")
    show.close()
    return stream.getvalue()


def test_a_terminal_gets_one_line_that_changes() -> None:
    lines = show_on(Terminal()).split("\n")
    assert len(lines) == 2
    assert lines[0].endswith("\rpart 2 failed")
    assert "restoring 50 %, 5 s left, 3 jobs\r" in lines[0]
    assert lines[1].endswith(" \r")


def test_a_log_gets_a_line_now_and_then() -> None:
    lines = show_on(io.StringIO()).splitlines()
    assert lines[:2] == ["reading 5 %, 0 s left", "part 2 failed"]
    assert 3 <= len(lines) <= 5
    assert not any("\r" in line for line in lines)


@pytest.mark.parametrize(("seconds", "text"), [(3.2, "3 s"), (600, "10 min"), (7500, "2 h 05 min")])
def test_durations(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text
