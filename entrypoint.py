#!/usr/bin/env python3
"""Seedpod's command line, and process 1 of its container.

    check      verify the checkpoints            stage    copy them to fast local storage
    fetch      download what is missing          convert  make 16-bit files of them
    run        do one job on this machine    serve    boot, then take jobs (the default)
    bench      measure a task

Each is a function of app/cli that imports what it needs, so that `check` never loads torch.
Exit status: 0 done, 64 wrong use, 65 bad input, 69 unavailable, 70 our fault, 74 input or output
failed, 78 configuration or checkpoints wrong.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

if __name__ == "__main__":  # process 1 gets no signal without a handler, and the imports take a second
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(128 + number))
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where Ctrl-C is ignored
        signal.signal(signal.SIGINT, lambda number, frame: os._exit(128 + number))
sys.path.insert(0, str(Path(__file__).resolve().parent))  # runs from any folder

from app.cli.parser import parsed
from app.errors import SeedpodError, is_full
from app.settings import load_settings


def main(arguments: Sequence[str], environ: Mapping[str, str] = os.environ) -> int:
    """Run one command; returns the exit status."""
    try:
        options = parsed(arguments or ["serve"])
        with ended_by_signals():
            return int(options.command(options, load_settings(environ)))
    except SeedpodError as error:
        print(f"seedpod: {error.message} [{error.code}]", file=sys.stderr)
        return error.exit_status
    except (KeyboardInterrupt, Ended) as error:
        number = error.number if isinstance(error, Ended) else signal.SIGINT
        print(f"seedpod: interrupted ({number.name}); nothing partial was left.", file=sys.stderr)
        return 128 + number
    except BrokenPipeError:
        # Whoever read our results has gone; Python would complain once more while it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if isinstance(error, OSError) and is_full(error):
            print("seedpod: there is no room left for what was to be written. [no_space]", file=sys.stderr)
            return 74
        traceback.print_exc()
        print(f"seedpod: a fault of ours ({type(error).__name__}), told above; please report it. [internal]",
              file=sys.stderr)  # fmt: skip
        return 70


class Ended(KeyboardInterrupt):
    """A signal that ends a command, as Ctrl-C does: what it began is cleaned up on the way out."""

    def __init__(self, number: signal.Signals) -> None:
        self.number = number


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end what runs inside as Ctrl-C does. The server has handlers of its own."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may say what a signal does
        return

    def end(number: int, frame: object) -> NoReturn:
        raise Ended(signal.Signals(number))

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # from here on there is something to clean up
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main(sys.argv[1:]))
