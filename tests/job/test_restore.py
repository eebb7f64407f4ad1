"""The job runner on real clips, with the nano model: what comes out is the clip that went in, restored."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from app.errors import InputError, JobStopped, SeedpodError, UnavailableError, UsageError
from app.job.request import Part, RestoreRequest
from app.job.restore import RestoreResult, look, plan_restore, run_restore
from app.job.result import Limits
from app.memory import SLACK, Room
from app.models.seedvr2.memory import Choice, Task
from app.models.seedvr2.restore import RestoreOptions, Restorer, latent_size
from app.models.seedvr2.vae_config import VAEConfig
from app.progress import Silent
from app.video.probe import probe
from app.video.read import read_frames
from tests.models.nano import restorer

REPOSITORY = Path(__file__).resolve().parents[2]
LIMITS = Limits(pixels=1024 * 1024, frames=10_000)


def ffmpeg(*arguments: str | Path) -> None:
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *map(str, arguments)], check=True)


def restore(
    source: Path,
    output: Path,
    on_step: Callable[[], None] = lambda: None,
    part: Part | None = None,
    **fields: object,
) -> RestoreResult:
    request = RestoreRequest.model_validate(fields)
    job = plan_restore(request, look(source, LIMITS), output, LIMITS, part)
    return run_restore(restorer(), "nano", job, Silent(), on_step)


def frames_of(path: Path) -> list[np.ndarray]:
    return list(read_frames(path, probe(path)))


def test_it_can_be_stopped_while_cuts_are_looked_for(short_clip: Path, tmp_path: Path) -> None:
    asked = []

    def stop() -> None:
        asked.append(1)
        raise JobStopped("job_cancelled", "The job was cancelled by its caller.")

    with pytest.raises(JobStopped):
        restore(short_clip, tmp_path / "out.mp4", stop)
    assert len(asked) == 1
    assert list(tmp_path.iterdir()) == []


def test_length_rate_and_sound_stay(short_clip: Path, tmp_path: Path) -> None:
    result = restore(short_clip, tmp_path / "out.mp4", scale=2)
    made, source = probe(tmp_path / "out.mp4"), probe(short_clip)
    assert (made.width, made.height) == (96, 64) == (result.width, result.height)
    assert made.rate == source.rate == Fraction(30000, 1001)
    assert len(frames_of(tmp_path / "out.mp4")) == 10 == result.frames
    assert made.has_audio and result.sound
    assert made.duration == pytest.approx(source.duration, abs=0.05)
    assert result.bytes == (tmp_path / "out.mp4").stat().st_size
    steps = {"find cuts", "read", "resize", "encode", "transformer", "decode", "colour", "write"}
    assert set(result.seconds) == steps
    assert sum(result.seconds.values()) <= result.total_seconds
    json.dumps(result.to_dict())


def test_the_same_seed_gives_the_same_file(short_clip: Path, tmp_path: Path) -> None:
    for name in ("a.mkv", "b.mkv"):
        restore(short_clip, tmp_path / name, codec="lossless", seed=5)
    restore(short_clip, tmp_path / "c.mkv", codec="lossless", seed=6)
    a, b, c = (np.stack(frames_of(tmp_path / name)) for name in ("a.mkv", "b.mkv", "c.mkv"))
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_an_image_becomes_an_image(suffix: str, tmp_path: Path) -> None:
    source = tmp_path / f"in.{suffix}"
    Image.effect_noise((37, 51), 60).convert("RGB").save(source)
    result = restore(source, tmp_path / f"out.{suffix}", scale=1.5)
    with Image.open(tmp_path / f"out.{suffix}") as made:
        assert made.size == (result.width, result.height) == (56, 76)


def test_png_frames_are_a_folder(short_clip: Path, tmp_path: Path) -> None:
    result = restore(short_clip, tmp_path / "frames", codec="png")
    names = sorted(path.name for path in (tmp_path / "frames").iterdir())
    assert names == [f"{i:06}.png" for i in range(1, 11)]
    assert not result.sound


def test_a_picture_too_small_to_crop_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (12, 40)).save(tmp_path / "in.png")
    with pytest.raises(UsageError, match="12x40"):
        restore(tmp_path / "in.png", tmp_path / "out.png", fit="crop")


def test_more_frames_than_allowed(short_clip: Path, tmp_path: Path) -> None:
    job = plan_restore(RestoreRequest(), look(short_clip, LIMITS), tmp_path / "out.mp4", LIMITS)
    with pytest.raises(InputError, match="has 10 frames, and the limit is 9"):
        run_restore(restorer(), "nano", replace(job, most_frames=9), Silent())


@pytest.mark.parametrize("codec", ["hevc10", "h264_10"])
def test_ten_bits_are_ten_bits(codec: str, short_clip: Path, tmp_path: Path) -> None:
    restore(short_clip, tmp_path / "out.mp4", codec=codec, scale=2)
    assert probe(tmp_path / "out.mp4").bit_depth == 10


def test_an_odd_size_and_a_turned_clip(tmp_path: Path) -> None:
    ffmpeg("-f", "lavfi", "-i", "testsrc2=size=50x34:rate=10", "-frames:v", "3", tmp_path / "flat.mp4")
    ffmpeg("-display_rotation", "90", "-i", tmp_path / "flat.mp4", "-c", "copy", tmp_path / "turned.mp4")
    assert (probe(tmp_path / "turned.mp4").width, probe(tmp_path / "turned.mp4").height) == (34, 50)
    result = restore(tmp_path / "turned.mp4", tmp_path / "out.mp4", height=51, width=35)
    made = probe(tmp_path / "out.mp4")
    assert (made.width, made.height, made.rotation) == (35, 51, 0)
    assert result.notes  # an odd size is told


@pytest.mark.parametrize("name", ["in.gif", "in.webm", "in.mov", "in.mkv"])
def test_other_containers_come_in(name: str, tmp_path: Path) -> None:
    ffmpeg("-f", "lavfi", "-i", "testsrc2=size=48x32:rate=10", "-frames:v", "4", tmp_path / name)
    result = restore(tmp_path / name, tmp_path / "out.mp4")
    assert result.frames == 4
    assert Fraction(result.rate) == 10


def test_another_rate_keeps_the_duration(short_clip: Path, tmp_path: Path) -> None:
    result = restore(short_clip, tmp_path / "out.mp4", rate=15)
    assert result.frames == 5
    assert probe(tmp_path / "out.mp4").rate == 15


def test_nothing_leaks_across_a_cut(tmp_path: Path) -> None:
    """Two clips that begin alike and differ after the cut: the first shot's frames are the same."""
    pieces = {"smooth": "gradients=c0=0x204080:c1=0xf0e010:seed=1", "checks": "testsrc2", "bars": "smptebars"}
    for name, source in pieces.items():
        picture = f"{source}{':' if '=' in source else '='}size=64x48:rate=10"
        ffmpeg("-f", "lavfi", "-i", picture, "-frames:v", "12", "-c:v", "ffv1", tmp_path / f"{name}.mkv")
    made = []
    for second in ("checks", "bars"):
        joined = tmp_path / f"{second}-joined.mkv"
        ffmpeg("-i", tmp_path / "smooth.mkv", "-i", tmp_path / f"{second}.mkv", "-filter_complex",
               "[0:v][1:v]concat=n=2:v=1", "-c:v", "ffv1", joined)  # fmt: skip
        result = restore(joined, tmp_path / f"{second}-out.mkv", codec="lossless", window=5)
        assert result.shots == 2
        made.append(np.stack(frames_of(tmp_path / f"{second}-out.mkv")))
    assert np.array_equal(made[0][:12], made[1][:12])
    assert not np.array_equal(made[0][12:], made[1][12:])
    whole = restore(tmp_path / "bars-joined.mkv", tmp_path / "whole.mkv", codec="lossless", cuts=False)
    assert whole.shots == 1
    assert not np.array_equal(np.stack(frames_of(tmp_path / "whole.mkv"))[:12], made[1][:12])


@pytest.fixture(scope="module")
def two_shots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 frames that move, then 12 of bars, with a tone; and `rest.mkv`, the same from frame 10 on."""
    folder = tmp_path_factory.mktemp("shots")
    moving, bars = (f"{name}=size=48x32:rate=25,trim=end_frame" for name in ("testsrc2", "smptebars"))
    graph = f"{moving}=240[a];{bars}=12[b];[a][b]concat=n=2:v=1,format=yuv420p[v]"
    tone = ["-f", "lavfi", "-i", "sine=frequency=440:duration=10.08"]
    mapped = ["-map", "[v]", "-map", "0:a", "-c:v", "ffv1"]
    ffmpeg(*tone, "-filter_complex", graph, *mapped, folder / "whole.mkv")
    rest = "trim=start_frame=10,setpts=PTS-STARTPTS"
    ffmpeg("-i", folder / "whole.mkv", "-vf", rest, "-c:v", "ffv1", "-an", folder / "rest.mkv")
    return folder


PART = {"source_start": 10, "start": 230, "stop": 250, "shot": 0, "edges": [0, 240, 252]}


def test_a_part_of_a_clip_is_what_the_whole_has_there(two_shots: Path, tmp_path: Path) -> None:
    fields = {"codec": "lossless", "window": 7, "height": 16, "width": 16, "color": "none", "seed": 3}
    whole = restore(two_shots / "whole.mkv", tmp_path / "whole.mkv", **fields)
    assert (whole.shots, whole.frames, whole.sound) == (2, 252, True)
    made = restore(two_shots / "rest.mkv", tmp_path / "part.mkv", part=Part(**PART), **fields)
    assert (made.shots, made.frames, made.sound) == (2, 20, False)
    expected, got = (np.stack(frames_of(tmp_path / name)) for name in ("whole.mkv", "part.mkv"))
    assert np.array_equal(got, expected[230:250])
    other = Part(**{**PART, "shot": 1})
    restore(two_shots / "rest.mkv", tmp_path / "other.mkv", part=other, **fields)
    assert not np.array_equal(np.stack(frames_of(tmp_path / "other.mkv")), got)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"source_start": 220}, "begins with frame 220, and frames 28 to 251"),
        ({"source_start": 9}, "ends with frame 250, and frames 28 to 251"),
        ({"edges": [0, 240, 20_000]}, "20,000 frames, and the limit is 10,000"),
    ],
)
def test_a_part_that_its_source_does_not_hold(
    values: dict[str, object], words: str, two_shots: Path, tmp_path: Path
) -> None:
    part = Part(**{**PART, "stop": 252, **values})
    with pytest.raises(InputError, match=words):
        restore(two_shots / "rest.mkv", tmp_path / "out.mkv", part=part, window=5, height=16)
    assert list(tmp_path.iterdir()) == []


def test_an_image_has_no_parts(tmp_path: Path) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "in.png")
    with pytest.raises(UsageError, match="no parts"):
        restore(tmp_path / "in.png", tmp_path / "out.png", part=Part(source_start=0, start=0, stop=1, shot=0,
                                                                     edges=[0, 1]))  # fmt: skip


class StoppedError(SeedpodError):
    pass


def test_stopping_leaves_nothing(short_clip: Path, tmp_path: Path) -> None:
    calls = 0

    def stop() -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise StoppedError("job_cancelled", "stopped by the test")

    with pytest.raises(StoppedError):
        restore(short_clip, tmp_path / "out.mp4", stop)
    assert list(tmp_path.iterdir()) == []
    restore(short_clip, tmp_path / "out.mp4")  # and the model is as good as before


def memory_of(source: Path, output: Path) -> tuple[float, list[float]]:
    """Memory of a process that restores, in MB: the peak, and what is resident at each step."""
    code = """
import resource, sys
from pathlib import Path
from tests.job.test_restore import restore
resident = []
def look():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    resident.append(pages * resource.getpagesize() / 1e6)
restore(Path(sys.argv[1]), Path(sys.argv[2]), look, window=5, cuts=False, short_side=32)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000, *resident)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(source), str(output)],
        cwd=REPOSITORY, check=True, capture_output=True, text=True,
        # What is freed goes back to the system at once, so that what is resident is what is held.
        env=os.environ | {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
    )  # fmt: skip
    peak, *resident = map(float, done.stdout.split())
    return peak, resident


@pytest.mark.slow
def test_memory_does_not_grow_with_length(
    tmp_path: Path, record_property: Callable[[str, object], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """One shot of 15 frames of 0.7 MB, and one ten times longer, whose end needs no more than what is before
    it. Holding on to frames would show: 135 more of them are a third of the whole process."""
    peaks, resident = {}, []
    for count in (15, 150):
        source = tmp_path / f"{count}.mp4"
        ffmpeg("-f", "lavfi", "-i", "testsrc2=size=640x360:rate=25", "-frames:v", str(count), source)
        peaks[count], resident = memory_of(source, tmp_path / f"{count}-out.mp4")
        record_property(f"peak_mb_{count}_frames", peaks[count])
    end = resident[7 * len(resident) // 10 :]  # finding cuts comes first, and is more than half of the looks
    before, last = max(end[: len(end) // 2]), max(end[len(end) // 2 :])
    with capsys.disabled():
        print(f"\npeak memory: {peaks[15]:.0f} MB for 15 frames, {peaks[150]:.0f} MB for 150; of these the "
              f"last looks' first half {before:.0f}, their second {last:.0f}")  # fmt: skip
    assert peaks[150] < 1.15 * peaks[15]
    assert last < 1.02 * before


def test_a_sixteen_bit_model_restores(short_clip: Path, tmp_path: Path) -> None:
    """The transformer in bfloat16 gives nearly what it gives in float32."""
    full = restorer()
    half = replace(full, dit=_copy(full.dit).bfloat16(), positive=full.positive.bfloat16())
    options = plan_restore(RestoreRequest(), look(short_clip, LIMITS), tmp_path / "x.mp4", LIMITS).options
    with torch.inference_mode():
        frames = frames_of(short_clip)
        a = torch.cat(list(full.restore_shot(iter(frames), 10, options)))
        b = torch.cat(list(half.restore_shot(iter(frames), 10, options)))
    assert (a - b).norm() / a.norm() < 0.1


def _copy(model: torch.nn.Module) -> torch.nn.Module:
    import copy

    return copy.deepcopy(model)


# ------------------------------------------------------------------ memory


def leave(free: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave a model and its work so many bytes."""
    monkeypatch.setattr(Restorer, "room", lambda self: Room(free, free, apart=False))


def test_the_way_through_the_model_is_told(short_clip: Path, tmp_path: Path) -> None:
    result = restore(short_clip, tmp_path / "out.mp4")
    assert result.memory.startswith("windows of 31 latents, whole frames: up to ")
    assert not any("Memory" in note for note in result.notes)


def test_tiles_as_asked_and_as_memory_asks_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ffmpeg("-f", "lavfi", "-i", "testsrc2=size=160x64:rate=10", "-frames:v", "2", tmp_path / "in.mkv")
    fields = {"scale": 3, "codec": "lossless", "color": "none"}
    estimate, frame = restorer().estimate, latent_size(RestoreOptions(192, 480), VAEConfig())
    needs = [estimate.need(Task(2, frame, color="none"), Choice(31, tile)) for tile in (32, None)]
    least, whole = (need.device + need.host for need in needs)
    assert least < 0.9 * whole
    leave(int(SLACK * (least + whole) / 2), monkeypatch)
    cramped = restore(tmp_path / "in.mkv", tmp_path / "cramped.mkv", **fields)
    (tile,) = re.findall(r"tiles of (\d+) pixels", cramped.memory)
    assert any(f"with tile {tile} on any machine" in note for note in cramped.notes)
    monkeypatch.undo()
    asked = restore(tmp_path / "in.mkv", tmp_path / "asked.mkv", tile=int(tile), **fields)
    assert f"tiles of {tile} pixels" in asked.memory and not asked.notes
    assert all(
        np.array_equal(a, b)
        for a, b in zip(frames_of(tmp_path / "asked.mkv"), frames_of(tmp_path / "cramped.mkv"), strict=True)
    )


def test_what_cannot_fit_is_refused_before_it_is_begun(
    short_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(1000, monkeypatch)
    with pytest.raises(UnavailableError) as caught:
        restore(short_clip, tmp_path / "out.mp4")
    assert caught.value.code == "memory_short"
    assert "A result of 48x32 takes up to" in caught.value.message
    assert list(tmp_path.iterdir()) == []


def test_a_part_keeps_its_windows_or_is_refused(
    two_shots: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(1000, monkeypatch)
    with pytest.raises(UnavailableError, match="or a shorter window"):
        restore(two_shots / "rest.mkv", tmp_path / "part.mkv", part=Part(**PART), height=16)


def test_a_tile_is_large_enough_or_none() -> None:
    for value in (0, 256, None):
        assert RestoreRequest(tile=value).tile == value
    with pytest.raises(ValidationError, match="256 pixels or more"):
        RestoreRequest(tile=64)
