"""Several clips through one codec: files that are named, or all clips in a folder, each into a folder of its
own, and a list of what came of each.

One clip that cannot be made does not keep the others from being made.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from app.errors import InputError, SeedpodError, UnavailableError, UsageError
from app.job.autoencode import AutoencodeResult, run_autoencode
from app.job.autoencode_plan import AutoencodeJob, plan_autoencode
from app.job.autoencode_request import AutoencodeRequest
from app.job.result import Limits
from app.models.latents.autoencode import StateDicts
from app.models.latents.codec import Codec
from app.progress import Progress
from app.video.place import check_place, failures_of, temporary
from app.video.write import IMAGE_SUFFIXES

MANIFEST = "results.json"
SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".gif", *IMAGE_SUFFIXES)

# What may be wrong with one clip and not with the next.
OF_A_CLIP = (InputError, UsageError, UnavailableError)


@dataclass(frozen=True)
class Refused:
    """A clip that cannot be taken, and why."""

    name: str
    error: SeedpodError

    def to_dict(self) -> dict[str, object]:
        return {"clip": self.name, "error": self.error.to_dict()}


@dataclass(frozen=True)
class Made:
    """A clip, and what came back."""

    name: str
    result: AutoencodeResult

    def to_dict(self) -> dict[str, object]:
        """`path` is the folder of the clip, within the one of all."""
        return {"clip": self.name, "result": {**self.result.to_dict(), "path": self.name}}


@dataclass(frozen=True)
class Clips:
    """What is to be made: a job for each clip that can be taken, in order, and the others."""

    jobs: tuple[AutoencodeJob, ...]
    refused: tuple[Refused, ...]


def plan_clips(
    request: AutoencodeRequest,
    sources: Sequence[Path],
    others: Mapping[str, Path],
    output: Path,
    limits: Limits,
) -> Clips:
    """Jobs for the clips that `sources` name, or are in the folders that they name, in the order of names.

    Raises:
        UsageError: `clips_same_name`: two clips would go into one folder.
        InputError: `folder_empty`: a folder holds no clip; `clips_unusable`: none can be taken.
        FileError: `output` cannot be written, or is a folder with something in it.
    """
    check_place(output, folder=True)
    files = sorted((path for source in sources for path in _clips_in(source)), key=lambda path: path.name)
    for one, other in pairwise(files):
        if one.name == other.name:
            raise UsageError(
                "clips_same_name",
                f"Two of the clips are called {one.name}; expected a name of its own for each, as their "
                "results go into folders of those names: rename one, or run them apart.",
            )
    jobs, refused = [], []
    for path in files:
        try:
            jobs.append(plan_autoencode(request, path, others, output / path.name, limits, parent=False))
        except InputError as error:
            refused.append(Refused(path.name, error))
    if not jobs:
        raise InputError(
            "clips_unusable",
            f"None of the {len(files)} clips can be taken; the first: {refused[0].error.message}",
        )
    return Clips(tuple(jobs), tuple(refused))


def run_clips(
    codec: Codec,
    model: str,
    clips: Clips,
    output: Path,
    progress: Progress,
    on_step: Callable[[], None] = lambda: None,
    models: StateDicts | None = None,
) -> list[Made | Refused]:
    """Do the jobs. `results.json` in `output` says what came of each clip so far, whatever ends the work."""
    with failures_of(output):
        output.mkdir(exist_ok=True)
    listed: list[Made | Refused] = [*clips.refused]
    for job in clips.jobs:
        name = job.info.path.name
        try:
            listed.append(Made(name, run_autoencode(codec, model, job, progress, on_step, models)))
        except OF_A_CLIP as error:
            listed.append(Refused(name, error))
        listed.sort(key=lambda each: each.name)
        _write_manifest(output / MANIFEST, listed)
    return listed


def _clips_in(source: Path) -> Iterator[Path]:
    if not source.is_dir():
        yield source
        return
    try:
        files = [
            path
            for path in source.iterdir()
            if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
        ]
    except OSError as error:
        raise InputError(
            "input_unreadable", f"The folder {source.name} cannot be read: {error.strerror}."
        ) from None
    if not files:
        raise InputError(
            "folder_empty",
            f"{source.name or source} holds no clip; expected files that end in {', '.join(SUFFIXES)}: name "
            "another folder, or a file.",
        )
    yield from files


def _write_manifest(path: Path, listed: Sequence[Made | Refused]) -> None:
    hidden = temporary(path)
    try:
        with failures_of(path):
            hidden.write_text(json.dumps([each.to_dict() for each in listed], indent=2) + "\n")
            hidden.replace(path)
    finally:
        hidden.unlink(missing_ok=True)
