"""Memory of each task: predicted against measured, and what the published models take by arithmetic.

    python -m benchmarks.memory [restore] [generate] [autoencode] [--quick]

Measured is the most that tensors held during a job on the CPU in float32, narrow models with random weights:
counted tensor by tensor, for what the system tells of a process is rough. The second table of a task computes
nothing: it is the planner's choice for cards of 12 to 80 GiB, less 3% for the driver, and what it predicts.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from app.errors import UnavailableError
from app.memory import Room
from app.models.seedvr2.config import DiTConfig, config_3b, config_7b
from app.models.seedvr2.dit import DiT
from app.models.seedvr2.fitting import Fit, Limits, fit
from app.models.seedvr2.memory import Choice, Estimate, Task
from app.models.seedvr2.restore import RestoreOptions, Restorer, latent_size
from app.models.seedvr2.vae import VideoVAE
from app.models.seedvr2.vae_config import VAEConfig
from app.models.seedvr2.variants import VARIANTS, Variant
from app.nn.allocations import Allocations
from app.nn.float8 import Product
from benchmarks import memory_autoencode, memory_generate
from benchmarks.cases import draw, ready
from benchmarks.machine import show

GB = 10**9
SHARE = 0.97  # of a card's memory, that programs get
# Bytes free on the host beside a card: of a desk, of a rented machine.
HOST = {12: 64 * GB, 16: 64 * GB, 24: 64 * GB, 80: 200 * GB}
CHOSEN = "What is chosen for the published models, and its predicted peak"
SIZES = {"720p": (720, 1280), "1080p": (1080, 1920), "2160p": (2160, 3840)}
MODELS: dict[str, Callable[[], DiTConfig]] = {"3b": config_3b, "7b": config_7b}
LENGTHS = {"121 frames": 31, "longer": 1000}  # of a shot: latents; the first is one window
NARROW = Variant(
    config_3b(dim=256, heads=2, layers=4, separate=2, text_dim=256),
    VAEConfig(block_out_channels=(32, 64, 128, 128), layers_per_block=1),
)


AnyCase = TypeVar("AnyCase")


@dataclass(frozen=True)
class Case:
    """A restoration on the CPU."""

    variant: Variant
    frames: int
    options: RestoreOptions


def _case(variant: Variant, frames: int, height: int, width: int, **options: Any) -> Case:
    return Case(variant, frames, RestoreOptions(height=height, width=width, **options))


NANO = VARIANTS["nano"]
CASES = {
    "nano, an image of 480x320": _case(NANO, 1, 320, 480),
    "nano, 13 frames of 240x160": _case(NANO, 13, 160, 240),
    "nano, 45 frames of 144x96, windows of 5": _case(NANO, 45, 96, 144, window=5),
    "nano, 25 frames of 400x240, windows of 5, tiles": _case(NANO, 25, 240, 400, window=5, tile=32),
    "narrow, 9 frames of 144x96": _case(NARROW, 9, 96, 144),
}


def main() -> None:
    """Print both tables of each task."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    arguments.add_argument("tasks", nargs="*", help=f"of {', '.join(TASKS)}; default: all")
    arguments.add_argument("--quick", action="store_true", help="one case, one card: see that it runs")
    options = arguments.parse_args()
    if unknown := set(options.tasks) - set(TASKS):
        arguments.error(f"{', '.join(sorted(unknown))}: expected {', '.join(TASKS)}")
    for task in options.tasks or TASKS:
        TASKS[task](quick=options.quick)


def restore_tables(*, quick: bool) -> None:
    compared("a restoration", CASES, predicted, measured, quick=quick)
    if quick:
        table(published([24], ["720p"], ["3b"]))
    else:
        table([*published(), *published((16, 24), models=("3b float8", "7b float8"))])


def generate_tables(*, quick: bool) -> None:
    ours = memory_generate
    compared("a generated clip", ours.CASES, ours.predicted, ours.measured, quick=quick)
    show(CHOSEN, ours.HEAD, ours.published(rooms((24,) if quick else (12, 16, 24, 80))))


def autoencode_tables(*, quick: bool) -> None:
    ours = memory_autoencode
    compared("a clip through a codec", ours.CASES, ours.predicted, ours.measured, quick=quick)
    show(CHOSEN, ours.HEAD, ours.published(rooms((24,) if quick else (12, 16, 24, 80))))


TASKS = {"restore": restore_tables, "generate": generate_tables, "autoencode": autoencode_tables}


def compared(
    what: str,
    cases: Mapping[str, AnyCase],
    predicted: Callable[[AnyCase], int],
    measured: Callable[[AnyCase], int],
    *,
    quick: bool,
) -> None:
    """Print the predicted and the measured peak of each case."""
    rows = []
    for name in list(cases)[: 1 if quick else None]:
        told, found = predicted(cases[name]), measured(cases[name])
        rows.append([name, f"{told / 1e6:.1f}", f"{found / 1e6:.1f}", f"{told / found:.3f}"])
    show(f"Peak of {what}, CPU, float32", ["case", "predicted, MB", "measured, MB", "ratio"], rows)


def rooms(cards: Sequence[int]) -> dict[int, Room]:
    """What cards of so many GiB, and the hosts beside them, have free."""
    return {gib: Room(int(SHARE * gib * 2**30), HOST[gib], apart=True) for gib in cards}


# ------------------------------------------------------------------ measured


def predicted(case: Case) -> int:
    """Bytes that the restoration is said to take, on the device and beside it: here these are one."""
    estimate = Estimate(case.variant.dit, case.variant.vae, torch.float32, torch.float32, "cpu")
    config, options = case.variant.vae, case.options
    task = Task(config.latents_holding(case.frames), latent_size(options, config), color=options.color)
    need = estimate.need(task, Choice(options.window, options.tile, options.stream))
    return need.device + need.host


def measured(case: Case) -> int:
    """Bytes of the weights, and the most that tensors hold beside them."""
    config = case.variant.dit
    dit = ready(lambda: DiT(config), torch.float32, "cpu")
    model = Restorer(
        dit,
        ready(lambda: VideoVAE(case.variant.vae), torch.float32, "cpu"),
        draw(torch.float32, "cpu", 64, config.text_dim),
        draw(torch.float32, "cpu", 64, config.text_dim),
    )
    tensors = *dit.parameters(), *model.vae.parameters(), model.positive, model.negative
    weights = sum(tensor.nbytes for tensor in tensors)
    with torch.inference_mode(), Allocations("cpu") as taken:
        for _ in model.restore_shot(pictures(case), case.frames, case.options):
            pass
    return weights + int(taken.peak)


def pictures(case: Case) -> Iterator[NDArray[np.uint8]]:
    """Frames of half the result's size."""
    draws = np.random.default_rng(0)
    for _ in range(case.frames):
        yield draws.integers(0, 255, (case.options.height // 2, case.options.width // 2, 3), dtype=np.uint8)


# ------------------------------------------------------------------ by arithmetic


@dataclass(frozen=True)
class Row:
    """What is chosen for a model, the size of its result, a shot's length and a card; None: nothing fits."""

    model: str
    size: str
    length: str
    gib: int
    fit: Fit | None


def published(
    cards: Sequence[int] = (24, 80),
    sizes: Sequence[str] = tuple(SIZES),
    models: Sequence[str] = tuple(MODELS),
) -> list[Row]:
    """The planner's choices for the published models; "7b float8" is the 7B with its matrices in 8 bits."""
    rows = []
    for model in models:
        name, _, eight = model.partition(" ")
        estimate = card_estimate(MODELS[name](), "widened" if eight else None)
        for size in sizes:
            height, width = SIZES[size]
            frame = latent_size(RestoreOptions(height=height, width=width), estimate.vae)
            for length, latents in LENGTHS.items():
                task = Task(latents, frame, source=3 * height * width)
                rows += [Row(model, size, length, gib, _fit(estimate, task, gib, size)) for gib in cards]
    return rows


def card_estimate(config: DiTConfig, float8: Product | None = None) -> Estimate:
    """Of a published model as it runs on a card."""
    return Estimate(config, VAEConfig.published(), torch.bfloat16, torch.float16, "cuda", float8)


def _fit(estimate: Estimate, task: Task, gib: int, size: str) -> Fit | None:
    try:
        return fit(estimate, task, rooms([gib])[gib], Limits(window=31), size)
    except UnavailableError:
        return None


def table(rows: Sequence[Row]) -> None:
    """Print the choices, with the card's and the host's memory that each takes."""
    lines = []
    for row in rows:
        start = [f"{row.model} {row.size}, {row.length}", f"{row.gib} GiB"]
        if row.fit is None:
            lines.append([*start, "-", "-", "-", "does not fit", "-"])
            continue
        choice, need = row.fit.choice, row.fit.need
        tile = "whole frames" if row.fit.tile is None else f"{row.fit.tile} px"
        place = "host" if choice.stream else "card"
        lines.append(
            [*start, f"{choice.window}", tile, place, f"{need.device / GB:.1f}", f"{need.host / GB:.1f}"]
        )
    head = ["restoration", "card", "window", "tile", "blocks", "card's GB", "host's GB"]
    show(CHOSEN, head, lines)


if __name__ == "__main__":
    main()
