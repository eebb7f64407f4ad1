"""One job on this machine, from a file or a prompt to a file: the boot chain, then the job.

What can be refused is refused before anything is staged or loaded. Each task imports what it needs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from app import chain
from app.boot.hashes import HashRecord, sha256_file
from app.boot.locate import Found
from app.boot.manifest import Manifest, read_manifest
from app.boot.verify import Selection, select_models
from app.job.autoencode_request import AutoencodeRequest, weights_of
from app.job.result import Limits
from app.models.registry import abilities
from app.progress import Progress
from app.settings import Settings

if TYPE_CHECKING:
    from app.job.autoencode import AutoencodeResult
    from app.job.clips import Made, Refused
    from app.job.generate import GenerateResult
    from app.job.generate_plan import GenerateJob
    from app.job.generate_request import GenerateRequest
    from app.job.request import RestoreRequest
    from app.job.restore import RestoreResult
    from app.models.latents.autoencode import StateDicts
    from app.models.latents.codec import Codec


def restore_once(
    settings: Settings, request: RestoreRequest, source: Path, output: Path, progress: Progress
) -> RestoreResult:
    """Restore a clip or an image into `output`."""
    from app.job.restore import look, plan_restore, run_restore

    ready = _Ready(settings, "restore", request.model, progress)
    job = plan_restore(request, look(source, ready.limits), output, ready.limits)
    (loaded,) = chain.load_staged(settings, ready.manifest, ready.selection, ready.hashes, progress, progress)
    try:
        return run_restore(loaded.pipeline, ready.name, job, progress)
    finally:
        loaded.pipeline.close()


def generate_once(
    settings: Settings,
    request: GenerateRequest,
    pictures: Mapping[str, Path | None],
    output: Path,
    progress: Progress,
) -> GenerateResult:
    """Make a video from a prompt into `output`. Where every prompt was encoded before, and a cache folder
    remembers it, the text encoder is not even staged."""
    from app.job.generate import run_generate
    from app.job.generate_plan import Pictures, plan_generate
    from app.models.wan.tokenizer import Tokenizer

    ready = _Ready(settings, "generate", request.model, progress)
    able = abilities(ready.manifest.models[ready.name], ready.files)
    job = plan_generate(request, able, Pictures(**pictures), output, ready.limits)
    Tokenizer(ready.files["tokenizer"].path)  # says what is wrong with it before T5 is staged
    unread = ("t5",) if _encoded(settings, job, ready.files, ready.hashes, progress) else ()
    (loaded,) = chain.load_staged(
        settings, ready.manifest, ready.selection, ready.hashes, progress, progress, unread=unread
    )
    try:
        return run_generate(loaded.pipeline, ready.name, job, progress)
    finally:
        loaded.pipeline.close()


def autoencode_once(
    settings: Settings,
    request: AutoencodeRequest,
    source: Path,
    others: Mapping[str, Path],
    output: Path,
    progress: Progress,
) -> AutoencodeResult:
    """Take a clip through a codec and back, into the folder `output`."""
    from app.job.autoencode import run_autoencode
    from app.job.autoencode_plan import plan_autoencode

    ready = _Ready(settings, "autoencode", request.model, progress)
    job = plan_autoencode(request, source, others, output, ready.limits)
    codec, models = _codec(settings, request, ready, progress)
    return run_autoencode(codec, ready.name, job, progress, models=models)


def autoencode_all(
    settings: Settings,
    request: AutoencodeRequest,
    sources: Sequence[Path],
    others: Mapping[str, Path],
    output: Path,
    progress: Progress,
) -> list[Made | Refused]:
    """Take several clips, and every clip in folders, through a codec, each into a folder within `output`."""
    from app.job.clips import plan_clips, run_clips

    ready = _Ready(settings, "autoencode", request.model, progress)
    clips = plan_clips(request, sources, others, output, ready.limits)
    codec, models = _codec(settings, request, ready, progress)
    return run_clips(codec, ready.name, clips, output, progress, models=models)


def open_codec(settings: Settings, model: str | None, progress: Progress) -> tuple[str, Codec]:
    """A video autoencoder of the manifest, loaded, and its name: for notebooks and measurements."""
    ready = _Ready(settings, "autoencode", model, progress)
    return ready.name, _codec(settings, AutoencodeRequest(), ready, progress)[0]


def _codec(
    settings: Settings, request: AutoencodeRequest, ready: _Ready, progress: Progress
) -> tuple[Codec, StateDicts]:
    """The codec of a job, and the weights of the models that its own are interpolated with."""
    named = [*dict.fromkeys([ready.name, *weights_of(request)])]
    for name in named[1:]:
        chain.choose_model(settings, ready.manifest, "autoencode", name)
    if settings.fetch == "missing":
        chain.fetch_missing(settings, ready.manifest, named[1:], progress)
    selection = select_models(ready.manifest, named, settings.roots)
    chain.check(settings, ready.manifest, selection, ready.hashes, progress).require_ok()
    loaded = {
        model.name: model.pipeline
        for model in chain.load_staged(settings, ready.manifest, selection, ready.hashes, progress, progress)
    }
    return loaded[ready.name], {name: loaded[name].module.state_dict() for name in weights_of(request)}


class _Ready:
    """The model of a job, its files there and verified as far as the settings ask."""

    def __init__(self, settings: Settings, task: str, model: str | None, progress: Progress) -> None:
        self.manifest: Manifest = read_manifest(settings.manifest)
        self.name = chain.choose_model(settings, self.manifest, task, model)
        if settings.fetch == "missing":
            chain.fetch_missing(settings, self.manifest, [self.name], progress)
        self.selection: Selection = select_models(self.manifest, [self.name], settings.roots)
        self.hashes: HashRecord = chain.hash_record(settings)
        chain.check(settings, self.manifest, self.selection, self.hashes, progress).require_ok()
        self.files: Mapping[str, Found] = chain.found_files(self.selection)[self.name]
        self.limits = Limits(settings.max_pixels, settings.max_frames)


def _encoded(
    settings: Settings,
    job: GenerateJob,
    files: Mapping[str, Found],
    hashes: HashRecord,
    progress: Progress,
) -> bool:
    """Whether a cache folder has the embeddings of all prompts. Their keys need the hash of T5's file: where
    nobody knows it, it is taken once."""
    from app.models.wan.embeddings import EmbeddingCache, known

    if settings.cache is None:
        return False
    prompts = list(job.options.prompts.values())
    if job.options.guidance != 1:
        prompts.append(job.options.negative)
    path = files["t5"].path
    sha256 = files["t5"].entry.sha256 or hashes.lookup(path)
    if sha256 is None:
        before = path.stat()
        sha256 = sha256_file(path, readers=settings.readers, progress=progress)
        hashes.remember(path, sha256, before)
    return known(EmbeddingCache(settings.cache), prompts, files["tokenizer"].path, sha256)
