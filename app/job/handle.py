"""A job of the API, from its payload to where its result is:

    validate -> fetch source -> plan -> run -> deliver

Everything it makes lies in a folder of its own, which is gone when it ends. Knows nothing of queues.
"""

from __future__ import annotations

import base64
import gc
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from app.chain import Loaded
from app.errors import UnavailableError
from app.job.archive import pack
from app.job.autoencode_request import weights_of
from app.job.bucket import bucket_of
from app.job.deliver import DeliverySettings, check_delivery, deliver
from app.job.fits import least_bytes, stopped_by_growth
from app.job.models import Models
from app.job.payload import AutoencodePayload, GeneratePayload, RestorePayload, validate
from app.job.result import Limits, Result
from app.job.source import Media, SourceLimits, fetch_source
from app.progress import Progress
from app.settings import Settings

if TYPE_CHECKING:
    from app.job.generate_plan import GenerateJob
    from app.job.restore import RestoreJob

PIECE = 500_000  # bytes of a video in one piece of a stream, before base64: the platform takes 1 MB
FOLDER = "job-"  # what the folder of a job is called, before its id


@dataclass(frozen=True)
class Context:
    """What every job of a worker shares: its models, limits, where sources and results are, and the
    folder in which each job makes its own."""

    models: Models
    limits: Limits
    source: SourceLimits
    input_root: Path | None
    delivery: DeliverySettings
    scratch: Path


def make_context(settings: Settings, models: Models, scratch: Path) -> Context:
    """The context that the settings ask for.

    Raises:
        ConfigError: The bucket's settings make no sense.
    """
    bucket = bucket_of(
        settings.bucket_endpoint_url, settings.bucket_access_key_id, settings.bucket_secret_access_key,
        name=settings.bucket, region=settings.bucket_region, prefix=settings.bucket_prefix,
        link_seconds=settings.bucket_link_seconds,
    )  # fmt: skip
    return Context(
        models=models,
        limits=Limits(settings.max_pixels, settings.max_frames),
        source=SourceLimits(
            settings.source_bytes,
            settings.source_seconds,
            settings.source_private,
            frozenset(settings.source_ports),
        ),
        input_root=settings.input,
        delivery=DeliverySettings(bucket, settings.output, settings.inline_bytes),
        scratch=scratch,
    )


@dataclass(frozen=True)
class Work:
    """A job at work: the model that does it, its own folder, and whom it tells of its progress.

    `on_step` is called between steps and may raise to stop; `emit` takes pieces of the result's stream.
    """

    context: Context
    loaded: Loaded
    folder: Path
    progress: Progress
    on_step: Callable[[], None]
    emit: Callable[[Mapping[str, Any]], None]
    seconds: dict[str, float] = field(default_factory=dict)

    def fetch(self, media: Media, name: str = "source") -> Path:
        """The file of a source, in the job's folder or the mounted input folder."""
        folder = self.folder / name
        folder.mkdir(mode=0o700)
        with self.timed("fetch"):
            self.progress.start("fetch", None, "B")
            path = fetch_source(media, folder, self.context.source, self.context.input_root, self.on_step)
            self.progress.finish()
        if path.parent == folder:  # a job may have several: messages name the one that is meant
            path = path.rename(path.with_name(f"{name}{path.suffix}"))
        return path

    def deliver(self, job_id: str, made: Path, *, stoppable: bool) -> Mapping[str, Any]:
        """Take a file to where results go; returns where it is."""

        def on_bytes(count: int) -> None:
            if stoppable:
                self.on_step()  # a delivery, too, can be stopped
            self.progress.advance(count)

        with self.timed("deliver"):
            packed = pack(made, self.on_step) if made.is_dir() else made
            self.progress.start("deliver", packed.stat().st_size, "B")
            delivered = deliver(packed, job_id, self.context.delivery, on_bytes)
            self.progress.finish()
        return delivered

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[step] = self.seconds.get(step, 0.0) + time.perf_counter() - begin


def handle(
    context: Context,
    job_id: str,
    payload: Mapping[str, Any],
    progress: Progress,
    on_step: Callable[[], None] = lambda: None,
    emit: Callable[[Mapping[str, Any]], None] = lambda piece: None,
) -> dict[str, Any]:
    """Do one job; returns its result for its caller.

    `on_step` is called between steps and may raise to stop. `emit` takes pieces of the result's stream.

    Raises:
        SeedpodError: What went wrong, for the caller's eyes; `out_of_memory` when a second try with half the
        window failed, too.
    """
    request = validate(payload)
    name = context.models.choose(request.task, request.model)
    loaded = context.models.wait(name, on_step)
    check_delivery(1, context.delivery)
    folder = context.scratch / f"{FOLDER}{job_id}"  # by its id, so that the next worker can remove it
    folder.mkdir(mode=0o700)
    work = Work(context, loaded, folder, progress, on_step, emit)
    try:
        result = TASKS[request.task](work, request)
        delivered = work.deliver(job_id, Path(result.path), stoppable=result.whole)
        return _answer(result, delivered, work.seconds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# ------------------------------------------------------------------ the tasks: each imports what it needs


def prepare(tasks: Collection[str]) -> None:
    """Import what jobs of these tasks will need, before the first one comes."""
    for task in tasks:
        for module in _MODULES[task]:
            import_module(f"app.job.{module}")


def _restore(work: Work, request: RestorePayload) -> Result:
    """Restore, and once more with half the window where memory runs out."""
    from app.job.restore import RestoreResult, output_size, run_restore
    from app.models.seedvr2.segment import SHORTEST

    source = work.fetch(request.source)
    job = _plan(work, request, source)
    loaded = work.loaded
    on_step = stopped_by_growth(work.folder, work.context.delivery, work.on_step)

    def on_count(frames: int) -> None:
        height, width = output_size(job.options)
        check_delivery(least_bytes(job.writer.path.suffix, frames, height, width), work.context.delivery)

    windows = [request.window]
    try:
        return run_restore(
            loaded.pipeline, loaded.name, job, work.progress, on_step, on_count, windows.append
        )
    except UnavailableError as error:
        if error.code != "out_of_memory" or request.part:  # whose windows must be those of the other parts
            raise
    _drop_caches()  # outside of the handler: the error holds on to what ran out of memory
    window = max(SHORTEST, windows[-1] // 2)
    job = _plan(work, request.model_copy(update={"window": window}), source)
    result = run_restore(loaded.pipeline, loaded.name, job, work.progress, on_step)
    note = f"Memory ran out with a window of {windows[-1]}; this was made with one of {window}."
    return RestoreResult(**{**result.to_dict(), "notes": (*result.notes, note)})


def _plan(work: Work, request: RestorePayload, source: Path) -> RestoreJob:
    from app.job.restore import look, plan_restore

    info = look(source, work.context.limits)
    suffix = "" if request.codec == "png" else f".{request.container}"
    if info.is_image:
        suffix = f".{request.picture}"
    return plan_restore(request, info, work.folder / f"result{suffix}", work.context.limits, request.part)


def _generate(work: Work, request: GeneratePayload) -> Result:
    """Generate, and once more with half the window and without T5 where memory runs out."""
    from app.job.generate import GenerateResult, run_generate
    from app.models.wan.config import TRAINED_BLOCK

    files = {
        name: work.fetch(media, name)
        for name, media in (
            ("start", request.start), ("pose", request.pose), ("reference", request.pose_reference)
        )
        if media is not None
    }  # fmt: skip
    job = _plan_generate(work, request, files)
    on_step = stopped_by_growth(work.folder, work.context.delivery, work.on_step)
    loaded = work.loaded
    windows = [job.options.latents_seen]
    try:
        return run_generate(
            loaded.pipeline, loaded.name, job, work.progress, on_step, _pieces(work), windows.append
        )
    except UnavailableError as error:
        if error.code != "out_of_memory" or job.writer.frames_written:  # what was streamed is gone for good
            raise
    _drop_caches()
    loaded.pipeline.text.release()
    window, note = request.window, "Memory ran out; this was made with less kept in it."
    if not job.options.length.at_once:
        window = max(request.sink + TRAINED_BLOCK, windows[-1] // 2)
        note = f"Memory ran out; this was made with a window of {window}."
    job = _plan_generate(work, request.model_copy(update={"window": window}), files)
    result = run_generate(loaded.pipeline, loaded.name, job, work.progress, on_step, _pieces(work))
    return GenerateResult(**{**result.to_dict(), "notes": (*result.notes, note)})


def _plan_generate(work: Work, request: GeneratePayload, files: Mapping[str, Path]) -> GenerateJob:
    from app.job.generate_plan import Pictures, plan_generate

    output = work.folder / f"result.{request.container}"
    job = plan_generate(
        request, work.loaded.pipeline.able, Pictures(**files), output, work.context.limits,
        stream=request.stream,
    )  # fmt: skip
    check_delivery(
        least_bytes(output.suffix, job.frames, request.height, request.width), work.context.delivery
    )
    return job


def _pieces(work: Work) -> Callable[[bytes, int], None]:
    """What takes the pieces of a video into the job's stream."""

    def emit(piece: bytes, frames: int) -> None:
        for begin in range(0, len(piece), PIECE):
            part = base64.b64encode(piece[begin : begin + PIECE]).decode()
            work.emit({"content_type": "video/mp4", "frames": frames, "base64": part})

    return emit


def _autoencode(work: Work, request: AutoencodePayload) -> Result:
    """Take a clip through a codec and back; the result is a folder, which is delivered as one archive."""
    from app.job.autoencode import run_autoencode
    from app.job.autoencode_plan import plan_autoencode

    models = work.context.models
    named = [models.choose("autoencode", name) for name in weights_of(request)]
    source = work.fetch(request.source)
    others = {name: work.fetch(media, name) for name, media in (("b", request.b), ("c", request.c)) if media}
    job = plan_autoencode(request, source, others, work.folder / "result", work.context.limits)
    states = {name: models.wait(name, work.on_step).pipeline.module.state_dict() for name in named}
    latents = work.folder / "latents"
    latents.mkdir()  # before the growth of the result is watched, of which latents are no part
    on_step = stopped_by_growth(work.folder, work.context.delivery, work.on_step)
    return run_autoencode(
        work.loaded.pipeline, work.loaded.name, job, work.progress, on_step, states, latents
    )


TASKS: Mapping[str, Callable[[Work, Any], Result]] = {
    "restore": _restore,
    "generate": _generate,
    "autoencode": _autoencode,
}
_MODULES = {
    "restore": ("restore",),
    "generate": ("generate", "generate_plan"),
    "autoencode": ("autoencode", "autoencode_plan"),
}


def _drop_caches() -> None:
    gc.collect()
    torch.cuda.empty_cache()  # does nothing before CUDA is first used


def _answer(result: Result, delivered: Mapping[str, Any], seconds: Mapping[str, float]) -> dict[str, Any]:
    told = {name: value for name, value in result.to_dict().items() if name not in ("path", "bytes")}
    told["seconds"] |= {step: round(value, 3) for step, value in seconds.items()}
    return {**told, "notes": list(result.notes), "result": dict(delivered)}
