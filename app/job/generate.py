"""The generate task: request -> model -> encode, as a stream, and what came of it.

Knows of requests, pictures and pipelines; nothing of servers, downloads or manifests.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from app.errors import JobStopped
from app.job.generate_plan import GenerateJob
from app.job.result import Result, told_out_of_memory
from app.models.wan import fitting
from app.models.wan.fitting import Fit, fit
from app.models.wan.generate import Guide
from app.models.wan.memory import Choice
from app.progress import Progress
from app.timing import Stopwatch
from app.video.fragments import FragmentWriter
from app.video.frames import resize, to_unit
from app.video.probe import ClipInfo, probe
from app.video.read import read_frames

if TYPE_CHECKING:
    from app.models.wan.generate import Generator


@dataclass(frozen=True, kw_only=True)
class GenerateResult(Result):
    """What generating made. `first_frames_seconds`: how long the first frames took to be made and written,
    the image that a clip begins with not counted. `memory`: which way was taken for the memory there was."""

    prompt: str
    first_frames_seconds: float
    memory: str


def run_generate(
    generator: Generator,
    model: str,
    job: GenerateJob,
    progress: Progress,
    on_step: Callable[[], None] = lambda: None,
    emit: Callable[[bytes, int], None] = lambda piece, frames: None,
    on_window: Callable[[int], None] = lambda latents: None,
) -> GenerateResult:
    """Generate a clip.

    `on_step` is called between steps and may raise to stop: nothing partial is left then, unless the request
    keeps it. `emit` gets the pieces of a stream, and how many frames were made so far; `on_window`, once, how
    many latents a block will see.

    Raises:
        InputError: A picture is damaged. FileError: The output cannot be written. UnavailableError:
        `memory_short`, before anything is computed; `out_of_memory`.
    """
    begin = time.perf_counter()
    clock = Stopwatch()
    notes = [*job.notes, *_cut_prompts(generator, job)]
    progress.start("memory", None, "B")
    found = _fit(job, generator)
    progress.finish(str(found))
    on_window(found.window)
    notes += _given_up(job, found)
    job = _done_as(job, found.choice)
    first, whole = 0.0, True
    with told_out_of_memory(lambda: _too_large(job)), job.writer as writer:
        with clock("read"):
            guide = _guide(job)
        made = generator.generate(job.options, guide, on_step, clock)
        del guide
        progress.start("generate", job.frames, "frames")
        with closing(made) as blocks, _kept(job) as kept:
            for block in blocks:
                pictures = block[: job.frames - writer.frames_written].float().clamp(-1, 1)
                with clock("write"):
                    writer.write(pictures)
                    if isinstance(writer, FragmentWriter):
                        emit(writer.take(), writer.frames_written)
                if not first and writer.frames_written > (job.options.length.given == 1):
                    first = time.perf_counter() - begin
                progress.advance(len(pictures))
                del block, pictures  # nothing of them stays while the next ones are made
        whole = not kept.stopped
    if isinstance(writer, FragmentWriter):
        emit(writer.take(), writer.frames_written)  # the last frame, and what ends the file
    progress.finish(f"{job.options.width}x{job.options.height}")
    frames = writer.frames_written
    if not whole:  # a signal may come between a frame and its count
        path = writer.path
        with closing(read_frames(path, probe(path), size=(16, 16))) as kept_frames:
            frames = sum(1 for _ in kept_frames)
        notes.append(f"The job was stopped after {frames} of {job.frames} frames.")
    return GenerateResult(
        path=str(job.writer.path),
        model=model,
        width=job.options.width,
        height=job.options.height,
        frames=frames,
        rate=str(job.rate),
        seed=job.request.seed,
        bytes=job.writer.path.stat().st_size,
        seconds={step: round(seconds, 3) for step, seconds in clock.seconds.items()},
        total_seconds=round(time.perf_counter() - begin, 3),
        notes=(*notes, *job.writer.notes),
        prompt=job.options.prompts[0],
        first_frames_seconds=round(first, 3),
        memory=str(found),
        whole=whole,
    )


def _cut_prompts(generator: Generator, job: GenerateJob) -> list[str]:
    """A note for each prompt that is too long to be read whole."""
    told = [generator.text.tokens(prompt).note for prompt in job.options.prompts.values()]
    return [f"{note[:1].upper()}{note[1:]}" for note in told if note]


def _fit(job: GenerateJob, generator: Generator) -> Fit:
    """The way to make the clip that fits the memory which is free now.

    Raises:
        UnavailableError: `memory_short`.
    """
    options = job.options
    start = 0 if job.start is None else max(1, job.used)
    task = generator.task(
        options, start, options.length.frames if job.pose else 0, reference=job.reference is not None
    )
    limits = fitting.Limits(generator.stays, shorten=job.request.window is None)
    what = f"A result of {options.width}x{options.height}"
    if options.length.at_once:
        what += f" with {options.length.frames} frames made at once"
    return fit(generator.estimate, task, generator.room(), limits, what)


def _done_as(job: GenerateJob, choice: Choice) -> GenerateJob:
    options = replace(job.options, window=choice.window, decode=choice.decode, text=choice.text)
    return replace(job, options=options)


def _given_up(job: GenerateJob, found: Fit) -> list[str]:
    """What memory changed of the result, in sentences."""
    asked = job.options.latents_seen
    if found.window == asked:
        return []
    return [
        f"Memory was short for a window of {asked} latents: this was made with one of "
        f"{found.window}, as with window {found.window} on any machine."
    ]


def _guide(job: GenerateJob) -> Guide:
    """The pictures, decoded."""
    size = job.options.height, job.options.width
    start = None
    if job.start is not None:
        with closing(read_frames(job.start.path, job.start)) as frames:
            last = deque(frames, maxlen=max(1, job.used))
        start = torch.cat([_covering(to_unit(frame[None]), *size) for frame in last]) * 2 - 1
    return Guide(
        start=start,
        poses=None if job.pose is None else _pictures(job.pose, size),
        reference=None if job.reference is None else _pictures(job.reference, size, 1)[0],
    )


def _pictures(info: ClipInfo, size: tuple[int, int], most: int | None = None) -> Tensor:
    """(frames, 3, height, width) uint8, the first `most` of them."""
    with closing(read_frames(info.path, info, size=size)) as frames:
        pictures = [torch.from_numpy(frame) for frame in islice(frames, most)]
    return torch.stack(pictures).permute(0, 3, 1, 2)


def _covering(frame: Tensor, height: int, width: int) -> Tensor:
    """A picture, (1, 3, h, w), cut to the shape of height x width around its middle, and resized."""
    h, w = frame.shape[2:]
    cut_h, cut_w = min(h, round(w * height / width)), min(w, round(h * width / height))
    top, left = (h - cut_h) // 2, (w - cut_w) // 2
    cut = frame[:, :, top : top + max(1, cut_h), left : left + max(1, cut_w)]
    return resize(cut, height, width).clamp(0, 1)


class _Stop:
    """Whether a job was stopped, and what it made is kept."""

    stopped = False


@contextmanager
def _kept(job: GenerateJob) -> Iterator[_Stop]:
    """Where the request keeps what a stopped job made, stopping ends the making and not the writing."""
    stop = _Stop()
    try:
        yield stop
    except (JobStopped, KeyboardInterrupt):
        if not job.request.keep_partial or not job.writer.frames_written:
            raise
        stop.stopped = True


def _too_large(job: GenerateJob) -> str:
    """What to tell where memory ran out."""
    if job.options.length.at_once:
        what, less = f"{job.options.length.frames} frames made at once", "fewer frames"
    else:
        what, less = f"a window of {job.options.latents_seen} latents", "a shorter window"
    return (
        f"A result of {job.options.width}x{job.options.height} with {what} does not fit the memory of "
        f"this machine; ask for a smaller size or {less}, or use a larger GPU."
    )
