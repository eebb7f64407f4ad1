"""Processes that work on one model together, each on a card of its own. This one is rank 0, and leads.

Orders go to the others through a pipe each, tensors through torch.distributed: NCCL between cards, gloo
between CPUs. Where a rank fails, all are ended and the work with them; one that loses its leader ends at
once. Nobody waits for ever: not for one that died, and not for one that does not answer. Knows nothing of
models: an order is a function of some module.

`python -m app.nn.ranks DESCRIPTOR` is a rank that is led, of the pipe at that descriptor.
"""

from __future__ import annotations

import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist

from app.errors import SeedpodError, UnavailableError
from app.nn.exchange import LostRankError

ROOT: Final = Path(__file__).resolve().parents[2]
PATIENCE: Final = 300.0  # seconds that a rank waits for the others within a pass
START: Final = 300.0  # seconds that a process may take to import torch, and to join the others
LOOK: Final = 0.5  # seconds between two looks at whether the others live
LAST_WORDS: Final = 2.0  # seconds that a rank which failed may take to say why


@dataclass(frozen=True)
class Member:
    """One of `count` ranks, as its functions see it; `held` is what they keep between orders."""

    rank: int
    count: int
    device: torch.device
    held: dict[Any, Any] = field(default_factory=dict)


Order = Callable[..., object]  # (member, *arguments), found by its name in its module


class Ranks:
    """Rank 0's hold on the others. They are started with the first order that `work` gives."""

    def __init__(self, count: int, device: torch.device, patience: float = PATIENCE) -> None:
        """`device` is this rank's; the others take the cards behind it, or the CPU as well.

        Raises:
            UnavailableError: `device_unavailable`: there are fewer cards.
        """
        first, there = device.index or 0, torch.cuda.device_count() if device.type == "cuda" else 0
        if device.type == "cuda":
            device = torch.device("cuda", first)  # torch joins no group on a card without a number
        self.member = Member(0, count, device)
        self._patience = patience
        self._others: list[_Other] = []
        self._ended: str | None = None
        if device.type == "cuda" and first + count > there:
            raise UnavailableError(
                "device_unavailable",
                f"A job was to run on {count} cards (SEEDPOD_SP_SIZE, --sp-size), and this machine shows "
                f"{there} CUDA devices, of which {first} come before the first to use; ask for "
                f"{max(there - first, 1)}.",
            )

    @contextmanager
    def work(self, order: Order, *arguments: object, patience: float | None = None) -> Iterator[Member]:
        """The others carry out `order` while this rank does its part inside, and `patience` seconds longer at
        most.

        Raises:
            UnavailableError: `rank_failed`: a rank failed, now or before, which ended them all.
            Whatever this rank's part raises, which ends them, too.
        """
        try:
            if not self._others:
                self._start()
            for other in self._others:
                other.tell((order, arguments))
            with self._watched():
                yield self.member
            for other in self._others:
                other.answer(patience or self._patience)
        except BaseException as error:
            # What this rank's part says of itself, such as a file that is wrong for all, is the reason.
            failed = None if isinstance(error, SeedpodError) else self._failed(error)
            self.close(failed or f"rank 0 was stopped ({type(error).__name__})")
            if failed is None:
                raise
            raise UnavailableError(
                "rank_failed",
                f"The job was shared by {self.member.count} processes, and {failed}. All of them were ended: "
                "start again, with a smaller size or a shorter window if memory ran out, or with one card.",
            ) from error

    def close(self, why: str = "they were told to") -> None:
        """End the others."""
        if not self._others:
            return
        self._ended = why
        others, self._others = self._others, []
        for other in others:
            other.pipe.close()  # which ends it
        if dist.is_initialized():
            _abort()
            with suppress(Exception):  # what is left of the group may no longer be told
                dist.destroy_process_group()
        for other in others:
            with suppress(subprocess.TimeoutExpired):
                other.process.wait(LAST_WORDS)
            other.process.kill()
            other.process.wait()

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Where another rank dies while this one works, what this one waits for is given up: a card would
        wait for ever."""
        done = threading.Event()

        def watch() -> None:
            while not done.wait(LOOK):
                if any(other.process.poll() is not None for other in self._others):
                    _abort()
                    return

        threading.Thread(target=watch, daemon=True).start()
        try:
            yield
        finally:
            done.set()

    def _start(self) -> None:
        """Start the others, and join them."""
        if self._ended is not None:
            raise LostRankError(f"they were ended before: {self._ended}")
        device, count = self.member.device, self.member.count
        folder = Path(tempfile.mkdtemp(prefix="seedpod-ranks-"))
        try:
            for rank in range(1, count):
                place = f"cuda:{(device.index or 0) + rank}" if device.type == "cuda" else str(device)
                self._others.append(_Other.start(rank))
                self._others[-1].tell((rank, count, place, torch.get_num_threads()))
            for other in self._others:
                other.answer(START)
            for other in self._others:
                other.tell((folder / "store", self._patience))
            _join(self.member, folder / "store", self._patience)
            for other in self._others:
                other.answer(START)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _failed(self, error: BaseException) -> str | None:
        """Which other rank failed, and why; None if it was this one's own part."""
        told = [other for other in self._others if other.failed(0)]
        if not told and isinstance(error, LostRankError):
            end = time.monotonic() + LAST_WORDS
            told = [other for other in self._others if other.failed(end - time.monotonic())]
        for other in sorted(told, key=lambda other: other.lost):  # one that lost another is not the first
            return f"rank {other.rank} failed: {other.failure}"
        return str(error) if isinstance(error, LostRankError) else None


class _Other:
    """A rank that is led, seen from rank 0."""

    def __init__(self, rank: int, process: subprocess.Popen[bytes], pipe: Connection) -> None:
        self.rank, self.process, self.pipe = rank, process, pipe
        self.failure: str | None = None
        self.lost = False  # it failed since it lost another rank

    @classmethod
    def start(cls, rank: int) -> _Other:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", __name__, str(theirs.fileno())]
        with theirs:
            process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=2, pass_fds=[theirs.fileno()]
            )
        return cls(rank, process, Connection(ours.detach()))

    def tell(self, message: object) -> None:
        """Raises LostRankError."""
        try:
            self.pipe.send(message)
        except OSError as error:
            self.failed(LAST_WORDS)
            raise LostRankError(f"rank {self.rank} cannot be reached") from error

    def answer(self, seconds: float) -> None:
        """Return when the rank has carried out its order; raises LostRankError."""
        heard = self._hear(seconds)
        if self.failure is not None:
            raise LostRankError(f"rank {self.rank} failed")
        if not heard:
            raise LostRankError(f"rank {self.rank} has not answered for {seconds:.0f} s")

    def failed(self, seconds: float) -> bool:
        """Whether the rank has failed, as far as it tells within `seconds`."""
        if self.failure is None:
            self._hear(max(seconds, 0))
        return self.failure is not None

    def _hear(self, seconds: float) -> bool:
        """Whether it had a word to say."""
        try:
            if not self.pipe.poll(seconds):
                return False
            self.failure, self.lost = self.pipe.recv()
        except (OSError, EOFError):
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(LAST_WORDS)
            self.failure = f"its process died ({_status(self.process.returncode)})"
        return True


def _status(code: int | None) -> str:
    if code is not None and code < 0:
        return f"{signal.Signals(-code).name}; if nobody ended it, the host's memory ran out"
    return f"status {code}"


def _abort() -> None:
    """Give up what this rank waits for of the group."""
    with suppress(Exception):
        if dist.group.WORLD is not None:
            dist.group.WORLD.abort()


def _join(member: Member, store: Path, patience: float) -> None:
    """Make the group of all ranks, in each of them; between processes of this machine only."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    cuda = member.device.type == "cuda"
    if cuda:
        torch.cuda.set_device(member.device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        init_method=f"file://{store}", rank=member.rank, world_size=member.count,
        timeout=timedelta(seconds=patience), device_id=member.device if cuda else None,
    )  # fmt: skip


# ------------------------------------------------------------------ a rank that is led


def follow(pipe: Connection) -> None:
    """Carry out orders until the leader goes."""
    orders: queue.Queue[Any] = queue.Queue()
    threading.Thread(target=_hear, args=(pipe, orders), daemon=True).start()
    try:
        rank, count, device, threads = orders.get()
        torch.set_num_threads(threads)  # results of a CPU may depend on it, and shall be those of rank 0
        member = Member(rank, count, torch.device(device))
        pipe.send((None, False))
        _join(member, *orders.get())
        pipe.send((None, False))
        while True:
            order, arguments = orders.get()
            with torch.inference_mode():
                order(member, *arguments)
            pipe.send((None, False))
    except BaseException as error:
        with suppress(OSError):
            pipe.send((_told(error), isinstance(error, LostRankError)))
        raise


def _hear(pipe: Connection, orders: queue.Queue[Any]) -> None:
    """Take orders as they come: this is how a rank that is stuck in a pass hears that its leader has gone."""
    with suppress(OSError, EOFError):
        while True:
            orders.put(pipe.recv())
    os._exit(0)


def _told(error: BaseException) -> str:
    if isinstance(error, SeedpodError):
        return error.message.rstrip(".")
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return "its memory ran out"
    return f"{type(error).__name__}: {error}".partition("\n")[0]


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # a terminal's, or a container's: the leader decides
    from app.nn import ranks  # not this module, which is __main__: orders know the other's Member

    ranks.follow(Connection(int(sys.argv[1])))
