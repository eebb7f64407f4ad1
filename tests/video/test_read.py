import os
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from app.errors import InputError, UsageError
from app.video import ffmpeg
from app.video.probe import probe
from app.video.read import read_frames
from tests.video.clips import clip, make


def frames_of(path: Path, **options: object) -> np.ndarray:
    return np.stack(list(read_frames(path, probe(path), **options)))


def coded(path: Path, *options: str, frames: int = 3) -> Path:
    """A clip whose frame i shows the number i as a grey of 20 + 4 i, so that frames can be told apart."""
    grey = "geq=lum='16.5+(20+4*N)*219/255':cb=128:cr=128"
    return make(path, "-f", "lavfi", "-i", f"color=s=64x48:r=25:d={frames / 25},{grey}", *options)


def numbers(frames: np.ndarray) -> list[int]:
    return [round((float(frame.mean()) - 20) / 4) for frame in frames]


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "mov", "webm", "ts"])
@pytest.mark.parametrize("rate", ["24000/1001", "25", "60000/1001"])
def test_every_frame_once(tmp_path: Path, suffix: str, rate: str) -> None:
    path = clip(
        tmp_path / f"a.{suffix}", *(("-cpu-used", "8") if suffix == "webm" else ()), rate=rate, frames=31
    )
    assert frames_of(path).shape == (31, 72, 128, 3)


def test_frames_come_in_order(tmp_path: Path) -> None:
    path = coded(tmp_path / "a.mp4", "-crf", "1", frames=40)
    assert numbers(frames_of(path)) == list(range(40))


def test_another_rate_keeps_the_duration(tmp_path: Path) -> None:
    path = coded(tmp_path / "a.mp4", "-crf", "1", frames=50)
    assert numbers(frames_of(path, rate=Fraction(25, 2)))[:4] in ([0, 2, 4, 6], [1, 3, 5, 7])
    assert len(frames_of(path, rate=Fraction(50))) == 100
    assert len(frames_of(path, rate=Fraction(30000, 1001))) == 60


def test_a_rate_without_a_frame_is_no_damage(tmp_path: Path) -> None:
    path = clip(tmp_path / "a.mp4", frames=10)
    with pytest.raises(UsageError, match=r"rate is 0\.01, at which a\.mp4 has no frame"):
        list(read_frames(path, probe(path), rate=Fraction(1, 100)))


def test_a_variable_rate_becomes_constant_without_losing_time(tmp_path: Path) -> None:
    """Of 50 frames only some are stored; each is shown until the next one comes."""
    kept = [*range(10), 12, 14, 16, 25, *range(30, 50)]
    chosen = "+".join(rf"eq(n\,{n})" for n in kept)
    options = ("-vf", f"select='{chosen}'", "-fps_mode", "vfr", "-crf", "1")
    grey = "color=s=64x48:r=25:d=2,geq=lum='16.5+(20+4*N)*219/255':cb=128:cr=128"
    path = make(tmp_path / "a.mp4", "-f", "lavfi", "-i", grey, *options)
    expected = [max(k for k in kept if k <= n) for n in range(50)]
    assert numbers(frames_of(path)) == expected


@pytest.mark.parametrize("size", ["127x71", "33x17", "128x71", "17x16"])
@pytest.mark.parametrize("pixel_format", ["yuv444p", "yuv420p"])
def test_odd_sizes(tmp_path: Path, size: str, pixel_format: str) -> None:
    picture = ("-f", "lavfi", "-i", f"testsrc=s={size}:r=25:d=0.12")
    path = make(tmp_path / "a.mkv", *picture, "-c:v", "ffv1", "-pix_fmt", pixel_format)
    width, height = map(int, size.split("x"))
    assert frames_of(path).shape == (3, height, width, 3)


@pytest.mark.parametrize("turn", [90, 180, 270])
def test_rotation_is_applied(tmp_path: Path, turn: int) -> None:
    stored = clip(tmp_path / "a.mp4", "-crf", "1", "-pix_fmt", "yuv444p", frames=2)
    turned = make(tmp_path / "b.mp4", "-display_rotation", str(-turn), "-i", str(stored), "-c", "copy")
    upright = np.rot90(frames_of(stored), -turn // 90, axes=(1, 2)).astype(int)
    assert np.abs(frames_of(turned).astype(int) - upright).max() <= 1


COLOURS = np.array(
    [
        [255, 0, 0],
        [0, 255, 0],
        [0, 0, 255],
        [255, 255, 255],
        [0, 0, 0],
        [128, 64, 200],
        [10, 200, 90],
        [90, 90, 90],
    ]
)
LUMA = {"bt709": (0.2126, 0.0722), "smpte170m": (0.299, 0.114), "bt2020nc": (0.2627, 0.0593)}


def stored_values(matrix: str, full: bool, depth: int) -> np.ndarray:
    """(3, 8): Y, Cb, Cr of COLOURS by the definition of the standard."""
    kr, kb = LUMA[matrix]
    red, green, blue = COLOURS.T / 255
    y = kr * red + (1 - kr - kb) * green + kb * blue
    planes = np.stack([y, (blue - y) / (2 - 2 * kb), (red - y) / (2 - 2 * kr)])
    scale = 2 ** (depth - 8)
    if full:
        planes = planes * (2**depth - 1) + np.array([[0], [128], [128]]) * scale
    else:
        planes = (planes * np.array([[219], [224], [224]]) + np.array([[16], [128], [128]])) * scale
    return planes.round().clip(0, 2**depth - 1)


@pytest.mark.parametrize("matrix", LUMA)
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("depth", [8, 10])
@pytest.mark.parametrize("chroma", ["444", "420"])
def test_known_colours_come_out(tmp_path: Path, matrix: str, full: bool, depth: int, chroma: str) -> None:
    planes = stored_values(matrix, full, depth).astype(np.uint8 if depth == 8 else "<u2")
    raw = np.repeat(planes[:, None], 32, 1).repeat(32, 2)  # (3, 32, 256): eight patches
    (tmp_path / "raw").write_bytes(raw.tobytes())
    deep = "" if depth == 8 else "10le"
    source = ("-f", "rawvideo", "-pix_fmt", f"yuv444p{deep}", "-s", "256x32", "-i", str(tmp_path / "raw"))
    tags = f"setparams=colorspace={matrix}:range={'pc' if full else 'tv'},format=yuv{chroma}p{deep}"
    path = make(tmp_path / "a.mkv", *source, "-vf", tags, "-c:v", "libx264", "-qp", "0")
    info = probe(path)
    assert (info.color.matrix, info.color.full_range, info.bit_depth) == (matrix, full, depth)
    (frame,) = read_frames(path, info, pixel_format="rgb24" if depth == 8 else "rgb48le")
    out = frame[16, 16::32].astype(float) / (1 if depth == 8 else 257)
    error = np.abs(out - COLOURS).max()
    print(f"{matrix} full={full} {depth} bits {chroma}: {error:.2f}")
    assert error <= (1.01 if depth == 8 else 0.5)


def test_ten_bits_are_kept(tmp_path: Path) -> None:
    ramp = "nullsrc=s=1024x16:r=25:d=0.04,format=yuv444p10le,geq=lum='64+X*876/1023':cb=512:cr=512"
    path = make(tmp_path / "a.mkv", "-f", "lavfi", "-i", ramp, "-c:v", "ffv1", "-color_range", "tv")
    (deep,) = read_frames(path, probe(path), pixel_format="rgb48le")
    (shallow,) = read_frames(path, probe(path))
    assert deep.dtype == np.uint16
    assert len(np.unique(deep[8])) > 850
    assert len(np.unique(shallow[8])) == 256
    assert deep[8, 0].max() == 0
    assert deep[8, -1].min() == 65535


@pytest.mark.parametrize("transfer", ["smpte2084", "arib-std-b67"])
def test_high_dynamic_range_is_mapped(tmp_path: Path, transfer: str) -> None:
    tags = f"setparams=colorspace=bt2020nc:color_primaries=bt2020:color_trc={transfer}:range=tv"
    ramp = "nullsrc=s=256x32:r=25:d=0.08,format=yuv420p10le,geq=lum='64+X*876/255':cb=512:cr=512"
    path = make(tmp_path / "a.mkv", "-f", "lavfi", "-i", f"{ramp},{tags}", "-c:v", "ffv1")
    info = probe(path)
    assert any("HDR" in note for note in info.notes)
    row = frames_of(path)[0, 16].mean(-1)
    print(row[::32].round())
    assert row[0] < 5
    assert row[-1] > 240
    assert (np.diff(row) > -4).all()
    assert 100 < row[128] < 250


def test_transparency_is_laid_over_black(tmp_path: Path) -> None:
    half = "color=c=white@0.5:s=32x32:r=25:d=0.04,format=rgba"
    path = make(tmp_path / "a.mov", "-f", "lavfi", "-i", half, "-c:v", "qtrle", "-pix_fmt", "argb")
    info = probe(path)
    assert info.has_alpha
    assert any("transparency" in note for note in info.notes)
    assert np.abs(frames_of(path).astype(int) - 128).max() <= 1
    Image.new("RGBA", (8, 8), (255, 255, 255, 128)).save(tmp_path / "a.png")
    assert np.abs(frames_of(tmp_path / "a.png").astype(int) - 128).max() <= 1


def test_a_size_of_ones_own(tmp_path: Path) -> None:
    path = clip(tmp_path / "a.mp4", frames=2)
    assert frames_of(path, size=(20, 30)).shape == (2, 20, 30, 3)
    Image.new("RGB", (64, 64), (9, 8, 7)).save(tmp_path / "a.png")
    small = frames_of(tmp_path / "a.png", size=(20, 30))
    assert small.shape == (1, 20, 30, 3)
    assert (small == (9, 8, 7)).all()


def test_images_upright_and_exact(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (20, 40, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 8  # turn by 90 degrees against the clock
    Image.fromarray(noise).save(tmp_path / "a.png", exif=exif)
    assert (frames_of(tmp_path / "a.png")[0] == np.rot90(noise)).all()
    deep = frames_of(tmp_path / "a.png", pixel_format="rgb48le")
    assert (deep[0] == np.rot90(noise).astype(np.uint16) * 257).all()


def test_grey_of_sixteen_bits_is_scaled_not_clipped(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64).astype(np.uint16)[None].repeat(8, 0)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    info = probe(tmp_path / "a.png")
    assert any("16 bits" in note for note in info.notes)
    row = frames_of(tmp_path / "a.png")[0, 0, :, 0].astype(int)
    assert np.abs(row - np.linspace(0, 255, 64)).max() <= 1


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_pictures_of_an_animation_keep_their_times(tmp_path: Path, suffix: str) -> None:
    greys = [40, 120, 200]
    pictures = [Image.new("RGB", (16, 16), (g, g, g)) for g in greys]
    durations = [40, 120, 80]
    pictures[0].save(
        tmp_path / f"a.{suffix}", save_all=True, append_images=pictures[1:], duration=durations, lossless=True
    )
    values = frames_of(tmp_path / f"a.{suffix}").mean((1, 2, 3)).round().tolist()
    assert values == [40, 120, 120, 120, 200, 200]
    assert len(frames_of(tmp_path / f"a.{suffix}", rate=Fraction(50))) == 12
    assert len(frames_of(tmp_path / f"a.{suffix}", rate=Fraction(1))) == 1


def damaged(path: Path, start: float, stop: float) -> Path:
    """Noise in this part of the file."""
    content = bytearray(path.read_bytes())
    first, last = int(len(content) * start), int(len(content) * stop)
    content[first:last] = np.random.default_rng(0).bytes(last - first)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi"])
def test_damage_in_the_middle_is_an_error(tmp_path: Path, suffix: str) -> None:
    path = clip(tmp_path / f"a.{suffix}", "-movflags", "+faststart", frames=100, size="320x240")
    damaged(path, 0.5, 0.55)
    with pytest.raises(InputError) as caught:
        frames_of(path)
    assert caught.value.code == "input_damaged"
    assert str(tmp_path) not in caught.value.message


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "webm"])
def test_a_file_cut_short_is_an_error(tmp_path: Path, suffix: str) -> None:
    fast = ("-cpu-used", "8") if suffix == "webm" else ("-movflags", "+faststart")
    path = clip(tmp_path / f"a.{suffix}", *fast, frames=100, size="160x120")
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * 0.7)])
    with pytest.raises(InputError) as caught:
        frames_of(path)
    assert caught.value.code == "input_damaged"
    assert "of 4.00 s" in caught.value.message


def test_damage_at_the_very_end_is_told_and_forgiven(tmp_path: Path) -> None:
    path = clip(tmp_path / "a.mkv", "-g", "5", "-bf", "0", frames=100, size="320x240")
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * 0.975)])
    told: list[str] = []
    frames = list(read_frames(path, probe(path), warn=told.append))
    assert 88 < len(frames) < 100
    assert len(told) == 1
    assert "at its end" in told[0]


def children() -> set[int]:
    """Process ids of our children."""
    return {
        int(pid)
        for task in Path("/proc/self/task").iterdir()
        for pid in (task / "children").read_text().split()
    }


def test_closing_ends_ffmpeg(tmp_path: Path) -> None:
    path = clip(tmp_path / "a.mp4", frames=400, size="320x240")
    before = children()
    frames = read_frames(path, probe(path))
    next(frames)
    assert len(children() - before) == 1
    frames.close()
    assert children() == before


def test_an_error_of_the_caller_ends_ffmpeg(tmp_path: Path) -> None:
    path = clip(tmp_path / "a.mp4", frames=400, size="320x240")
    before = children()
    with pytest.raises(ZeroDivisionError):
        for _ in read_frames(path, probe(path)):
            raise ZeroDivisionError
    deadline = time.monotonic() + 5
    while children() != before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert children() == before


def test_a_flood_of_messages_does_not_stop_the_flow(tmp_path: Path) -> None:
    """Debug messages far beyond what a pipe holds, while frames are read slowly."""
    path = clip(tmp_path / "a.mp4", frames=50)
    decode = [
        "-loglevel",
        "trace",
        *ffmpeg.input_options(path),
        "-f",
        "rawvideo",
        "-pix_fmt",
        "gray",
        "pipe:1",
    ]
    with ffmpeg.Ffmpeg(decode) as child:
        frame = bytearray(128 * 72)
        count = 0
        while child.read_into(memoryview(frame)) == len(frame):
            count += 1
        assert child.finish() == 0
    assert count == 50
    assert len(child.last_lines) == 200


def test_a_child_sees_none_of_our_secrets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with ffmpeg.Ffmpeg(["-f", "lavfi", "-re", "-i", "testsrc2", "-f", "rawvideo", "pipe:1"]) as child:
        environment = Path(f"/proc/{child.pid}/environ").read_bytes()
    assert b"hf_secret" not in environment


def resident() -> int:
    """Bytes this process holds in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def test_memory_does_not_grow_with_the_length(tmp_path: Path) -> None:
    path = clip(tmp_path / "a.mp4", "-preset", "ultrafast", size="640x360", frames=400)
    seen = []
    for i, _ in enumerate(read_frames(path, probe(path))):
        if i in (40, 399):
            seen.append(resident())
    print(f"after 40 frames {seen[0] / 1e6:.1f} MB, after 400 {seen[1] / 1e6:.1f} MB")
    assert seen[1] - seen[0] < 10 * 640 * 360 * 3
