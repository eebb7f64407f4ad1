"""Ranks that fail: the work ends with the reason, and soon."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from app.errors import ConfigError, UnavailableError
from app.nn.exchange import broadcast
from app.nn.ranks import Order, Ranks
from tests.models import sharing


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    group = Ranks(2, torch.device("cpu"), patience=5)
    yield group
    group.close()


def led() -> list[str]:
    """The processes that this one leads."""
    me = Path("/proc/self/task").glob("*/children")
    children = [int(child) for tasks in me for child in tasks.read_text().split()]
    commands = [Path(f"/proc/{child}/cmdline").read_bytes().decode() for child in children]
    return [command for command in commands if "app.nn.ranks" in command]


@pytest.mark.parametrize(
    ("order", "reason"),
    [
        (sharing.fail, "rank 1 failed: ValueError: no luck"),
        (sharing.run_out, "rank 1 failed: its memory ran out"),
        (sharing.die, r"rank 1 failed: its process died \(SIGKILL"),
        (sharing.sleep, "another rank cannot be reached"),
    ],
)
def test_a_rank_that_fails_ends_the_work_with_its_reason(ranks: Ranks, order: Order, reason: str) -> None:
    with ranks.work(sharing.meet):
        broadcast(torch.ones(1))
    begin = time.monotonic()
    with (
        pytest.raises(UnavailableError, match=f"shared by 2 processes, and {reason}") as caught,
        torch.inference_mode(),
        ranks.work(order),
    ):
        broadcast(torch.ones(1))
    assert caught.value.code == "rank_failed"
    assert time.monotonic() - begin < 20
    assert led() == []
    with pytest.raises(UnavailableError, match=f"they were ended before: {reason}"), ranks.work(order):
        pass


def test_a_rank_that_only_does_not_answer(ranks: Ranks) -> None:
    """Where this one's own part asks nothing of it."""
    with pytest.raises(UnavailableError, match="rank 1 has not answered for 5 s"), ranks.work(sharing.sleep):
        pass
    assert led() == []


def test_an_error_of_the_leaders_own_part_stays_what_it_is(ranks: Ranks) -> None:
    with pytest.raises(ZeroDivisionError), ranks.work(sharing.meet):
        print(1 / 0)
    assert led() == []


def test_what_is_wrong_for_all_ranks_is_told_as_what_it_is(ranks: Ranks) -> None:
    """A file or a compiler: whichever rank finds it first, the code and the status are those of one card."""
    with pytest.raises(ConfigError, match="wrong for all"), ranks.work(sharing.fail):
        assert ranks._others[0].process.wait(20) != 0
        raise ConfigError("some_code", "This is wrong for all.")
    assert led() == []


def test_a_leader_that_is_killed_leaves_nobody(tmp_path: Path) -> None:
    code = f"""
import os, signal, torch
from app.nn.ranks import Ranks
from tests.models import sharing
from tests.nn.test_ranks import led
ranks = Ranks(3, torch.device("cpu"))
with ranks.work(sharing.sleep):
    pids = [other.process.pid for other in ranks._others]
    open({str(tmp_path / "pids")!r}, "w").write(" ".join(map(str, pids)))
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code])
    assert done.returncode == -9
    pids = (tmp_path / "pids").read_text().split()
    assert len(pids) == 2
    end = time.monotonic() + 10
    while any("app.nn.ranks" in _command(pid) for pid in pids):
        assert time.monotonic() < end
        time.sleep(0.05)


def _command(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode()
    except OSError:
        return ""


def test_more_cards_than_there_are_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UnavailableError, match=r"to run on 4 cards .* shows 2 CUDA devices") as caught:
        Ranks(4, torch.device("cuda"))
    assert caught.value.code == "device_unavailable"
    with pytest.raises(UnavailableError):
        Ranks(2, torch.device("cuda:1"))
    assert Ranks(2, torch.device("cuda")).member.device == torch.device("cuda:0")  # torch joins no other
