"""Loading a `.pth` and a safetensors file into a model, against torch, safetensors and a plain read.

    python -m benchmarks.loading [--size 1.0] [--folder build/bench] [--repeat 3] [--seconds 30] [--cold]
                                 [--quick]

Every load is a process of its own, forked from one that has imported torch; in every round each way takes its
turn, and a table has as many rounds as fit in `--seconds`, at least one. The time is of the load alone, with
the model's build and one look at each page of the weights (what is mapped is only read then). `read` in the
ratio is that by 8 threads. Peak: the process's host memory beyond what it held before the load. With `--cold`
the file's pages are dropped from the page cache first. On a machine with a card, loads to it are measured
too.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from app.boot.checkpoint import load
from app.boot.manifest import Format
from app.boot.tensorread import bytes_of, open_reader
from benchmarks.machine import ratios, show, spread
from benchmarks.measure import host_peak, reset_host_peak, seconds

ROOT = Path(__file__).resolve().parents[1]
WIDTH = 1024  # of the layers that the model consists of
BLOCK = 1 << 23
READERS = 8
OWN = "seedpod"
READ = f"read, {READERS} threads"  # what times are compared with
State = dict[str, torch.Tensor]
Job = tuple[Path, str, torch.dtype | None]  # file, device, type or None for the file's


def main() -> None:
    """Write the files, measure, print."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    arguments.add_argument("--size", type=float, default=1.0, help="GB of a file (default: 1)")
    arguments.add_argument("--folder", type=Path, default=ROOT / "build" / "bench")
    arguments.add_argument("--repeat", type=int, default=3, help="rounds at most")
    arguments.add_argument("--seconds", type=float, default=30.0, help="of a table's rounds")
    arguments.add_argument("--cold", action="store_true", help="drop the file from the page cache first")
    arguments.add_argument(
        "--quick", action="store_true", help="10 MB, once, in one process: see that it runs"
    )
    options = arguments.parse_args()
    if options.quick:
        options.size, options.repeat = 0.01, 1
    options.folder.mkdir(parents=True, exist_ok=True)
    files: dict[Format, Path] = {
        "torch": options.folder / "loading.pth",
        "safetensors": options.folder / "loading.safetensors",
    }
    try:
        write(files, int(options.size * 1e9))
        measure = one if options.quick else in_process
        for device in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
            table(files["torch"], device, "stored", options, measure)
            table(files["safetensors"], device, "stored", options, measure)
            table(files["torch"], device, "bfloat16", options, measure)
    finally:
        for path in files.values():
            path.unlink(missing_ok=True)


def write(files: dict[Format, Path], size: int) -> None:
    """Both files with the same random weights, float32."""
    layers = max(1, size // (4 * WIDTH * (WIDTH + 1)))
    state = {name: torch.randn(tensor.shape) for name, tensor in build(layers).state_dict().items()}
    torch.save(state, files["torch"])
    save_file(state, files["safetensors"])
    os.sync()


class Layer(nn.Linear):
    """A linear layer whose weights are not drawn: every way has others for it."""

    def reset_parameters(self) -> None: ...


def build(layers: int, dtype: torch.dtype | None = None) -> nn.Module:
    """The model: so many linear layers."""
    return nn.ModuleList(Layer(WIDTH, WIDTH, dtype=dtype) for _ in range(layers))


# ------------------------------------------------------------------ the ways


def own(path: Path, device: str, dtype: torch.dtype | None) -> State:
    format: Format = "safetensors" if path.suffix == ".safetensors" else "torch"
    layers = layers_of(path)
    made = load(lambda: build(layers), path, format, device=device, dtype=dtype, readers=READERS)
    return made.state_dict()


def assigned(read: Callable[[Path, str], State]) -> Callable[..., State]:
    """The tensors of the file become the model's: the quickest way with torch alone."""

    def way(path: Path, device: str, dtype: torch.dtype | None) -> State:
        with torch.device("meta"):
            model = build(layers_of(path))
        model.load_state_dict(read(path, device), assign=True)
        return model.to(dtype=dtype).state_dict()

    return way


def copied(read: Callable[[Path, str], State]) -> Callable[..., State]:
    """The tensors of the file are copied into the model's, of the type that is asked for."""

    def way(path: Path, device: str, dtype: torch.dtype | None) -> State:
        with torch.device(device):
            model = build(layers_of(path), dtype)
        model.load_state_dict(read(path, "cpu"))
        return model.state_dict()

    return way


def read_torch(path: Path, device: str) -> State:
    state: State = torch.load(path, map_location=device, weights_only=True)
    return state


def read_mapped(path: Path, device: str) -> State:
    state: State = torch.load(path, map_location=device, weights_only=True, mmap=True)
    return state


def read_safetensors(path: Path, device: str) -> State:
    return load_file(path, device=device)


def raw(readers: int) -> Callable[..., State]:
    """The file's bytes into one piece of the host's memory, and nothing else."""

    def way(path: Path, device: str, dtype: torch.dtype | None) -> State:
        size = path.stat().st_size
        memory = torch.empty(size, dtype=torch.uint8)
        buffer = bytes_of(memory)
        with open_reader(path) as reader, ThreadPoolExecutor(readers) as threads:
            list(threads.map(lambda at: reader.read_into(buffer[at : at + BLOCK], at), range(0, size, BLOCK)))
        return {"file": memory}

    return way


def ways_of(format: Format) -> dict[str, Callable[..., State]]:
    """What is measured for a format, by name; the plain reads come first."""
    ways: dict[str, Callable[..., State]] = {"read, 1 thread": raw(1), READ: raw(READERS), OWN: own}
    if format == "safetensors":
        return ways | {
            "load_file, assigned": assigned(read_safetensors),
            "load_file, copied": copied(read_safetensors),
        }
    return ways | {
        "torch.load, assigned": assigned(read_torch),
        "torch.load, copied": copied(read_torch),
        "torch.load mmap, assigned": assigned(read_mapped),
        "torch.load mmap, copied": copied(read_mapped),
    }


def layers_of(path: Path) -> int:
    """How many layers the file holds, by its size: its names take less than a layer."""
    return max(1, path.stat().st_size // (4 * WIDTH * (WIDTH + 1)))


# ------------------------------------------------------------------ measuring


def one(name: str, path: str, device: str, dtype: str) -> dict[str, float]:
    """A load in this process: its seconds, and bytes of host memory at its peak."""
    way = ways_of("safetensors" if path.endswith(".safetensors") else "torch")[name]
    if device == "cuda":
        torch.cuda.synchronize()  # its start is no part of the load
    wanted = None if dtype == "stored" else getattr(torch, dtype)

    def loaded() -> None:
        for tensor in way(Path(path), device, wanted).values():
            flat = tensor.view(-1)
            flat[:: 4096 // flat.itemsize].max()

    before = reset_host_peak()
    took = seconds(loaded, device)
    return {"seconds": took, "peak": host_peak() - before}


def in_process(name: str, path: str, device: str, dtype: str) -> dict[str, float]:
    """`one` in a process of its own."""
    context = multiprocessing.get_context("forkserver")  # the same for every call: it imports torch once
    context.set_forkserver_preload(["app.boot.checkpoint", "benchmarks.measure", "safetensors.torch"])
    with ProcessPoolExecutor(1, context) as process:
        return process.submit(one, name, path, device, dtype).result()


def table(
    path: Path,
    device: str,
    dtype: str,
    options: argparse.Namespace,
    measure: Callable[..., dict[str, float]],
) -> None:
    """Measure every way, and print."""
    ways = ways_of("safetensors" if path.suffix == ".safetensors" else "torch")
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    begin = time.perf_counter()
    for rounds in range(1, options.repeat + 1):
        for name in ways:
            page_cache(path, options.cold)
            runs[name].append(measure(name, str(path), device, dtype))
        if (time.perf_counter() - begin) * (rounds + 1) / rounds > options.seconds:
            break
    size = path.stat().st_size
    took = {name: [run["seconds"] for run in taken] for name, taken in runs.items()}
    rows = [
        [
            name,
            spread([size / 1e9 / each for each in took[name]]),
            *(spread(ratios(took[name], took[other])) for other in (READ, OWN)),
            f"{statistics.median(run['peak'] for run in taken) / size:.2f}",
        ]
        for name, taken in runs.items()
    ]
    title = f"Loading {path.suffix}, {size / 1e9:.2f} GB float32, to {device}, type: {dtype}, "
    head = ["way", "GB/s", "time / read", f"time / {OWN}", "peak / file"]
    show(title + ("cold" if options.cold else "warm") + " page cache", head, rows, ["safetensors"])


def page_cache(path: Path, cold: bool) -> None:
    """Take the file's pages out of the page cache, or bring them in."""
    with path.open("rb", buffering=0) as file:
        if cold:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        else:
            buffer = bytearray(BLOCK)
            while file.readinto(buffer):
                pass


if __name__ == "__main__":
    main()
