"""SIGTERM and SIGINT, from the first moment of the process to its last, as process 1 too.

A Python that is process 1 and installs no handler is never ended by SIGTERM, and one that does hears of it
only between two bytecodes of its main thread. It does not know what has to be done before the process ends.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

log = logging.getLogger(__name__)


class Stop:
    """Whether the process was asked to stop, and what it then does. Install it before any slow import."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self._act: Callable[[], object] = leave
        self._process = os.getpid()

    def install(self) -> None:
        """Catch both signals. Main thread only."""
        signal.signal(signal.SIGTERM, self.handle)
        signal.signal(signal.SIGINT, self.handle)

    def then(self, act: Callable[[], object]) -> None:
        """From now on the first signal calls `act`, in the main thread; before, it ended the process."""
        self._act = act
        if self.asked.is_set():  # the signal came while somebody replaced what it does
            act()

    def handle(self, number: int, frame: FrameType | None = None) -> None:
        """A handler for `signal.signal`. After the first signal, only Ctrl-C changes anything: who asks again
        does not want to wait for the running job."""
        if os.getpid() != self._process:
            os._exit(0)  # a fork inherits the handler, and its parent waits for it to end
        if not self.asked.is_set():
            self.asked.set()
            self._act()
        elif number == signal.SIGINT:
            leave(128 + number)


def leave(status: int = 0) -> NoReturn:
    """End the process and its children at once, whatever its threads do: joining one that computes would
    wait for it."""
    # Children by the kernel's word: of the SDK's heartbeat, `multiprocessing` may not know yet.
    for children in Path("/proc/self/task").glob("*/children"):
        with suppress(OSError):
            for child in children.read_text().split():
                os.kill(int(child), signal.SIGKILL)
    with suppress(Exception):
        logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):  # in a signal handler the stream may be busy
            stream.flush()
    os._exit(status)
