"""The restore task: decode -> model -> encode, as a stream, and what came of it.

Knows of clips and pipelines; nothing of servers, downloads or manifests.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from app.errors import InputError, UsageError
from app.job.request import Part, RestoreRequest
from app.job.result import Limits, Result, told_out_of_memory
from app.models.seedvr2 import fitting
from app.models.seedvr2.dit import DiT
from app.models.seedvr2.fitting import Fit, fit
from app.models.seedvr2.memory import Choice, Task
from app.models.seedvr2.restore import RestoreOptions, Restorer, latent_size
from app.models.seedvr2.segment import Segment, segments
from app.progress import Progress
from app.timing import Stopwatch
from app.video.frames import MULTIPLE, target_size
from app.video.probe import ClipInfo, probe
from app.video.rates import exact_rate
from app.video.read import PixelFormat, read_frames
from app.video.shots import Shot, find_shots
from app.video.write import ImageWriter, VideoWriter

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor


SOURCE_PIXELS = 4  # a source may have this many times the pixels that a result may have
Writer = VideoWriter | ImageWriter


@dataclass(frozen=True, kw_only=True)
class RestoreResult(Result):
    """What restoring made; `sound` says whether the source's was carried over, `memory` which way through the
    model was taken for the memory there was."""

    shots: int
    sound: bool
    memory: str


@dataclass(frozen=True)
class RestoreJob:
    """A job that was looked at and can begin: nothing is decoded or written yet."""

    request: RestoreRequest
    info: ClipInfo
    rate: Fraction
    options: RestoreOptions
    writer: Writer
    most_frames: int
    part: Part | None = None


def look(source: Path, limits: Limits) -> ClipInfo:
    """What the source is.

    Raises:
        InputError: It is not a clip or image that can be read, or is beyond the limits.
    """
    return probe(source, max_frames=limits.frames, max_pixels=SOURCE_PIXELS * limits.pixels)


def plan_restore(
    request: RestoreRequest, info: ClipInfo, output: Path, limits: Limits, part: Part | None = None
) -> RestoreJob:
    """Everything that can be refused before any costly work; nothing is written yet.

    `part` says which part of a longer clip the source is.

    Raises:
        UsageError: The size asked for makes no sense, `output` does not fit the codec, or `part` an image.
        InputError: The result would be beyond the limits.
        FileError: `output` cannot be written.
    """
    rate = info.rate if request.rate is None else exact_rate(request.rate)
    options = restore_options(request, info, limits)
    if output.exists() and info.path.samefile(output):
        raise UsageError("output_is_input", f"{output.name} is the source itself; name another output.")
    if part is not None:
        _check_part(part, info, limits)
    if info.is_image:
        return RestoreJob(request, info, rate, options, ImageWriter(output), limits.frames)
    height, width = output_size(options)
    sound = info.path if info.has_audio and part is None else None
    writer = VideoWriter(
        output, width, height, rate, codec=request.codec, audio_from=sound, crf=request.quality
    )
    return RestoreJob(request, info, rate, options, writer, limits.frames, part)


def _check_part(part: Part, info: ClipInfo, limits: Limits) -> None:
    if info.is_image:
        raise UsageError(
            "part_of_image", f"{info.path.name} is an image, which has no parts; leave part out."
        )
    if part.edges[-1] - part.edges[0] > limits.frames:
        raise InputError(
            "input_too_large",
            f"The part's shots have {part.edges[-1] - part.edges[0]:,} frames, and the limit is "
            f"{limits.frames:,}; send fewer shots, or raise SEEDPOD_MAX_FRAMES.",
        )


def run_restore(
    restorer: Restorer,
    model: str,
    job: RestoreJob,
    progress: Progress,
    on_step: Callable[[], None] = lambda: None,
    on_count: Callable[[int], None] = lambda frames: None,
    on_window: Callable[[int], None] = lambda latents: None,
) -> RestoreResult:
    """Restore a clip or image.

    `on_step` is called between steps and may raise to stop; so may `on_count`, which is told how many frames
    the result will have before any is restored. `on_window` is told the window that fits. Whatever is raised,
    nothing partial is left.

    Raises:
        InputError: The source is damaged. FileError: The output cannot be written.
    """
    begin = time.perf_counter()
    clock = Stopwatch()
    notes = list(job.info.notes)
    with clock("find cuts"):
        edges = _edges(job, progress, notes.append, on_step)
    progress.start("memory", None, "B")
    found = _fit(job, restorer, edges)
    progress.finish(str(found))
    on_window(found.choice.window)
    job = _done_as(job, found.choice)
    notes += _given_up(job, found)
    pieces = _segments(job, restorer, edges)
    count = sum(len(piece.made) for piece in pieces)
    if count > job.most_frames:
        raise InputError(
            "input_too_large",
            f"{job.info.path.name} has {count:,} frames, and the limit is {job.most_frames:,}; cut "
            "it, or raise SEEDPOD_MAX_FRAMES.",
        )
    on_count(count)
    progress.start("restore", count, "frames")
    with (
        job.writer as writer,
        torch.inference_mode(),
        told_out_of_memory(lambda: _too_large(job)),
        closing(_restored(restorer, job, pieces, clock, on_step)) as frames,
    ):
        for frame in frames:
            with clock("write"):
                writer.write(frame)
            progress.advance(1)
    height, width = output_size(job.options)
    progress.finish(f"{len(pieces)} shot{'s' if len(pieces) > 1 else ''}, {width}x{height}")
    path = job.writer.path
    return RestoreResult(
        path=str(path),
        model=model,
        width=width,
        height=height,
        frames=count,
        shots=len(pieces),
        rate=str(job.rate),
        sound=job.info.has_audio and job.request.codec != "png" and job.part is None,
        memory=str(found),
        seed=job.request.seed,
        bytes=sum(file.stat().st_size for file in (path.iterdir() if path.is_dir() else [path])),
        seconds={step: round(seconds, 3) for step, seconds in clock.seconds.items()},
        total_seconds=round(time.perf_counter() - begin, 3),
        notes=(*notes, *job.writer.notes),
    )


def restore_options(request: RestoreRequest, info: ClipInfo, limits: Limits) -> RestoreOptions:
    """The pipeline's options for a clip.

    Raises:
        UsageError: The size makes no sense.
        InputError: `output_too_large`: the result would have more pixels than the limit.
    """
    height, width = target_size(
        info.height, info.width,
        to_height=request.height, to_width=request.width,
        scale=request.scale, short_side=request.short_side,
        multiple=1 if info.is_image else 2,
    )  # fmt: skip
    if request.fit == "crop" and min(height, width) < MULTIPLE:
        raise UsageError(
            "size_invalid",
            f"The result would be {width}x{height}, and fit crop cuts sides to multiples of {MULTIPLE}; ask "
            "for a larger size, or use fit pad.",
        )
    if height * width > limits.pixels:
        raise InputError(
            "output_too_large",
            f"The result would be {width}x{height}, {height * width:,} pixels a frame, and the limit is "
            f"{limits.pixels:,}; ask for a smaller size, or raise SEEDPOD_MAX_PIXELS.",
        )
    return RestoreOptions(
        height=height,
        width=width,
        seed=request.seed,
        steps=request.steps,
        guidance=request.guidance,
        rescale=request.rescale,
        condition_noise=request.condition_noise,
        window=request.window,
        fit=request.fit,
        color=request.color,
    )


def output_size(options: RestoreOptions) -> tuple[int, int]:
    """(height, width) of the frames that the pipeline gives."""
    if options.fit == "crop":
        return options.height // MULTIPLE * MULTIPLE, options.width // MULTIPLE * MULTIPLE
    return options.height, options.width


def _edges(
    job: RestoreJob, progress: Progress, warn: Callable[[str], None], on_step: Callable[[], None]
) -> Sequence[int]:
    """The frames that shots begin with, and last where the last one ends: what the job's part says, or what
    the clip shows."""
    if job.part is not None:
        return job.part.edges
    shots = _shots(job, progress, warn, on_step)
    return [shots[0].start, *(shot.stop for shot in shots)]


def _segments(job: RestoreJob, restorer: Restorer, edges: Sequence[int]) -> list[Segment]:
    """What to restore of each shot: all of it, or what the job's part says."""
    start, stop = (edges[0], edges[-1]) if job.part is None else (job.part.start, job.part.stop)
    return segments(start, stop, edges, job.options.window, restorer.vae.config)


# ------------------------------------------------------------------ memory


def _fit(job: RestoreJob, restorer: Restorer, edges: Sequence[int]) -> Fit:
    """The way through the model that fits the memory which is free now.

    Raises:
        UnavailableError: `memory_short`.
    """
    options, info, config = job.options, job.info, restorer.vae.config
    longest = max(len(piece.encoded) for piece in _segments(job, restorer, edges))
    height, width = output_size(options)
    kept = min(info.height * info.width * 3 * (2 if info.bit_depth > 8 else 1), height * width * 3 * 4)
    task = Task(
        latents=longest,
        frame=latent_size(options, config),
        source=0 if options.color == "none" else kept,
        steps=options.steps,
        guided=options.guidance != 1.0,
        noised=options.condition_noise > 0,
        color=options.color,
        unit=config.spatial_factor,
    )
    asked = job.request.tile
    wanted = fitting.Limits(
        window=options.window,
        tile=None if asked is None else asked // config.spatial_factor,
        shorten=job.part is None,  # windows must be those of the other parts
        stream=isinstance(restorer.dit, DiT),
    )
    return fit(restorer.estimate, task, restorer.room(), wanted, f"A result of {width}x{height}")


def _done_as(job: RestoreJob, choice: Choice) -> RestoreJob:
    options = replace(job.options, window=choice.window, tile=choice.tile, stream=choice.stream)
    return replace(job, options=options)


def _given_up(job: RestoreJob, found: Fit) -> list[str]:
    """What memory changed of the result, in sentences."""
    notes = []
    if found.tile is not None and job.request.tile is None:
        notes.append(
            "Memory was short for whole frames: the autoencoder took tiles, as with tile "
            f"{found.tile} on any machine."
        )
    if found.choice.window < job.request.window:
        asked, got = job.request.window, found.choice.window
        notes.append(f"Memory was short for windows of {asked} latents: this was made with {got}.")
    return notes


# ------------------------------------------------------------------ frames


def _shots(
    job: RestoreJob, progress: Progress, warn: Callable[[str], None], on_step: Callable[[], None]
) -> list[Shot]:
    """The shots to restore each on its own; with cuts off, the whole clip as one. Damage at the very end
    of a file shows in this pass: the next one stops before it."""
    if job.info.is_image:
        return [Shot(0, 1)]
    seconds = job.info.duration
    progress.start("find cuts", None if seconds is None else round(seconds * job.rate), "frames")

    def on_frame() -> None:
        on_step()
        progress.advance(1)

    shots = find_shots(job.info.path, job.info, rate=job.rate, warn=warn, on_frame=on_frame)
    progress.finish(f"{shots[-1].stop} frames, {len(shots)} shot{'s' if len(shots) > 1 else ''}")
    return shots if job.request.cuts else [Shot(0, shots[-1].stop)]


def _restored(
    restorer: Restorer,
    job: RestoreJob,
    pieces: list[Segment],
    clock: Stopwatch,
    on_step: Callable[[], None],
) -> Generator[Tensor]:
    """The frames of the result, (1, 3, height, width) float32 in [-1, 1], shot after shot."""
    deep: PixelFormat = "rgb48le" if job.info.bit_depth > 8 else "rgb24"
    read = read_frames(job.info.path, job.info, rate=job.rate, pixel_format=deep)
    with closing(read):  # at once, not when somebody forgets the error that ended this
        frames = clock.around("read", read)
        if job.part is not None:
            frames = _of_part(frames, job.part, pieces, on_step)
        for number, piece in enumerate(pieces, job.part.shot if job.part else 0):
            taken = islice(frames, len(piece.read))
            yield from restorer.restore_segment(taken, piece, job.options, number, on_step, clock)


def _of_part(
    frames: Iterator[NDArray[Any]], part: Part, pieces: list[Segment], on_step: Callable[[], None]
) -> Iterator[NDArray[Any]]:
    """The frames of a part's source from the first that its pieces read on; an error where one is missing."""
    first, last = part.edges[0] + pieces[0].read.start, part.edges[-2] + pieces[-1].read.stop - 1
    needed = f"frames {first} to {last} of the clip are needed for {part.start} to {part.stop - 1}"
    if part.source_start > first:
        raise InputError(
            "part_not_in_source",
            f"The source begins with frame {part.source_start}, and {needed}; send a longer part.",
        )
    held = part.source_start
    for frame in frames:
        on_step()
        held += 1
        if held > first:
            yield frame
    raise InputError(
        "part_not_in_source",
        f"The source ends with frame {held - 1}, and {needed}; send a longer part.",
    )


def _too_large(job: RestoreJob) -> str:
    """What to tell where memory ran out."""
    return (
        f"A result of {job.options.width}x{job.options.height} with a window of {job.options.window} "
        "latents does not fit the memory of this machine; ask for a smaller size or a shorter window, or "
        "use a larger GPU."
    )
