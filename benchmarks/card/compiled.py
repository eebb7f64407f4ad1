"""What compiled steps (`SEEDPOD_COMPILE`) gain: passes of the transformers with them and without."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from app.models.seedvr2 import steps as seedvr2
from app.models.seedvr2.dit import DiT
from app.models.seedvr2.variants import Variant
from app.models.wan import steps as wan
from app.models.wan.cache import KVCache
from app.models.wan.config import TRAINED_BLOCK, TRAINED_FRAMES, TransformerConfig
from app.models.wan.transformer import Plan, Transformer
from app.nn.compiled import Compiler
from benchmarks.card.bench import Bench, drawn
from benchmarks.card.restore import TEXT
from benchmarks.machine import ratios, spread
from benchmarks.measure import in_turns

HEAD = ("pass", "plain, ms", "compiled, ms", "compiled / plain", "compiling, s")
SECONDS = 4.0  # of the rounds of a pass


def restore_rows(
    name: str, variant: Variant, sizes: dict[str, tuple[int, int]], frames: int, bench: Bench
) -> list[list[str]]:
    """A transformer pass over a clip of `frames` frames at each size."""
    spot, config = bench.spot, variant.dit
    begin = time.perf_counter()
    steps = seedvr2.compiled(config, spot.device, spot.dtype, Compiler())
    compiling = time.perf_counter() - begin
    model = drawn(lambda: DiT(config), spot.device, spot.dtype)
    text = torch.randn(TEXT, config.text_dim, device=spot.device).to(spot.dtype)
    rows = []
    for size, (height, width) in sizes.items():
        down, across = (-(-side // 16) * 16 // variant.vae.spatial_factor for side in (height, width))
        shape = variant.vae.latents_holding(frames), down, across
        latents = torch.randn(*shape, config.in_channels, device=spot.device).to(spot.dtype)
        plain = model.plan(*shape, TEXT)
        plain_way, fused = (
            partial(model, latents, text, 500.0, plan) for plan in (plain, replace(plain, steps=steps))
        )
        cells = compared(plain_way, fused, bench)
        rows.append([f"{name} {size}, {shape[0]} latents", *cells, f"{compiling:.3g}"])
    return rows


def generate_rows(config: TransformerConfig, height: int, width: int, bench: Bench) -> list[list[str]]:
    """A block of latents of height x width, as a clip's first and with a full cache behind it."""
    spot = bench.spot
    begin = time.perf_counter()
    steps = wan.compiled(config, spot.device, spot.dtype, Compiler())
    compiling = time.perf_counter() - begin
    model = drawn(lambda: Transformer(config), spot.device, spot.dtype)
    cross = model.cross(torch.randn(1, config.text_length, config.text_dim))
    times = model.times(torch.full((1, TRAINED_BLOCK), 500.0))
    x = torch.randn(1, config.out_channels, TRAINED_BLOCK, height, width, device=spot.device)
    rows = []
    for seen in (TRAINED_BLOCK, TRAINED_FRAMES):
        cache = model.cache(height, width, seen)
        if seen > TRAINED_BLOCK:
            cache.take(seen - TRAINED_BLOCK)
        for stored in (part for layer in cache.layers for part in layer):
            stored.normal_()
        plan = model.plan(TRAINED_BLOCK, height, width, start=seen - TRAINED_BLOCK, cache=cache)

        def run(chosen: wan.Steps, plan: Plan = plan, cache: KVCache = cache) -> object:
            model.steps = chosen
            return model(x, times, cross, plan, cache)

        cells = compared(partial(run, wan.PLAIN), partial(run, steps), bench)
        rows.append([f"{TRAINED_BLOCK} of {seen} latents", *cells, f"{compiling:.3g}"])
    return rows


def compared(plain: Callable[[], object], compiled: Callable[[], object], bench: Bench) -> list[str]:
    """Milliseconds of each, and the ratio, round by round."""
    ways = {"plain": plain, "compiled": compiled}
    for way in ways.values():
        way()
    taken = in_turns(ways, SECONDS, bench.spot.device.type)
    both = [spread([1000 * each for each in taken[name]]) for name in ways]
    return [*both, spread(ratios(taken["compiled"], taken["plain"]))]
