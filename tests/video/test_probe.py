import os
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from app.errors import InputError
from app.video.probe import counted_rate, probe
from tests.video.clips import clip, make


@pytest.mark.parametrize(
    "rate", ["24000/1001", "24", "25", "30000/1001", "50", "60000/1001", "60", "120", "17/3"]
)
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_the_rate_is_exact(tmp_path: Path, rate: str, suffix: str) -> None:
    info = probe(clip(tmp_path / f"a.{suffix}", rate=rate, frames=24))
    assert info.rate == Fraction(rate)
    assert info.frames is not None
    assert abs(info.frames - 24) <= 1


@pytest.mark.parametrize(
    ("name", "options", "codec", "audio"),
    [
        ("a.mp4", (), "h264", "aac"),
        ("a.mov", ("-c:a", "pcm_s16le"), "h264", "pcm_s16le"),
        ("a.mkv", ("-c:v", "ffv1", "-c:a", "flac"), "ffv1", "flac"),
        ("a.webm", ("-c:v", "libvpx-vp9", "-cpu-used", "8", "-c:a", "libopus"), "vp9", "opus"),
        ("a.avi", ("-c:v", "mpeg4", "-c:a", "libmp3lame"), "mpeg4", "mp3"),
        ("a.ts", ("-c:v", "libx264", "-c:a", "mp2"), "h264", "mp2"),
    ],
)
def test_containers(tmp_path: Path, name: str, options: tuple[str, ...], codec: str, audio: str) -> None:
    info = probe(clip(tmp_path / name, *options, sound=True))
    assert (info.width, info.height, info.rate) == (128, 72, 25)
    assert (info.codec, info.audio_codec, info.has_audio) == (codec, audio, True)
    assert not info.is_image
    assert info.duration is not None
    assert 0.95 < info.duration < 1.2


def test_a_clip_without_sound(tmp_path: Path) -> None:
    info = probe(clip(tmp_path / "a.mp4"))
    assert not info.has_audio
    assert info.audio_codec is None


@pytest.mark.parametrize(
    "name", ["-a.mp4", "a:b.mp4", "a%03d.mp4", "a b'c\"é.mp4", "https:a.mp4", "a.txt", "noname"]
)
def test_any_name_is_only_a_name(tmp_path: Path, name: str) -> None:
    plain = clip(tmp_path / "plain.mp4", frames=5)
    plain.rename(tmp_path / name)
    assert probe(tmp_path / name).width == 128


def test_a_relative_name_that_begins_with_a_dash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip(tmp_path / "x.mp4", frames=5).rename(tmp_path / "-i.mp4")
    monkeypatch.chdir(tmp_path)
    assert probe(Path("-i.mp4")).height == 72


@pytest.mark.parametrize(("turn", "size"), [(90, (72, 128)), (180, (128, 72)), (270, (72, 128))])
def test_rotation_gives_the_size_as_displayed(tmp_path: Path, turn: int, size: tuple[int, int]) -> None:
    stored = clip(tmp_path / "a.mp4", frames=5)
    info = probe(make(tmp_path / "b.mp4", "-display_rotation", str(-turn), "-i", str(stored), "-c", "copy"))
    assert (info.width, info.height) == size
    assert info.rotation == turn


def test_pixels_that_are_not_square(tmp_path: Path) -> None:
    info = probe(clip(tmp_path / "a.mp4", "-vf", "setsar=8/9", frames=5, size="72x48"))
    assert (info.width, info.height) == (64, 48)
    assert info.sample_aspect == Fraction(8, 9)
    assert any("square" in note for note in info.notes)


def test_a_variable_rate_is_told(tmp_path: Path) -> None:
    dropped = ("-vf", r"select='not(mod(n\,3))+lt(n\,20)'", "-fps_mode", "vfr")
    info = probe(make(tmp_path / "a.mp4", "-f", "lavfi", "-i", "testsrc2=s=128x72:r=30:d=2", *dropped))
    assert info.rate == 30
    assert any("variable rate" in note for note in info.notes)


def test_a_rate_that_nobody_declares_is_counted(tmp_path: Path) -> None:
    uneven = "setpts='(N*40+5*mod(N,3)+3*mod(N,7))/1000/TB',settb=1/1000"
    picture = ("-f", "lavfi", "-i", "testsrc2=s=128x72:r=25:d=2")
    path = make(tmp_path / "a.mkv", *picture, "-vf", uneven, "-fps_mode", "passthrough")
    assert counted_rate(path) == pytest.approx(25, rel=0.01)
    assert counted_rate(clip(tmp_path / "b.mp4", frames=1)) == 25


@pytest.mark.parametrize(
    ("size", "options", "expected"),
    [
        ("128x72", (), ("smpte170m", False)),
        ("720x576", (), ("smpte170m", False)),
        ("1280x720", (), ("bt709", False)),
        ("1280x544", (), ("bt709", False)),
        ("960x720", (), ("bt709", False)),
        ("128x72", ("-colorspace", "bt709", "-color_range", "tv"), ("bt709", False)),
        ("1280x720", ("-colorspace", "smpte170m"), ("smpte170m", False)),
        ("128x72", ("-pix_fmt", "yuvj420p", "-c:v", "mjpeg"), ("bt470bg", True)),
        ("128x72", ("-c:v", "libx264rgb"), ("gbr", True)),
        ("128x72", ("-pix_fmt", "gray", "-c:v", "ffv1"), ("smpte170m", True)),
    ],
)
def test_colours_are_tagged_or_decided(
    tmp_path: Path, size: str, options: tuple[str, ...], expected: tuple[str, bool]
) -> None:
    color = probe(clip(tmp_path / "a.mkv", *options, size=size, frames=2)).color
    assert (color.matrix, color.full_range) == expected


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tiff", "gif"])
def test_images(tmp_path: Path, suffix: str) -> None:
    Image.new("RGB", (33, 21), (200, 30, 90)).save(tmp_path / f"a.{suffix}")
    info = probe(tmp_path / f"a.{suffix}")
    assert info.is_image
    assert not info.animated
    assert (info.width, info.height, info.frames) == (33, 21, 1)


def test_the_orientation_of_a_photograph(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "a.jpg", exif=exif)
    info = probe(tmp_path / "a.jpg")
    assert (info.width, info.height) == (20, 40)


@pytest.mark.parametrize(
    ("durations", "rate", "frames"),
    [
        ([100, 100, 100], Fraction(10), 3),
        ([40, 80, 40], Fraction(25), 4),
        ([0, 0], Fraction(10), 2),
        ([30, 40, 50], Fraction(25), 3),
    ],
)
@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_animations(tmp_path: Path, suffix: str, durations: list[int], rate: Fraction, frames: int) -> None:
    pictures = [Image.new("RGB", (24, 16), (60 * i, 250 - 60 * i, 9)) for i in range(len(durations))]
    pictures[0].save(
        tmp_path / f"a.{suffix}", save_all=True, append_images=pictures[1:], duration=durations, loop=0
    )
    info = probe(tmp_path / f"a.{suffix}")
    assert info.animated
    assert not info.is_image
    assert (info.rate, info.frames) == (rate, frames)


FORGED = "color_range:tv color_space:709:m=709,metadata=print:file=owned color_primaries:x color_trc:y"


@pytest.mark.parametrize(
    "title",
    [FORGED, f"x\n[Parsed_showinfo_0 @ 0x1] {FORGED}", "x\nStream mapping:\n", "Stream mapping:"],
)
def test_a_title_is_only_a_title(tmp_path: Path, title: str) -> None:
    plain = clip(tmp_path / "a.mkv", "-metadata", f"title={title}", frames=2, sound=True)
    color, audio = probe(plain).color, probe(plain).audio
    assert (color.matrix, color.primaries, color.transfer) == ("smpte170m", "unknown", "unknown")
    assert len(audio) == 1


@pytest.mark.parametrize("key", ["x\nStream mapping:\n", "x\n  Stream #0:0: Video: forged, 9 fps\n"])
def test_the_name_of_a_tag_cannot_describe_a_clip(tmp_path: Path, key: str) -> None:
    path = clip(tmp_path / "a.mkv", "-metadata", f"{key}=y", frames=2)
    try:
        assert probe(path).codec == "h264"
    except InputError as error:
        assert error.code == "input_damaged"


@pytest.mark.parametrize("name", ["a\nStream mapping:\n.mp4", "x\n  Stream #0:0: Video: forged.mp4"])
def test_a_name_with_a_line_break_describes_nothing(tmp_path: Path, name: str) -> None:
    clip(tmp_path / "plain.mp4", frames=5).rename(tmp_path / name)
    assert probe(tmp_path / name).codec == "h264"


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "gif", "tiff"])
def test_a_cut_image_is_refused(tmp_path: Path, suffix: str, share: float) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.effect_noise((64, 64), 90).convert("RGB").save(path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    try:
        probe(path)
    except InputError as error:
        assert error.code in ("input_damaged", "input_not_video")
        assert str(tmp_path) not in error.message


def test_the_limit_of_frames_holds_for_animations(tmp_path: Path) -> None:
    pictures = [Image.new("RGB", (16, 16), (9 * i, 0, 0)) for i in range(8)]
    pictures[0].save(tmp_path / "a.gif", save_all=True, append_images=pictures[1:], duration=100)
    with pytest.raises(InputError) as caught:
        probe(tmp_path / "a.gif", max_frames=7)
    assert caught.value.code == "input_too_large"
    assert "8 pictures" in caught.value.message


def _write(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def _sound_only(path: Path) -> None:
    make(path, "-f", "lavfi", "-i", "sine=duration=1", "-f", "mp4")


def _cover_art(path: Path) -> None:
    """Sound with a picture on its cover is no video."""
    cover = make(path.with_suffix(".cover.jpg"), "-f", "lavfi", "-i", "testsrc2=s=64x64", "-frames:v", "1")
    attached = ("-map", "0", "-map", "1", "-c:v", "copy", "-disposition:v", "attached_pic", "-f", "mp4")
    make(path, "-f", "lavfi", "-i", "sine=duration=1", "-i", str(cover), *attached)


def _without_index(path: Path) -> None:
    whole = clip(path.with_suffix(".whole.mp4")).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def _half_image(suffix: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        whole = path.with_suffix("." + suffix)
        Image.effect_noise((64, 64), 90).convert("RGB").save(whole)
        path.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])

    return write


def _hollow(path: Path) -> None:
    """A video stream whose every packet is noise."""
    clip(path.with_suffix(".h.mkv"), "-c:v", "ffv1", "-f", "matroska", frames=3, size="320x240")
    content = bytearray(path.with_suffix(".h.mkv").read_bytes())
    content[1500:-200] = os.urandom(len(content) - 1700)
    path.write_bytes(content)


BAD: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "missing": (lambda path: None, "input_missing", "does not exist"),
    "folder": (lambda path: path.mkdir(), "input_is_folder", "folder"),
    "pipe": (os.mkfifo, "input_not_file", "regular file"),
    "empty": (_write(b""), "input_empty", "0 bytes"),
    "text": (_write(b"this is a text\n" * 50), "input_not_video", "text"),
    "html": (_write(b"<!DOCTYPE html><html>404</html>"), "input_not_video", "web page"),
    "lfs": (_write(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "input_not_video", "LFS"),
    "playlist": (_write(b"#EXTM3U\n#EXTINF:1,\n/etc/passwd\n"), "input_not_video", "playlist"),
    "concat": (_write(b"ffconcat version 1.0\nfile /etc/passwd\n"), "input_not_video", "text"),
    "subtitles": (_write(b"1\n00:00:00,000 --> 00:00:01,000\nHello\n"), "input_not_video", "text"),
    "noise": (_write(os.urandom(10000)), "input_not_video", "no known"),
    "zeros": (_write(bytes(10000)), "input_not_video", "no known"),
    "sound": (_sound_only, "input_no_video", "no video"),
    "cover": (_cover_art, "input_no_video", "no video"),
    "cut mp4": (_without_index, "input_not_video", "cut short"),
    "cut png": (_half_image("png"), "input_damaged", "cannot be decoded"),
    "cut jpg": (_half_image("jpg"), "input_damaged", "cannot be decoded"),
    "hollow": (_hollow, "input_damaged", "no frame"),
    "heic": (_write(b"\0\0\0\x18ftypheic" + bytes(5000)), "input_codec_unknown", "HEIC"),
    "svg": (
        _write(b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg'/>"),
        "input_not_video",
        "XML",
    ),
    "below a file": (
        lambda path: path.parent.joinpath("x").write_bytes(b"x"),
        "input_missing",
        "does not exist",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_a_sentence(tmp_path: Path, case: str) -> None:
    write, code, words = BAD[case]
    path = tmp_path / "clip.mp4"
    write(path)
    with pytest.raises(InputError) as caught:
        probe(path)
    assert caught.value.code == code
    assert words in caught.value.message
    assert "clip.mp4" in caught.value.message
    assert str(tmp_path) not in caught.value.message


def test_an_address_is_not_a_file(tmp_path: Path) -> None:
    for address in ("https://example.com/a.mp4", "file:/etc/passwd", "concat:a|b", "pipe:0"):
        with pytest.raises(InputError) as caught:
            probe(Path(address))
        assert caught.value.code == "input_missing"


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = clip(tmp_path / "a.mp4", frames=2)

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputError) as caught:
        probe(path)
    assert caught.value.code == "input_unreadable"
    assert str(tmp_path) not in caught.value.message


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"max_pixels": 128 * 72 - 1}, "9216 pixels"),
        ({"max_frames": 24}, "25 frames"),
        ({"max_seconds": 0.5}, "1.0 s"),
    ],
)
def test_limits(tmp_path: Path, limits: dict[str, Any], words: str) -> None:
    path = clip(tmp_path / "a.mp4")
    assert probe(path, max_pixels=128 * 72, max_frames=25, max_seconds=1.1).frames == 25
    with pytest.raises(InputError) as caught:
        probe(path, **limits)
    assert caught.value.code == "input_too_large"
    assert words in caught.value.message


def test_the_limit_of_pixels_holds_for_images(tmp_path: Path) -> None:
    Image.new("L", (100, 100)).save(tmp_path / "a.png")
    with pytest.raises(InputError) as caught:
        probe(tmp_path / "a.png", max_pixels=9999)
    assert caught.value.code == "input_too_large"
