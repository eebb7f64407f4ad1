"""Several clips through one codec: every clip in a folder, each into its own folder, and a list of results.

One clip that cannot be read does not keep the others from being made.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from app.errors import InputError, SeedpodError
from app.job.autoencode import AutoencodeJob, AutoencodeResult, plan_autoencode, run_autoencode
from app.job.autoencode_request import AutoencodeRequest
from app.job.result import Limits
from app.models.latents.autoencode import StateDicts
from app.models.latents.codec import Codec
from app.models.latents.weights_request import InterpolateWeights
from app.progress import Progress
from app.video.place import check_place
from app.video.write import IMAGE_SUFFIXES

MANIFEST = "results.json"
SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".gif", *IMAGE_SUFFIXES)


@dataclass(frozen=True)
class Refused:
    """A clip of a folder that was looked at and cannot be taken."""

    name: str
    error: SeedpodError


@dataclass(frozen=True)
class Clips:
    """What is to be made: `whole` for the one clip that was named, else a job for each clip of a folder."""

    jobs: tuple[AutoencodeJob, ...]
    refused: tuple[Refused, ...]
    whole: bool


def plan_clips(
    request: AutoencodeRequest, source: Path, others: Mapping[str, Path], output: Path, limits: Limits
) -> Clips:
    """A job for the clip `source`, or for every clip in that folder, in the order of their names.

    Raises:
        InputError: `folder_empty`: it holds no clip; `folder_unusable`: none of its clips can be taken.
        What `plan_autoencode` raises of the one clip that was named.
    """
    if not source.is_dir():
        return Clips((plan_autoencode(request, source, others, output, limits),), (), True)
    check_place(output, folder=True)
    files = sorted(path for path in source.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    if not files:
        raise InputError(
            "folder_empty",
            f"{source.name} holds no clip; expected files that end in {', '.join(SUFFIXES)}: name another "
            "folder, or a file.",
        )
    jobs, refused = [], []
    for path in files:
        try:
            jobs.append(plan_autoencode(request, path, others, output / path.name, limits, parent=False))
        except InputError as error:
            refused.append(Refused(path.name, error))
    if not jobs:
        raise InputError(
            "folder_unusable",
            f"None of the {len(files)} clips in {source.name} can be taken; the first: "
            f"{refused[0].error.message}",
        )
    return Clips(tuple(jobs), tuple(refused), False)


def run_clips(
    codec: Codec,
    model: str,
    clips: Clips,
    output: Path,
    progress: Progress,
    on_step: Callable[[], None] = lambda: None,
    models: StateDicts | None = None,
) -> list[AutoencodeResult]:
    """Do the jobs, and for a folder list what came of each clip in `results.json`."""
    if clips.whole:
        return [run_autoencode(codec, model, clips.jobs[0], progress, on_step, models)]
    output.mkdir(exist_ok=True)
    results = []
    listed: list[dict[str, object]] = [
        {"clip": refused.name, "error": refused.error.to_dict()} for refused in clips.refused
    ]
    for job in clips.jobs:
        name = job.info.path.name
        try:
            result = run_autoencode(codec, model, job, progress, on_step, models)
        except InputError as error:  # its data is damaged further on
            listed.append({"clip": name, "error": error.to_dict()})
        else:
            results.append(result)
            listed.append({"clip": name, "result": {**result.to_dict(), "path": name}})
    listed.sort(key=lambda entry: str(entry["clip"]))
    (output / MANIFEST).write_text(json.dumps(listed, indent=2) + "\n")
    return results


def weights_of(request: AutoencodeRequest, model: str) -> list[str]:
    """Names of other models whose weights the request interpolates with."""
    named = [change.other for change in request.weights if isinstance(change, InterpolateWeights)]
    return [name for name in dict.fromkeys(named) if name != model]
