"""Self-Forcing and its text encoder on a card: from a prompt's embedding to frames on the host.

Of T5's place in a job, files and codecs nothing is measured; T5 has a table of its own.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import NoReturn, cast

import torch
from torch import Tensor

from app.models.wan.config import TransformerConfig
from app.models.wan.generate import GenerateOptions, Generator
from app.models.wan.layout import Conditions, Layout
from app.models.wan.length import length
from app.models.wan.parts import Abilities
from app.models.wan.sampler import FewStep, generate_blocks
from app.models.wan.schedule import SeededNoise
from app.models.wan.text import TextEncoder
from app.models.wan.transformer import Transformer
from app.models.wan.umt5 import UMT5Encoder
from app.models.wan.umt5_config import UMT5Config
from app.models.wan.vae import WanVAE
from app.models.wan.vae_config import VAEConfig
from benchmarks.card.bench import MEMORY, Bench, drawn, empty, on_meta, taken
from benchmarks.machine import spread
from benchmarks.measure import in_turns, seconds
from benchmarks.models import flops

REPEAT = 3
CLIP_HEAD = ("size", "frames", "frames/s", "first piece, s", MEMORY, "VAE, time")
BLOCK_HEAD = ("latents seen", "block, ms", "a pass, ms", "of the rate", "decode, ms", "of the rate")
TEXT_HEAD = ("tokens", "ms", "of the rate", MEMORY)


@dataclass(frozen=True)
class Models:
    config: TransformerConfig
    transformer: Transformer
    vae_config: VAEConfig
    vae: WanVAE
    prompt: Tensor


class Known:
    """The text encoder of a prompt that was encoded before: nothing is loaded."""

    loaded, nbytes, device = False, 0, torch.device("cpu")

    def __init__(self, prompt: Tensor) -> None:
        self.prompt = prompt
        self.config = UMT5Config(dim=prompt.shape[-1])

    def knows(self, prompt: str) -> bool:
        return True

    def nbytes_on(self, kind: str) -> int:
        return 0

    def encode(self, prompts: object) -> Tensor:
        return self.prompt


def models(config: TransformerConfig, vae: VAEConfig, bench: Bench) -> Models:
    spot = bench.spot
    return Models(
        config,
        drawn(lambda: Transformer(config), spot.device, spot.dtype),
        vae,
        drawn(lambda: WanVAE(vae), spot.device, spot.conv_dtype),
        torch.randn(1, config.text_length, config.text_dim, device=spot.device).to(spot.dtype),
    )


# ------------------------------------------------------------------ whole clips


def clip_rows(made: Models, height: int, width: int, frames: int, bench: Bench) -> list[list[str]]:
    """A clip through the pipeline, after one that is not timed. The VAE's share is that of `blocks`."""
    device = bench.spot.device
    generator = Generator(
        able=Abilities("few", (), False, False, frozenset(), made.config, made.vae_config.spatial_factor),
        transformer=made.transformer, vae=made.vae, text=cast(TextEncoder, Known(made.prompt)),
        load_transformer=never, load_pose=never, load_clip=never,
    )  # fmt: skip
    options = GenerateOptions({0: "a prompt"}, length(frames, "nothing", blocks=True), height, width)
    arrived: list[float] = []

    def run() -> None:
        arrived[:] = [time.perf_counter()]
        count = 0
        for block in generator.generate(options):
            count += len(block.float().clamp(-1, 1).cpu())
            arrived.append(time.perf_counter())
        assert count == frames

    run()
    found = taken(run, device)
    passes, decodes = zip(*timed_blocks(made, height, width, frames, device), strict=True)
    share = sum(decodes) / (sum(decodes) + sum(passes))
    speed, first = frames / found.seconds, arrived[1] - arrived[0]
    return [[f"{width}x{height}", f"{frames}", f"{speed:.3g}", f"{first:.3g}", found.memory, f"{share:.0%}"]]


def never(*arguments: object) -> NoReturn:
    raise AssertionError("nothing is to be loaded")


# ------------------------------------------------------------------ block by block


def timed_blocks(
    made: Models, height: int, width: int, frames: int, device: torch.device
) -> list[tuple[float, float]]:
    """Seconds of each block, with the pass that remembers the one before, and of its decoding: each waits
    for the other, which a clip of the pipeline need not do."""
    kind, state, found = str(device), made.vae.new_state(), []
    shape = layout(made, height, width, frames)
    blocks = generate_blocks(
        made.transformer, shape, Conditions({0: made.prompt}), SeededNoise(0, device), FewStep()
    )
    held = []
    for _ in range(len(shape.blocks()[1])):
        took = seconds(lambda: held.append(next(blocks)), kind)
        found.append((took, seconds(lambda: made.vae.decode(held.pop().latents, state), kind)))
    return found


def layout(made: Models, height: int, width: int, frames: int) -> Layout:
    factor = made.vae_config.spatial_factor
    return Layout(length(frames, "nothing", blocks=True).made, height // factor, width // factor)


def block_rows(made: Models, height: int, width: int, frames: int, bench: Bench) -> list[list[str]]:
    """Each block of a clip, by how many latents it sees."""
    timed_blocks(made, height, width, frames, bench.spot.device)
    clips = [timed_blocks(made, height, width, frames, bench.spot.device) for _ in range(REPEAT)]
    shape, steps = layout(made, height, width, frames), FewStep().steps
    rows = []
    work = decode_operations(made.vae_config, shape)
    for number, block in enumerate(shape.blocks()[1]):
        seen = min((number + 1) * block, shape.capacity())
        passes = [clip[number][0] for clip in clips]
        decodes = [clip[number][1] for clip in clips]
        count = steps + (number > 0)
        each = [1000 * took / count for took in passes]
        rate = bench.share(pass_operations(made.config, shape, block, seen), min(each) / 1000)
        rows.append([
            f"{seen}", spread([1000 * took for took in passes]), spread(each), rate,
            spread([1000 * took for took in decodes]), bench.share(work[min(number, 1)], min(decodes)),
        ])  # fmt: skip
    return rows


def pass_operations(config: TransformerConfig, shape: Layout, block: int, seen: int) -> float:
    """One pass over a block that sees so many latents."""
    model = on_meta(lambda: Transformer(config))
    cross = model.cross(empty(1, config.text_length, config.text_dim))
    cache = model.cache(shape.height, shape.width, seen)
    if seen > block:
        cache.take(seen - block)
    plan = model.plan(block, shape.height, shape.width, start=seen - block, cache=cache)
    x = empty(1, config.out_channels, block, shape.height, shape.width)
    return flops(lambda: model(x, torch.full((1, block), 500.0), cross, plan, cache))


def decode_operations(config: VAEConfig, shape: Layout) -> list[float]:
    """Of the first block and of a later one."""
    vae = on_meta(lambda: WanVAE(config))
    state = vae.new_state()
    z = empty(1, config.z_dim, shape.block, shape.height, shape.width)
    return [flops(lambda: vae.decode(z, state)) for _ in range(2)]


# ------------------------------------------------------------------ T5


def text_rows(config: UMT5Config, tokens: tuple[int, ...], bench: Bench) -> list[list[str]]:
    """A prompt of each length."""
    device = bench.spot.device
    model, shape = (
        drawn(lambda: UMT5Encoder(config), device, bench.spot.dtype),
        on_meta(lambda: UMT5Encoder(config)),
    )
    rows = []
    for count in tokens:
        ids = torch.randint(config.vocab, (1, count), device=device)
        way = partial(model, ids, torch.ones_like(ids))
        way()
        found = taken(way, device)
        took = in_turns({"": way}, 2.0, str(device))[""]
        counted = torch.ones(1, count, dtype=torch.int64, device="meta")
        rate = bench.share(flops(partial(shape, counted, counted)), min(took))
        rows.append([f"{count}", spread([1000 * each for each in took]), rate, found.memory])
    return rows
