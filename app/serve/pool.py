"""Processes with a card each, behind one server: the boot of all of them, and who does a job.

The files are verified and staged once, here; every process then loads from the same copies. A process that
dies is started again; its job goes to another one, once, unless some of its stream is out already. A card
whose process does not boot is left out. Knows nothing of HTTP or RunPod, and never loads torch.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from app import errors
from app.errors import JobStopped, SeedpodError, UnavailableError
from app.progress import Progress, duration_text
from app.serve.lifecycle import FOLDER
from app.serve.outcome import died
from app.settings import Settings

if TYPE_CHECKING:
    from app.boot.manifest import Manifest
    from app.boot.stage import Staged
    from app.boot.verify import Selection
    from app.serve.reporter import Reporter

ROOT: Final = Path(__file__).resolve().parents[2]
LOOK: Final = 0.1  # seconds between two looks at whether a job should stop, or a process is free
HUNG: Final = 20.0  # seconds beyond its time that a job's process lives; at 30 the lifecycle gives up all
LAST: Final = 5.0  # seconds that a process which was killed may take to be gone
TRIES: Final = 3  # boots in a row in which a card's process may die
PAUSE: Final = 1.0  # seconds before the second of them, and twice as long before the third
BROKEN: Final = ("out_of_memory", "rank_failed", "device_failed")  # errors after which a process is replaced
_log = logging.getLogger(__name__)


class DiedError(Exception):
    """The process died, or one that it works with, before the work was done; `error` is what it told."""

    def __init__(self, how: str = "", error: SeedpodError | None = None) -> None:
        super().__init__(how)
        self.error = error


@dataclass(eq=False)
class Card:
    """A place for a process. `visible`: its CUDA_VISIBLE_DEVICES, None where that is not set."""

    number: int
    visible: str | None
    state: Literal["booting", "ready", "busy", "failed"] = "booting"
    process: subprocess.Popen[bytes] | None = None
    pipe: Connection | None = None


@dataclass
class _Files:
    """What was verified, and the copies that are there while anybody loads."""

    manifest: Manifest
    selection: Selection
    loading: int = 0
    copies: list[Staged] = field(default_factory=list)


class Pool:
    """A boot of several processes, and what runs jobs on them: in place of a `Boot` and its `jobs_of`."""

    module = "app.serve.card"  # what a process is

    def __init__(
        self,
        settings: Settings,
        scratch: Path,
        cards: Sequence[str | None],
        progress: Callable[[], Progress],
        environ: Mapping[str, str],
    ) -> None:
        """`environ` is what the processes inherit; what they need of the settings they are told."""
        self.cancel = threading.Event()
        self.reason: str | None = None
        self.tasks: Mapping[str, str] | None = None  # as a Boot's
        self.on_lost: Callable[[], object] = lambda: None  # called when jobs ran, and none can any more
        self._settings, self._scratch, self._progress, self._environ = settings, scratch, progress, environ
        self._cards = [Card(number, visible) for number, visible in enumerate(cards)]
        self._changed = threading.Condition()
        self._staging = threading.Lock()
        self._begin = time.perf_counter()
        self._end: float | None = None

    # -------------------------------------------------------------- how the boot goes

    @property
    def state(self) -> Literal["booting", "ready", "failed"]:
        """Ready while a process is, even if others are not."""
        workers = self.workers
        if workers["ready"]:
            return "ready"
        return "booting" if workers["booting"] else "failed"

    @property
    def workers(self) -> Counter[str]:
        """How many cards are booting, ready or failed."""
        return Counter("ready" if card.state == "busy" else card.state for card in self._cards)

    def able(self) -> int:
        """Jobs that can run at a time. Where no card booted, as many as would have: each is told why."""
        return len(self._cards) - self.workers["failed"] or len(self._cards)

    @property
    def seconds(self) -> float:
        """How long it took until a process was ready, or has taken so far."""
        return (self._end or time.perf_counter()) - self._begin

    def start(self) -> None:
        """Begin, in threads that do not keep the process alive."""
        threading.Thread(target=self._boot, name="boot", daemon=True).start()

    def _boot(self) -> None:
        try:
            for card in self._cards:
                self._start(card)  # they import meanwhile
            files = self._verified()
        except BaseException as error:
            for card in self._cards:
                self._fail(card, error)
            return
        for card in self._cards:
            threading.Thread(target=self._keep, args=(card, files), daemon=True).start()

    def _verified(self) -> _Files:
        """manifest -> locate -> fetch -> verify, once for all."""
        from app import chain
        from app.boot.manifest import read_manifest
        from app.boot.verify import select_models

        settings, progress = self._settings, self._progress()
        manifest = read_manifest(settings.manifest)
        if settings.fetch == "missing" and settings.models:
            chain.fetch_missing(settings, manifest, settings.models, progress)
        selection = select_models(manifest, settings.models, settings.roots)
        self.tasks = {name: manifest.models[name].task for name in selection.located}
        chain.check(settings, manifest, selection, chain.hash_record(settings), progress).require_ok()
        return _Files(manifest, selection)

    @contextmanager
    def _staged(self, files: _Files) -> Iterator[None]:
        """The files are staged inside: whoever comes while another loads finds them there."""
        from app import chain
        from app.boot.stage import unstage

        settings = self._settings
        with self._staging:
            if not files.loading:
                hashes, progress = chain.hash_record(settings), self._progress()
                staged = chain.stage_files(
                    settings, files.manifest, files.selection, hashes, progress, self.cancel
                )
                files.copies = [copy for copy in staged.values() if copy.nbytes and not settings.keep_staged]
            files.loading += 1
        try:
            yield
        finally:
            with self._staging:
                files.loading -= 1
                for copy in files.copies if not files.loading else ():
                    unstage(copy)

    # -------------------------------------------------------------- a process, from start to end

    def _keep(self, card: Card, files: _Files) -> None:
        """Boot a card's process, and start it again when it dies; unless it does not boot."""
        try:
            self._load(card, files)
            while not self.cancel.is_set():
                assert card.process is not None
                card.process.wait()
                if self.cancel.is_set():
                    return
                how = _how(card.process)
                _log.error("the process of card %d died (%s); it is started again", card.number, how)
                self._start(card)
                self._load(card, files)
        except BaseException as error:
            self._fail(card, error)

    def _load(self, card: Card, files: _Files) -> None:
        """Let a card's process load its models; one that dies meanwhile, as where the host's memory ran out,
        is started again a few times.

        Raises:
            UnavailableError: `boot_failed`. What staging raises.
        """
        for pause in (*(PAUSE * 2**number for number in range(TRIES - 1)), None):
            try:
                with self._staged(files):
                    self._boot_process(card)
                return
            except DiedError as death:
                told = f"The process of card {card.number} died while it booted ({death})."
                if death.error is not None:
                    told = death.error.message
            if pause is None or self.cancel.wait(pause):
                raise UnavailableError("boot_failed", told)
            _log.error("%s It is started again.", told)
            self._start(card)

    def _start(self, card: Card) -> None:
        ours, theirs = socket.socketpair()
        environ = {**self._environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{self._environ.get('PYTHONPATH', '')}"}
        if card.visible is not None:
            environ["CUDA_VISIBLE_DEVICES"] = card.visible
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", self.module, str(theirs.fileno())],
                env=environ, stdin=subprocess.DEVNULL, stdout=2, pass_fds=[theirs.fileno()],
            )  # fmt: skip
        with self._changed:
            card.state, card.process, card.pipe = "booting", process, Connection(ours.detach())

    def _boot_process(self, card: Card) -> None:
        """Let a process load its models.

        Raises:
            UnavailableError: `boot_failed`: it told why. DiedError: It died, or has to be replaced.
        """
        assert card.pipe is not None and card.process is not None
        told = {"fetch": "never", "verify": "quick", "keep_staged": True}
        try:
            card.pipe.send(("boot", self._settings.model_copy(update=told), self._scratch))
            state, reason, code = card.pipe.recv()
        except (OSError, EOFError):
            card.process.wait()
            raise DiedError(_how(card.process)) from None
        if state != "ready":
            card.process.kill()
            card.process.wait()
            error = UnavailableError("boot_failed", reason or "The log tells why.")
            raise DiedError(error=error) if code in BROKEN else error
        with self._changed:
            card.state = "ready"
            self._end = self._end or time.perf_counter()
            self._changed.notify_all()
        _log.info("card %d: ready after %s", card.number, duration_text(time.perf_counter() - self._begin))

    def _fail(self, card: Card, error: BaseException) -> None:
        if not isinstance(error, SeedpodError):
            _log.error("boot", exc_info=error)
            error = UnavailableError("boot_failed", f"A fault of ours ({type(error).__name__}); see the log.")
        _log.error("card %d does not boot: %s [%s]", card.number, error.message, error.code)
        if card.process is not None:
            card.process.kill()
            card.process.wait()
        with self._changed:
            card.state, self.reason = "failed", error.message
            self._changed.notify_all()
        if self.state == "failed" and self._end is not None and not self.cancel.is_set():
            self.on_lost()

    # -------------------------------------------------------------- jobs

    def run(self, job_id: str, payload: Mapping[str, Any], reporter: Reporter) -> Mapping[str, Any]:
        """Do a job on the first process that is free; what the lifecycle runs.

        Raises:
            SeedpodError: What the job raised. UnavailableError: `worker_died`, `boot_failed`.
        """
        given_up = time.monotonic() + self._settings.job_seconds + HUNG
        for last in (False, True):
            job = self._taken(job_id, reporter, given_up)
            try:
                return job.done(payload)
            except DiedError as death:
                reporter.check()
                if last or job.streamed:
                    raise death.error or died() from None
                _log.warning("the process of card %d died; another one takes its job", job.card.number)
            finally:
                self._freed(job_id, job)
        raise AssertionError("the last try returns or raises")

    def _freed(self, job_id: str, job: _Job) -> None:
        """A process can take the next job, if it ended this one and is whole; else it is replaced."""
        card = job.card
        if not job.over:
            job.process.kill()
            with suppress(subprocess.TimeoutExpired):  # a card that hangs may keep it
                job.process.wait(LAST)
            shutil.rmtree(self._scratch / f"{FOLDER}{job_id}", ignore_errors=True)
        with self._changed:
            if card.process is job.process and card.state == "busy":
                card.state = "ready" if job.over else "booting"
            self._changed.notify_all()

    def _taken(self, job_id: str, reporter: Reporter, given_up: float) -> _Job:
        """The job on a process that was free and lives; waits for one."""
        while True:
            with self._changed:
                for card in self._cards:
                    if card.state == "ready" and card.process is not None and card.process.poll() is None:
                        card.state = "busy"
                        return _Job(job_id, card, reporter, given_up)
                if self.state == "failed":
                    raise UnavailableError("boot_failed", self.reason or "The log tells why.")
                self._changed.wait(LOOK)
            reporter.check()


class _Job:
    """A job on a process: its news go to the reporter, the wish to stop it the other way."""

    def __init__(self, job_id: str, card: Card, reporter: Reporter, given_up: float) -> None:
        assert card.pipe is not None and card.process is not None
        self.streamed = False
        self.over = False  # the process told how it ended, and can take another
        self.card, self.process = card, card.process
        self._id, self._reporter, self._given_up, self._pipe = job_id, reporter, given_up, card.pipe
        self._stopped: JobStopped | None = None

    def done(self, payload: Mapping[str, Any]) -> Mapping[str, Any]:
        """The job's output; raises DiedError, or what the job raised."""
        try:
            self._pipe.send(("job", self._id, payload))
            while True:
                if self._pipe.poll(LOOK):
                    word, *values = self._pipe.recv()
                    if word == "output":
                        self.over = True
                        return dict(values[0])
                    if word == "error":
                        self.over = values[1] not in BROKEN
                        error = getattr(errors, values[0])(*values[1:])
                        raise DiedError(error=error) if error.code == "rank_failed" else error
                    self.streamed |= word == "emit"
                    getattr(self._reporter, word)(*values)
                self._look()
        except (OSError, EOFError):
            raise self._stopped or DiedError() from None

    def _look(self) -> None:
        if self._stopped is None:
            try:
                self._reporter.check()
            except JobStopped as stop:
                self._stopped = stop
                self._pipe.send(("stop", self._id, stop.code, stop.message))
        elif time.monotonic() > self._given_up:
            _log.error("the job does not answer: its process is killed")
            raise self._stopped


def _how(process: subprocess.Popen[bytes]) -> str:
    """How a process ended."""
    code = process.returncode or 0
    with suppress(ValueError):
        return signal.Signals(-code).name if code < 0 else f"status {code}"
    return f"signal {-code}"
