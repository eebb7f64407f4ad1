"""Is each file there, whole, and what it claims to be: every problem of every model at once.

From cheap to dear: presence, kind of file, size, content, tensors, hash. One cause gives one problem:
what a later check would say of a file that an earlier one refused is left out. Nothing of the user's is
ever changed. It does not know which tensors a model has: `contents` does.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Literal

from app.boot import faults
from app.boot.content import HEAD_BYTES, refuse_other_content
from app.boot.faults import Fault
from app.boot.hashes import HashRecord, sha256_file
from app.boot.locate import Found, Located, Missing, locate_all
from app.boot.manifest import FileEntry, Format, Manifest, ModelEntry
from app.boot.regular import open_regular
from app.boot.tensorfile import TensorIndex, read_index
from app.errors import ConfigError, SeedpodError
from app.progress import Progress

# verified: its hash is right. present: right as far as looked, its hash is not known or not computed.
State = Literal["verified", "present", "missing", "wrong"]
Contents = Callable[[ModelEntry, str, TensorIndex], Sequence[str]]
ReadIndex = Callable[[Path, Format], TensorIndex]

# What the size already says, and says better: how much of the file is there.
_SAID_BY_SIZE: Final = {"checkpoint_truncated", "checkpoint_corrupt"}
_PLACEHOLDERS: Final = {"checkpoint_lfs_pointer", "checkpoint_html"}


@dataclass(frozen=True)
class Problem:
    """One thing wrong with one file of one model, in sentences; `code` is stable."""

    code: str
    model: str
    file: str
    message: str


@dataclass(frozen=True)
class FileReport:
    """One part of one model. `file` is the manifest's name of what was found, or of what is missing;
    `size` is in bytes, as it is on the disk; `note` says why this file and not the first choice."""

    model: str
    part: str
    file: str
    path: Path | None
    size: int | None
    state: State
    note: str | None
    problems: tuple[Problem, ...]


@dataclass(frozen=True)
class Report:
    """What `verify` found; `incomplete` are models that were not asked for by name and lack files."""

    files: tuple[FileReport, ...]
    incomplete: Mapping[str, tuple[str, ...]]
    notes: tuple[str, ...] = ()

    @property
    def problems(self) -> tuple[Problem, ...]:
        """Every problem; what is wrong with a file that several models share is told once."""
        unique: dict[tuple[str, str, str], Problem] = {}
        for file in self.files:
            for problem in file.problems:
                key = (problem.code, problem.file, problem.message)
                other = unique.setdefault(key, problem)
                if problem.model not in other.model.split(", "):
                    unique[key] = replace(other, model=f"{other.model}, {problem.model}")
        return tuple(unique.values())

    @property
    def ok(self) -> bool:
        return not self.problems

    def require_ok(self) -> None:
        """Raises:
        ConfigError: the first problem's code, and the sentences of all.
        """
        if self.problems:
            raise ConfigError(self.problems[0].code, "\n".join(p.message for p in self.problems))


@dataclass(frozen=True)
class Selection:
    """The models to boot with what plays their parts, and those that lack files and were not named."""

    located: Located
    incomplete: Located


def select_models(
    manifest: Manifest, names: Sequence[str] | None, roots: Sequence[Path], *, all_if_none: bool = False
) -> Selection:
    """The models named, or with None every model whose files are all there, but for those that the manifest
    boots by name alone.

    With `all_if_none`, every model is selected when None finds no complete one (for `check`, which then
    reports all that is missing).

    Raises:
        ConfigError: `model_unknown`, or `models_incomplete` when None finds no complete model.
    """
    if names is not None:
        if unknown := [name for name in names if name not in manifest.models]:
            raise ConfigError("model_unknown", faults.unknown_models(unknown, list(manifest.models)))
        return Selection(locate_all(manifest, names, roots), {})
    located = locate_all(manifest, [m.name for m in manifest.models.values() if not m.by_name], roots)
    incomplete = {
        name: parts for name, parts in located.items() if any(isinstance(p, Missing) for p in parts.values())
    }
    if len(incomplete) < len(located):
        return Selection({n: p for n, p in located.items() if n not in incomplete}, incomplete)
    if all_if_none:
        return Selection(located, {})
    raise ConfigError("models_incomplete", faults.none_complete(lacking(located), roots))


def lacking(located: Located) -> dict[str, tuple[str, ...]]:
    """model -> the paths that it lacks, relative to a root."""
    return {
        name: tuple(str(place.entry.path) for place in parts.values() if isinstance(place, Missing))
        for name, parts in located.items()
    }


def verify(
    manifest: Manifest,
    selection: Selection,
    *,
    depth: Literal["quick", "full"],
    hashes: HashRecord,
    contents: Contents,
    progress: Progress | None = None,
    readers: int = 4,
    read: ReadIndex = read_index,
) -> Report:
    """Everything that is wrong with the files of the models selected.

    quick compares hashes that are remembered; full computes the others, and remembers them.
    `contents(model, part, index)` says in sentences how a file's tensors differ from what the model
    needs. A file that several models share is read once.
    """
    files = _gather(selection.located)
    checks = _Checks(manifest, hashes, read)
    for file in files.values():
        checks.look(file)
    misfits = _misfits(manifest, selection.located, files, contents)
    notes = []
    for file in files.values():
        if file.fault is None and not any(use in misfits for use in file.uses):
            notes += checks.judge_hash(file, depth, readers, progress)
    return Report(
        tuple(
            _report(use, file, misfits.get(use))
            for name, parts in selection.located.items()
            for use, file in (((name, part), files[_key(place)]) for part, place in parts.items())
        ),
        lacking(selection.incomplete),
        (*notes, *_does_without(manifest, selection.located)),
    )


def _does_without(manifest: Manifest, located: Located) -> Iterator[str]:
    """A sentence for each optional part that no file plays."""
    for name, parts in located.items():
        for part, file in manifest.models[name].optional.items():
            if part not in parts:
                path = manifest.files[file].path
                yield f"{name} does without its optional {part}: {path} is not there."


_Use = tuple[str, str]  # model, part


@dataclass
class _File:
    """One file, there or missing, and what has come to light of it so far."""

    place: Found | Missing
    uses: list[_Use] = field(default_factory=list)
    size: int | None = None  # bytes
    index: TensorIndex | None = None
    fault: Fault | None = None
    verified: bool = False


def _key(place: Found | Missing) -> Path | str:
    return place.path if isinstance(place, Found) else place.entry.name


def _gather(located: Located) -> dict[Path | str, _File]:
    """Each file once, with all that use it, in the order of the models."""
    files: dict[Path | str, _File] = {}
    for name, parts in located.items():
        for part, place in parts.items():
            files.setdefault(_key(place), _File(place)).uses.append((name, part))
    return files


def _misfits(
    manifest: Manifest, located: Located, files: Mapping[Path | str, _File], contents: Contents
) -> dict[_Use, Fault]:
    """The uses for which a file, whole as it is, holds the wrong tensors."""
    misfits = {}
    for name, parts in located.items():
        for part, place in parts.items():
            file = files[_key(place)]
            if isinstance(place, Found) and file.index is not None and file.fault is None:
                try:
                    sentences = contents(manifest.models[name], part, file.index)
                except SeedpodError as error:
                    misfits[name, part] = Fault(error.code, error.message)
                else:
                    if sentences:
                        misfits[name, part] = faults.tensors(place, name, part, sentences)
    return misfits


def _report(use: _Use, file: _File, misfit: Fault | None) -> FileReport:
    model, part = use
    place, fault = file.place, file.fault or misfit
    state: State = "verified" if file.verified else "present"
    if fault:
        state = "missing" if isinstance(place, Missing) else "wrong"
    return FileReport(
        model=model,
        part=part,
        file=place.entry.name,
        path=place.path if isinstance(place, Found) else None,
        size=file.size,
        state=state,
        note=faults.provenance(place) if isinstance(place, Found) else None,
        problems=(Problem(fault.code, model, place.entry.name, fault.message),) if fault else (),
    )


class _Checks:
    """The checks of a single file, and what they compare it with."""

    def __init__(self, manifest: Manifest, hashes: HashRecord, read: ReadIndex) -> None:
        self._manifest = manifest
        self._hashes = hashes
        self._read = read

    def look(self, file: _File) -> None:
        """All but its tensors and its hash."""
        if isinstance(file.place, Missing):
            file.fault = faults.missing(file.place, file.uses)
        elif outside := file.place.leads_out():
            file.fault = faults.leads_out(file.place, outside)
        else:
            self._open(file, file.place)

    def _open(self, file: _File, found: Found) -> None:
        try:
            info = found.path.stat()
            if not stat.S_ISREG(info.st_mode):
                file.fault = faults.not_a_file(found, stat.S_ISDIR(info.st_mode))
                return
            with open_regular(found.path) as data:
                head = data.read(HEAD_BYTES)
        except OSError as error:
            file.fault = faults.unreadable(found, error)
            return
        file.size = info.st_size
        file.index, file.fault = self._content(found, head, info.st_size)
        models = [model for model, _ in file.uses]
        if found.entry.size is not None and info.st_size not in (0, found.entry.size):
            if file.fault is None or file.fault.code in _SAID_BY_SIZE:
                likely = self._known_as(found, info.st_size)
                file.fault = faults.size(found, models, info.st_size, found.entry.size, likely)
        elif file.fault is None and found.converted_from is not None and file.index is not None:
            source = file.index.metadata.get("source_sha256")
            file.fault = faults.stale(found, found.converted_from, models, source)
            file.fault = file.fault or self._outdated(found, models, file.index.metadata, info)

    def _outdated(
        self, found: Found, models: Sequence[str], metadata: Mapping[str, str], made: os.stat_result
    ) -> Fault | None:
        """Whether a converted file's master, of which the manifest has no hash, was replaced since."""
        assert found.converted_from is not None and found.master is not None
        try:
            master = found.master.stat()
        except OSError:  # a converted file needs no master
            return None
        known = self._hashes.lookup(found.master)
        if found.converted_from.sha256 is not None or known == metadata.get("source_sha256", ""):
            return None
        if known is not None:
            why = f"its sha256 is {known}, expected {metadata.get('source_sha256')}"
        elif str(master.st_size) != metadata.get("source_size"):
            why = f"it has {master.st_size:,} bytes, expected {metadata.get('source_size')}"
        elif master.st_mtime_ns > made.st_mtime_ns:
            why = "the master was written later, as a copy of a volume without its times is"
        else:
            return None
        return faults.replaced_master(found, models, why)

    def _content(self, found: Found, head: bytes, size: int) -> tuple[TensorIndex | None, Fault | None]:
        path, format = found.path, found.entry.format
        try:
            if size > 0 and format != "data":
                return self._read(path, format), None
            refuse_other_content(path, format, head, size)
        except SeedpodError as error:
            if size == 0 or format != "data" or error.code in _PLACEHOLDERS:
                return None, Fault(error.code, error.message)
        return None, None

    def _known_as(self, found: Found, size: int) -> tuple[FileEntry, ...]:
        """Which files of the manifest a file of the wrong size may be: by its hash if that is
        remembered, else by its size."""
        sha256 = self._hashes.lookup(found.path)
        known = [entry for entry in self._manifest.files.values() if entry.name != found.entry.name]
        by_hash = tuple(entry for entry in known if sha256 and entry.sha256 == sha256)
        return by_hash or tuple(entry for entry in known if entry.size == size)

    def judge_hash(self, file: _File, depth: str, readers: int, progress: Progress | None) -> list[str]:
        """Compare the hash, if it is known, remembered, or to be computed. Returns notes."""
        found, notes = file.place, []
        assert isinstance(found, Found), "a missing file has a fault"
        if found.entry.sha256 is None:
            return []
        sha256 = self._hashes.lookup(found.path)
        if sha256 is None and depth == "full":
            try:
                info = found.path.stat()
                sha256 = sha256_file(found.path, readers=readers, progress=progress)
            except (OSError, SeedpodError) as error:
                file.fault = faults.unreadable(found, error)
                return []
            if not self._hashes.remember(found.path, sha256, info):
                notes.append(f"The hash of {found.path} could not be written to the cache folder.")
        if sha256 is not None:
            file.verified = sha256 == found.entry.sha256
            if not file.verified:
                others = [entry for entry in self._manifest.files.values() if entry.sha256 == sha256]
                file.fault = faults.wrong_hash(found, [model for model, _ in file.uses], sha256, others)
        return notes
