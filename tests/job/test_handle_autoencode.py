"""An autoencode job of the API from payload to its archive, with nano's VQ-VAE."""

from __future__ import annotations

import base64
import io
import threading
import time
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from app.chain import Loaded
from app.errors import JobStopped, SeedpodError
from app.job.deliver import DeliverySettings
from app.job.handle import Context, handle
from app.job.models import Models
from app.job.result import Limits
from app.job.source import SourceLimits
from app.models.latents.codecs import VQCodec
from app.models.latents.vqvae import VQVAE
from app.models.latents.vqvae_config import VQConfig
from app.progress import Silent
from app.video.probe import probe
from app.video.read import read_frames
from tests.golden import draw
from tests.job.test_autoencode import clip_of
from tests.models.latents.small import codec

PAGE = {"base64": base64.b64encode(b"<html>no</html>").decode()}


@pytest.fixture
def context(tmp_path: Path) -> Context:
    for name in ("in", "out", "scratch"):
        (tmp_path / name).mkdir()
    for seed, name in enumerate("abc"):
        clip_of(tmp_path / f"in/{name}.mp4", 9, 16, 24, seed)
    other = draw(VQVAE(VQConfig(width=8, inner=4, blocks=1, codes=32, dim=4)), "other/")
    odd = draw(VQVAE(VQConfig(width=12, inner=4, blocks=1, codes=32, dim=4)), "odd/")
    models = {
        "one": codec("vqvae"),
        "two": VQCodec(other.requires_grad_(False)),
        "odd": VQCodec(odd.requires_grad_(False)),
    }
    return Context(
        models=Models.of(*(Loaded(name, "autoencode", model, 0.0) for name, model in models.items())),
        limits=Limits(1 << 20, 100_000),
        source=SourceLimits(10_000_000, 10),
        input_root=tmp_path / "in",
        delivery=DeliverySettings(output_root=tmp_path / "out"),
        scratch=tmp_path / "scratch",
    )


def asked(**changes: Any) -> dict[str, Any]:
    source = {"path": "a.mp4"}
    return {"task": "autoencode", "model": "one", "source": source, "report": False, **changes}


def do(
    context: Context, payload: Mapping[str, Any], on_step: Callable[[], None] = lambda: None, job: str = "j1"
) -> dict[str, Any]:
    try:
        return handle(context, job, payload, Silent(), on_step)
    finally:
        assert list(context.scratch.iterdir()) == []  # whatever happens, nothing is left


def archive(context: Context, answer: Mapping[str, Any]) -> zipfile.ZipFile:
    if "base64" in answer["result"]:
        return zipfile.ZipFile(io.BytesIO(base64.b64decode(answer["result"]["base64"])))
    assert context.delivery.output_root is not None
    return zipfile.ZipFile(context.delivery.output_root / answer["result"]["path"])


def test_a_clip_goes_in_and_an_archive_comes_out(context: Context, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    answer = do(context, asked(report=True, edits=[{"kind": "noise", "strength": 0.2}]))
    with archive(context, answer) as packed:
        assert packed.testzip() is None
        assert sorted(packed.namelist()) == sorted(answer["files"])
        assert {"original.mp4", "reconstructed.mp4", "edited.mp4", "report.html", "report.json"} < set(
            packed.namelist()
        )
        packed.extract("edited.mp4", tmp_path)
        assert str(tmp_path) not in packed.read("report.html").decode()
    shown = tmp_path / "edited.mp4"
    assert sum(1 for _ in read_frames(shown, probe(shown))) == answer["frames"] == 9
    assert (answer["width"], answer["height"], answer["model"]) == (24, 16, "one")
    assert str(context.scratch) not in str(answer)


def test_the_same_bytes_twice_by_every_way(context: Context) -> None:
    inline = {
        name: {"base64": base64.b64encode((context.input_root / f"{name}.mp4").read_bytes()).decode()}
        for name in "abc"
    }  # fmt: skip
    edits = [{"kind": "arithmetic"}, {"kind": "interpolate", "clip": "b"}]
    by_path = do(context, asked(edits=edits, b={"path": "b.mp4"}, c={"path": "c.mp4"}))
    by_value = do(
        replace(context, delivery=DeliverySettings()),
        asked(source=inline["a"], edits=edits, b=inline["b"], c=inline["c"]),
    )
    assert by_path["result"]["sha256"] == by_value["result"]["sha256"]


def test_latents_do_not_count_as_what_is_delivered(context: Context) -> None:
    """They lie in the job's folder, and may be larger than the result."""
    inline = replace(context, delivery=DeliverySettings())
    size = len(base64.b64decode(do(inline, asked())["result"]["base64"]))
    growth: list[float] = [0.0]
    import app.job.handle as module

    real = module.stopped_by_growth

    def at_every_step(folder: Path, how: DeliverySettings, on_step: Callable[[], None]) -> Callable[[], None]:
        def clock() -> float:
            growth[0] += 1
            return growth[0]

        return real(folder, how, on_step, clock)

    module.stopped_by_growth = at_every_step
    try:
        least = replace(context, delivery=replace(DeliverySettings(), inline_bytes=size + 40_000))
        assert do(least, asked(edits=[{"kind": "smooth", "sigma": 1}] * 2))["frames"] == 9
    finally:
        module.stopped_by_growth = real


def test_weights_towards_another_served_model(context: Context) -> None:
    before = {name: tensor.clone() for name, tensor in codec("vqvae").module.state_dict().items()}
    change = {"kind": "interpolate", "amount": 1.0, "other": "two"}
    answer = do(context, asked(weights=[change, {"kind": "noise", "strength": 0.01}]))
    assert answer["edited"] != answer["reconstructed"]
    for name, tensor in codec("vqvae").module.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    itself = do(context, asked(weights=[{**change, "other": "one"}]), job="j2")
    assert itself["edited"] == itself["reconstructed"]


@pytest.mark.parametrize(
    ("changes", "code", "says"),
    [
        ({"model": "none"}, "model_not_served", "one, two, odd"),
        ({"model": None}, "model_not_served", "name one"),
        ({"weights": [{"kind": "interpolate", "amount": 1, "other": "x"}]}, "model_not_served", "'x'"),
        ({"weights": [{"kind": "interpolate", "amount": 1, "other": "odd"}]}, "weights_other_differs", "odd"),
        ({"weights": [{"kind": "melt"}]}, "request_invalid", "weights"),
        ({"edits": [{"kind": "melt"}]}, "request_invalid", "edits"),
        ({"edits": [{"kind": "noise", "strength": "0.5"}]}, "request_invalid", "strength"),
        ({"edits": [{"kind": "noise", "strength": float("nan")}]}, "request_invalid", "strength"),
        ({"edits": [{"kind": "arithmetic"}]}, "clip_unknown", "'b'"),
        ({"edits": [{"kind": "interpolate", "clip": "z"}]}, "request_invalid", "'z'"),
        ({"edits": [{"kind": "noise", "strength": 0.1}] * 33}, "request_invalid", "32"),
        ({"source": PAGE}, "input_not_video", "source"),
        ({"b": PAGE, "edits": [{"kind": "interpolate", "clip": "b"}]}, "input_not_video", "b"),
        ({"source": {"path": "../secret"}}, "source_", ""),
        ({"source": {"path": "none.mp4"}}, "source_", ""),
        ({"short_side": 4096}, "output_too_large", "short_side"),
        ({"frames": 0}, "request_invalid", "frames"),
        ({"report": "yes"}, "request_invalid", "report"),
        ({"output": "/etc"}, "request_invalid", "output"),
    ],
)
def test_what_cannot_be_done(context: Context, changes: dict[str, Any], code: str, says: str) -> None:
    with pytest.raises(SeedpodError) as error:
        do(context, asked(**changes))
    assert error.value.code.startswith(code) and says in error.value.message, error.value
    assert list((context.scratch.parent / "out").iterdir()) == []
    assert str(context.scratch) not in error.value.message


def test_a_stop_is_heard_within_two_seconds(context: Context, tmp_path: Path) -> None:
    """Of a long clip, at several moments: while it is encoded, decoded, and reported."""
    pytest.importorskip("sklearn")
    clip_of(tmp_path / "in/long.mp4", 400, 32, 48)
    for after in (0.3, 1.5):
        stop = threading.Event()
        timer = threading.Timer(after, stop.set)
        asked_at: list[float] = []

        def check(stop: threading.Event = stop, asked_at: list[float] = asked_at) -> None:
            if stop.is_set():
                asked_at.append(time.monotonic())
                raise JobStopped("job_cancelled", "stopped")

        begin = time.monotonic()
        timer.start()
        with pytest.raises(JobStopped):
            do(context, asked(source={"path": "long.mp4"}, report=True), check)
        assert time.monotonic() - begin - after < 2
