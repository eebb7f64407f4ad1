#!/usr/bin/env python3
"""How far a restoration in 16 and in 8 bits lies from that in float32, beside how far two seeds lie apart:
the figures of docs/precision.md.

    python tools/measure_float8.py [--clips 9] [--steps 1]

Nano's trained weights restore the clips of tools/measure_nano.py, spoiled in the same way. Differences are
those of the decoded frames, before they are rounded to bytes: PSNR, and the mean in steps of 255. Nano is
narrow; a second table has the error of one product at its width and at those of the published models.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from app.device import place
from app.models.seedvr2.dit import DiT
from app.models.seedvr2.restore import RestoreOptions, Restorer
from app.nn.float8 import Float8Linear
from app.nn.linear import Linear
from tools.measure_nano import Clip, clips, nano, spoiled

WAYS = ("bfloat16", "float8, widened", "float8, scaled")
SEEDS = (1, 2, 3)
WIDTHS = (192, 1536, 2560, 3072, 12288)


@dataclass(frozen=True)
class Difference:
    """Of frames from those that float32 makes, in steps of 255: root of the mean square, and mean."""

    rms: float
    mean: float

    @classmethod
    def of(cls, frames: Tensor, known: Tensor) -> Difference:
        apart = (frames - known).mul_(127.5)
        return cls(apart.square().mean().sqrt().item(), apart.abs().mean().item())

    def __str__(self) -> str:
        decibels = 20 * math.log10(255 / self.rms) if self.rms else math.inf
        return f"{decibels:.1f} dB, {self.mean:.2f}"


def frames(restorer: Restorer, poor: Clip, options: RestoreOptions) -> Tensor:
    """(n, 3, h, w) in [-1, 1]: what a job makes, before it is rounded."""
    with torch.inference_mode():
        return torch.cat(list(restorer.restore_shot(iter(poor), len(poor), options))).clamp_(-1, 1)


def differences(restorers: dict[str, Restorer], clean: Clip, steps: int) -> dict[str, Difference]:
    """Of one clip: between seeds, their mean; and of each way."""
    poor = spoiled(clean)
    height, width = clean.shape[1:3]
    options = RestoreOptions(height, width, steps=steps)
    known = frames(restorers["float32"], poor, options)
    seeds = [
        Difference.of(frames(restorers["float32"], poor, replace(options, seed=seed)), known)
        for seed in SEEDS
    ]
    found = {"another seed": mean(seeds)}
    for way in WAYS:
        found[way] = Difference.of(frames(restorers[way], poor, options), known)
    return found


def mean(many: Sequence[Difference]) -> Difference:
    """Root of the mean square, and mean, of several."""
    square = sum(one.rms**2 for one in many) / len(many)
    return Difference(math.sqrt(square), sum(one.mean for one in many) / len(many))


def restorers() -> dict[str, Restorer]:
    """Nano in float32 and in each way."""
    made = {way: nano(placement=place("cpu", way.partition(",")[0])) for way in ("float32", *WAYS)}
    assert isinstance(made["float8, scaled"].dit, DiT)
    for layer in made["float8, scaled"].dit.modules():
        if isinstance(layer, Float8Linear):
            layer.product = "scaled"  # of any size: a CPU takes all
    return made


def table(rows: dict[str, dict[str, Difference]]) -> list[str]:
    """Markdown: a clip a line, and all of them."""
    lines = [
        f"| clip | {' | '.join(next(iter(rows.values())))} |",
        "| --- |" + " ---: |" * (len(WAYS) + 1),
        *(f"| {name} | {' | '.join(map(str, found.values()))} |" for name, found in rows.items()),
    ]
    every = together(rows)
    return [*lines, f"| all | {' | '.join(map(str, every.values()))} |"]


def together(rows: dict[str, dict[str, Difference]]) -> dict[str, Difference]:
    """Over all clips, which count alike."""
    return {way: mean([found[way] for found in rows.values()]) for way in next(iter(rows.values()))}


def products(width: int, tokens: int = 64, rows: int = 256) -> list[float]:
    """The error of a product with a matrix of so wide rows, of drawn numbers, relative to the exact one: in
    each way."""
    torch.manual_seed(width)
    wide = Linear(width, rows, bias=False).bfloat16().requires_grad_(False)
    x = torch.randn(tokens, width).bfloat16()
    layers = [wide, Float8Linear(wide, "widened"), Float8Linear(wide, "scaled")]
    for layer in layers[1:]:
        assert isinstance(layer, Float8Linear)
        layer.receive_rows(x.device).put(0, wide.weight)
    exact = x.double() @ wide.weight.double().t()
    return [float((layer(x).double() - exact).norm() / exact.norm()) for layer in layers]


def products_table() -> list[str]:
    """Markdown: nano's width, and those of the published models."""
    head = [f"| width of a row | {' | '.join(WAYS)} |", "| ---: |" + " ---: |" * len(WAYS)]
    errors = {width: [f"{error:.2%}" for error in products(width)] for width in WIDTHS}
    return [*head, *(f"| {width} | {' | '.join(row)} |" for width, row in errors.items())]


def main(arguments: Sequence[str]) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--clips", type=int, default=9, help="the first of them; default: all, %(default)s")
    parser.add_argument("--steps", type=int, default=1, help="default: %(default)s, as a job has it")
    options = parser.parse_args(arguments)
    models, rows = restorers(), {}
    for name, clean in itertools.islice(clips(), options.clips):
        rows[name] = differences(models, clean, options.steps)
        told = ", ".join(f"{way} {found}" for way, found in rows[name].items())
        print(f"{name}: {told}", file=sys.stderr, flush=True)
    print("\n".join([*table(rows), "", *products_table()]))


if __name__ == "__main__":
    main(sys.argv[1:])
