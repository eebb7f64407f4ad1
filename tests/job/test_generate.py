"""A generate job with nano, from its plan to its file: pieces as they are made, and what a stop leaves."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import pytest
import torch
from PIL import Image

from app.errors import InputError, JobStopped, UnavailableError
from app.job import generate as job_module
from app.job.generate import GenerateResult, run_generate
from app.job.generate_plan import Pictures, plan_generate
from app.job.generate_request import GenerateRequest
from app.job.request import parse
from app.job.result import Limits
from app.memory import SLACK, Room
from app.models.wan import generate as pipeline
from app.models.wan.generate import Generator
from app.models.wan.memory import Choice
from app.progress import Silent
from app.video.fragments import FragmentWriter
from app.video.probe import probe
from app.video.read import read_frames
from tests.models.wan import nano
from tests.models.wan.nano import Told

LIMITS = Limits(1 << 20, 1000)


@pytest.fixture(scope="module")
def generator(wan_volume: Path) -> Generator:
    return nano.load(wan_volume)


def run(
    generator: Generator,
    output: Path,
    on_step: Callable[[], None] = lambda: None,
    emit: Callable[[bytes, int], None] = lambda piece, frames: None,
    *,
    pictures: Pictures | None = None,
    stream: bool = False,
    **asked: Any,
) -> GenerateResult:
    request = parse(GenerateRequest, {"prompt": "a cat", "height": 32, "width": 48, "frames": 21, **asked})
    planned = plan_generate(request, generator.able, pictures or Pictures(), output, LIMITS, stream=stream)
    return run_generate(generator, "nano-wan", planned, Silent(), on_step, emit)


def frames_of(path: Path) -> torch.Tensor:
    return torch.stack([torch.from_numpy(frame) for frame in read_frames(path, probe(path))])


def decodes(path: Path) -> int:
    """Frames that ffmpeg, asked to be strict, decodes."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-xerror", "-i", str(path)]
    done = subprocess.run([*command, "-f", "framemd5", "-"], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return sum(not line.startswith("#") for line in done.stdout.splitlines())


def stopping(after: int, error: BaseException) -> Callable[[], None]:
    """Raises at the pass after this many."""
    passes: list[int] = []

    def on_step() -> None:
        passes.append(1)
        if len(passes) > after:
            raise error

    return on_step


CANCELLED = JobStopped("job_cancelled", "The job was cancelled by its caller.")


# ------------------------------------------------------------------ results


@pytest.mark.parametrize(
    ("suffix", "asked", "frames", "rate"),
    [
        ("mp4", {}, 21, "16"),
        ("mkv", {"codec": "lossless"}, 21, "16"),
        ("mov", {"frames": None, "seconds": 1, "rate": 23.976}, 24, "24000/1001"),
        ("mp4", {"frames": None, "seconds": 0.7}, 11, "16"),
    ],
)
def test_frames_and_rate_of_the_file_are_exact(
    generator: Generator, tmp_path: Path, suffix: str, asked: dict[str, Any], frames: int, rate: str
) -> None:
    result = run(generator, tmp_path / f"out.{suffix}", **asked)
    info = probe(tmp_path / f"out.{suffix}")
    assert (result.frames, result.rate, result.whole) == (frames, rate, True)
    assert str(info.rate) == rate and len(frames_of(info.path)) == frames
    assert (info.width, info.height) == (48, 32)
    assert result.bytes == info.path.stat().st_size
    assert 0 < result.first_frames_seconds <= result.total_seconds
    assert list(tmp_path.iterdir()) == [info.path]


def test_lossless_holds_what_the_model_made(generator: Generator, tmp_path: Path) -> None:
    run(generator, tmp_path / "a.mkv", codec="lossless", seed=3)
    made = nano.clip(generator, nano.options(21, prompts={0: "a cat"}, seed=3))
    exact = ((made.clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1)
    assert (frames_of(tmp_path / "a.mkv").float() - exact).abs().max() <= 1


def test_a_prompt_that_is_cut_is_told(generator: Generator, tmp_path: Path) -> None:
    result = run(generator, tmp_path / "a.mp4", prompt="snow " * 3000, frames=9)
    assert any("tokens and the model reads 512" in note for note in result.notes)


def test_an_image_is_cut_to_the_shape_and_not_squeezed(generator: Generator, tmp_path: Path) -> None:
    wide = Image.new("RGB", (200, 32), "blue")
    wide.paste(Image.new("RGB", (48, 32), "red"), (76, 0))
    wide.save(tmp_path / "wide.png")
    square = Image.new("RGB", (48, 32), "red")
    square.save(tmp_path / "red.png")
    for name in ("wide", "red"):
        pictures = Pictures(start=tmp_path / f"{name}.png")
        run(generator, tmp_path / f"{name}.mkv", pictures=pictures, codec="lossless", frames=13)
    wide_frames, red_frames = frames_of(tmp_path / "wide.mkv"), frames_of(tmp_path / "red.mkv")
    assert torch.equal(wide_frames, red_frames)


def test_a_picture_that_breaks_off_is_refused_and_nothing_is_left(
    generator: Generator, tmp_path: Path
) -> None:
    Image.effect_noise((96, 64), 50).save(tmp_path / "start.png")
    content = (tmp_path / "start.png").read_bytes()
    (tmp_path / "start.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError):
        run(generator, tmp_path / "a.mp4", pictures=Pictures(start=tmp_path / "start.png"), frames=13)
    assert [path.name for path in tmp_path.iterdir()] == ["start.png"]


# ------------------------------------------------------------------ streams


def test_the_first_piece_leaves_before_the_second_block_is_begun(
    generator: Generator, tmp_path: Path
) -> None:
    events: list[str] = []
    pieces: list[bytes] = []

    def emit(piece: bytes, frames: int) -> None:
        events.append(f"{frames} frames")
        pieces.append(piece)

    output = tmp_path / "a.mp4"
    result = run(generator, output, lambda: events.append("pass"), emit, frames=33, stream=True)
    passes = ["pass"] * 4
    assert events == [*passes, "9 frames", *passes, "21 frames", *passes, "33 frames", "33 frames"]
    assert b"".join(pieces) == output.read_bytes()
    assert decodes(output) == result.frames == 33

    (tmp_path / "first.mp4").write_bytes(pieces[0])
    assert decodes(tmp_path / "first.mp4") == 8  # the ninth's duration is not known yet
    (tmp_path / "begun.mp4").write_bytes(b"".join(pieces[:2]))
    assert decodes(tmp_path / "begun.mp4") == 20
    assert torch.equal(frames_of(output)[:8], frames_of(tmp_path / "first.mp4"))


def test_a_stream_from_an_image_begins_with_it(generator: Generator, tmp_path: Path) -> None:
    Image.effect_noise((96, 64), 50).convert("RGB").save(tmp_path / "start.png")
    pieces: list[bytes] = []
    result = run(
        generator, tmp_path / "a.mp4", lambda: None, lambda piece, _: pieces.append(piece),
        pictures=Pictures(start=tmp_path / "start.png"), frames=13, stream=True,
    )  # fmt: skip
    assert b"".join(pieces) == (tmp_path / "a.mp4").read_bytes()
    assert decodes(tmp_path / "a.mp4") == result.frames == 13


def test_the_file_grows_while_it_is_made(generator: Generator, tmp_path: Path) -> None:
    sizes: list[int] = []

    def on_step() -> None:
        sizes.append(sum(path.stat().st_size for path in tmp_path.iterdir()))

    run(generator, tmp_path / "a.mp4", on_step, frames=33, stream=True)
    assert sizes[0] == 0 < sizes[5] < sizes[-1] < (tmp_path / "a.mp4").stat().st_size


# ------------------------------------------------------------------ stops


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("error", [CANCELLED, KeyboardInterrupt()], ids=["cancelled", "Ctrl-C"])
def test_a_stopped_job_leaves_a_video_that_plays_if_it_was_asked_to(
    generator: Generator, tmp_path: Path, error: BaseException, stream: bool
) -> None:
    pieces: list[bytes] = []
    output = tmp_path / "a.mp4"
    result = run(
        generator, output, stopping(9, error), lambda piece, _: pieces.append(piece),
        frames=93, keep_partial=True, stream=stream,
    )  # fmt: skip
    assert (result.whole, result.frames, decodes(output)) == (False, 21, 21)
    assert "The job was stopped after 21 of 93 frames." in result.notes
    assert list(tmp_path.iterdir()) == [output]
    assert b"".join(pieces) == (output.read_bytes() if stream else b"")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("after", "keep"), [(6, False), (2, True)])
def test_else_nothing_is_left(
    generator: Generator, tmp_path: Path, after: int, keep: bool, stream: bool
) -> None:
    with pytest.raises(JobStopped):
        run(generator, tmp_path / "a.mp4", stopping(after, CANCELLED), keep_partial=keep, stream=stream)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_in_the_middle_of_a_frame_leaves_whole_frames(
    generator: Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = FragmentWriter.write
    written: list[int] = []

    def write(self: FragmentWriter, frames: Any) -> None:
        written.append(1)
        if len(written) == 2:
            real(self, frames[:5])
            assert self._child is not None
            self._child.write(memoryview(bytes(1001)))
            raise KeyboardInterrupt
        real(self, frames)

    monkeypatch.setattr(FragmentWriter, "write", write)
    result = run(generator, tmp_path / "a.mp4", stream=True, keep_partial=True)
    assert (result.whole, result.frames, decodes(tmp_path / "a.mp4")) == (False, 14, 14)


def test_a_failure_is_no_stop(generator: Generator, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="odd"):
        run(generator, tmp_path / "a.mp4", stopping(6, ValueError("odd")), keep_partial=True)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------ memory


@pytest.mark.parametrize(
    ("variant", "asked", "parts"),
    [
        ("nano", {"frames": 93}, ["48x32", "a window of 21 latents", "a shorter window"]),
        ("nano", {"frames": 93, "window": 9}, ["a window of 9 latents"]),
        ("nano", {"frames": 33}, ["a window of 9 latents"]),
        ("nano-many", {"frames": 29, "steps": 2}, ["29 frames made at once", "fewer frames"]),
    ],
)
def test_running_out_of_memory_says_what_to_do(
    wan_volume: Path, tmp_path: Path, variant: str, asked: dict[str, Any], parts: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    real = pipeline.generate_blocks

    def blocks(model: Any, *arguments: Any) -> Any:
        if model.device.type != "meta":  # where what a clip will take is counted
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        yield from real(model, *arguments)

    monkeypatch.setattr(pipeline, "generate_blocks", blocks)
    with pytest.raises(UnavailableError) as caught:
        run(nano.load(wan_volume, variant=variant), tmp_path / "a.mp4", **asked)
    assert caught.value.code == "out_of_memory"
    for part in parts:
        assert part in caught.value.message
    assert list(tmp_path.iterdir()) == []


def test_running_out_of_memory_names_the_window_that_was_taken(
    generator: Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = job_module._fit

    def shorter(*arguments: Any) -> Any:
        found = real(*arguments)
        return replace(found, choice=replace(found.choice, window=6))

    def full(*arguments: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(job_module, "_fit", shorter)
    monkeypatch.setattr(generator, "generate", full)
    with pytest.raises(UnavailableError, match="a window of 6 latents does not fit"):
        run(generator, tmp_path / "a.mp4", frames=93)


def test_progress_counts_frames(
    generator: Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Told()
    counted: list[float] = []
    monkeypatch.setattr(told, "advance", counted.append)
    request = parse(GenerateRequest, {"prompt": "a cat", "height": 32, "width": 48, "frames": 21})
    planned = plan_generate(request, generator.able, Pictures(), tmp_path / "a.mp4", LIMITS)
    run_generate(generator, "nano-wan", planned, told)
    assert told.steps == ["memory", "generate"] and counted == [9, 12]


def leave(free: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave a model and its work so many bytes."""
    monkeypatch.setattr(Generator, "room", lambda self: Room(free, free, apart=False))


def test_the_way_that_was_taken_is_told(generator: Generator, tmp_path: Path) -> None:
    result = run(generator, tmp_path / "a.mp4", frames=33)
    assert result.memory.startswith(
        "a window of 9 latents, decoded 3 at a time, the text encoder in memory: up to "
    )
    assert not any("Memory" in note for note in result.notes)


def test_less_memory_makes_the_same_frames_until_the_window_is_short(
    wan_volume: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = nano.load(wan_volume)
    asked: dict[str, Any] = {"frames": 45, "codec": "lossless", "height": 64, "width": 96}
    whole = run(made, tmp_path / "whole.mkv", **asked)
    options = plan_generate(
        parse(GenerateRequest, {"prompt": "a cat", **asked}),
        made.able,
        Pictures(),
        tmp_path / "b.mkv",
        LIMITS,
    ).options
    task = made.task(options)
    choices = Choice(None), Choice(None, 1), Choice(None, 1, "nowhere"), Choice(6, 1, "nowhere")
    needs = [made.estimate.need(task, choice).device for choice in choices]
    assert sorted(needs, reverse=True) == needs
    expected = frames_of(tmp_path / "whole.mkv").int()
    ways, differences = [], []
    for choice, need in zip(choices, needs, strict=True):
        leave(int(SLACK * need) + 1, monkeypatch)
        result = run(made, tmp_path / "short.mkv", **asked)
        ways.append(result.memory)
        differences.append(int((frames_of(tmp_path / "short.mkv").int() - expected).abs().max()))
        assert bool(result.notes) == (choice.window is not None)
        assert made.text.loaded == (choice.text == "device")
    assert differences[0] == 0 and max(differences[1:3]) <= 1 < differences[3]  # sums are rounded otherwise
    assert whole.memory.startswith("a window of 12 latents, decoded 3 at a time, the text encoder in memory")
    assert "decoded one by one, the text encoder in memory" in ways[1]
    assert "the text encoder out of memory" in ways[2]
    assert ways[3].startswith("a window of 6 latents")
    assert "with window 6 on any machine" in result.notes[-1]


@pytest.mark.parametrize(
    ("variant", "asked", "parts"),
    [
        (
            "nano",
            {"frames": 93},
            ["A result of 48x32 takes up to", "of the machine's 1.0 kB", "a window of 6"],
        ),
        ("nano", {"frames": 93, "window": 9}, ["a window of 9 latents", "or a shorter window"]),
        ("nano-many", {"frames": 29, "steps": 2}, ["with 29 frames made at once", "or fewer frames"]),
    ],
)
def test_what_cannot_fit_is_refused_before_anything_is_made(
    wan_volume: Path, tmp_path: Path, variant: str, asked: dict[str, Any], parts: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    made = nano.load(wan_volume, variant=variant)
    monkeypatch.setattr(made.text, "_load_model", lambda: pytest.fail("T5 was read"))
    leave(1000, monkeypatch)
    with pytest.raises(UnavailableError) as caught:
        run(made, tmp_path / "a.mp4", **asked)
    assert caught.value.code == "memory_short"
    for part in parts:
        assert part in caught.value.message, caught.value.message
    assert list(tmp_path.iterdir()) == []
