"""What the nano models learn from: moving scenes that are drawn, and the same scenes spoiled.

A scene is two layers, a ground and shapes cut out of another, that move on their own. Layers are dead
leaves, gradients, lines of text, waves, and the photographs that ship inside scikit-image, scikit-learn and
matplotlib where those are installed. `spoil` makes of a clip what a user brings: half the size, noise,
H.264. Everything is drawn from a seed. Knows nothing of models.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from app.video.frames import resize, to_unit
from app.video.probe import probe
from app.video.read import read_frames
from app.video.write import VideoWriter

Picture = NDArray[np.uint8]  # (height, width, 3)
Clip = NDArray[np.uint8]  # (frames, height, width, 3)

PHOTOGRAPHS = {
    "skimage": ("data/astronaut.png", "data/coffee.png", "data/chelsea.png", "data/rocket.jpg",
                "data/brick.png", "data/grass.png", "data/gravel.png", "data/motorcycle_left.png",
                "data/camera.png", "data/coins.png", "data/page.png"),
    "sklearn": ("datasets/images/china.jpg", "datasets/images/flower.jpg"),
    "matplotlib": ("mpl-data/sample_data/grace_hopper.jpg",),
}  # fmt: skip
SPARE = 32  # pixels around the picture, for the camera to move in
FASTEST = 3.0  # pixels a frame
WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "0123456789",
    "SEED",
    "pod",
    "restore",
    "frame",
]


def photographs() -> list[Path]:
    """Those that are on this machine; no package is imported to find them."""
    found = []
    for package, names in PHOTOGRAPHS.items():
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            found += [path for path in (Path(folder) / name for name in names) if path.is_file()]
    return found


def scene(seed: int, frames: int, height: int, width: int) -> Clip:
    """A clip of two moving layers, (frames, height, width, 3). Another seed, another scene."""
    draw = np.random.default_rng([7, seed])
    tall, wide = height + 2 * SPARE, width + 2 * SPARE
    # Drawn at twice the size and averaged down: edges are clean, and half a pixel is a whole step.
    ground, above = (_layer(draw, 2 * tall, 2 * wide) for _ in range(2))
    mask = _shapes(draw, 2 * tall, 2 * wide)
    ways = [_way(draw, frames) for _ in range(2)]
    clip = np.empty((frames, height, width, 3), np.uint8)
    for i in range(frames):
        back = _seen(ground, ways[0][i], height, width)
        front, alpha = (_seen(x, ways[1][i], height, width) for x in (above, mask))
        clip[i] = np.rint(back + (front - back) * (alpha / 255)).astype(np.uint8)
    return clip


def _way(draw: np.random.Generator, frames: int) -> NDArray[np.int64]:
    """Offsets in half pixels, (frames, 2): mostly a steady pan, sometimes none."""
    speed = draw.uniform(-FASTEST, FASTEST, 2) * draw.choice([0.0, 0.4, 1.0], p=[0.2, 0.5, 0.3])
    steps = np.arange(frames)[:, None] - frames / 2
    way: NDArray[np.int64] = np.clip(np.rint(2 * (SPARE + steps * speed)), 0, 4 * SPARE).astype(np.int64)
    return way


def _seen(layer: Picture, offset: NDArray[np.int64], height: int, width: int) -> NDArray[np.float32]:
    part = layer[offset[0] : offset[0] + 2 * height, offset[1] : offset[1] + 2 * width].astype(np.float32)
    mean: NDArray[np.float32] = part.reshape(height, 2, width, 2, -1).mean((1, 3))
    return mean


def _layer(draw: np.random.Generator, height: int, width: int) -> Picture:
    kinds: list[Callable[..., Picture]] = [_leaves, _gradient, _text, _waves]
    if photographs() and draw.random() < 0.6:
        return _photograph(draw, height, width)
    return kinds[int(draw.choice(4, p=[0.5, 0.15, 0.15, 0.2]))](draw, height, width)


def _photograph(draw: np.random.Generator, height: int, width: int) -> Picture:
    """A part of a photograph, enlarged before it is averaged down, perhaps mirrored, its colours changed."""
    pictures = photographs()
    picture = _opened(pictures[int(draw.integers(len(pictures)))])
    scale = max(float(draw.uniform(1.0, 2.0)), height / picture.height, width / picture.width)
    part_h, part_w = int(height / scale), int(width / scale)
    top = int(draw.integers(picture.height - part_h + 1))
    left = int(draw.integers(picture.width - part_w + 1))
    part = picture.crop((left, top, left + part_w, top + part_h)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    pixels = np.asarray(part)[:, :: int(draw.choice([-1, 1]))]
    gain, lift = draw.uniform(0.7, 1.1, 3), draw.uniform(0, 30)
    return np.clip(pixels * gain + lift, 0, 255).astype(np.uint8)


@cache
def _opened(path: Path) -> Image.Image:
    return Image.open(path).convert("RGB")


def _leaves(draw: np.random.Generator, height: int, width: int) -> Picture:
    """Dead leaves (Matheron, 1968): shapes that hide each other, their sizes by a power law."""
    picture = Image.new("RGB", (width, height), _colour(draw))
    pen = ImageDraw.Draw(picture)
    for _ in range(int(draw.integers(150, 500))):
        radius = min(4.0 / draw.power(1.5), 90.0)
        x, y = draw.uniform(0, width), draw.uniform(0, height)
        turn = draw.uniform(0, 6.28) + np.linspace(0, 6.28, int(draw.choice([3, 4, 5, 24])), endpoint=False)
        sides = radius * draw.uniform(0.4, 1.0, 2)
        corners = [(x + sides[0] * np.cos(a), y + sides[1] * np.sin(a)) for a in turn]
        pen.polygon(corners, fill=_colour(draw))
    return _grained(draw, np.asarray(picture))


def _gradient(draw: np.random.Generator, height: int, width: int) -> Picture:
    corners = np.array([[_colour(draw) for _ in range(2)] for _ in range(2)], np.uint8)
    return np.asarray(Image.fromarray(corners).resize((width, height), Image.Resampling.BICUBIC))


def _text(draw: np.random.Generator, height: int, width: int) -> Picture:
    picture = Image.new("RGB", (width, height), _colour(draw))
    pen, y = ImageDraw.Draw(picture), 0
    while y < height:
        size = int(draw.integers(20, 56))
        line = " ".join(draw.choice(WORDS, 12))
        pen.text((int(draw.integers(-80, 20)), y), line, _colour(draw), ImageFont.load_default(size))
        y += int(size * 1.3)
    return np.asarray(picture)


def _waves(draw: np.random.Generator, height: int, width: int) -> Picture:
    """A sum of a few plane waves with periods from 6 pixels up, in three colours."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    total = np.zeros((height, width, 3), np.float32)
    for _ in range(4):
        period, angle = np.exp(draw.uniform(np.log(12), np.log(200))), draw.uniform(0, 6.28)
        phase = (x * np.cos(angle) + y * np.sin(angle)) * (6.28 / period)
        total += np.sin(phase)[..., None] * draw.uniform(5, 40, 3)
    return _picture(total + np.array(_colour(draw)))


def _grained(draw: np.random.Generator, picture: Picture) -> Picture:
    """With faint texture at two sizes, as surfaces have."""
    height, width, _ = picture.shape
    grain = np.zeros((height, width), np.float32)
    for step in (3, 12):
        small = draw.normal(0, draw.uniform(0, 10), (height // step + 1, width // step + 1)).astype(
            np.float32
        )
        grain += np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))
    return _picture(picture + grain[..., None])


def _picture(values: NDArray[np.floating]) -> Picture:
    made: Picture = np.clip(values, 0, 255).astype(np.uint8)
    return made


def _shapes(draw: np.random.Generator, height: int, width: int) -> Picture:
    """Where the front layer is seen: a few ellipses and boxes, 255 inside."""
    mask = Image.new("L", (width, height))
    pen = ImageDraw.Draw(mask)
    for _ in range(int(draw.integers(0, 6))):
        x, y = draw.uniform(0, width), draw.uniform(0, height)
        a, b = draw.uniform(10, 80, 2)
        (pen.ellipse if draw.random() < 0.6 else pen.rectangle)((x - a, y - b, x + a, y + b), fill=255)
    return np.asarray(mask)[..., None]


def _colour(draw: np.random.Generator) -> tuple[int, int, int]:
    """Any lightness, mostly muted."""
    grey, tint = draw.uniform(10, 245), draw.normal(0, 30, 3)
    red, green, blue = (int(v) for v in np.clip(grey + tint, 0, 255))
    return red, green, blue


def spoil(clip: Clip, path: Path, *, noise: float, crf: int, blur: float = 0.0, seed: int = 0) -> Clip:
    """A Gaussian blur of `blur` pixels, half the size (antialiased bicubic), then Gaussian noise of
    `noise` / 255, then H.264 into `path`.

    Returns the frames as the product reads them back from the file, (frames, height / 2, width / 2, 3).
    """
    draw = np.random.default_rng([11, seed])
    if blur:
        soft = ImageFilter.GaussianBlur(blur)
        clip = np.stack([np.asarray(Image.fromarray(frame).filter(soft)) for frame in clip])
    small = resize(to_unit(clip), clip.shape[1] // 2, clip.shape[2] // 2).permute(0, 2, 3, 1).numpy() * 255
    noisy = np.clip(np.rint(small + draw.normal(0, noise, small.shape)), 0, 255).astype(np.uint8)
    with VideoWriter(path, noisy.shape[2], noisy.shape[1], Fraction(25), crf=crf) as writer:
        writer.write(noisy)
    return np.stack(list(read_frames(path, probe(path))))


def pairs(seeds: Sequence[int], frames: int, height: int, width: int) -> Iterator[tuple[Clip, Clip]]:
    """Scenes and what is left of them: blurred by up to a pixel, noise up to 20 / 255 and CRF 28 to 38; half
    of them not blurred, 15 and 35."""
    with tempfile.TemporaryDirectory() as folder:
        for seed in seeds:
            draw = np.random.default_rng([13, seed])
            noise, crf = float(draw.uniform(0, 20)), int(draw.integers(28, 39))
            blur = float(draw.uniform(0, 1))
            if draw.random() < 0.5:
                noise, crf, blur = 15.0, 35, 0.0
            clip, path = scene(seed, frames, height, width), Path(folder) / f"{seed}.mp4"
            yield clip, spoil(clip, path, noise=noise, crf=crf, blur=blur, seed=seed)


def stacked(
    seeds: Sequence[int], frames: int, height: int, width: int, tell: Callable[[int], Any]
) -> dict[str, Clip]:
    """The pairs of these seeds as two arrays, "clean" and "spoiled", (clips, frames, height, width, 3)."""
    clean, spoiled = [], []
    for done, (whole, poor) in enumerate(pairs(seeds, frames, height, width), 1):
        clean.append(whole)
        spoiled.append(poor)
        tell(done)
    return {"clean": np.stack(clean), "spoiled": np.stack(spoiled)}
