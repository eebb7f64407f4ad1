"""SeedVR2 on a card: whole clips through the pipeline, from frames on the host to frames on the host.

Of files, cuts and codecs nothing is measured. Operations are counted on the meta device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, islice

import numpy as np
import torch
from numpy.typing import NDArray

from app.models.seedvr2.config import DiTConfig
from app.models.seedvr2.dit import DiT
from app.models.seedvr2.restore import RestoreOptions, Restorer
from app.models.seedvr2.segment import spans
from app.models.seedvr2.vae import VideoVAE
from app.models.seedvr2.vae_config import VAEConfig
from app.models.seedvr2.variants import Variant
from app.timing import Stopwatch
from benchmarks.card.bench import MEMORY, Bench, drawn, empty, on_meta, taken
from benchmarks.models import flops

Frame = NDArray[np.uint8]
TEXT = 58  # tokens of the published prompt
WARM = 9  # frames that pass before anything is timed
HEAD = (
    "model and size", "frames", "frames/s", "s a step", MEMORY, "transformer, time", "of the rate",
    "encode, time", "of the rate", "decode, time", "of the rate",
)  # fmt: skip


@dataclass(frozen=True)
class Operations:
    """Of a whole clip."""

    transformer: float
    encode: float
    decode: float


def restorer(variant: Variant, bench: Bench) -> Restorer:
    """The published pipeline with random weights."""
    spot = bench.spot
    prompt = torch.randn(TEXT, variant.dit.text_dim, device=spot.device).to(spot.dtype)
    dit = drawn(lambda: DiT(variant.dit), spot.device, spot.dtype)
    vae = drawn(lambda: VideoVAE(variant.vae), spot.device, spot.conv_dtype)
    return Restorer(dit, vae, prompt, prompt)


def row(
    name: str, model: Callable[[], Restorer], variant: Variant, height: int, width: int,
    lengths: tuple[int, ...], bench: Bench, budget: float,
) -> list[list[str]]:  # fmt: skip
    """Measure a size on the longest clip of `lengths` that will take less than `budget` seconds."""
    options, restored = RestoreOptions(height=height, width=width), model()
    run(restored, options, WARM)
    pace = taken(lambda: run(restored, options, WARM), bench.spot.device).seconds / WARM
    count = max((length for length in lengths if length * pace < budget), default=min(lengths))
    clock = Stopwatch()
    found = taken(lambda: run(restored, options, count, clock), bench.spot.device)
    work = operations(variant, options, count)
    steps = clock.seconds["transformer"], clock.seconds["encode"], clock.seconds["decode"]
    shares = [
        cell
        for took, each in zip(steps, (work.transformer, work.encode, work.decode), strict=True)
        for cell in (f"{took / found.seconds:.0%}", bench.share(each, took))
    ]
    windows = len(spans(variant.vae.latents_holding(count), options.window))
    step = clock.seconds["transformer"] / windows / options.steps
    return [[name, f"{count}", f"{count / found.seconds:.3g}", f"{step:.3g}", found.memory, *shares]]


def run(model: Restorer, options: RestoreOptions, count: int, clock: Stopwatch | None = None) -> None:
    """Restore a clip of noise of a quarter of the size."""
    made = sum(1 for _ in model.restore_shot(noise(options, count), count, options, clock=clock))
    assert made == count


def noise(options: RestoreOptions, count: int) -> Iterator[Frame]:
    size = max(1, options.height // 4), max(1, options.width // 4), 3
    some = np.random.default_rng(0).integers(0, 255, (8, *size), dtype=np.uint8)
    return islice(cycle(some), count)


# ------------------------------------------------------------------ operations


def operations(variant: Variant, options: RestoreOptions, count: int) -> Operations:
    """Those of matrix products, convolutions and attention that a clip of `count` frames takes."""
    factor = variant.vae.spatial_factor
    height, width = (-(-side // 16) * 16 // factor for side in (options.height, options.width))
    latents = variant.vae.latents_holding(count)
    encode, decode = slices(variant.vae, latents, height, width)
    windows = [len(window) for window in spans(latents, options.window)]
    passes = {length: transformer(variant.dit, length, height, width) for length in set(windows)}
    return Operations(options.steps * sum(passes[length] for length in windows), encode, decode)


def transformer(config: DiTConfig, frames: int, height: int, width: int) -> float:
    """One pass. Layers differ in pairs, by how they are cut into windows, and the last one by leaving the
    text out: what a pair more takes is counted once."""
    fewest = 2 + config.layers % 2
    if config.layers <= fewest + 2:
        return counted(config, frames, height, width)
    few, more = (
        counted(first_layers(config, layers), frames, height, width) for layers in (fewest, fewest + 2)
    )
    return few + (more - few) * (config.layers - fewest) / 2


def first_layers(config: DiTConfig, layers: int) -> DiTConfig:
    return replace(
        config, layers=layers, separate=min(config.separate, layers),
        windows=config.windows[:layers], shifted=config.shifted[:layers],
    )  # fmt: skip


def counted(config: DiTConfig, frames: int, height: int, width: int) -> float:
    model = on_meta(lambda: DiT(config))
    plan = model.plan(frames, height, width, TEXT)
    latents, text = empty(frames, height, width, config.in_channels), empty(TEXT, config.text_dim)
    return flops(lambda: model(latents, text, 500.0, plan))


def slices(config: VAEConfig, latents: int, height: int, width: int) -> tuple[float, float]:
    """Encoding and decoding a clip latent by latent: the first one's, and so often that of a later one."""
    vae, factor = on_meta(lambda: VideoVAE(config)), config.spatial_factor
    states = vae.new_state(), vae.new_state()
    encode, decode = [], []
    for frames in (1, config.temporal_factor):
        x, z = empty(1, 3, frames, factor * height, factor * width), empty(1, 16, 1, height, width)
        encode.append(flops(partial(vae.encode_slice, x, states[0])))
        decode.append(flops(partial(vae.decode_slice, z, states[1])))
    encoding, decoding = (first + (latents - 1) * later for first, later in (encode, decode))
    return encoding, decoding
