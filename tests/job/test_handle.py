"""A job of the API from payload to result, with nano."""

from __future__ import annotations

import base64
import io
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from app.chain import Loaded
from app.errors import SeedpodError, UnavailableError
from app.job import handle as handle_module
from app.job import restore as restore_module
from app.job.deliver import DeliverySettings
from app.job.handle import Context, handle, make_context
from app.job.models import Models
from app.job.payload import validate
from app.job.result import Limits, out_of_memory
from app.job.source import SourceLimits
from app.progress import Silent
from app.settings import load_settings
from app.video.probe import probe
from tests.models.nano import restorer


@pytest.fixture
def context(tmp_path: Path) -> Context:
    for name in ("in", "out", "scratch"):
        (tmp_path / name).mkdir()
    return Context(
        models=Models.of(Loaded("nano", "restore", restorer(), 0.0)),
        limits=Limits(1 << 20, 1000),
        source=SourceLimits(10_000_000, 10),
        input_root=tmp_path / "in",
        delivery=DeliverySettings(output_root=tmp_path / "out"),
        scratch=tmp_path / "scratch",
    )


def source(clip: Path) -> dict[str, str]:
    return {"base64": base64.b64encode(clip.read_bytes()).decode()}


def do(context: Context, payload: Mapping[str, Any], job_id: str = "j1") -> dict[str, Any]:
    try:
        return handle(context, job_id, {"task": "restore", **payload}, Silent())
    finally:
        assert list(context.scratch.iterdir()) == []  # whatever happens, nothing is left


def test_a_clip_goes_in_and_comes_out(context: Context, short_clip: Path) -> None:
    answer = do(context, {"source": source(short_clip), "scale": 2})
    made = context.delivery.output_root / answer["result"]["path"]
    assert (probe(made).width, probe(made).height) == (96, 64)
    assert answer["frames"] == 10
    assert answer["sound"] is True
    assert {"fetch", "restore", "deliver"} & set(answer["seconds"]) >= {"fetch", "deliver"}
    assert str(context.scratch) not in str(answer)


def test_a_picture_is_delivered_inline(context: Context, tmp_path: Path) -> None:
    Image.effect_noise((40, 32), 50).convert("RGB").save(context.input_root / "in.png")
    inline = replace(context, delivery=DeliverySettings())
    answer = do(inline, {"source": {"path": "in.png"}, "picture": "webp"})
    with Image.open(io.BytesIO(base64.b64decode(answer["result"]["base64"]))) as picture:
        assert picture.format == "WEBP"
        assert picture.size == (40, 32)


def test_frames_come_as_an_archive(context: Context, short_clip: Path) -> None:
    answer = do(context, {"source": source(short_clip), "codec": "png"})
    with zipfile.ZipFile(context.delivery.output_root / answer["result"]["path"]) as archive:
        assert len(archive.namelist()) == 10


def test_frames_are_the_same_archive_every_time(context: Context, short_clip: Path) -> None:
    answers = [do(context, {"source": source(short_clip), "codec": "png"}, job_id) for job_id in ("j1", "j2")]
    assert answers[0]["result"]["sha256"] == answers[1]["result"]["sha256"]


def restored_frames(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the frames that are restored."""
    counted: list[int] = []
    real = restore_module._restored

    def restored(*arguments: Any) -> Any:
        for frame in real(*arguments):
            counted.append(1)
            yield frame

    monkeypatch.setattr(restore_module, "_restored", restored)
    return counted


@pytest.mark.parametrize(
    ("inline", "asked", "before"),
    [
        (0, {}, "fetched"),  # nothing can be sent inside the answer: not even the source is fetched
        (1000, {"codec": "png"}, "restored"),  # ten pictures cannot be that small
        (40, {"codec": "lossless"}, "restored"),
    ],
)
def test_what_cannot_be_delivered_is_refused_before_the_work(
    inline: int, asked: dict[str, Any], before: str, context: Context, short_clip: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    counted = restored_frames(monkeypatch)
    if before == "fetched":
        monkeypatch.setattr(handle_module, "fetch_source", lambda *_: pytest.fail("it was fetched"))
    small = replace(context, delivery=DeliverySettings(inline_bytes=inline))
    with pytest.raises(SeedpodError) as caught:
        do(small, {"source": source(short_clip), **asked})
    assert caught.value.code == "deliver_too_large"
    assert counted == []


def test_what_grows_too_large_is_not_made_to_its_end(
    context: Context, short_clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noise as PNG, of which only the first pictures fit."""
    monkeypatch.setattr("app.job.fits.EVERY", 0.0)
    counted = restored_frames(monkeypatch)
    small = replace(context, delivery=DeliverySettings(inline_bytes=10_000))
    with pytest.raises(SeedpodError) as caught:
        do(small, {"source": source(short_clip), "codec": "png", "scale": 2, "window": 5})
    assert caught.value.code == "deliver_too_large"
    assert len(counted) < 10


def memory_runs_out(monkeypatch: pytest.MonkeyPatch, windows: set[int]) -> list[int]:
    """The device runs out of memory whenever the transformer is given one of these windows."""
    tried = []
    real = restore_module._restored

    def restored(pipeline: Any, job: Any, *rest: Any) -> Any:
        tried.append(job.options.window)
        if job.options.window in windows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        yield from real(pipeline, job, *rest)

    monkeypatch.setattr(restore_module, "_restored", restored)
    return tried


def test_out_of_memory_is_tried_once_more_with_less(
    context: Context, short_clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = memory_runs_out(monkeypatch, {31})
    answer = do(context, {"source": source(short_clip)})
    assert tried == [31, 15]
    assert any("window of 31" in note and "15" in note for note in answer["notes"])


def test_the_second_try_has_half_of_the_window_that_was_too_long(
    context: Context, short_clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = restore_module._fit

    def shorter(*arguments: Any) -> Any:
        found = real(*arguments)
        return replace(found, choice=replace(found.choice, window=min(found.choice.window, 15)))

    monkeypatch.setattr(restore_module, "_fit", shorter)
    tried = memory_runs_out(monkeypatch, {15})
    answer = do(context, {"source": source(short_clip)})
    assert tried == [15, 7]
    assert "Memory ran out with a window of 15; this was made with one of 7." in answer["notes"]


def test_out_of_memory_twice_is_a_coded_error(
    context: Context, short_clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = memory_runs_out(monkeypatch, {31, 15})
    with pytest.raises(UnavailableError) as caught:
        do(context, {"source": source(short_clip)})
    assert tried == [31, 15]
    assert caught.value.code == "out_of_memory"
    assert "48x32" in caught.value.message


def test_a_part_keeps_the_window_of_the_others(
    context: Context, short_clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = memory_runs_out(monkeypatch, {31})
    part = {"source_start": 0, "start": 2, "stop": 9, "shot": 0, "edges": [0, 10]}
    with pytest.raises(UnavailableError, match="48x32"):
        do(context, {"source": source(short_clip), "part": part})
    assert tried == [31]
    answer = do(context, {"source": source(short_clip), "part": part, "window": 9}, "j2")
    assert (answer["frames"], answer["sound"]) == (7, False)


def test_what_counts_as_out_of_memory() -> None:
    assert out_of_memory(torch.OutOfMemoryError("x"))
    assert out_of_memory(MemoryError())
    assert out_of_memory(
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
    )
    assert out_of_memory(
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
    )
    assert not out_of_memory(RuntimeError("shape mismatch"))


def test_the_bucket_that_the_settings_mean(tmp_path: Path) -> None:
    environ = {
        "BUCKET_ENDPOINT_URL": "https://s3.eu-west-1.amazonaws.com/clips",
        "BUCKET_ACCESS_KEY_ID": "key",
        "BUCKET_SECRET_ACCESS_KEY": "secret",
    }
    asked = {"SEEDPOD_BUCKET_REGION": "eu-central-2", "SEEDPOD_BUCKET_LINK_SECONDS": "600"}
    told = []
    for settings in (environ, environ | asked):
        bucket = make_context(load_settings(settings), {}, tmp_path).delivery.bucket
        assert bucket
        told.append((bucket.region, bucket.link_seconds))
    assert told == [("eu-west-1", 604_800), ("eu-central-2", 600)]
    for wrong in ({"SEEDPOD_BUCKET_LINK_SECONDS": "604801"}, {"SEEDPOD_BUCKET_REGION": "eu central"}):
        with pytest.raises(SeedpodError, match=next(iter(wrong))):
            load_settings(wrong)


@pytest.mark.parametrize(
    ("payload", "code"),
    [
        ({"source": {"base64": "!!!"}}, "source_base64_invalid"),
        ({"source": {"path": "../secret.mp4"}}, "source_path_outside"),
        ({"source": {"path": "gone.mp4"}}, "source_path_missing"),
        ({"source": {"url": "http://127.0.0.1/x.mp4"}}, "source_"),
        ({"source": {"base64": base64.b64encode(b"not a video").decode()}}, "input_not_video"),
        ({"source": {"base64": "AAAA"}, "model": "seedvr2-9b"}, "model_not_served"),
        ({"source": {"base64": "AAAA"}, "steps": 0}, "request_invalid"),
        ({"source": {}}, "request_invalid"),
        ({"source": {"url": "https://a.example/", "path": "b"}}, "request_invalid"),
        ({}, "request_invalid"),
    ],
)
def test_bad_payloads_are_coded_and_tell_no_path(
    context: Context, payload: dict[str, Any], code: str
) -> None:
    with pytest.raises(SeedpodError) as caught:
        do(context, payload)
    assert caught.value.code.startswith(code)
    assert str(context.scratch) not in caught.value.message


@pytest.mark.parametrize("payload", [None, [], "restore", {"task": "dance"}, {"task": ["restore"]}])
def test_what_is_no_payload(payload: object) -> None:
    with pytest.raises(SeedpodError, match=r"expected an object|may be restore"):
        validate(payload)
