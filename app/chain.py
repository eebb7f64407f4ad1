"""The boot chain, a function a step: select -> fetch -> verify -> stage -> load.

Each takes what the step before gave. `entrypoint.py` reads them off in order. Knows nothing of jobs.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.boot.hashes import HashRecord, cache_folders
from app.boot.locate import Found, Missing, locate_all
from app.boot.manifest import FileEntry, Manifest
from app.boot.verify import Report, Selection, select_models, verify
from app.errors import ConfigError, UsageError
from app.models.registry import contents, load_model
from app.models.source import Source
from app.progress import Progress
from app.settings import Settings

if TYPE_CHECKING:
    from threading import Event

    from app.boot.stage import Staged

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
        selection = select_models(manifest, settings.models, settings.roots)
        able = [model for model in selection.located if manifest.models[model].task == task]
        if len(able) == 1:
            return able[0]
        have = f"several models do {task}: {', '.join(able)}" if able else f"no model here does {task}"
        raise UsageError("model_ambiguous", f"No model was named, and {have}; name one with --model.")
    select_models(manifest, [name], settings.roots)  # refuses a name that the manifest does not know
    if manifest.models[name].task != task:
        raise UsageError(
            "model_wrong_task", f"model {name} does {manifest.models[name].task}, not {task}; name another."
        )
    return name


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
) -> dict[Path, Staged]:
    """Stage the files that are marked for it, each once: path -> where to read it.

    Staging hashes what it copies. What stays in place is hashed here, unless its hash is remembered: no
    file whose hash is known is loaded without having been compared with it once. `cancel` gives up.

    Raises:
        ConfigError: A hash is wrong. What `stage` raises.
    """
    from app.boot.stage import stage

    staged: dict[Path, Staged] = {}
    for place in (place for parts in found_files(selection).values() for place in parts.values()):
        if not place.entry.stage or place.path in staged:
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


def load_models(
    settings: Settings,
    manifest: Manifest,
    selection: Selection,
    staged: Mapping[Path, Staged],
    progress: Progress,
) -> dict[str, Loaded]:
    """Load the models, one at a time. Copies that this process staged are given back: they are read."""
    import time

    from app.boot.stage import unstage
    from app.device import place

    placement = place(settings.device, settings.dtype)
    loaded = {}
    for name, parts in found_files(selection).items():
        begin = time.perf_counter()
        sources = {
            part: Source(staged[found.path].path if found.path in staged else found.path, found.entry.format)
            for part, found in parts.items()
        }
        pipeline = load_model(manifest.models[name], sources, placement, settings.readers, progress)
        loaded[name] = Loaded(name, manifest.models[name].task, pipeline, time.perf_counter() - begin)
    for copy in staged.values():
        if copy.nbytes:  # a copy that was there before belongs to somebody else
            unstage(copy)
    return loaded
