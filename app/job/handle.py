"""A job of the API, from its payload to where its result is:

    validate -> fetch source -> plan -> restore -> deliver

Everything it makes lies in a folder of its own, which is gone when it ends. Knows nothing of queues.
"""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from app.chain import Loaded
from app.errors import UnavailableError, UsageError
from app.job.bucket import bucket_of
from app.job.deliver import DeliverySettings, check_delivery, deliver
from app.job.payload import RestorePayload, validate
from app.job.run import Limits, RestoreJob, Result, look, plan_restore, run_restore
from app.job.source import SourceLimits, fetch_source
from app.models.seedvr2.windowed import SHORTEST
from app.progress import Progress
from app.settings import Settings

FOLDER = "job-"  # what the folder of a job is called, before its id


@dataclass(frozen=True)
class Context:
    """What every job of a worker shares: models by name, limits, where sources and results are, and the
    folder in which each job makes its own."""

    models: Mapping[str, Loaded]
    limits: Limits
    source: SourceLimits
    input_root: Path | None
    delivery: DeliverySettings
    scratch: Path


def make_context(settings: Settings, models: Mapping[str, Loaded], scratch: Path) -> Context:
    """The context that the settings ask for.

    Raises:
        ConfigError: The bucket's settings make no sense.
    """
    bucket = bucket_of(
        settings.bucket_endpoint_url, settings.bucket_access_key_id, settings.bucket_secret_access_key,
        name=settings.bucket, prefix=settings.bucket_prefix,
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


def handle(
    context: Context,
    job_id: str,
    payload: Mapping[str, Any],
    progress: Progress,
    on_step: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Do one job; returns its result for its caller.

    `on_step` is called between steps and may raise to stop.

    Raises:
        SeedpodError: What went wrong, for the caller's eyes; `out_of_memory` when a second try with half the
        window failed, too.
    """
    request = validate(payload)
    loaded = _model(context, request.model)
    folder = context.scratch / f"{FOLDER}{job_id}"  # by its id, so that the next worker can remove it
    folder.mkdir(mode=0o700)
    try:
        seconds = {}
        begin = time.perf_counter()
        progress.start("fetch", None, "B")
        source = fetch_source(request.source, folder, context.source, context.input_root, on_step)
        progress.finish()
        seconds["fetch"] = time.perf_counter() - begin
        result = _restore(context, loaded, request, source, folder, progress, on_step)
        begin = time.perf_counter()
        made = _packed(Path(result.path))
        progress.start("deliver", made.stat().st_size, "B")

        def on_bytes(count: int) -> None:
            on_step()  # a delivery, too, can be stopped
            progress.advance(count)

        delivered = deliver(made, job_id, context.delivery, on_bytes)
        progress.finish()
        seconds["deliver"] = time.perf_counter() - begin
        return _answer(result, delivered, seconds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _model(context: Context, name: str | None) -> Loaded:
    """The model named, or the only one."""
    if name is None and len(context.models) == 1:
        return next(iter(context.models.values()))
    if name is None or name not in context.models:
        asked = "no model was named" if name is None else f"model is {name!r}"
        raise UsageError(
            "model_not_served", f"{asked}; this worker serves {', '.join(context.models)}: name one of them."
        )
    return context.models[name]


def _restore(
    context: Context,
    loaded: Loaded,
    request: RestorePayload,
    source: Path,
    folder: Path,
    progress: Progress,
    on_step: Callable[[], None],
) -> Result:
    """Restore, and once more with half the window where memory runs out."""
    job = _plan(context, request, source, folder)
    try:
        return run_restore(loaded.pipeline, loaded.name, job, progress, on_step)
    except UnavailableError as error:
        if error.code != "out_of_memory":
            raise
    _drop_caches()  # outside of the handler: the error holds on to what ran out of memory
    window = max(SHORTEST, request.window // 2)
    job = _plan(context, request.model_copy(update={"window": window}), source, folder)
    result = run_restore(loaded.pipeline, loaded.name, job, progress, on_step)
    note = f"Memory ran out with a window of {request.window}; this was made with one of {window}."
    return Result(**{**result.to_dict(), "notes": (*result.notes, note)})


def _plan(context: Context, request: RestorePayload, source: Path, folder: Path) -> RestoreJob:
    info = look(source, context.limits)
    suffix = "" if request.codec == "png" else f".{request.container}"
    if info.is_image:
        suffix = f".{request.picture}"
    check_delivery(None, context.delivery)
    return plan_restore(request, info, folder / f"result{suffix}", context.limits)


def _drop_caches() -> None:
    gc.collect()
    torch.cuda.empty_cache()  # does nothing before CUDA is first used


def _packed(path: Path) -> Path:
    """A file to deliver: a folder of frames goes into one archive."""
    if not path.is_dir():
        return path
    return Path(shutil.make_archive(str(path), "zip", path))


def _answer(result: Result, delivered: Mapping[str, Any], seconds: Mapping[str, float]) -> dict[str, Any]:
    told = {name: value for name, value in result.to_dict().items() if name not in ("path", "bytes")}
    told["seconds"] |= {step: round(value, 3) for step, value in seconds.items()}
    return {**told, "notes": list(result.notes), "result": dict(delivered)}
