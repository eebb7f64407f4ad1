"""The boot chain, a function a step: select -> fetch -> verify -> stage -> load.

Each takes what the step before gave. `entrypoint.py` reads them off in order. Knows nothing of jobs.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.boot.faults import none_complete
from app.boot.hashes import HashRecord, cache_folders
from app.boot.locate import Found, Missing, locate_all
from app.boot.manifest import FileEntry, Manifest
from app.boot.verify import Report, Selection, lacking, select_models, verify
from app.errors import ConfigError, UsageError
from app.models.registry import contents, family, load_model
from app.models.source import Loading, Source
from app.progress import Progress
from app.settings import Settings

if TYPE_CHECKING:
    from concurrent.futures import Future
    from threading import Event

    from app.boot.stage import Staged
    from app.nn.compiled import Compiler
    from app.nn.ranks import Ranks

log = logging.getLogger(__name__)

Files = Mapping[str, Mapping[str, Found]]  # model -> part -> file


def hash_record(settings: Settings) -> HashRecord:
    """Where hashes are remembered under these settings."""
    folder, *also = cache_folders(settings.cache, settings.roots, settings.user_cache_folder())
    return HashRecord(folder, also)


def choose_model(settings: Settings, manifest: Manifest, task: str, name: str | None) -> str:
    """The model of a task: the one named, or the only one that the settings or the volume leave.

    Raises:
        ConfigError: `model_unknown`, or none is complete. UsageError: `model_wrong_task`,
        `model_ambiguous`.
    """
    if name is None:
        able = _able(settings, manifest, task)
        if len(able) == 1:
            return able[0]
        have = f"several models do {task}: {', '.join(able)}"
        if not able:  # what lacks files was told already
            have = f"none of SEEDPOD_MODELS ({', '.join(settings.models or ())}) does {task}"
        raise UsageError("model_ambiguous", f"No model was named, and {have}; name one with --model.")
    select_models(manifest, [name], settings.roots)  # refuses a name that the manifest does not know
    if manifest.models[name].task != task:
        raise UsageError(
            "model_wrong_task", f"model {name} does {manifest.models[name].task}, not {task}; name another."
        )
    return name


def _able(settings: Settings, manifest: Manifest, task: str) -> list[str]:
    """The models that can do a task: of those that the settings name, or of all, the complete ones; first
    those that a worker boots without being told."""
    if settings.models is not None:
        select_models(
            manifest, settings.models, settings.roots
        )  # refuses names that the manifest does not know
        return [name for name in settings.models if manifest.models[name].task == task]
    names = [model.name for model in manifest.models.values() if model.task == task]
    located = locate_all(manifest, names, settings.roots)
    complete = [
        name for name, parts in located.items() if not any(isinstance(p, Missing) for p in parts.values())
    ]
    if not complete:
        raise ConfigError("models_incomplete", none_complete(lacking(located), settings.roots, task))
    return [name for name in complete if not manifest.models[name].by_name] or complete


def fetch_missing(
    settings: Settings,
    manifest: Manifest,
    names: Sequence[str],
    progress: Progress,
    *,
    optional: bool = False,
) -> list[Path]:
    """Download every file that the models lack into the first root that can be written, with `optional`
    also what they can do without."""
    from app.boot.fetch import fetch

    token = settings.hf_token.get_secret_value() if settings.hf_token else None
    missing: dict[str, FileEntry] = {
        place.entry.name: place.entry
        for parts in locate_all(manifest, names, settings.roots, every=optional).values()
        for place in parts.values()
        if isinstance(place, Missing)
    }
    root = _fetch_root(settings) if missing else Path()
    return [
        fetch(entry, root, endpoint=settings.hf_endpoint, token=token, progress=progress)
        for entry in missing.values()
    ]


def _fetch_root(settings: Settings) -> Path:
    existing = [root for root in settings.roots if root.is_dir()]
    if not existing:
        roots = ", ".join(map(str, settings.roots))
        raise ConfigError(
            "roots_missing",
            f"None of the folders in SEEDPOD_ROOTS ({roots}) exists; mount the volume there.",
        )
    # Where none can be written, the download says so of the first.
    return next((root for root in existing if os.access(root, os.W_OK | os.X_OK)), existing[0])


def check(
    settings: Settings, manifest: Manifest, selection: Selection, hashes: HashRecord, progress: Progress
) -> Report:
    """Verify the models selected, as deeply as the settings say."""
    return verify(
        manifest, selection,
        depth=settings.verify, hashes=hashes, contents=contents,
        progress=progress, readers=settings.readers,
    )  # fmt: skip


def found_files(selection: Selection) -> Files:
    """The files of a selection that was verified: all are there."""
    return {
        name: {part: place for part, place in parts.items() if isinstance(place, Found)}
        for name, parts in selection.located.items()
    }


def stage_files(
    settings: Settings,
    manifest: Manifest,
    selection: Selection,
    hashes: HashRecord,
    progress: Progress,
    cancel: Event | None = None,
    done: Mapping[Path, Staged] | None = None,
) -> dict[Path, Staged]:
    """Stage the files that are marked for it, each once: path -> where to read it.

    Staging hashes what it copies. What stays in place is hashed here, unless its hash is remembered: no
    file whose hash is known is loaded without having been compared with it once. `done` are files that were
    staged before, for another model; `cancel` gives up.

    Raises:
        ConfigError: A hash is wrong. What `stage` raises.
    """
    from app.boot.stage import stage

    staged: dict[Path, Staged] = {}
    for place in (place for parts in found_files(selection).values() for place in parts.values()):
        if not place.entry.stage or place.path in staged:
            continue
        if done and place.path in done:
            staged[place.path] = done[place.path]
            continue
        before = place.path.stat()
        made = stage(
            place.path,
            sha256=place.entry.sha256, mode=settings.stage, readers=settings.readers,
            progress=progress, cancel=cancel,
        )  # fmt: skip
        if made.sha256 and made.nbytes:  # of a copy that was there before, the source was not read
            hashes.remember(place.path, made.sha256, before)
        staged[place.path] = made
    full = settings.model_copy(update={"verify": "full"})
    check(full, manifest, _read_in_place(selection, staged), hashes, progress).require_ok()
    return staged


def _read_in_place(selection: Selection, staged: Mapping[Path, Staged]) -> Selection:
    """The part of a selection that is not read from a verified copy."""
    return Selection(
        {
            name: {
                part: place
                for part, place in parts.items()
                if not (isinstance(place, Found) and place.path in staged and staged[place.path].sha256)
            }
            for name, parts in selection.located.items()
        },
        {},
    )


@dataclass(frozen=True)
class Loaded:
    """A model that is ready, and how long its loading took."""

    name: str
    task: str
    pipeline: Any
    seconds: float


def load_staged(
    settings: Settings,
    manifest: Manifest,
    selection: Selection,
    hashes: HashRecord,
    staging: Progress,
    loading: Progress,
    cancel: Event | None = None,
    on_staged: Callable[[Staged], None] = lambda copy: None,
    *,
    eager: bool = False,
    unread: Collection[str] = (),
) -> Generator[Loaded]:
    """Stage and load the models, each as soon as it is ready: while one loads, the next one is staged.
    Staging begins with the call.

    `on_staged` is told of each file. A copy that this process made is given back once every model has read
    it, unless the settings keep them. `eager`: what every job may need is loaded now, not with the first
    job. `unread` are parts that no job will read: they are not staged.

    Raises:
        ConfigError: `float8_unavailable`: no model has anything to keep in 8 bits.
        What `stage_files` and a model's loader raise. Staging is given up then.
    """
    from concurrent.futures import ThreadPoolExecutor

    if settings.dtype == "float8":
        _refuse_float8(manifest, selection)
    cancel = cancel or threading.Event()
    files = found_files(selection)
    copies = _Copies(settings, files)
    ahead = ThreadPoolExecutor(1, "stage")

    def stage_model(name: str) -> dict[Path, Staged]:
        parts = {part: place for part, place in selection.located[name].items() if part not in unread}
        own = Selection({name: parts}, {})
        return stage_files(settings, manifest, own, hashes, staging, cancel, copies.staged)

    def load(first: Future[dict[Path, Staged]]) -> Generator[Loaded]:
        try:
            ranks = _ranks(settings) if settings.sp_size > 1 else None
            for place, (name, parts) in enumerate(files.items()):
                for copy in copies.add(first.result()):
                    on_staged(copy)
                for later in list(files)[place + 1 : place + 2]:
                    first = ahead.submit(stage_model, later)
                yield _load(settings, manifest, name, parts, copies, hashes, loading, eager, ranks)
        except BaseException:
            cancel.set()
            raise
        finally:
            ahead.shutdown()

    return load(ahead.submit(stage_model, next(iter(files))))  # at once, not when the first is asked for


def _refuse_float8(manifest: Manifest, selection: Selection) -> None:
    """Unless a model has a transformer: beside it, others run as they do with bfloat16."""
    if all(manifest.models[name].task == "autoencode" for name in selection.located):
        raise ConfigError(
            "float8_unavailable",
            f"SEEDPOD_DTYPE is float8, which keeps the matrices of transformers in 8 bits, and autoencoders "
            f"({', '.join(selection.located)}) have none; set SEEDPOD_DTYPE=bfloat16, or leave it unset.",
        )


def _ranks(settings: Settings) -> Ranks:
    """The cards of a job, behind the first, which have no process yet."""
    from app.device import place
    from app.nn.ranks import Ranks

    return Ranks(settings.sp_size, place(settings.device, settings.dtype).device)


def _compiler(settings: Settings) -> Compiler | None:
    """What compiles the steps of models; None where that is not asked for."""
    from app.nn.compiled import Compiler

    if settings.compile == "off":
        return None
    return Compiler(settings.cache / "compiled" if settings.cache else None)


class _Copies:
    """Staged files, each given back when the last model that reads it is done with it. Models may be done
    at any time, in any thread."""

    def __init__(self, settings: Settings, files: Files) -> None:
        self.staged: dict[Path, Staged] = {}
        self._keep = settings.keep_staged
        self._readers = {
            found.path: {name for name, parts in files.items() if found in parts.values()}
            for parts in files.values()
            for found in parts.values()
        }
        self._lock = threading.Lock()

    def add(self, staged: Mapping[Path, Staged]) -> list[Staged]:
        """Take over files that were staged; returns those that are new."""
        with self._lock:
            new = {path: copy for path, copy in staged.items() if path not in self.staged}
            self.staged |= new
        return list(new.values())

    def done(self, model: str, path: Path) -> None:
        """`model` will not read this file from its copy again."""
        from app.boot.stage import unstage

        with self._lock:
            self._readers[path].discard(model)
            if not self._readers[path] and path in self.staged:
                copy = self.staged.pop(path)
                if copy.nbytes and not self._keep:  # one that was there before belongs to somebody else
                    unstage(copy)


def _load(
    settings: Settings,
    manifest: Manifest,
    name: str,
    parts: Mapping[str, Found],
    copies: _Copies,
    hashes: HashRecord,
    progress: Progress,
    eager: bool,
    ranks: Ranks | None,
) -> Loaded:
    import time

    from app.device import place
    from app.nn.float8 import PRODUCTS

    begin = time.perf_counter()
    sources = {}
    for part, found in parts.items():
        staged = copies.staged.get(found.path)
        sources[part] = Source(
            staged.path if staged else found.path,
            found.entry.format,
            found.path,
            found.entry.sha256 or (staged.sha256 if staged else None) or hashes.lookup(found.path),
            partial(copies.done, name, found.path),
        )
    model = manifest.models[name]
    codec = model.task == "autoencode"
    dtype = "bfloat16" if codec and settings.dtype == "float8" else settings.dtype
    placement = place(settings.device, dtype, metal=codec)
    if placement.float8:
        log.info("%s: matrices in float8, %s", name, PRODUCTS[placement.float8])
    loading = Loading(
        placement, settings.readers, progress,
        text_encoder=settings.text_encoder, eager=eager, cache=settings.cache, ranks=ranks,
        compiler=_compiler(settings),
    )  # fmt: skip
    pipeline = load_model(model, sources, loading)
    for part in parts.keys() - family(model).lazy:
        sources[part].done()
    return Loaded(name, model.task, pipeline, time.perf_counter() - begin)
