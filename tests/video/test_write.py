import os
import re
import subprocess
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from app.errors import FileError, InternalError, SeedpodError, UsageError
from app.video import ffmpeg, write
from app.video.encoders import CODECS, Codec
from app.video.probe import probe
from app.video.read import read_frames
from app.video.write import VideoWriter, write_image
from tests.video.clips import clip, make, said
from tests.video.test_read import children, resident


def noise(frames: int = 3, height: int = 36, width: int = 64) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (frames, height, width, 3), np.uint8)


def as_floats(frames: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(frames).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def written(path: Path, frames: Any, rate: Fraction = Fraction(25), **options: Any) -> Path:
    height, width = frames.shape[-2:] if isinstance(frames, torch.Tensor) else frames.shape[1:3]
    with VideoWriter(path, width, height, rate, **options) as writer:
        writer.write(frames)
    return path


def read_back(path: Path, pixel_format: Any = "rgb24") -> np.ndarray:
    return np.stack(list(read_frames(path, probe(path), pixel_format=pixel_format)))


@pytest.mark.parametrize("rate", ["24000/1001", "25", "30000/1001", "60000/1001", "60", "17/3", "1"])
@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv"])
def test_the_rate_and_the_count_are_exact(tmp_path: Path, suffix: str, rate: str) -> None:
    path = written(tmp_path / f"a.{suffix}", noise(31), Fraction(rate))
    assert probe(path).rate == Fraction(rate)
    assert len(read_back(path)) == 31


@pytest.mark.parametrize("suffix", ["mkv", "mp4", "mov"])
@pytest.mark.parametrize("size", [(36, 64), (35, 63), (17, 16)])
def test_lossless_is_bit_exact(tmp_path: Path, suffix: str, size: tuple[int, int]) -> None:
    frames = noise(4, *size)
    for given in (frames, as_floats(frames)):
        assert (read_back(written(tmp_path / f"a.{suffix}", given, codec="lossless")) == frames).all()


COLOURS = [
    (255, 0, 0),
    (0, 255, 0),
    (0, 0, 255),
    (255, 255, 255),
    (0, 0, 0),
    (128, 64, 200),
    (10, 200, 90),
    (90,) * 3,
]


@pytest.mark.parametrize("codec", ["h264", "h264_10", "hevc10"])
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_colours_come_back_and_are_tagged(tmp_path: Path, codec: Codec, suffix: str) -> None:
    patches = (
        np.array(COLOURS, np.uint8).repeat(32, 0)[None, None].repeat(64, 1).repeat(3, 0)
    )  # (3, 64, 256, 3)
    path = written(tmp_path / f"a.{suffix}", as_floats(patches), codec=codec, crf=4)
    assert re.search(r"\(tv, bt709[,/]", said(path)), said(path)
    assert "progressive" in said(path)
    info = probe(path)
    assert (info.color.matrix, info.color.primaries, info.color.transfer) == ("bt709", "bt709", "bt709")
    assert not info.color.full_range
    out = read_back(path)[1, 32, 16::32].astype(int)
    print(codec, np.abs(out - COLOURS).max())
    assert np.abs(out - COLOURS).max() <= 2


def test_the_conversion_is_bt709_and_not_only_its_tag(tmp_path: Path) -> None:
    red = np.zeros((2, 64, 64, 3), np.uint8)
    red[..., 0] = 255
    path = written(tmp_path / "a.mp4", red, crf=4)
    command = [ffmpeg.binary(), "-v", "error", "-i", str(path), "-f", "rawvideo", "-pix_fmt", "yuv420p", "-"]
    raw = np.frombuffer(subprocess.run(command, capture_output=True, check=True).stdout, np.uint8)
    y, u, v = raw[64 * 32], raw[64 * 64 + 512], raw[64 * 64 + 1024 + 512]
    assert (abs(int(y) - 63), abs(int(u) - 102), abs(int(v) - 240)) <= (1, 1, 1)  # BT.601 has 81, 90, 240


def test_eight_bits_are_rounded(tmp_path: Path) -> None:
    """Truncation would darken by half a level on average; (254.6, 254.4) must give (255, 254)."""
    values = torch.tensor([254.6, 254.4, 0.4, 0.6, 127.5, 300.0, -20.0, 17.0])
    frame = (values / 127.5 - 1).reshape(1, 1, 1, 8).expand(1, 3, 8, 8)
    row = read_back(written(tmp_path / "a.mkv", frame, codec="lossless"))[0, 0, :, 0]
    assert row.tolist() == [255, 254, 0, 1, 128, 255, 0, 17]


@pytest.mark.parametrize("codec", ["h264_10", "hevc10"])
def test_ten_bits_come_from_the_floats(tmp_path: Path, codec: Codec) -> None:
    ramp = torch.linspace(-1, 1, 1024).reshape(1, 1, 1, 1024).expand(2, 3, 64, 1024)
    path = written(tmp_path / "a.mp4", ramp, codec=codec, crf=0)
    assert probe(path).bit_depth == 10
    row = read_back(path, "rgb48le")[0, 32].mean(-1)
    assert len(np.unique(row)) > 600  # 8 bits hold 220 luma levels
    error = np.abs(row / 65535 * 1023 - np.arange(1024))
    print(f"{codec}: mean error {error.mean():.2f}, largest {error.max():.2f} of 1023")
    assert error.mean() < 1


@pytest.mark.parametrize("codec", ["h264", "h264_10", "hevc10"])
@pytest.mark.parametrize("size", [(36, 63), (35, 64), (35, 63)])
def test_odd_sizes_are_kept_and_told(tmp_path: Path, codec: Codec, size: tuple[int, int]) -> None:
    frames = np.full((2, *size, 3), 77, np.uint8)
    with VideoWriter(tmp_path / "a.mp4", size[1], size[0], Fraction(25), codec=codec) as writer:
        writer.write(frames)
    assert "4:4:4" in writer.notes[0]
    out = read_back(tmp_path / "a.mp4")
    assert out.shape == frames.shape
    assert np.abs(out.astype(int) - 77).max() <= 2


@pytest.mark.parametrize("codec", CODECS)
def test_the_smallest_frames(tmp_path: Path, codec: Codec) -> None:
    name = "a" if codec == "png" else "a.mkv"
    path = written(tmp_path / name, noise(1, 16, 16), codec=codec)
    assert path.exists()


def test_png_frames(tmp_path: Path) -> None:
    frames = noise(12, 35, 63)
    path = written(tmp_path / "frames %d", as_floats(frames), codec="png")
    assert sorted(p.name for p in path.iterdir()) == [f"{i:06d}.png" for i in range(1, 13)]
    assert (np.stack([np.array(Image.open(path / f"{i:06d}.png")) for i in range(1, 13)]) == frames).all()


@pytest.mark.parametrize("suffix", ["png", "jpg", "jpeg", "webp", "bmp", "tif", "tiff", "PNG"])
def test_images(tmp_path: Path, suffix: str) -> None:
    smooth = np.linspace(0, 255, 40).round().astype(np.uint8)[None, :, None].repeat(30, 0).repeat(3, -1)
    for given in (smooth, as_floats(smooth[None])[0]):
        write_image(tmp_path / f"a.{suffix}", given)
        out = np.array(Image.open(tmp_path / f"a.{suffix}").convert("RGB"))
        exact = suffix.lower() not in ("jpg", "jpeg", "webp")
        assert np.abs(out.astype(int) - smooth).max() <= (0 if exact else 6)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", ["-a.mp4", "a:b.mp4", "a%03d.mp4", "a b'c\"é.mkv"])
def test_any_name_is_only_a_name(tmp_path: Path, name: str) -> None:
    assert len(read_back(written(tmp_path / name, noise(3)))) == 3
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_a_relative_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    written(Path("-a.mp4"), noise(2))
    assert [p.name for p in tmp_path.iterdir()] == ["-a.mp4"]


def test_an_earlier_file_is_replaced_only_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"earlier")
    with VideoWriter(path, 64, 36, Fraction(25)) as writer:
        writer.write(noise(3))
        assert path.read_bytes() == b"earlier"
    assert probe(path).width == 64


@pytest.mark.parametrize("codec", CODECS)
def test_an_error_leaves_nothing(tmp_path: Path, codec: Codec) -> None:
    before = children()
    path = tmp_path / ("a" if codec == "png" else "a.mkv")
    with pytest.raises(ZeroDivisionError), VideoWriter(path, 64, 36, Fraction(25), codec=codec) as writer:
        writer.write(noise(3))
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    assert children() == before


def test_no_frame_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InternalError), VideoWriter(tmp_path / "a.mp4", 64, 36, Fraction(25)):
        pass
    assert list(tmp_path.iterdir()) == []


def test_values_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    frames = torch.zeros(1, 3, 16, 16)
    frames[0, 1, 2, 3] = float("nan")
    with pytest.raises(InternalError) as caught:
        written(tmp_path / "a.mp4", frames)
    assert caught.value.code == "not_finite"
    assert list(tmp_path.iterdir()) == []


def _filled(path: Path) -> Path:
    path.mkdir()
    (path / "x").write_bytes(b"x")
    return path


BAD: dict[str, tuple[Callable[[Path], Path], str, type[SeedpodError], str]] = {
    "suffix": (lambda p: p / "a.xyz", "h264", UsageError, "output_suffix"),
    "no suffix": (lambda p: p / "a", "h264", UsageError, "output_suffix"),
    "webm": (lambda p: p / "a.webm", "hevc10", UsageError, "output_suffix"),
    "gif": (lambda p: p / "a.gif", "lossless", UsageError, "output_suffix"),
    "image": (lambda p: p / "a.png", "h264", UsageError, "output_suffix"),
    "no folder": (lambda p: p / "none" / "a.mp4", "h264", FileError, "output_folder_missing"),
    "folder is a file": (
        lambda p: written(p / "f.mkv", noise(1)) / "a.mp4",
        "h264",
        FileError,
        "output_folder_missing",
    ),
    "is a folder": (lambda p: _filled(p / "a.mp4"), "h264", FileError, "output_is_folder"),
    "frames over files": (lambda p: _filled(p / "frames"), "png", FileError, "output_exists"),
    "frames over a file": (lambda p: written(p / "f.mkv", noise(1)), "png", FileError, "output_exists"),
    "frames nowhere": (lambda p: p / "none" / "frames", "png", FileError, "output_folder_missing"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_place_is_refused_before_any_work(tmp_path: Path, case: str) -> None:
    place, codec, error, code = BAD[case]
    path = place(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error) as caught:
        VideoWriter(path, 64, 36, Fraction(25), codec=codec)
    assert caught.value.code == code
    assert str(tmp_path) not in caught.value.message
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(FileError) as caught:
        VideoWriter(tmp_path / "a.mp4", 64, 36, Fraction(25))
    assert caught.value.code == "output_unwritable"


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    def full(_: Path) -> Path:
        link = tmp_path / ".full.partial"
        link.symlink_to("/dev/full")
        return link

    monkeypatch.setattr(write, "temporary", full)
    with pytest.raises(FileError) as caught:
        written(tmp_path / f"a.{suffix}", noise(60))
    assert caught.value.code == "output_no_space"
    assert list(tmp_path.iterdir()) == []


def packets(path: Path, stream: str = "a:0") -> list[str]:
    """The payload of each packet of a stream, as MD5."""
    command = [
        ffmpeg.binary(),
        "-v",
        "error",
        "-i",
        str(path),
        "-map",
        f"0:{stream}",
        "-c",
        "copy",
        "-f",
        "framemd5",
        "-",
    ]
    lines = subprocess.run(command, capture_output=True, check=True, text=True).stdout.splitlines()
    return [re.split(r",\s*", line)[5] for line in lines if line[0] != "#"]


@pytest.mark.parametrize(
    ("source", "options", "target", "codec"),
    [
        ("mp4", (), "mp4", "aac"),
        ("mkv", ("-c:a", "libmp3lame"), "mkv", "mp3"),
        ("mkv", ("-c:a", "ac3"), "mov", "ac3"),
        ("webm", ("-c:v", "libvpx-vp9", "-cpu-used", "8", "-c:a", "libopus"), "mp4", "opus"),
        ("mov", ("-c:a", "pcm_s16le"), "mov", "pcm_s16le"),
        ("mov", ("-c:a", "alac"), "mp4", "alac"),
    ],
)
def test_sound_is_copied_where_it_can_be(
    tmp_path: Path, source: str, options: tuple[str, ...], target: str, codec: str
) -> None:
    original = clip(tmp_path / f"s.{source}", *options, sound=True, size="64x36")
    path = written(tmp_path / f"a.{target}", noise(25), audio_from=original)
    assert probe(path).audio_codec == codec
    if codec != "pcm_s16le":  # whose packets are cut anew
        assert packets(path) == packets(original)


@pytest.mark.parametrize(
    ("source", "options", "target"),
    [
        ("mov", ("-c:a", "pcm_s16le"), "mp4"),
        ("mkv", ("-c:a", "libvorbis"), "mp4"),
        ("webm", ("-c:v", "libvpx-vp9", "-cpu-used", "8", "-c:a", "libopus"), "mov"),
        ("mkv", ("-c:a", "wmav2"), "mkv"),
    ],
)
def test_other_sound_becomes_aac(tmp_path: Path, source: str, options: tuple[str, ...], target: str) -> None:
    original = clip(tmp_path / f"s.{source}", *options, sound=True, size="64x36")
    info = probe(written(tmp_path / f"a.{target}", noise(25), audio_from=original))
    assert info.audio_codec == "aac"
    assert info.duration is not None
    assert 0.99 < info.duration < 1.06


def test_sound_longer_than_the_picture_is_kept_whole(tmp_path: Path) -> None:
    original = make(tmp_path / "s.m4a", "-f", "lavfi", "-i", "sine=duration=3")
    picture = clip(tmp_path / "p.mp4", size="64x36")
    both = make(tmp_path / "s.mp4", "-i", str(picture), "-i", str(original), "-c", "copy")
    path = written(tmp_path / "a.mp4", noise(25), audio_from=both)
    assert packets(path) == packets(both)
    assert probe(path).duration == pytest.approx(3, abs=0.05)


def test_every_sound_track_is_kept(tmp_path: Path) -> None:
    tones = ("-f", "lavfi", "-i", "sine=400:duration=1", "-f", "lavfi", "-i", "sine=900:duration=1")
    picture = ("-f", "lavfi", "-i", "testsrc2=s=64x36:r=25:d=1")
    maps = ("-map", "0", "-map", "1", "-map", "2", "-c:a:0", "aac", "-c:a:1", "libvorbis")
    original = make(tmp_path / "s.mkv", *picture, *tones, *maps)
    info = probe(written(tmp_path / "a.mp4", noise(25), audio_from=original))
    assert [track.codec for track in info.audio] == ["aac", "aac"]
    assert packets(tmp_path / "a.mp4", "a:0") == packets(original, "a:0")


def test_a_source_without_sound(tmp_path: Path) -> None:
    original = clip(tmp_path / "s.mp4", size="64x36")
    assert not probe(written(tmp_path / "a.mp4", noise(25), audio_from=original)).has_audio


def flash_and_beep(path: Path, picture_delay: float, sound_delay: float, *options: str) -> Path:
    """A white frame at 1.0 s of the picture, a beep from 1.0 to 1.2 s of the sound, each delayed."""
    flash = "color=black:s=64x48:r=25:d=2,geq=lum='if(eq(N,25),235,16)':cb=128:cr=128"
    beep = "aevalsrc='if(between(t,1,1.2),sin(2*PI*1000*t),0)':d=2:s=48000"
    video = ("-itsoffset", str(picture_delay), "-f", "lavfi", "-i", flash)
    return make(path, *video, "-itsoffset", str(sound_delay), "-f", "lavfi", "-i", beep, *options)


def beep_after_flash(path: Path) -> float:
    """Seconds from the white frame to the begin of the beep."""
    info = probe(path)
    flash = next(i for i, frame in enumerate(read_frames(path, info)) if frame.mean() > 100)
    align = f"asetpts=PTS-({float(info.start)})/TB,aresample=async=1:first_pts=0"
    command = [ffmpeg.binary(), "-v", "error", "-copyts", "-i", str(path), "-map", "0:a:0", "-af", align]
    raw = subprocess.run(
        [*command, "-ac", "1", "-ar", "48000", "-f", "s16le", "-"], capture_output=True, check=True
    )
    loud = np.abs(np.frombuffer(raw.stdout, np.int16).astype(int)) > 3000
    return float(np.argmax(loud)) / 48000 - flash / float(info.rate)


@pytest.mark.parametrize(
    ("source", "options"),
    [("ts", ("-c:v", "libx264", "-c:a", "aac")), ("mkv", ("-c:a", "libopus")), ("mp4", ())],
)
@pytest.mark.parametrize("delays", [(0, 0), (0, 0.5), (0.5, 0)])
@pytest.mark.parametrize("target", ["mp4", "mkv"])
def test_sound_stays_in_sync(
    tmp_path: Path, source: str, options: tuple[str, ...], delays: tuple[float, float], target: str
) -> None:
    original = flash_and_beep(tmp_path / f"s.{source}", *delays, *options)
    info = probe(original)
    with VideoWriter(tmp_path / f"a.{target}", 64, 48, info.rate, audio_from=original) as writer:
        for frame in read_frames(original, info):
            writer.write(frame[None])
    before, after = beep_after_flash(original), beep_after_flash(tmp_path / f"a.{target}")
    print(f"{source} {delays} -> {target}: {before:.3f} s -> {after:.3f} s")
    assert after == pytest.approx(before, abs=0.005)
    assert probe(tmp_path / f"a.{target}").start < Fraction(1, 100)


def test_memory_does_not_grow_with_the_length(tmp_path: Path) -> None:
    frame = torch.linspace(-1, 1, 640).expand(1, 3, 360, 640)
    seen = []
    with VideoWriter(tmp_path / "a.mkv", 640, 360, Fraction(25), codec="lossless") as writer:
        for i in range(150):
            writer.write(frame)
            if i in (15, 149):
                seen.append(resident())
    print(f"after 15 frames {seen[0] / 1e6:.1f} MB, after 150 {seen[1] / 1e6:.1f} MB")
    assert seen[1] - seen[0] < 10 * 640 * 360 * 3
