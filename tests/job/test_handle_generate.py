"""A generate job of the API from payload to result, with nano: streams, stops, deliveries, and memory."""

from __future__ import annotations

import base64
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import pytest
import runpod
import torch
from PIL import Image

from app.chain import Loaded
from app.errors import JobStopped, SeedpodError, UnavailableError
from app.job.deliver import DeliverySettings
from app.job.handle import Context, handle
from app.job.models import Models
from app.job.payload import PAYLOADS, validate
from app.job.result import Limits
from app.job.source import SourceLimits
from app.memory import SLACK, Room
from app.models.wan import generate as pipeline
from app.models.wan.generate import Generator
from app.models.wan.memory import Choice
from app.progress import Silent
from app.serve.lifecycle import Lifecycle
from app.serve.record import State
from app.serve.reporter import Reporter
from app.video.probe import probe
from app.video.read import read_frames
from tests.models.wan import nano
from tests.serve.local_server import lifecycle, serving

KEY = "a key"
PAGE = {"base64": base64.b64encode(b"<html>no</html>").decode()}


@pytest.fixture(scope="module")
def loaded(wan_volume: Path) -> Loaded:
    return Loaded("nano-wan", "generate", nano.load(wan_volume, eager=True), 0.0)


@pytest.fixture
def context(loaded: Loaded, tmp_path: Path) -> Context:
    for name in ("in", "out", "scratch"):
        (tmp_path / name).mkdir()
    return Context(
        models=Models.of(loaded),
        limits=Limits(1 << 20, 100_000),
        source=SourceLimits(10_000_000, 10),
        input_root=tmp_path / "in",
        delivery=DeliverySettings(output_root=tmp_path / "out"),
        scratch=tmp_path / "scratch",
    )


def asked(**changes: Any) -> dict[str, Any]:
    return {"task": "generate", "prompt": "a cat", "height": 32, "width": 48, "frames": 21, **changes}


def do(
    context: Context,
    payload: Mapping[str, Any],
    on_step: Callable[[], None] = lambda: None,
    emit: Callable[[Mapping[str, Any]], None] = lambda piece: None,
    job_id: str = "j1",
) -> dict[str, Any]:
    try:
        return handle(context, job_id, payload, Silent(), on_step, emit)
    finally:
        assert list(context.scratch.iterdir()) == []  # whatever happens, nothing is left


def delivered(context: Context, answer: Mapping[str, Any]) -> Path:
    assert context.delivery.output_root is not None
    return context.delivery.output_root / str(answer["result"]["path"])


def frames_in(path: Path) -> int:
    return sum(1 for _ in read_frames(path, probe(path)))


# ------------------------------------------------------------------ results


def test_a_prompt_goes_in_and_a_video_comes_out(context: Context) -> None:
    answer = do(context, asked(container="mkv", codec="lossless", seed=5))
    made = delivered(context, answer)
    assert made.suffix == ".mkv" and frames_in(made) == answer["frames"] == 21
    assert (answer["seed"], answer["whole"], answer["prompt"]) == (5, True, "a cat")
    assert {"text", "transformer", "decode", "write", "deliver"} <= set(answer["seconds"])
    assert str(context.scratch) not in str(answer)


def test_sources_come_by_every_way(context: Context) -> None:
    picture = context.scratch.parent / "in" / "start.png"
    Image.effect_noise((48, 32), 50).convert("RGB").save(picture)
    by_path = do(context, asked(start={"path": "start.png"}, frames=13))
    inline = {"base64": base64.b64encode(picture.read_bytes()).decode()}
    by_value = do(replace(context, delivery=DeliverySettings()), asked(start=inline, frames=13))
    assert by_path["result"]["sha256"] == by_value["result"]["sha256"]
    poses = delivered(context, do(context, asked(container="mkv", codec="lossless"), job_id="j2"))
    inline = {"base64": base64.b64encode(poses.read_bytes()).decode()}
    assert do(context, asked(frames=None, pose=inline), job_id="j3")["frames"] == 21


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"start": PAGE}, "input_not_video"),
        ({"pose": PAGE}, "input_not_video"),
        ({"pose": {"path": "nothing.mp4"}}, "source_"),
        ({"frames": 80}, "frames_not_blocks"),
        ({"use_ema": True, "model": "other"}, "model_"),
        ({"stream": True, "container": "mkv"}, "request_invalid"),
        ({"stream": True, "codec": "hevc10"}, "request_invalid"),
        ({"prompt": 3}, "request_invalid"),
        ({"frames": "21"}, "request_invalid"),  # JSON has numbers
        ({"reference": {"path": "a.png"}}, "request_invalid"),
        ({"window": 6, "sink": 4}, "request_invalid"),
    ],
    ids=str,
)
def test_refusals(context: Context, changes: dict[str, Any], code: str) -> None:
    steps: list[int] = []
    with pytest.raises(SeedpodError) as caught:
        do(context, asked(**changes), lambda: steps.append(1))
    assert caught.value.code.startswith(code), caught.value.code
    assert not steps or caught.value.code == "input_not_video"  # asked while it was fetched
    if PAGE in changes.values():
        assert caught.value.message.startswith(f"{min(changes)} is a web page")


# ------------------------------------------------------------------ memory


def starving(monkeypatch: pytest.MonkeyPatch, times: int, after: int = 0) -> list[Any]:
    """The first clips run out of memory after some blocks; returns what each was to be."""
    layouts: list[Any] = []
    real = pipeline.generate_blocks

    def blocks(model: Any, layout: Any, *others: Any) -> Iterator[Any]:
        made = real(model, layout, *others)
        if model.device.type == "meta":  # what a clip will take is counted
            yield from made
            return
        layouts.append(layout)
        if len(layouts) <= times:
            for _ in range(after):
                yield next(made)
            raise torch.OutOfMemoryError("CUDA out of memory.")
        yield from made

    monkeypatch.setattr(pipeline, "generate_blocks", blocks)
    return layouts


@pytest.mark.parametrize(
    ("changes", "window"),
    [({"frames": 93}, 10), ({"frames": 33}, 4), ({"frames": 93, "window": 12, "sink": 6}, 9)],
)
@pytest.mark.parametrize("stream", [False, True])
def test_where_memory_runs_out_a_smaller_window_is_tried_once(
    context: Context, changes: dict[str, Any], window: int, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layouts = starving(monkeypatch, 1)
    pieces: list[Mapping[str, Any]] = []
    answer = do(context, asked(stream=stream, **changes), emit=pieces.append)
    assert [layout.window for layout in layouts] == [changes.get("window"), window]
    assert answer["whole"] and answer["frames"] == changes["frames"]
    assert f"Memory ran out; this was made with a window of {window}." in answer["notes"]
    if stream:
        content = b"".join(base64.b64decode(piece["base64"]) for piece in pieces)
        assert content == delivered(context, answer).read_bytes()


def test_the_second_try_has_half_of_the_window_that_was_too_long(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = context.models.wait("nano-wan").pipeline
    do(context, asked())  # the prompt is known, so that nothing but the window counts
    need = generator.estimate.need(generator.task(nano.options(93)), Choice(9, 1, "nowhere")).device
    monkeypatch.setattr(Generator, "room", lambda self: Room(int(SLACK * need) + 1, 0, apart=False))
    layouts = starving(monkeypatch, 1)
    answer = do(context, asked(frames=93), job_id="j2")
    assert [layout.window for layout in layouts] == [9, 4], "asked for were 21"
    assert "Memory ran out; this was made with a window of 4." in answer["notes"]
    generator.text.prepare()


def test_the_second_try_needs_no_t5(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    starving(monkeypatch, 1)
    generator = context.models.wait("nano-wan").pipeline
    do(context, asked(prompt="never asked before"))
    assert not generator.text.loaded
    generator.text.prepare()


def test_what_does_not_fit_a_smaller_window_either_is_told(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    layouts = starving(monkeypatch, 2)
    with pytest.raises(UnavailableError) as caught:
        do(context, asked())
    assert caught.value.code == "out_of_memory" and len(layouts) == 2


def test_what_was_streamed_is_not_begun_again(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    layouts = starving(monkeypatch, 1, after=1)
    with pytest.raises(UnavailableError):
        do(context, asked(stream=True))
    assert len(layouts) == 1


def test_a_clip_made_at_once_is_tried_again_without_t5(
    context: Context, wan_volume: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = Loaded("many", "generate", nano.load(wan_volume, variant="nano-many"), 0.0)
    layouts = starving(monkeypatch, 1)
    answer = do(replace(context, models=Models.of(many)), asked(steps=2))
    assert [layout.window for layout in layouts] == [None, None]
    assert any(note.startswith("Memory ran out") for note in answer["notes"])


# ------------------------------------------------------------------ a queue, and the official client


def queue(context: Context) -> Lifecycle:
    def run(job_id: str, payload: Mapping[str, Any], reporter: Reporter) -> Mapping[str, Any]:
        return handle(context, job_id, payload, reporter, reporter.check, reporter.emit)

    return lifecycle(run)


def until(told: Callable[[], bool], seconds: float = 20) -> float:
    begin = time.monotonic()
    while not told():
        assert time.monotonic() - begin < seconds
        time.sleep(0.005)
    return time.monotonic() - begin


@pytest.mark.parametrize("keep", [False, True])
def test_a_cancelled_job_ends_within_two_seconds_and_keeps_what_it_was_asked_to(
    context: Context, keep: bool
) -> None:
    jobs = queue(context)
    jobs.submit(asked(frames=12 * 2000 - 3, window=6, keep_partial=keep), "long")

    def percent() -> float:
        record = jobs.get("long")
        assert record is not None
        return float((record.progress or {}).get("percent", 0))

    until(lambda: percent() > 7.0)  # fetch and cuts are behind: progress moves with the frames
    jobs.cancel("long")
    until(lambda: jobs.get("long").state.final, 2)  # type: ignore[union-attr]
    record = jobs.get("long")
    assert record is not None and record.state is State.CANCELLED
    until(lambda: not list(context.scratch.iterdir()), 5)
    assert context.delivery.output_root is not None
    left = [path for path in context.delivery.output_root.rglob("*") if path.is_file()]
    assert len(left) == keep
    if keep:
        assert 9 <= frames_in(left[0]) < 12 * 2000 - 3
    jobs.close()


def test_a_stopped_job_that_keeps_tells_that_it_is_not_whole(context: Context) -> None:
    passes: list[int] = []

    def on_step() -> None:
        passes.append(1)
        if len(passes) > 6:
            raise JobStopped("job_timeout", "too long")

    answer = do(context, asked(keep_partial=True, stream=True), on_step)
    assert (answer["whole"], answer["frames"]) == (False, 9)
    assert frames_in(delivered(context, answer)) == 9
    passes.clear()
    with pytest.raises(JobStopped):
        do(context, asked(), on_step)


def test_the_official_client_gets_a_video_piece_by_piece(
    context: Context, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    slow = pipeline.generate_blocks

    def blocks(*arguments: Any) -> Iterator[Any]:
        for block in slow(*arguments):
            yield block
            time.sleep(0.4)

    monkeypatch.setattr(pipeline, "generate_blocks", blocks)
    with serving(queue(context), api_key=KEY, validate=validate, payloads=PAYLOADS) as server:
        monkeypatch.setattr(runpod, "endpoint_url_base", f"{server.url}/v2")
        job = runpod.Endpoint("local", api_key=KEY).run(asked(frames=45, stream=True))
        seen = [(piece, job.status()) for piece in job.stream()]
        output = job.output()
    assert seen[0][1] == "IN_PROGRESS"  # while later blocks are made
    pieces = [base64.b64decode(piece["base64"]) for piece, _ in seen]
    assert [piece["frames"] for piece, _ in seen] == [9, 21, 33, 45, 45]
    assert {piece["content_type"] for piece, _ in seen} == {"video/mp4"}
    assert b"".join(pieces) == delivered(context, output).read_bytes()
    for name, content, frames in (("first", pieces[0], 8), ("whole", b"".join(pieces), 45)):
        path = tmp_path / f"{name}.mp4"
        path.write_bytes(content)
        command = [
            imageio_ffmpeg.get_ffmpeg_exe(),
            "-v",
            "error",
            "-xerror",
            "-i",
            path,
            "-f",
            "framemd5",
            "-",
        ]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr
        assert sum(not line.startswith("#") for line in done.stdout.splitlines()) == frames
