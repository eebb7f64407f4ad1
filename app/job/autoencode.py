"""The autoencode task: a clip through a codec, beside what comes back of it and of its edited latents.

The result is a folder: original, reconstructed, edited and side_by_side videos, a sheet, and a report. Knows
of clips and codecs; nothing of servers, downloads or manifests.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from app.errors import InputError
from app.job.autoencode_plan import AutoencodeJob
from app.job.result import Result, told_out_of_memory
from app.memory import Room
from app.models.latents import fitting, report
from app.models.latents.analyze import channel_map, channel_statistics, compression, principal_components
from app.models.latents.autoencode import Latent, Session, StateDicts
from app.models.latents.codec import Codec
from app.models.latents.codecs import ImageCodec
from app.models.latents.compare import Board
from app.models.latents.fit import Fit
from app.models.latents.metal import device_of, lacks_operation, moved_to_cpu, place_of
from app.models.latents.pixels import from_bytes, to_bytes
from app.models.latents.quality import Meter, Quality
from app.models.latents.spool import Latents, View
from app.models.latents.weights_request import changes_of
from app.progress import Progress
from app.timing import Stopwatch
from app.video.place import failures_of, temporary
from app.video.probe import ClipInfo
from app.video.read import read_frames
from app.video.sheet import write_sheet
from app.video.write import VideoWriter

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from pydantic import BaseModel
    from torch import Tensor

    Frame = NDArray[np.uint8]

WIDEST, HIGHEST = 7680, 4320  # of the side-by-side video: what players take


@dataclass(frozen=True, kw_only=True)
class AutoencodeResult(Result):
    """What came back: `reconstructed` and `edited` say how near to the original (PSNR in dB, SSIM), `latents`
    their shape (channels, count, height, width), `compression` numbers of the frames per number of theirs,
    `device` where it ran and in which type, `memory` how many frames passed at once, for the memory there
    was."""

    device: str
    memory: str
    files: tuple[str, ...]
    latents: tuple[int, ...]
    compression: float
    reconstructed: dict[str, float | None]
    edited: dict[str, float | None] | None


def run_autoencode(
    codec: Codec,
    model: str,
    job: AutoencodeJob,
    progress: Progress,
    on_step: Callable[[], None] = lambda: None,
    models: StateDicts | None = None,
    work: Path | None = None,
) -> AutoencodeResult:
    """Encode, edit, decode and compare.

    `on_step` is called between steps and may raise to stop. `models`: state dicts of other models, by name,
    that weights may be interpolated with. `work`: an existing folder for latents; unset, they lie beside the
    result until it is done. Whatever is raised, nothing partial is left.

    Where a Metal device lacks an operation, the codec is moved to the CPU, for later jobs, too, and the
    result's notes say so.

    Raises:
        UsageError: An edit or a change does not fit the codec or the clip. InputError: A source is damaged,
        or what is decoded is no picture. FileError: The output cannot be written. UnavailableError:
        `memory_short`, before anything is encoded; `out_of_memory`.
    """
    try:
        return _made(codec, model, job, progress, on_step, models, work)
    except Exception as error:
        if not lacks_operation(device_of(codec), error):
            raise
        note = moved_to_cpu(codec, error)
    progress.start("once more on the CPU", None, "frames")
    progress.finish(note)
    result = _made(codec, model, job, progress, on_step, models, work)
    return replace(result, notes=(*result.notes, note))


def _made(
    codec: Codec,
    model: str,
    job: AutoencodeJob,
    progress: Progress,
    on_step: Callable[[], None],
    models: StateDicts | None,
    work: Path | None,
) -> AutoencodeResult:
    progress.start("memory", None, "B")
    found = _fit(codec, job)
    progress.finish(str(found))
    if isinstance(codec, ImageCodec):
        codec.batch, codec.most = found.batch, None  # where memory ended was another clip's
    inside = job.output.is_dir()
    folder = temporary(job.output / "result" if inside else job.output)
    latents = temporary((work or folder) / "latents")
    with failures_of(job.output):
        folder.mkdir()
        latents.mkdir()
    try:
        with told_out_of_memory(lambda: _too_large(job)):
            result = _Run(codec, model, job, str(found), folder, latents, progress, on_step).result(models)
        with failures_of(job.output):
            if inside:
                for path in folder.iterdir():
                    path.replace(job.output / path.name)
            else:
                folder.replace(job.output)
        return result
    finally:
        shutil.rmtree(latents, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)


def _fit(codec: Codec, job: AutoencodeJob) -> fitting.Fit:
    """How many frames at once fit the memory which is free now.

    Raises:
        UnavailableError: `memory_short`.
    """
    request, (height, width) = job.request, job.size
    task = fitting.Task(
        height, width, request.frames or job.info.frames, request.fit,
        edited=bool(request.edits or request.weights), changed=bool(request.weights),
    )  # fmt: skip
    device = device_of(codec)
    estimate = fitting.Estimate(codec, device.type)
    return fitting.fit(estimate, task, Room.on(device, estimate.weights))


def _too_large(job: AutoencodeJob) -> str:
    """What to tell where memory ran out."""
    return (
        f"A clip of {job.size[1]}x{job.size[0]} does not pass through this codec in the memory of this "
        "machine; set a smaller short_side, or use a larger GPU."
    )


@dataclass
class _Run:
    """One job at work: its result in `folder`, its latents in `work`."""

    codec: Codec
    model: str
    job: AutoencodeJob
    memory: str
    folder: Path
    work: Path
    progress: Progress
    on_step: Callable[[], None]
    clock: Stopwatch = field(default_factory=Stopwatch)

    def result(self, models: StateDicts | None) -> AutoencodeResult:
        begin = time.perf_counter()
        request, (height, width) = self.job.request, self.job.size
        session = Session(
            self.codec, lambda: self._frames(self.job.info), self.job.size, self.work,
            fit=request.fit, on_step=self.on_step, clock=self.clock,
        )  # fmt: skip
        self._start("encode", [self.job.info] * (2 if request.weights else 1) + [*self.job.others.values()])
        latents = session.latents(
            request.edits,
            changes_of(request.weights),
            {name: partial(self._frames, info) for name, info in self.job.others.items()},
            models,
        )
        self.progress.finish(f"{latents.own.shape[1]} latents of {'x'.join(map(str, latents.own.shape))}")
        compared = self._write(session, latents)
        if request.report:
            self._start("report", [self.job.info])
            with self.clock("report"):
                self._report(latents, compared)
            self.progress.finish()
        shutil.rmtree(self.work)
        quality = {name: _numbers(each) for name, each in compared.items()}
        files = sorted(path.relative_to(self.folder).as_posix() for path in self._files())
        frames = compared["reconstructed"].frames
        return AutoencodeResult(
            path=str(self.job.output),
            model=self.model,
            width=width,
            height=height,
            frames=frames,
            rate=str(self.job.info.rate),
            seed=0,
            bytes=sum(path.stat().st_size for path in self._files()),
            seconds={step: round(seconds, 3) for step, seconds in self.clock.seconds.items()},
            total_seconds=round(time.perf_counter() - begin, 3),
            notes=self.job.info.notes,
            device=place_of(self.codec),
            memory=self.memory,
            files=tuple(files),
            latents=latents.own.shape,
            compression=round(frames * height * width * 3 / math.prod(latents.own.shape), 2),
            reconstructed=quality["reconstructed"],
            edited=quality.get("edited"),
        )

    def _files(self) -> list[Path]:
        return [path for path in self.folder.rglob("*") if path.is_file()]

    def _write(self, session: Session, latents: Latent) -> dict[str, Quality]:
        """Write the videos and the sheet; how near what came back is to the original."""
        edited = latents.edited is not latents.own
        names = ["original", "reconstructed", *(["edited"] if edited else [])]
        meters = {name: Meter() for name in names[1:]}
        height, width = self.job.size
        board = Board(names, *_cell(len(names), height, width))
        self._start("decode", [self.job.info])
        with ExitStack() as stack:
            writers = {name: stack.enter_context(self._writer(name, height, width)) for name in names}
            whole = stack.enter_context(self._writer("side_by_side", board.height, board.width))
            moments = stack.enter_context(closing(session.moments(latents)))
            for moment in moments:
                frames = [moment.original, moment.reconstructed]
                if moment.edited is not None:
                    frames.append(moment.edited)
                pictures = [to_bytes(frame[None]) for frame in frames]
                with self.clock("write"):
                    for name, picture in zip(names, pictures, strict=True):
                        writers[name].write(picture)
                    whole.write(board.frame([picture[0] for picture in pictures])[None])
                with self.clock("compare"):
                    for meter, picture in zip(meters.values(), pictures[1:], strict=True):
                        meter.add(pictures[0][0], picture[0])
        self.progress.finish()
        self.on_step()
        suffix = self._suffix
        write_sheet(self.folder / "sheet.png", [(name, self.folder / f"{name}{suffix}") for name in names])
        return {name: meter.quality() for name, meter in meters.items()}

    @property
    def _suffix(self) -> str:
        return ".mkv" if self.job.request.codec == "lossless" else ".mp4"

    def _writer(self, name: str, height: int, width: int) -> VideoWriter:
        request = self.job.request
        return VideoWriter(
            self.folder / f"{name}{self._suffix}", width, height, self.job.info.rate,
            codec=request.codec, crf=request.quality,
        )  # fmt: skip

    def _frames(self, info: ClipInfo) -> Generator[Tensor]:
        """The frames of a clip, at the size of the job, in chunks (n, 3, height, width) in [-1, 1]."""
        import numpy as np

        with closing(read_frames(info.path, info, size=self.job.size)) as read:
            frames = islice(read, self.job.request.frames)
            count = 0
            while chunk := list(islice(frames, fitting.CHUNK)):
                self.on_step()
                count += len(chunk)
                if count > self.job.most_frames:
                    raise InputError(
                        "input_too_large",
                        f"{info.path.name} has more than {self.job.most_frames:,} frames, which is the "
                        "limit; set frames, or raise SEEDPOD_MAX_FRAMES.",
                    )
                self.progress.advance(len(chunk))
                yield from_bytes(np.stack(chunk))

    def _start(self, step: str, clips: Sequence[ClipInfo]) -> None:
        """Begin a step that goes through these clips."""
        most = self.job.request.frames
        lengths = [info.frames for info in clips]
        known = [length if most is None else min(length, most) for length in lengths if length is not None]
        self.progress.start(step, sum(known) if len(known) == len(clips) else None, "frames")

    def _watched(self, latents: Latents) -> View:
        """The same latents; whoever reads them can be stopped."""

        def read(start: int, stop: int) -> Tensor:
            self.on_step()
            return latents.read(start, stop)

        return View(latents.shape, read)

    def _report(self, latents: Latent, compared: Mapping[str, Quality]) -> None:
        request, (height, width) = self.job.request, self.job.size
        facts = self.codec.facts
        frames = compared["reconstructed"].frames
        fit = Fit(height, width, facts, request.fit)
        clips = {"original": self._watched(latents.own)}
        if latents.edited is not latents.own:
            clips["edited"] = self._watched(latents.edited)
        made = report.Report(
            title=self.job.info.path.name,
            model=self.model,
            codec=facts,
            width=width,
            height=height,
            frames=frames,
            rate=str(self.job.info.rate),
            quality=dict(compared),
            channels={name: channel_statistics(clip) for name, clip in clips.items()},
            tracks=principal_components(clips),
            holds=channel_map(fit.frames(self._frames(self.job.info)), clips["original"], facts),
            compression=compression(latents.own, frames, height, width, facts),
            edits=tuple(_line(edit) for edit in request.edits),
            weights=tuple(_line(change) for change in request.weights),
            notes=self.job.info.notes,
        )
        report.write(self.folder, made, clips["original"], clips.get("edited"), self.folder / "sheet.png")


def _line(described: BaseModel) -> str:
    """What was asked for, as the command line writes it."""
    values = described.model_dump(exclude_defaults=True)
    return " ".join([values.pop("kind"), *(f"{name}={value}" for name, value in values.items())])


def _cell(clips: int, height: int, width: int) -> tuple[int, int]:
    """Height and width that each clip is shown at beside the others: its own, or less of both where the
    video would be larger than players take."""
    scale = min(1.0, (WIDEST / clips - 4) / width, (HIGHEST - 48) / height)
    return max(1, int(height * scale)), max(1, int(width * scale))


def _numbers(quality: Quality) -> dict[str, float | None]:
    return {"psnr": quality.psnr, "ssim": quality.ssim, "temporal_error": quality.temporal_error}
