"""Encoded parts in one file: every frame, at its time, with the film's sound."""

import re
import subprocess
from fractions import Fraction
from pathlib import Path

import pytest

from app.errors import FileError, UnavailableError
from app.video import ffmpeg
from app.video.probe import probe
from app.video.rates import exact_rate
from app.video.write import VideoWriter
from examples.serve.distribute.join import decoded, join
from tests.examples.films import film, frames_of
from tests.video.clips import make, said

LENGTHS = (17, 1, 40, 33)


def parts_of(source: Path, folder: Path, suffix: str, codec: str, rate: Fraction) -> list[Path]:
    frames, start, paths = frames_of(source), 0, []
    for number, length in enumerate(LENGTHS):
        paths.append(folder / f"part-{number}{suffix}")
        height, width = frames.shape[1:3]
        with VideoWriter(paths[-1], width, height, rate, codec=codec) as writer:
            writer.write(frames[start : start + length])
        start += length
    return paths


def stamps(path: Path) -> list[int]:
    copied = ["-loglevel", "error", "-i", f"file:{path}", "-map", "0:v", "-c", "copy", "-f", "framecrc", "-"]
    lines = ffmpeg.run(copied).output.decode().splitlines()
    return sorted(int(line.split(",")[2]) for line in lines if not line.startswith("#"))


@pytest.mark.parametrize(
    ("suffix", "codec", "rate"),
    [
        (".mp4", "h264", "30000/1001"),
        (".mov", "h264", "1199/50"),
        (".mkv", "h264", "30000/1001"),
        (".mp4", "h264_10", "1199/50"),
        (".mp4", "hevc10", "30000/1001"),
        (".mkv", "hevc10", "1199/50"),
        (".mp4", "lossless", "1199/50"),
        (".mkv", "lossless", "30000/1001"),
    ],
)
def test_frames_and_times_are_exact(suffix: str, codec: str, rate: str, tmp_path: Path) -> None:
    source, exact = film(tmp_path / "film.mov", sum(LENGTHS), rate=rate, size="96x64"), Fraction(rate)
    named = exact_rate(float(exact))  # as a job is told: 23.98 is 24000/1001 there
    paths = parts_of(source, tmp_path, suffix, codec, named)
    contents, output = [decoded(path) for path in paths], tmp_path / f"joined{suffix}"
    join(paths, contents, output, rate=exact, part_rate=named, codec=codec, sound_from=source)
    assert decoded(output).frames == tuple(check for each in contents for check in each.frames)
    made = probe(output)
    assert made.rate == exact
    steps = {b - a for a, b in zip(stamps(output), stamps(output)[1:], strict=False)}
    assert len(steps) == 1 or (suffix == ".mkv" and max(steps) - min(steps) == 1)
    assert stamps(output)[0] == 0
    assert [track.codec for track in made.audio] == ["aac"]
    assert made.duration == pytest.approx(float(sum(LENGTHS) / exact), abs=0.05)
    if codec == "hevc10" and suffix != ".mkv":
        assert "hvc1" in said(output)
    if codec == "lossless":
        assert (frames_of(output) == frames_of(source)).all()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["film.mov", output.name, *(path.name for path in paths)]
    )


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_the_sound_is_that_of_one_worker(suffix: str, tmp_path: Path) -> None:
    """Two tracks, one of them of a kind that the container does not take, and a picture that begins late."""
    silent = film(tmp_path / "silent.mkv", sum(LENGTHS), size="96x64", sound=False)
    tone = ["-f", "lavfi", "-i", "sine=frequency={}:duration=5"]
    tones = [word.format(pitch) for pitch in (440, 880) for word in tone]
    source = make(
        tmp_path / "film.mkv", "-itsoffset", "0.8", "-i", str(silent), *tones, "-map", "0", "-map", "1",
        "-map", "2", "-c:v", "copy", "-c:a:0", "aac", "-c:a:1", "pcm_s16le",
        "-metadata:s:a:1", "language=fra",
    )  # fmt: skip
    frames, info = frames_of(source), probe(source)
    whole, output = tmp_path / f"whole{suffix}", tmp_path / f"joined{suffix}"
    with VideoWriter(whole, info.width, info.height, info.rate, audio_from=source) as writer:
        writer.write(frames)
    paths = parts_of(source, tmp_path, suffix, "h264", info.rate)
    contents = [decoded(path) for path in paths]
    join(paths, contents, output, rate=info.rate, part_rate=info.rate, codec="h264", sound_from=source)
    assert sound_of(output) == sound_of(whole)
    assert len(probe(output).audio) == 2
    assert re.findall(r"#0:\d\S*\((\w+)\).*Audio", said(output)) == re.findall(
        r"#0:\d\S*\((\w+)\).*Audio", said(whole)
    )


def sound_of(path: Path) -> list[str]:
    """The samples of every track, with their times."""
    options = ["-loglevel", "error", "-i", f"file:{path}", "-map", "0:a", "-f", "framecrc", "-"]
    return ffmpeg.run(options).output.decode().splitlines()


def test_a_film_without_sound(tmp_path: Path) -> None:
    source = film(tmp_path / "film.mp4", sum(LENGTHS), sound=False)
    paths = parts_of(source, tmp_path, ".mp4", "h264", Fraction(25))
    contents = [decoded(path) for path in paths]
    join(paths, contents, tmp_path / "out.mp4", rate=Fraction(25), part_rate=Fraction(25), codec="h264",
         sound_from=None)  # fmt: skip
    assert not probe(tmp_path / "out.mp4").has_audio


def test_a_part_that_is_damaged_is_known(tmp_path: Path) -> None:
    path = film(tmp_path / "film.mp4", 60)
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 400] = bytes(400)
    (tmp_path / "torn.mp4").write_bytes(content)
    (tmp_path / "short.mp4").write_bytes(path.read_bytes()[:-2000])
    for name in ("torn.mp4", "short.mp4"):
        with pytest.raises(UnavailableError, match=name):
            decoded(tmp_path / name)


def test_parts_that_do_not_fit_together_are_not_joined(tmp_path: Path) -> None:
    """Parts whose decoders need other parameters: one file has those of the first only."""
    source = film(tmp_path / "film.mp4", sum(LENGTHS), sound=False)
    paths = parts_of(source, tmp_path, ".mp4", "h264", Fraction(25))
    other = make(tmp_path / "other.mp4", "-i", str(paths[2]), "-c:v", "libx264", "-profile:v", "baseline")
    other.replace(paths[2])
    contents = [decoded(path) for path in paths]
    before = sorted(tmp_path.iterdir())
    try:
        join(paths, contents, tmp_path / "out.mp4", rate=Fraction(25), part_rate=Fraction(25), codec="h264",
             sound_from=None)  # fmt: skip
    except FileError as error:
        assert error.code == "join_failed"
        assert sorted(tmp_path.iterdir()) == before
    else:  # a muxer that carries parameters along would do, too
        assert decoded(tmp_path / "out.mp4").frames == tuple(c for each in contents for c in each.frames)


def test_ffmpegs_refusal_is_told(tmp_path: Path) -> None:
    source = film(tmp_path / "film.mp4", sum(LENGTHS), sound=False)
    paths = parts_of(source, tmp_path, ".mp4", "h264", Fraction(25))
    contents = [decoded(path) for path in paths]
    paths[1].unlink()
    with pytest.raises(FileError, match=r"out\.mp4 (could not be written; ffmpeg|would show)"):
        join(paths, contents, tmp_path / "out.mp4", rate=Fraction(25), part_rate=Fraction(25), codec="h264",
             sound_from=None)  # fmt: skip
    assert not (tmp_path / "out.mp4").exists()


def test_the_bundled_ffmpeg_has_what_is_needed() -> None:
    done = subprocess.run(
        [ffmpeg.binary(), "-hide_banner", "-bsfs"], capture_output=True, text=True, check=True
    )
    assert "setts" in done.stdout
