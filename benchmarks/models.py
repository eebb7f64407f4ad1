"""Time and memory of the passes of every model, with random weights, against peers and the matrix rate.

    python -m benchmarks.models [--real] [--device cuda] [--only TEXT] [--dtype float32] [--seconds 1.5]
                                [--profile [FOLDER]] [--quick]

Narrow models by default, for a laptop; `--real` has the published widths and sizes, for a card. In every
round ours and the peer take their turns. Memory is the peak beyond weights and inputs. The share is that of
the rate of one large matrix product of the same type, measured just before: what matrix products and
convolutions alone would take, over what the pass took. A profile's file holds the tables of all sizes.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count, sdpa_flop_count

from app.nn.linear import linear
from benchmarks.cases import CASES, QUICK, REAL, SMALL, Case, Size, Way, peers
from benchmarks.machine import about, ratios, show, spread
from benchmarks.measure import in_turns, peak_of

ROOT = Path(__file__).resolve().parents[1]
OURS, PEER = "ours", "peer"
LIBRARIES = "diffusers", "transformers"
ROWS = 12  # of a profile


def main() -> None:
    """Measure every pass at three sizes and two types, and print."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    arguments.add_argument("--real", action="store_true", help="published widths and sizes")
    arguments.add_argument("--device", default="cpu")
    arguments.add_argument("--only", default="", help="passes whose name holds this text")
    arguments.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: both")
    arguments.add_argument("--seconds", type=float, default=1.5, help="of the rounds of a pass")
    arguments.add_argument("--profile", type=Path, nargs="?", const=ROOT / "build" / "bench" / "profile",
                           help="keep torch's profiler tables, here or in FOLDER")  # fmt: skip
    arguments.add_argument(
        "--quick", action="store_true", help="one tiny size, once, float32: see that it runs"
    )
    options = arguments.parse_args()
    sizes: tuple[Size, ...] = REAL if options.real else SMALL
    if options.quick:
        sizes, options.seconds, options.dtype = QUICK, 0.0, options.dtype or "float32"
    with torch.inference_mode():
        for dtype in [options.dtype] if options.dtype else ["float32", "bfloat16"]:
            table(getattr(torch, dtype), sizes, options)


def table(dtype: torch.dtype, sizes: tuple[Size, ...], options: argparse.Namespace) -> None:
    """Measure all passes in one type, and print."""
    rate = matrix_rate(dtype, options.device, options.seconds)
    rows: list[list[str]] = []
    profiles: dict[str, list[str]] = {}
    for name, (make, peer) in CASES.items():
        for size in sizes if options.only.lower() in name.lower() else ():
            case = make(size, dtype, options.device, options.real)
            rows.append([name, case.size, *measured(case, rate, options), named(peer, dtype, options.device)])
            if options.profile:
                profiles.setdefault(name, []).append(f"{case.size}\n{profile_of(case.ours, options.device)}")
    kind = str(dtype).removeprefix("torch.")
    for name, texts in profiles.items():
        keep_profile(options.profile, f"{name}, {kind}", texts)
    widths = "published" if options.real else "narrow"
    title = f"Models, {widths} widths, {options.device}, {kind}; matrix product: {rate / 1e9:.3g} GFLOP/s"
    head = ["pass", "size", "ms", "share", "MB", "time / peer's", "peer's MB", "peer"]
    show(title, head, rows, LIBRARIES)


def measured(case: Case, rate: float, options: argparse.Namespace) -> list[str]:
    """Milliseconds, share of the matrix rate, megabytes; ratio of times, the peer's megabytes."""
    ways: dict[str, Way] = {OURS: case.ours} | ({PEER: case.peer} if case.peer else {})
    work = flops(case.ours)  # each way's first pass, which is none of the measured ones
    peaks = {name: peak_of(way, options.device) / 1e6 for name, way in ways.items()}
    taken = in_turns(ways, options.seconds, options.device)
    share = [work / each / rate for each in taken[OURS]]
    own = [spread([1000 * each for each in taken[OURS]]), f"{max(share):.0%}", f"{peaks[OURS]:.3g}"]
    if PEER not in ways:
        return [*own, "-", "-"]
    return [*own, spread(ratios(taken[OURS], taken[PEER])), f"{peaks[PEER]:.3g}"]


def matrix_rate(dtype: torch.dtype, device: str, budget: float) -> float:
    """Operations a second of the best of some large products, as the models' linear layers have them: where
    a CPU has no 16-bit arithmetic torch's own product is ten times slower, and a share of it says nothing."""
    side = 8192 if device.startswith("cuda") else 512
    x, weight = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    linear(x, weight)
    taken = in_turns({OURS: lambda: linear(x, weight)}, budget, device, most=20)
    return 2.0 * side**3 / min(taken[OURS])


def flops(way: Way) -> int:
    """Operations of a pass's matrix products, convolutions and attention."""
    aten = torch.ops.aten
    counted = {
        aten.mkldnn_convolution: _mkldnn_flops,
        aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    }
    with FlopCounterMode(display=False, custom_mapping=counted) as counter:
        way()
    return int(counter.get_total_flops())


def _mkldnn_flops(
    x: list[int], weight: list[int], *rest: object, out_shape: list[int], **named: object
) -> int:
    return int(conv_flop_count(x, weight, out_shape, transposed=False))


def _attention_flops(q: list[int], k: list[int], v: list[int], *rest: object, **named: object) -> int:
    count: Callable[..., int] = sdpa_flop_count
    return count(q, k, v)


def named(peer: str, dtype: torch.dtype, device: str) -> str:
    """A peer, and its type where that is not ours."""
    other = peer in LIBRARIES and peers(dtype, device) != dtype
    return f"{peer}, float32" if other else peer


def profile_of(way: Way, device: str) -> str:
    """Torch's table of a pass, the most expensive operations first."""
    cuda = device.startswith("cuda")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as found:
        way()
    key = f"self_{'device' if cuda else 'cpu'}_time_total"
    text: str = found.key_averages().table(sort_by=key, row_limit=ROWS, max_name_column_width=50)
    return text


def keep_profile(folder: Path, title: str, texts: list[str]) -> None:
    """Write the tables of a pass's sizes to a file, with what they were measured on."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [line.rstrip() for text in (title, *texts, about()) for line in (*text.splitlines(), "")]
    name = re.sub(r"\W+", "-", title).lower()
    (folder / f"{name}.txt").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
