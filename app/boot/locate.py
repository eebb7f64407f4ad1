"""Find each part of a model under the roots, or say exactly where it was looked for.

A file may be at its path under any root, or in the hub cache that RunPod fills below a root. A smaller
file of the same weights is preferred: what `convert` made here first, then the manifest's alternatives.
Nothing is opened but a converted file's one-line hash; whether a file is right is `verify`'s to say.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Final

from app.boot.folders import Nearby, describe, present
from app.boot.manifest import FileEntry, Manifest, ModelEntry, Origin
from app.boot.regular import open_regular
from app.errors import ConfigError

HUB_CACHE: Final = PurePosixPath("huggingface-cache/hub")  # where RunPod keeps cached models
CONVERTED: Final = ("bf16", "fp16")  # what `convert` makes, in order of preference
_SHA256: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Found:
    """A file that plays a part.

    `entry` is the file that was taken: the part's own, an alternative, or a converted file, whose entry
    is made up from `converted_from` (its sha256 is what its sidecar says, None without one).
    """

    entry: FileEntry
    path: Path
    root: Path
    converted_from: FileEntry | None = None
    revision: str | None = None  # a hub revision other than the pinned one, in whose folder it lies
    master: Path | None = None  # where the file that this one was converted from lies, or lay

    def leads_out(self) -> Path | None:
        """Where the file's path really leads, if that is outside its root."""
        real = Path(os.path.realpath(self.path))
        return None if real.is_relative_to(os.path.realpath(self.root)) else real


@dataclass(frozen=True)
class Tried:
    """A path where a file was looked for, and a clause on what is there instead."""

    path: Path
    held: str


@dataclass(frozen=True)
class Missing:
    """A part without a file; `nearby` are files of the right name in the wrong folder."""

    entry: FileEntry
    tried: tuple[Tried, ...]
    nearby: tuple[Path, ...] = ()


Located = Mapping[str, Mapping[str, Found | Missing]]  # model -> part -> what was found


def locate(
    manifest: Manifest,
    model: ModelEntry,
    roots: Sequence[Path],
    nearby: Nearby | None = None,
    *,
    every: bool = False,
) -> Mapping[str, Found | Missing]:
    """What plays each part of `model`. Of its optional parts those that are there, or with `every` all.
    Several models share one `nearby`, so the roots are searched for misplaced files once."""
    nearby = nearby or Nearby(roots)
    parts = {part: _locate_part(manifest, name, roots, nearby) for part, name in model.parts.items()}
    optional = {part: _locate_part(manifest, name, roots, nearby) for part, name in model.optional.items()}
    return parts | {part: place for part, place in optional.items() if every or isinstance(place, Found)}


def locate_all(
    manifest: Manifest, models: Sequence[str], roots: Sequence[Path], *, every: bool = False
) -> Located:
    """`locate` for each of the models named."""
    nearby = Nearby(roots)
    return {name: locate(manifest, manifest.models[name], roots, nearby, every=every) for name in models}


def locate_file(entry: FileEntry, roots: Sequence[Path]) -> Found | Missing:
    """`entry` itself, without alternatives: what `convert` reads and `fetch` would otherwise download.

    Raises:
        ConfigError: `checkpoint_link_outside` where it is a link that leads out of its root.
    """
    looked = list(_look(entry, roots))
    found = next((place for place in looked if isinstance(place, Found)), None)
    if found and (real := found.leads_out()):
        raise ConfigError("checkpoint_link_outside", outside(found, real))
    return found or _missing(entry, looked, ())


def outside(found: Found, real: Path) -> str:
    """What is wrong with a file whose path leads out of its root, to `real`."""
    return (
        f"{found.path} is a link that leads out of the root {found.root}, to {real}; expected a file "
        "inside the root: mount the folder that holds it as a root of its own (SEEDPOD_ROOTS), or copy it."
    )


def _locate_part(manifest: Manifest, name: str, roots: Sequence[Path], nearby: Nearby) -> Found | Missing:
    entry = manifest.files[name]
    looked: list[_Absent] = []
    for place in _in_order(manifest, entry, roots):
        if isinstance(place, Found):
            return place
        looked.append(place)
    names = [entry.path.name, *(e.path.name for e in _alternatives(manifest, entry))]
    misplaced = [path for name in names for path in nearby.named(name)]
    return _missing(entry, looked, [p for p in misplaced if _may_be(manifest, entry, p, roots)])


def _in_order(manifest: Manifest, entry: FileEntry, roots: Sequence[Path]) -> Iterator[Found | _Absent]:
    """Everything that could play the part of `entry`, best first, over all roots one file at a time."""
    if entry.format != "data":
        for dtype in CONVERTED:
            yield from _look(entry, roots, dtype)
    for alternative in _alternatives(manifest, entry):
        yield from _look(alternative, roots)
    yield from _look(entry, roots)


def _alternatives(manifest: Manifest, entry: FileEntry) -> Iterator[FileEntry]:
    for name in entry.alternatives:
        yield from _alternatives(manifest, manifest.files[name])
        yield manifest.files[name]


# ------------------------------------------------------------------ one file, in all its places


@dataclass(frozen=True)
class _Absent:
    path: Path
    root: Path
    why: str | None  # None: nothing is there


def _look(entry: FileEntry, roots: Sequence[Path], dtype: str | None = None) -> Iterator[Found | _Absent]:
    """Each place of `entry`, or with `dtype` of the file that `convert` makes from it."""
    for path, root, revision in _places(entry, roots):
        target = path if dtype is None else converted_path(path, dtype)
        if not present(target):
            yield _Absent(target, root, _dangling(target))
        elif dtype is not None:
            yield Found(_converted_entry(entry, target, dtype), target, root, entry, revision, path)
        elif revision and (why := _differs(entry, target)):
            yield _Absent(target, root, f"it is another file, of revision {revision}: {why}")
        else:
            yield Found(entry, target, root, None, revision)


def _places(entry: FileEntry, roots: Sequence[Path]) -> Iterator[tuple[Path, Path, str | None]]:
    """(path, root, revision if it is not the pinned one): the roots themselves, then the pinned revision
    in their hub caches, then whatever other revisions these hold."""
    for root in roots:
        yield root / entry.path, root, None
    origin = entry.origin
    if origin is None:
        return
    if origin.revision:
        for root in roots:
            yield _snapshots(root, origin) / origin.revision / origin.filename, root, None
    for root in roots:
        revisions = _revisions(_snapshots(root, origin))
        if not revisions and origin.revision is None:  # nothing else would say where it was looked for
            yield _snapshots(root, origin) / "*" / origin.filename, root, None
        for revision in revisions:
            if revision != origin.revision:
                yield _snapshots(root, origin) / revision / origin.filename, root, revision


def _snapshots(root: Path, origin: Origin) -> Path:
    return root / HUB_CACHE / f"models--{origin.repo.replace('/', '--')}" / "snapshots"


def _revisions(snapshots: Path) -> list[str]:
    try:
        return sorted(path.name for path in snapshots.iterdir())
    except OSError:  # most roots have no hub cache
        return []


def _differs(entry: FileEntry, path: Path) -> str | None:
    """Why a file of another revision cannot be `entry`, from its size and, as the hub cache names large
    files by their hash, from where its link leads. Another revision may well hold another file."""
    size = path.stat().st_size
    if entry.size is not None and size != entry.size:
        return f"{size:,} bytes, not {entry.size:,}"
    blob = Path(os.path.realpath(path)).name
    if entry.sha256 and _SHA256.fullmatch(blob) and blob != entry.sha256:
        return f"sha256 {blob}, not {entry.sha256}"
    return None


def _dangling(path: Path) -> str | None:
    try:
        return f"it is a link to {path.readlink()}, which is not there"
    except OSError:  # not a link: nothing is there
        return None


def _may_be(manifest: Manifest, entry: FileEntry, path: Path, roots: Sequence[Path]) -> bool:
    """Whether a file of the right name could be the one that is missing: it is not some other entry of
    the manifest in its own place (every SeedVR2 has an `ema_vae.pth`), unless that has the same hash."""
    for root in roots:
        for other in manifest.files.values():
            if path == root / other.path:
                return other.sha256 is not None and other.sha256 == entry.sha256
    return True


def _missing(entry: FileEntry, looked: Sequence[Found | _Absent], nearby: Sequence[Path]) -> Missing:
    tried: list[Tried] = []
    folders: set[Path] = set()
    # the file itself first: a reader wants it, and not what could have stood in for it
    for place in sorted(looked, key=lambda place: place.path.name != entry.path.name):
        assert isinstance(place, _Absent)
        folder = place.path.parent
        held = place.why or ("as above" if folder in folders else describe(folder, place.root))
        if place.why is None:
            folders.add(folder)
        tried.append(Tried(place.path, held))
    return Missing(entry, tuple(tried), tuple(nearby))


# ------------------------------------------------------------------ what `convert` made


def converted_path(master: Path, dtype: str) -> Path:
    """Where `convert` writes its file: beside the master, seedvr2_ema_7b.bf16.safetensors."""
    return master.with_name(f"{master.stem}.{dtype}.safetensors")


def _converted_entry(master: FileEntry, path: Path, dtype: str) -> FileEntry:
    name = PurePosixPath(master.name)
    return replace(
        master,
        name=str(name.with_name(f"{name.stem}.{dtype}.safetensors")),
        path=master.path.with_name(path.name),
        format="safetensors",
        size=None,
        sha256=_sidecar_hash(path),
        origin=None,
        alternatives=(),
        superseded={},
        note=None,
    )


def _sidecar_hash(path: Path) -> str | None:
    """The hash in `<path>.sha256`, a file as sha256sum writes it; None if there is none."""
    try:
        with open_regular(path.with_name(f"{path.name}.sha256")) as file:
            match = _SHA256.match(file.read(64).decode("ascii", "replace"))
    except OSError:
        return None
    return match[0] if match else None
