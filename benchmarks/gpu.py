"""Every model of the published sizes on one card, with random weights, within ten minutes.

    python -m benchmarks.gpu [--only restore] [--seconds 540] [--compile] [--device cpu --sizes tiny]

Weights are drawn on the card; nothing is fetched and nothing is read but a file in memory. Needs torch,
numpy, einops, safetensors and this repository, and no other package. Shares are of the rate of one large
matrix product in the transformers' type, measured first: what matrix products, convolutions and attention
alone would take at it, over what was taken. `GB` is what tensors took at most, weights included, and in
brackets what torch's allocator held. `--compile` adds the transformers' passes with compiled steps beside
plain ones. Without a card it ends with status 69; with `--device cpu --sizes tiny`
the same code runs anywhere.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch

from app.boot.checkpoint import give_back
from app.device import place
from app.models.seedvr2.variants import VARIANTS as SEEDVR2
from app.models.seedvr2.variants import Variant
from app.models.wan.config import VARIANTS as WAN
from app.models.wan.config import TransformerConfig
from app.models.wan.umt5_config import UMT5_NANO, UMT5_XXL, UMT5Config
from app.models.wan.vae_config import VAEConfig
from benchmarks.card import compiled, generate, loading, restore
from benchmarks.card.bench import Bench
from benchmarks.machine import show
from benchmarks.measure import in_turns

UNAVAILABLE = 69
SECONDS = 540.0
Rows = Iterator[Sequence[str]]


@dataclass(frozen=True)
class Sizes:
    """What is measured. `frames`: of a clip to restore, whichever there is time for. `matrix`: the side of
    the product whose rate is the measure. `nbytes`: of the file that is loaded."""

    restorers: dict[str, Variant]
    restored: dict[str, tuple[int, int]]
    frames: tuple[int, ...]
    transformer: TransformerConfig
    vae: VAEConfig
    generated: tuple[int, int, int]  # height, width, frames
    text: UMT5Config
    tokens: tuple[int, ...]
    matrix: int
    nbytes: int


SIZES = {
    "published": Sizes(
        {"3B": SEEDVR2["3b"], "7B": SEEDVR2["7b"]},
        {"720p": (720, 1280), "1080p": (1080, 1920)},
        (21, 37, 61, 121),
        WAN["1.3b"], VAEConfig.published(), (480, 832, 117),
        UMT5_XXL, (64, 512), 8192, 4 * 10**9,
    ),
    "tiny": Sizes(
        {"nano": SEEDVR2["nano"]},
        {"16p": (16, 24), "30p": (30, 40)},
        (5, 9),
        WAN["nano"], VAEConfig.nano(), (32, 48, 21),
        UMT5_NANO, (8, 16), 128, 10**6,
    ),
}  # fmt: skip


def main(words: Sequence[str] | None = None) -> int:
    """Measure and print; each table as soon as it is there. 1 if something could not be measured."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    arguments.add_argument(
        "--only", default="", help=f"of {', '.join(PARTS)}: those whose name holds this text"
    )
    arguments.add_argument(
        "--seconds", type=float, default=SECONDS, help="in which all is done (default: 540)"
    )
    arguments.add_argument("--device", default="cuda")
    arguments.add_argument("--sizes", choices=SIZES, default="published")
    arguments.add_argument("--compile", action="store_true", help="also what SEEDPOD_COMPILE gains")
    options = arguments.parse_args(words)
    end = time.perf_counter() + options.seconds
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print(
            f"NOT MEASURED: torch {torch.__version__} sees no CUDA card here. On a machine with one run this "
            "again; to try the code itself: python -m benchmarks.gpu --device cpu --sizes tiny",
            file=sys.stderr,
        )
        return UNAVAILABLE
    sizes, spot = SIZES[options.sizes], place(options.device, "auto")
    failures: list[str] = []
    with torch.inference_mode():
        bench = Bench(spot, matrix_rate(sizes.matrix, spot.device, spot.dtype), end)
        kind = str(spot.dtype).removeprefix("torch.")
        rate = f"{bench.rate / 1e12:.3g} TFLOP/s"
        print(f"Matrix product, {kind}: {rate}. Weights are random, sizes {options.sizes}.")
        for name, measure in (PARTS | (COMPILED if options.compile else {})).items():
            if options.only.lower() in name.lower():
                measure(sizes, bench, Attempts(bench, failures))
    for failure in failures:
        print(f"NOT MEASURED: {failure}", file=sys.stderr)
    return int(bool(failures))


class Attempts:
    """What cannot be measured takes nothing else with it: too little memory or time, or an error."""

    def __init__(self, bench: Bench, failures: list[str]) -> None:
        self.bench, self.failures = bench, failures

    def __call__(
        self, name: str, width: int, way: Callable[[], Sequence[Sequence[str]]]
    ) -> Sequence[Sequence[str]]:
        """The rows of `way`, or one of `width` cells that says why there are none."""
        try:
            if self.bench.left < 0:
                raise TimeoutError("no time was left")
            return way()
        except Exception as error:
            if not isinstance(error, TimeoutError | torch.OutOfMemoryError):
                traceback.print_exc()
            reason = (str(error).splitlines() or [""])[0][:100] or type(error).__name__
        self.failures.append(f"{name}: {reason}")
        return [[name, f"not measured: {reason}", *[""] * (width - 2)]]


def matrix_rate(side: int, device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of the best of some products of random matrices, as a linear layer has them."""
    x, weight = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = {"": lambda: torch.nn.functional.linear(x, weight)}
    in_turns(product, 1.0, str(device), most=5)
    return 2.0 * side**3 / min(in_turns(product, 2.0, str(device), most=20)[""])


def generate_tables(sizes: Sizes, bench: Bench, attempt: Attempts) -> None:
    size = *sizes.generated, bench
    made = generate.models(sizes.transformer, sizes.vae, bench)
    head = generate.CLIP_HEAD
    rows = attempt("a clip", len(head), partial(generate.clip_rows, made, *size))
    show("Generate, four steps a block, from a known prompt to frames on the host", head, rows)
    head = generate.BLOCK_HEAD
    show(
        "Generate, block by block",
        head,
        attempt("blocks", len(head), partial(generate.block_rows, made, *size)),
    )
    del made
    give_back()


def text_table(sizes: Sizes, bench: Bench, attempt: Attempts) -> None:
    head = generate.TEXT_HEAD
    rows = attempt("T5", len(head), lambda: generate.text_rows(sizes.text, sizes.tokens, bench))
    show("Text encoder (UMT5), one prompt", head, rows)
    give_back()


def loading_table(sizes: Sizes, bench: Bench, attempt: Attempts) -> None:
    rows = attempt("loading", len(loading.HEAD), lambda: loading.rows(sizes.nbytes, bench))
    show(f"Loading {sizes.nbytes / 1e9:.3g} GB in 16 bits, a safetensors file in memory", loading.HEAD, rows)
    give_back()


def restore_table(sizes: Sizes, bench: Bench, attempt: Attempts) -> None:
    """Each model at each size, with its part of the time that is left."""
    rows: list[Sequence[str]] = []
    waiting = len(sizes.restorers) * len(sizes.restored)
    for name, variant in sizes.restorers.items():
        give_back()
        model = cache(partial(restore.restorer, variant, bench))
        for size, (height, width) in sizes.restored.items():
            # Half of a part: clips before it warm up, and counting takes its time, too.
            budget = 0.5 * bench.left / waiting
            title = f"{name} {size}"
            way = partial(restore.row, title, model, variant, height, width, sizes.frames, bench, budget)
            rows += attempt(title, len(restore.HEAD), way)
            waiting -= 1
    show("Restore, one step, colour lab, from frames on the host to frames on the host", restore.HEAD, rows)


def compile_table(sizes: Sizes, bench: Bench, attempt: Attempts) -> None:
    """Each model alone: compiled code of one takes nothing from the others."""
    height, width, _ = sizes.generated
    factor, head = sizes.vae.spatial_factor, compiled.HEAD
    ways: dict[str, Callable[[], Sequence[Sequence[str]]]] = {
        name: partial(compiled.restore_rows, name, variant, sizes.restored, sizes.frames[0], bench)
        for name, variant in sizes.restorers.items()
    }
    latents = height // factor, width // factor
    ways["generate"] = partial(compiled.generate_rows, sizes.transformer, *latents, bench)
    rows: list[Sequence[str]] = []
    for name, way in ways.items():
        rows += attempt(name, len(head), way)
        give_back()
    show("A pass of the transformers with compiled steps, and with plain ones", head, rows)


PARTS = {
    "generate": generate_tables,
    "text": text_table,
    "loading": loading_table,
    "restore": restore_table,
}
COMPILED = {"compile": compile_table}

if __name__ == "__main__":
    sys.exit(main())
