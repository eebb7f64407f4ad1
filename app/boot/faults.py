"""What is wrong with a checkpoint file, as a code and a sentence or two.

Each says which file, what it is, what was expected and what to do. Nothing is looked up here but the
sizes of misplaced files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from rich.filesize import decimal

from app.boot.locate import Found, Missing, outside
from app.boot.manifest import FileEntry
from app.errors import SeedpodError


@dataclass(frozen=True)
class Fault:
    """A stable code and a message for a person."""

    code: str
    message: str


def missing(place: Missing, uses: Sequence[tuple[str, str]]) -> Fault:
    """`checkpoint_missing`, with a line for each path that was tried; `uses` are (model, part)."""
    entry = place.entry
    models = " ".join(dict.fromkeys(model for model, _ in uses))
    parts = ", ".join(f"the {part} of {model}" for model, part in uses)
    size = f" ({decimal(entry.size)})" if entry.size else ""
    fetch = f" or run `entrypoint.py fetch {models}`" if entry.origin else ""
    text = (
        f"{entry.name}{size}, {parts}, is missing: expected at {entry.path} under a "
        f"root; put it there{fetch}."
    )
    for path in place.nearby:
        text += f" A file of that name{_nearby_size(path, entry)} is at {path}: if it is the one, move it."
    if entry.note:
        text += f" {entry.note}"
    return Fault("checkpoint_missing", text + _tried(place))


def _tried(place: Missing) -> str:
    """A line for each path, and one for those of a folder that have nothing new to tell."""
    lines: dict[tuple[Path, str], str] = {}
    for tried in place.tried:
        key = (tried.path.parent, tried.held)
        lines[key] = f"{lines[key]}, {tried.path.name}" if key in lines else str(tried.path)
    return "".join(f"\n  tried {paths}: {held}" for (_, held), paths in lines.items())


def _nearby_size(path: Path, entry: FileEntry) -> str:
    try:
        size = path.stat().st_size
    except OSError:
        return ""
    if path.name != entry.path.name or entry.size is None:
        return f" ({decimal(size)})"
    return " and size" if size == entry.size else f" but of {size:,} bytes instead of {entry.size:,}"


def leads_out(found: Found, real: Path) -> Fault:
    return Fault("checkpoint_link_outside", outside(found, real))


def not_a_file(found: Found, folder: bool) -> Fault:
    kind = "a folder" if folder else "a device, pipe or socket"
    return Fault(
        "checkpoint_not_file",
        f"{found.path} is {kind}, expected the file {found.entry.name}: put the file itself there.",
    )


def unreadable(found: Found, error: OSError | SeedpodError) -> Fault:
    if isinstance(error, SeedpodError):
        return Fault(error.code, error.message)
    return Fault(
        "checkpoint_unreadable",
        f"{found.path} cannot be read ({error.strerror}); expected a file that this process may read: "
        "check its permissions, its folder's, and the volume.",
    )


def size(found: Found, models: Sequence[str], held: int, expected: int, likely: Sequence[FileEntry]) -> Fault:
    """`checkpoint_size`: how much of the file is there, or which file it is by its size."""
    if likely:
        names = " or ".join(entry.name for entry in likely)
        what = f"which is what {names} has: another file is in its place"
    elif held < expected:
        # rounded down, so that a file that lacks its last bytes never has 100%
        what = f"{int(held / expected * 1000) / 10}%: half-downloaded or half-copied"
    else:
        what = f"{held - expected:,} too many: another version, or another file in its place"
    return Fault(
        "checkpoint_size",
        f"{found.path} has {held:,} bytes of the {expected:,} expected of {found.entry.name}, {what}. "
        f"{_remedy(found, models)}",
    )


def tensors(found: Found, model: str, part: str, sentences: Sequence[str]) -> Fault:
    return Fault(
        "checkpoint_tensors",
        f"{found.path} does not hold the tensors of {model}'s {part}: {' '.join(sentences)} "
        f"{_remedy(found, [model])}",
    )


def wrong_hash(found: Found, models: Sequence[str], sha256: str, others: Sequence[FileEntry]) -> Fault:
    """`checkpoint_superseded` or `checkpoint_hash`."""
    entry = found.entry
    if sha256 in entry.superseded:
        return Fault(
            "checkpoint_superseded",
            f"{found.path} is {entry.superseded[sha256]}: its sha256 is {sha256}, expected {entry.sha256}. "
            f"{_remedy(found, models)}",
        )
    what = f"it is {others[0].name}" if others else "it is damaged, or another version"
    return Fault(
        "checkpoint_hash",
        f"{found.path} has the sha256 {sha256}, expected {entry.sha256} for {entry.name}: {what}. "
        f"{_remedy(found, models)}",
    )


def stale(found: Found, master: FileEntry, models: Sequence[str], source: str | None) -> Fault | None:
    """`checkpoint_converted_stale` or `checkpoint_converted_unproven`: a converted file counts only with
    its own hash beside it, and if it says that it was made from the master of the manifest."""
    again = f"Run `entrypoint.py convert {models[0]}` again, or move it away so that {master.name} is used."
    if master.sha256 is not None and source != master.sha256:
        made = f"the file with sha256 {source}" if source else "a file it does not name"
        if source is not None and source in master.superseded:
            made = master.superseded[source]
        return Fault(
            "checkpoint_converted_stale",
            f"{found.path} was made from {made}, expected {master.sha256} ({master.name}). {again}",
        )
    if found.entry.sha256 is None:
        return Fault(
            "checkpoint_converted_unproven",
            f"{found.path} has no hash beside it; expected one line of sha256sum in "
            f"{found.path.name}.sha256, as `convert` writes it. {again}",
        )
    return None


def replaced_master(found: Found, models: Sequence[str], why: str) -> Fault:
    return Fault(
        "checkpoint_converted_stale",
        f"{found.path} was not made from {found.master} as that is now: {why}. Run "
        f"`entrypoint.py convert {models[0]}` again.",
    )


def provenance(found: Found) -> str | None:
    """Where a file is from that is not simply the part's own at its own path."""
    notes = []
    if found.converted_from:
        notes.append(f"converted from {found.converted_from.name}")
    if found.revision:
        origin = (found.converted_from or found.entry).origin
        pinned = f" instead of {origin.revision[:12]}" if origin and origin.revision else ""
        notes.append(f"from the hub cache, revision {found.revision[:12]}{pinned}")
    if found.entry.sha256 is None:
        notes.append("no hash is known for it")
    return ", ".join(notes) or None


def unknown_models(unknown: Sequence[str], known: Sequence[str]) -> str:
    near = {name: get_close_matches(name, known, n=1) for name in unknown}
    guesses = "".join(f" Did you mean {guess[0]} instead of {n!r}?" for n, guess in near.items() if guess)
    names = ", ".join(repr(name) for name in unknown)
    return f"{names}: no manifest lists such a model; known models: {', '.join(known)}.{guesses}"


def none_complete(lacking: Mapping[str, Sequence[str]], roots: Sequence[Path], task: str = "") -> str:
    does = f" that does {task}" if task else ""
    lines = "".join(f"\n  {model} lacks {', '.join(paths)}" for model, paths in lacking.items())
    return (
        f"No model{does} has all its files under {where(roots)}; expected at least one. Mount the "
        "volume that holds them, set SEEDPOD_ROOTS, or run `entrypoint.py fetch MODEL`; "
        f"`entrypoint.py check` prints each path that was tried.{lines}"
    )


def where(roots: Sequence[Path]) -> str:
    """The roots, in words, and which of them are not there."""
    return " or ".join(f"{root}{'' if root.is_dir() else ' (no such folder)'}" for root in roots)


def _remedy(found: Found, models: Sequence[str]) -> str:
    if found.converted_from:
        return f"Run `entrypoint.py convert {models[0]}` again."
    if found.entry.origin:
        return (
            f"Copy it again, or move it away and run `entrypoint.py fetch {' '.join(dict.fromkeys(models))}`."
        )
    return "Put the right file there."
