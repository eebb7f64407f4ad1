"""The boot chain in the background of a server, with a timeline: what ran when, for how long.

Imports run beside staging; `ping` answers meanwhile. It knows nothing of requests or of who asks.
"""

from __future__ import annotations

import logging
import os
import stat
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from app.errors import FileError, SeedpodError, UnavailableError
from app.progress import Progress, amount_text, duration_text
from app.settings import Settings

if TYPE_CHECKING:
    from app.boot.stage import Staged
    from app.job.handle import Context
    from app.job.payload import Payload
    from app.serve.reporter import Reporter

log = logging.getLogger(__name__)

POLL = 0.2  # seconds between two looks of a job that waits for the verification


@dataclass(frozen=True)
class Step:
    """A step of the boot. `begin` and `seconds` in seconds since the start; `nbytes` where it moved any."""

    name: str
    begin: float
    seconds: float
    nbytes: int = 0

    def __str__(self) -> str:
        rate = f", {amount_text(self.nbytes / self.seconds, 'B')}/s" if self.nbytes and self.seconds else ""
        size = f", {amount_text(self.nbytes, 'B')}{rate}" if self.nbytes else ""
        return f"{self.name}: from {self.begin:.2f} s, {duration_text(self.seconds)}{size}"


class Boot:
    """A boot and what came of it: `state` and, where it failed, `reason` and `code`."""

    def __init__(self, settings: Settings, scratch: Path, progress: Callable[[], Progress]) -> None:
        self.state: Literal["booting", "ready", "failed"] = "booting"
        self.reason: str | None = None
        self.code: str | None = None
        self.tasks: Mapping[str, str] | None = None  # what each model does, once it is known which there are
        self.timeline: list[Step] = []
        self.cancel = threading.Event()
        self._settings, self._scratch, self._progress = settings, scratch, progress
        self._context: Context | None = None  # from when the models are verified
        self._error: SeedpodError | None = None
        self._begin = time.perf_counter()
        self._end: float | None = None
        self._known = threading.Event()  # which models there will be, or that there will be none

    @property
    def workers(self) -> Counter[str]:
        """How many processes do jobs, by the state of each: this one."""
        return Counter([self.state])

    @property
    def seconds(self) -> float:
        """How long the boot took, or has been running."""
        return (self._end or time.perf_counter()) - self._begin

    def start(self) -> None:
        """Begin, in a thread that does not keep the process alive."""
        threading.Thread(target=self._run, name="boot", daemon=True).start()

    def wait(self, check: Callable[[], None] = lambda: None) -> Context:
        """What jobs share, once the files are verified: a job then waits for its own model, and for no
        other. `check` is called meanwhile and may raise.

        Raises:
            SeedpodError: Why the boot failed.
        """
        while not self._known.wait(POLL):
            check()
        if self._error is not None:
            raise UnavailableError("boot_failed", self._error.message)
        assert self._context is not None
        return self._context

    def _run(self) -> None:
        try:
            self._chain()
        except SeedpodError as error:
            self._fail(error)
        except Exception as error:
            log.exception("boot")
            self._fail(
                UnavailableError("boot_failed", f"A fault of ours ({type(error).__name__}); see the log.")
            )
        else:
            self.state = "ready"
            threading.Thread(target=self._import_sizes, name="sizes", daemon=True).start()
        self._end = time.perf_counter()
        for step in sorted(self.timeline, key=lambda step: step.begin):
            log.info("boot: %s", step)
        log.info("boot: %s after %s", self.state, duration_text(self.seconds))
        self._known.set()

    def _fail(self, error: SeedpodError) -> None:
        self._error, self.reason, self.code = error, error.message, error.code
        self.state = "failed"  # last: who sees it looks for the others
        self.cancel.set()  # what is still being staged is of no use
        if self._context is not None:
            self._context.models.fail(error)
        log.error("boot failed: %s [%s]", error.message, error.code)

    def _chain(self) -> None:
        """settings -> manifest -> locate -> fetch -> verify -> stage -> load, and the imports beside them."""
        from app import chain
        from app.boot.manifest import read_manifest
        from app.boot.verify import select_models

        settings, progress = self._settings, self._progress()
        imports = threading.Thread(target=self._import, name="imports", daemon=True)
        imports.start()
        with self._step("manifest"):
            manifest = read_manifest(settings.manifest)
        if settings.fetch == "missing" and settings.models:
            with self._step("fetch"):
                chain.fetch_missing(settings, manifest, settings.models, progress)
        with self._step("verify"):
            selection = select_models(manifest, settings.models, settings.roots)
            self.tasks = {name: manifest.models[name].task for name in selection.located}
            hashes = chain.hash_record(settings)
            chain.check(settings, manifest, selection, hashes, progress).require_ok()
        loading = chain.load_staged(
            settings,
            manifest,
            selection,
            hashes,
            progress,
            self._progress(),
            self.cancel,
            self._staged,
            eager=True,
        )
        with self._step("import tasks"):
            from app.job.handle import make_context, prepare
            from app.job.models import Models

            prepare(self.tasks.values())
        models = Models(self.tasks)
        self._context = make_context(settings, models, self._scratch)
        self._known.set()
        with closing(loading), self._step("stage and load"):
            for loaded in loading:
                self.timeline.append(
                    Step(f"load {loaded.name}", self._now() - loaded.seconds, loaded.seconds)
                )
                models.add(loaded)

    def _staged(self, copy: Staged) -> None:
        if copy.nbytes:
            begin = self._now() - copy.seconds
            self.timeline.append(Step(f"stage {copy.source.name}", begin, copy.seconds, copy.nbytes))

    def _import(self) -> None:
        with self._step("import torch"):
            import torch  # noqa: F401

    def _import_sizes(self) -> None:
        """What telling the memory of a first job imports, a second that it need not wait for."""
        from app.nn.allocations import prepare

        prepare()

    def _now(self) -> float:
        return time.perf_counter() - self._begin

    @contextmanager
    def _step(self, name: str) -> Iterator[None]:
        if self.cancel.is_set():
            raise UnavailableError("boot_cancelled", "The worker is stopping; the boot was given up.")
        begin = self._now()
        try:
            yield
        finally:
            self.timeline.append(Step(name, begin, self._now() - begin))


def jobs_of(boot: Boot) -> Callable[[str, Mapping[str, Any], Reporter], Mapping[str, Any]]:
    """What the lifecycle runs: a job waits for the boot, then is done."""

    def run(job_id: str, payload: Mapping[str, Any], reporter: Reporter) -> Mapping[str, Any]:
        context = boot.wait(reporter.check)
        from app.job.handle import handle

        return handle(context, job_id, payload, reporter, reporter.check, reporter.emit)

    return run


class Known(Protocol):
    """What is known of a boot before it is over."""

    @property
    def tasks(self) -> Mapping[str, str] | None: ...


def checks_of(boot: Known) -> Callable[[Any], Payload]:
    """What a payload has to pass before it is queued: it makes sense and, from when it is known which models
    there will be, one of them does it."""

    from app.job.models import check_served
    from app.job.payload import validate

    def check(payload: Any) -> Payload:
        checked = validate(payload)
        if boot.tasks is not None:
            check_served(boot.tasks, checked)
        return checked

    return check


def scratch_folder(settings: Settings) -> Path:
    """The folder for the files of running jobs, made for this user alone. A server on another port has
    another, and the next one on this port finds what a killed one left.

    Raises:
        FileError: `scratch_unusable`: it cannot be made, or belongs to somebody else.
    """
    try:
        folder = settings.scratch or Path(tempfile.gettempdir()) / f"seedpod-{os.getuid()}-{settings.port}"
    except FileNotFoundError:  # a read-only root without a temporary folder
        raise FileError(
            "scratch_unusable",
            "No temporary folder, such as /tmp, can be written to; mount one, or set SEEDPOD_SCRATCH.",
        ) from None
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.lstat()
    except OSError as error:
        raise FileError(
            "scratch_unusable", f"The folder {folder} cannot be made: {error.strerror}; set SEEDPOD_SCRATCH."
        ) from None
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise FileError(
            "scratch_unusable", f"{folder} is not a folder of this user; set SEEDPOD_SCRATCH to another."
        )
    return folder
