"""What is decided of a generate job, and refused, before anything is loaded."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import pytest
from PIL import Image

from app.errors import SeedpodError
from app.job.generate_plan import GUIDANCE, GenerateJob, Pictures, plan_generate
from app.job.generate_request import GenerateRequest
from app.job.request import parse
from app.job.result import Limits
from app.models.wan.config import VARIANTS
from app.models.wan.generate import NEGATIVE
from app.models.wan.parts import Abilities
from app.video.fragments import FragmentWriter
from app.video.write import VideoWriter

DISTILLED = Abilities(
    "few", ("generator_ema", "generator"), False, True, frozenset({"pose", "clip"}), VARIANTS["1.3b"], 8
)
WITHOUT = replace(DISTILLED, takes_pose=False)
MANY = replace(DISTILLED, sampling="many", sections=())
OF_IMAGES = replace(DISTILLED, image=True)
LIMITS = Limits(2_000_000, 2_000)


@pytest.fixture(scope="session")
def shot(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Clips of 96x64 at 16 frames per second, of any length."""
    folder = tmp_path_factory.mktemp("shots")

    def made(frames: int, size: str = "96x64") -> Path:
        path = folder / f"{frames}-{size}.mp4"
        if not path.exists():
            source = ["-f", "lavfi", "-i", f"testsrc2=size={size}:rate=16", "-frames:v", str(frames)]
            command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *source, "-pix_fmt", "yuv420p", path]
            subprocess.run([str(part) for part in command], check=True)
        return path

    return made


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "start.png"
    Image.effect_noise((96, 64), 50).convert("RGB").save(path)
    return path


def plan(tmp_path: Path, able: Abilities = DISTILLED, *, stream: bool = False, **asked: Any) -> GenerateJob:
    names = {name: asked.pop(name) for name in ("start", "pose", "reference") if name in asked}
    request = parse(GenerateRequest, {"prompt": "a cat", "height": 64, "width": 96, **asked})
    return plan_generate(request, able, Pictures(**names), tmp_path / "out.mp4", LIMITS, stream=stream)


def refused(tmp_path: Path, able: Abilities = DISTILLED, **asked: Any) -> SeedpodError:
    with pytest.raises(SeedpodError) as caught:
        plan(tmp_path, able, **asked)
    assert not (tmp_path / "out.mp4").exists()
    return caught.value


# ------------------------------------------------------------------ what is decided


def test_a_prompt_alone_makes_what_was_trained(tmp_path: Path) -> None:
    job = plan(tmp_path, height=480, width=832)
    assert (job.frames, job.rate, job.options.length.made) == (81, 16, 21)
    assert (job.options.guidance, job.options.section, job.options.window) == (1.0, None, None)
    assert job.notes == ()
    assert isinstance(job.writer, VideoWriter)
    assert isinstance(plan(tmp_path, stream=True).writer, FragmentWriter)
    assert list(tmp_path.iterdir()) == []  # nothing is written yet


@pytest.mark.parametrize(
    ("asked", "frames", "made"),
    [
        ({"frames": 9}, 9, 3),
        ({"seconds": 5}, 80, 21),
        ({"seconds": 0.01}, 1, 3),
        ({"seconds": 10, "rate": 24}, 240, 63),
        ({"seconds": 1, "rate": 23.976}, 24, 9),
    ],
)
def test_lengths(asked: dict[str, Any], frames: int, made: int, tmp_path: Path) -> None:
    job = plan(tmp_path, **asked)
    assert (job.frames, job.options.length.made) == (frames, made)
    assert job.options.length.frames >= frames


def test_the_rate_is_exact(tmp_path: Path) -> None:
    assert plan(tmp_path, rate=23.976).rate == Fraction(24000, 1001)


def test_past_what_was_trained_there_is_a_note_with_the_right_count(
    tmp_path: Path, shot: Callable[[int], Path]
) -> None:
    assert plan(tmp_path, frames=81).notes == ()
    (note,) = plan(tmp_path, frames=93).notes
    assert note.startswith("93 frames are more than the 81") and "rolls" in note
    *_, note = plan(tmp_path, frames=24, start=shot(69)).notes  # 69 + 24
    assert note.startswith("93 frames, those gone on from among them, are more than the 81")
    (note,) = plan(tmp_path, MANY, frames=93).notes
    assert "rolls" not in note and "quality" in note


def test_prompts_are_cleaned_and_changes_count_in_frames(tmp_path: Path) -> None:
    job = plan(tmp_path, prompt="  a &amp; b\n c ", changes=["1: a dog", {"at": 2.5, "prompt": " a  fox "}])
    assert job.options.prompts == {0: "a & b c", 16: "a dog", 40: "a fox"}
    assert plan(tmp_path, changes=["0.001: a dog"]).options.prompts[1] == "a dog"


def test_many_steps_have_guidance_and_the_published_negative_prompt(tmp_path: Path) -> None:
    job = plan(tmp_path, MANY)
    assert (job.options.guidance, job.options.negative) == (GUIDANCE, NEGATIVE)
    assert job.options.length.at_once
    assert plan(tmp_path, MANY, negative_prompt="").options.negative == ""


def test_what_it_begins_with(tmp_path: Path, picture: Path, shot: Callable[[int], Path]) -> None:
    job = plan(tmp_path, start=picture)
    assert (job.options.length.given, job.frames, job.used) == (1, 85, 1)
    job = plan(tmp_path, start=shot(30), seconds=1)
    assert (job.options.length.given, job.used, job.frames) == (6, 21, 16)
    assert "the last 21 frames" in job.notes[0]
    job = plan(tmp_path, start=shot(5), seconds=1)
    assert (job.options.length.given, job.used) == (1, 1)
    assert "its last frame is used: it has only 5" in job.notes[0]
    job = plan(tmp_path, OF_IMAGES, start=shot(30), frames=9)
    assert (job.options.length.given, job.used) == (0, 1)
    assert "begins with one picture" in job.notes[0]
    job = plan(tmp_path, start=picture, width=64)
    assert "start.png is 96x64, another shape than 64x64: its middle is used." in job.notes


def test_poses_give_the_length(tmp_path: Path, picture: Path, shot: Callable[[int], Path]) -> None:
    assert plan(tmp_path, pose=shot(21)).frames == 21
    assert plan(tmp_path, pose=shot(25), start=picture).frames == 25
    assert plan(tmp_path, pose=shot(21), frames=21).frames == 21
    asked = {"start": picture, "pose": shot(21), "reference": picture}
    assert plan(tmp_path, OF_IMAGES, **asked).reference is not None


@pytest.mark.parametrize(
    ("sections", "use_ema", "section"),
    [
        (("generator_ema", "generator"), None, None),
        (("generator_ema", "generator"), True, "generator_ema"),
        (("generator_ema", "generator"), False, "generator"),
        (("generator",), False, "generator"),
        ((), False, None),
    ],
)
def test_which_weights(
    sections: tuple[str, ...], use_ema: bool | None, section: str | None, tmp_path: Path
) -> None:
    job = plan(tmp_path, replace(DISTILLED, sections=sections), use_ema=use_ema)
    assert job.options.section == section


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("able", "asked", "code", "parts"),
    [
        (DISTILLED, {"frames": 80}, "frames_not_blocks", ["frames is 80", "81"]),
        (MANY, {"frames": 80}, "frames_not_blocks", ["77 or 81"]),
        (DISTILLED, {"height": 100}, "size_invalid", ["height is 100", "96 or 112"]),
        (DISTILLED, {"height": 2048, "width": 2048}, "output_too_large", ["4,194,304", "2,000,000"]),
        (DISTILLED, {"seconds": 86_400}, "output_too_large", ["1,382,400", "2,000"]),
        (DISTILLED, {"changes": ["5.1: a dog"]}, "change_too_late", ["5.1", "5.06"]),
        (MANY, {"changes": ["1: a dog"]}, "changes_refused", ["distilled"]),
        (MANY, {"window": 9}, "window_refused", ["window"]),
        (MANY, {"sink": 3}, "window_refused", ["sink"]),
        (DISTILLED, {"negative_prompt": "blurred"}, "negative_refused", ["guidance"]),
        (MANY, {"negative_prompt": "blurred", "guidance": 1}, "negative_refused", ["guidance"]),
        (DISTILLED, {"steps": 17}, "steps_refused", ["17", "16"]),
        (DISTILLED, {"prompt": " \n "}, "prompt_empty", ["empty"]),
        (DISTILLED, {"prompt": "a\0b"}, "prompt_invalid", ["U+0000"]),
        (DISTILLED, {"prompt": "a \ud800"}, "request_invalid", ["prompt is", "unicode"]),
        (DISTILLED, {"changes": ["1: &nbsp;"]}, "prompt_empty", ["empty"]),
        (DISTILLED, {"guidance": 3, "negative_prompt": "a\0b"}, "prompt_invalid", ["U+0000"]),
        (OF_IMAGES, {}, "image_missing", ["start"]),
        (replace(MANY, sections=("generator",)), {"use_ema": True}, "weights_missing", ["it has generator"]),
        (MANY, {"use_ema": True}, "weights_missing", ["without EMA"]),
    ],
    ids=lambda value: getattr(value, "sampling", None) or str(value)[:40],
)  # fmt: skip
def test_refusals(
    able: Abilities, asked: dict[str, Any], code: str, parts: list[str], tmp_path: Path
) -> None:
    error = refused(tmp_path, able, **asked)
    assert error.code == code
    for part in parts:
        assert part in error.message, error.message


def test_refusals_of_pictures(tmp_path: Path, picture: Path, shot: Callable[..., Path]) -> None:
    assert refused(tmp_path, MANY, start=picture).code == "start_refused"
    no_clip = replace(OF_IMAGES, has=frozenset({"pose"}))
    assert refused(tmp_path, no_clip, start=picture).code == "clip_missing"
    assert refused(tmp_path, start=shot(30), pose=shot(21)).code == "pose_refused"
    assert refused(tmp_path, pose=shot(21), reference=picture).code == "pose_refused"
    assert refused(tmp_path, OF_IMAGES, start=picture, reference=picture).code == "pose_refused"
    tall = Image.new("RGB", (64, 96))
    tall.save(tmp_path / "tall.png")
    asked = {"start": picture, "pose": shot(21), "reference": tmp_path / "tall.png"}
    error = refused(tmp_path, OF_IMAGES, **asked)
    assert error.code == "pose_size" and "the reference pose is 64x96" in error.message


def test_poses_that_do_not_fit(tmp_path: Path, picture: Path, shot: Callable[..., Path]) -> None:
    error = refused(tmp_path, pose=shot(21), frames=33)
    assert error.code == "pose_length" and "there are 21 pose frames, and the clip has 33" in error.message
    error = refused(tmp_path, pose=shot(20))
    assert error.code == "pose_length" and "the poses have 20 frames" in error.message
    assert "9 or 21" in error.message
    error = refused(tmp_path, pose=shot(21, "64x96"))
    assert error.code == "pose_size" and "the poses are 64x96, and the clip is 96x64" in error.message
    error = refused(tmp_path, pose=picture)
    assert error.code == "pose_length" and "the poses have 1 frame" in error.message


def test_poses_need_weights_that_were_trained_for_them(tmp_path: Path, shot: Callable[..., Path]) -> None:
    error = refused(tmp_path, WITHOUT, pose=shot(21))
    assert error.code == "pose_refused" and "pose_proj" in error.message and "noise" in error.message
    error = refused(tmp_path, replace(DISTILLED, has=frozenset()), pose=shot(21))
    assert error.code == "pose_missing" and "fetch" in error.message


@pytest.mark.parametrize("name", ["start", "pose"])
def test_the_output_is_never_what_the_clip_is_made_from(
    name: str, tmp_path: Path, shot: Callable[..., Path]
) -> None:
    output = tmp_path / "out.mp4"
    content = shot(21).read_bytes()
    output.write_bytes(content)
    (tmp_path / "link.mp4").symlink_to(output)
    for path in (output, tmp_path / "link.mp4", tmp_path / "." / "out.mp4"):
        with pytest.raises(SeedpodError) as caught:
            plan(tmp_path, **{name: path})
        assert caught.value.code == "output_is_input"
    assert output.read_bytes() == content
