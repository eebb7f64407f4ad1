import os
from collections.abc import Callable
from fractions import Fraction
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from app.errors import InputError, JobStopped
from app.video.probe import probe
from app.video.read import read_frames
from app.video.shots import Shot, distance, find_shots, shots_of
from tests.video.clips import clip, make

Frames = list[np.ndarray]
H, W = 36, 64


@cache
def world(seed: int, height: int = 120, width: int = 600) -> np.ndarray:
    """A large picture with a natural spectrum (1/f), in colour, in [0, 1]."""
    rng = np.random.default_rng(seed)
    down, right = np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None]
    falloff = 1 / np.maximum(np.hypot(down, right), 1 / 100)
    layers = []
    for _ in range(3):
        noise = np.fft.fft2(rng.standard_normal((height, width)))
        layers.append(np.fft.ifft2(noise * falloff).real)
    grey = np.stack([layers[0] + 0.4 * layer for layer in layers], -1)
    grey = (grey - grey.mean()) / grey.std()
    return (0.45 + 0.18 * grey).clip(0, 1)


def view(
    seed: int, frames: int, right: float = 0.0, down: float = 0.0, x: float = 0.0, noise: float = 0.0
) -> Frames:
    """A camera over `world`, moving by (down, right) pixels a frame from (20, x)."""
    picture, rng = world(seed), np.random.default_rng(seed)
    out = []
    for i in range(frames):
        top, left = round(20 + down * i), round(x + right * i)
        frame = picture[top : top + H, left : left + W]
        out.append(frame + noise * rng.standard_normal(frame.shape))
    return out


def brighter(frames: Frames, first: int, count: int, by: float = 0.5) -> Frames:
    return [f + by if first <= i < first + count else f for i, f in enumerate(frames)]


def fade(frames: Frames, first: int, count: int, to: float = 0.0) -> Frames:
    """Down to `to` within `count` frames and up again within as many."""
    weight = [max(0.0, 1 - abs(i - first - count) / count) for i in range(len(frames))]
    return [f * (1 - w) + to * w for f, w in zip(frames, weight, strict=True)]


def dissolve(a: Frames, b: Frames, count: int) -> Frames:
    mixed = [
        x * (1 - t) + y * t for x, y, t in zip(a[-count:], b[:count], np.linspace(0, 1, count), strict=True)
    ]
    return [*a[:-count], *mixed, *b[count:]]


def zoom(seed: int, frames: int, step: float) -> Frames:
    picture = Image.fromarray((world(seed) * 255).astype(np.uint8))
    out = []
    for i in range(frames):
        half_w, half_h = 50 * step**i, 28 * step**i
        box = (300 - half_w, 60 - half_h, 300 + half_w, 60 + half_h)
        assert box[1] >= 0
        out.append(np.asarray(picture.resize((W, H), Image.Resampling.BILINEAR, box)) / 255)
    return out


def twos(frames: Frames) -> Frames:
    return [f for f in frames for _ in range(2)]


def black(count: int) -> Frames:
    return [np.zeros((H, W, 3))] * count


def scaled(frames: Frames, low: float, high: float) -> Frames:
    return [low + (high - low) * f for f in frames]


def strip_box(frames: Frames) -> Frames:
    """Black bars above and below."""
    return [np.concatenate([f[:8] * 0, f[8:-8], f[:8] * 0]) for f in frames]


CASES: dict[str, tuple[Callable[[], Frames], list[int]]] = {
    "one shot": (lambda: view(1, 40), []),
    "hard cuts": (lambda: view(1, 20) + view(2, 20) + view(3, 20), [20, 40]),
    "quick cuts": (lambda: [f for s in range(8) for f in view(s, 6)], [6, 12, 18, 24, 30, 36, 42]),
    "quick cuts in motion": (
        lambda: [f for s in range(6) for f in view(s, 12, right=2)],
        [12, 24, 36, 48, 60],
    ),
    "same colours, other place": (lambda: view(1, 20) + view(1, 20, x=300), [20]),
    "low contrast": (lambda: scaled(view(1, 20) + view(2, 20), 0.45, 0.6), [20]),
    "dark": (lambda: scaled(view(1, 20, noise=0.02) + view(2, 20, noise=0.02), 0, 0.15), [20]),
    "letterbox": (lambda: strip_box(view(1, 20) + view(2, 20)), [20]),
    "to black and back": (lambda: view(1, 20) + black(10) + view(2, 20), [20, 30]),
    "noisy": (lambda: view(1, 20, noise=0.1) + view(2, 20, noise=0.1), [20]),
    "while panning": (lambda: view(1, 20, right=5) + view(2, 20, right=-5, x=300), [20]),
    "pan to still": (lambda: view(1, 20, right=6) + view(2, 20), [20]),
    "on twos": (lambda: twos(view(1, 15, right=3) + view(2, 15, right=3)), [30]),
    "flash at the cut": (lambda: view(1, 20) + brighter(view(2, 20), 0, 1), [20]),
    "flash elsewhere": (lambda: brighter(view(1, 20), 8, 2) + view(2, 20), [20]),
    "fast pan": (lambda: view(1, 60, right=7), []),
    "whip": (lambda: view(1, 20) + view(1, 8, right=14) + view(1, 20, x=112), []),
    "jolt": (lambda: view(1, 20, x=50) + view(1, 20, x=60), []),
    "shake": (lambda: [f for i in range(40) for f in view(1, 1, x=100 + 9 * np.sin(2.4 * i))], []),
    "zoom": (lambda: zoom(1, 30, 1.02), []),
    "fast zoom": (lambda: zoom(1, 14, 0.9), []),
    "motion on twos": (lambda: twos(view(1, 30, right=5)), []),
    "stepped motion": (lambda: [f for f in view(1, 12, right=8) for _ in range(4)], []),
    "flash of one frame": (lambda: brighter(view(1, 40, right=1), 20, 1), []),
    "flash of two frames": (lambda: brighter(view(1, 40, right=1), 20, 2), []),
    "flash of three frames": (lambda: brighter(view(1, 40), 20, 3), []),
    "white flash": (lambda: brighter(view(1, 40), 20, 1, by=1.0), []),
    "lightning": (lambda: brighter(brighter(view(1, 40), 18, 1), 21, 2), []),
    "strobe": (lambda: [f + 0.5 * (i % 4 == 0) for i, f in enumerate(view(1, 60))], []),
    "one black frame": (lambda: view(1, 20) + black(1) + view(1, 20), []),
    "fade to black": (lambda: fade(view(1, 50), 12, 10), []),
    "fade to white": (lambda: fade(view(1, 50), 12, 10, to=1.0), []),
    "dissolve": (lambda: dissolve(view(1, 35), view(2, 35), 20), []),
    "light goes on": (
        lambda: [f * (0.5 + 0.4 / (1 + np.exp(10 - i))) for i, f in enumerate(view(1, 40))],
        [],
    ),
    "noise": (lambda: view(1, 40, noise=0.25), []),
    "flat": (lambda: [np.full((H, W, 3), 0.5)] * 30, []),
    "black": (lambda: black(30), []),
    "grain on black": (
        lambda: [f * 0 + 0.02 * np.random.default_rng(i).random(f.shape) for i, f in enumerate(black(30))],
        [],
    ),
    "two frames": (lambda: view(1, 2), []),
    "a single frame": (lambda: view(1, 1), []),
    "a frame of another clip at the end": (lambda: view(1, 20) + view(2, 1), []),
}


@pytest.mark.parametrize("case", CASES)
def test_cuts_and_what_only_looks_like_one(case: str) -> None:
    make_frames, expected = CASES[case]
    frames = [(f.clip(0, 1) * 255).round().astype(np.uint8) for f in make_frames()]
    shots = shots_of(iter(frames))
    assert [shot.start for shot in shots[1:]] == expected
    assert shots[0].start == 0
    assert shots[-1].stop == len(frames)
    assert all(a.stop == b.start for a, b in pairwise(shots))


def test_distance_knows_a_shifted_picture() -> None:
    picture = world(1).astype(np.float32)
    a, b = picture[20 : 20 + H, 40 : 40 + W], picture[23 : 23 + H, 49 : 49 + W]
    other = world(2).astype(np.float32)[:H, :W]
    assert distance(a, a) == 0
    assert distance(a, b) < 0.01
    assert distance(a, other) > 0.5


@pytest.mark.parametrize("rate", [None, Fraction(25, 2), Fraction(50), Fraction(30000, 1001)])
def test_the_count_is_that_of_the_frames(tmp_path: Path, rate: Fraction | None) -> None:
    dropped = ("-vf", r"select='not(mod(n\,3))+lt(n\,20)'", "-fps_mode", "vfr")
    picture = ("-f", "lavfi", "-i", "testsrc2=s=128x72:r=25:d=3")
    for path in (clip(tmp_path / "a.mp4", frames=37), make(tmp_path / "b.mp4", *picture, *dropped)):
        info = probe(path)
        shots = find_shots(path, info, rate=rate)
        assert sum(len(shot) for shot in shots) == len(list(read_frames(path, info, rate=rate)))


def test_cuts_of_a_file(tmp_path: Path) -> None:
    """Encoded, larger, rotated; the cut is at 30 of 60 frames."""
    parts = "[0:v]trim=end_frame=30[a];[1:v]trim=end_frame=30[b];[a][b]concat=n=2"
    sources = (
        "-f",
        "lavfi",
        "-i",
        "testsrc2=s=320x180:r=25",
        "-f",
        "lavfi",
        "-i",
        "mandelbrot=s=320x180:r=25",
    )
    path = make(tmp_path / "a.mp4", *sources, "-filter_complex", parts)
    turned = make(tmp_path / "b.mp4", "-display_rotation", "90", "-i", str(path), "-c", "copy")
    for one in (path, turned):
        assert find_shots(one, probe(one)) == [Shot(0, 30), Shot(30, 60)]


def test_it_can_be_stopped_at_any_frame_and_ends_ffmpeg(tmp_path: Path) -> None:
    seen = []

    def stop() -> None:
        seen.append(1)
        if len(seen) == 7:
            raise JobStopped("job_cancelled", "The job was cancelled by its caller.")

    path = clip(tmp_path / "a.mp4", frames=100)
    with pytest.raises(JobStopped):
        find_shots(path, probe(path), on_frame=stop)
    assert len(seen) == 7
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    assert not children.exists() or "ffmpeg" not in str(
        [Path(f"/proc/{pid}/comm").read_text() for pid in children.read_text().split()]
    )


def test_an_image_is_one_shot(tmp_path: Path) -> None:
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    assert find_shots(tmp_path / "a.png", probe(tmp_path / "a.png")) == [Shot(0, 1)]


def test_a_damaged_clip_is_refused(tmp_path: Path) -> None:
    path = clip(tmp_path / "a.mkv", frames=100, size="320x240")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError):
        find_shots(path, probe(path))
