"""What each command imports, and how soon the server is ready, with nano models.

    python -m benchmarks.boot [--repeat 3] [--quick]

Imports are those of real runs: `python -X importtime` of each command, seconds of each package's own modules
added up (so that none is counted in another's), the largest packages that take 30 ms. Where two threads
import, as in `serve`, each one's seconds hold the other's turns. Seconds of a command, and of its CPU, are of
a run without that. What no command may import is in tests/test_imports.py. Ready is from the start of the
process to the first 200 of /ping, `answers` to its first answer; beside it, in the same round, a process that
only imports torch: what no server of torch models can be quicker than.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import imageio_ffmpeg

from benchmarks.machine import ratios, show, spread

ROOT = Path(__file__).resolve().parents[1]
ENTRY = "entrypoint.py"
LEAST, MOST = 0.03, 8  # seconds of a package that is named, and how many are
LIMIT = 300.0  # seconds in which a server must be ready
IMPORT = re.compile(r"^import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)$", re.MULTILINE)
STEP = re.compile(r"boot: (.+): from ([\d.]+) s, (.+)$", re.MULTILINE)
Environ = dict[str, str]


def main() -> None:
    """Make nano models and a clip, measure, print."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    arguments.add_argument("--repeat", type=int, default=3)
    arguments.add_argument("--quick", action="store_true", help="`check` and one start: see that it runs")
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        environ = prepare(folder)
        imports_table(commands(folder, quick=options.quick), environ, 1 if options.quick else options.repeat)
        ready_table(environ, 1 if options.quick else options.repeat)


def prepare(folder: Path) -> Environ:
    """Nano's checkpoints and a clip of ten small frames in `folder`; the environment that names them."""
    maker = [sys.executable, "tools/make_nano.py", str(folder)]
    subprocess.run(maker, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    source = ["-f", "lavfi", "-i", "testsrc2=size=48x32:rate=10", "-frames:v", "10"]
    ffmpeg = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *source, str(folder / "in.mp4")]
    subprocess.run(ffmpeg, check=True)
    settings = {"ROOTS": str(folder), "CACHE": str(folder / "cache"), "SCRATCH": str(folder / "scratch")}
    settings |= {"MODELS": "nano,nano-wan,nano-vqvae", "HOST": "127.0.0.1"}
    kept = {key: value for key, value in os.environ.items() if not key.startswith("SEEDPOD_")}
    return kept | {f"SEEDPOD_{key}": value for key, value in settings.items()}


def commands(folder: Path, *, quick: bool) -> dict[str, list[str]]:
    """The paths through the program, by name. `serve` is measured until it is ready."""
    paths = {
        "check": ["check", "nano", "nano-wan"],
        "stage": ["stage", "nano", "nano-wan"],
        "serve, until ready": ["serve"],
    }
    if quick:
        return paths
    clip, out = str(folder / "in.mp4"), str(folder / "out.mp4")
    return paths | {
        "run restore": ["run", "restore", clip, "-o", out, "--model", "nano"],
        "run generate": ["run", "generate", "a cat", "-o", out, "--model", "nano-wan", "--frames", "9",
                         "--height", "32", "--width", "48"],
        "run autoencode": ["run", "autoencode", clip, "-o", str(folder / "latents"), "--model", "nano-vqvae"],
    }  # fmt: skip


# ------------------------------------------------------------------ running


@dataclass(frozen=True)
class Run:
    """A run of a command: its seconds, those of its CPU, those until a server's first answer, and what it
    wrote to stderr."""

    seconds: float
    cpu: float
    answers: float
    told: str


def run(arguments: list[str], environ: Environ, *flags: str) -> Run:
    """Run a command; a server until it is ready."""
    command = [sys.executable, *flags, ENTRY, *arguments]
    if "-o" in arguments:  # a folder that must not be there yet
        shutil.rmtree(arguments[arguments.index("-o") + 1], ignore_errors=True)
    with tempfile.TemporaryFile("w+") as told:
        begin, before = time.perf_counter(), os.times()
        if arguments == ["serve"]:
            took, answers = serve(command, environ, told.fileno(), begin)
        else:
            subprocess.run(command, cwd=ROOT, env=environ, check=True, stdout=subprocess.DEVNULL, stderr=told)
            took = answers = time.perf_counter() - begin
        after = os.times()
        told.seek(0)
        cpu = after.children_user + after.children_system - before.children_user - before.children_system
        return Run(took, cpu, answers, told.read())


def serve(command: list[str], environ: Environ, told: int, begin: float) -> tuple[float, float]:
    """Start a server, wait until it is ready, end it; seconds until it was ready, and until it answered."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environ = environ | {"SEEDPOD_PORT": str(port)}
    process = subprocess.Popen(command, cwd=ROOT, env=environ, stdout=subprocess.DEVNULL, stderr=told)
    answers: float | None = None
    try:
        while (status := ping(port)) != 200:
            if status is not None and answers is None:
                answers = time.perf_counter() - begin
            if process.poll() is not None or time.perf_counter() - begin > LIMIT:
                raise RuntimeError(f"{' '.join(command)} did not get ready; exit status {process.poll()}")
            time.sleep(0.05)
        ready = time.perf_counter() - begin
        return ready, answers or ready
    finally:
        process.terminate()
        process.wait()


def ping(port: int) -> int | None:
    """What the server on this port answers; None if nothing."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5) as answer:
            return int(answer.status)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return None


# ------------------------------------------------------------------ tables


def imports_table(paths: dict[str, list[str]], environ: Environ, repeat: int) -> None:
    """What each path imports, and for how long."""
    rows = []
    for name, arguments in paths.items():
        run(arguments, environ)  # compiles and fills the page cache
        runs = [run(arguments, environ) for _ in range(repeat)]
        found = IMPORT.findall(run(arguments, environ, "-X", "importtime").told)
        packages = by_package(found)
        heavy = [f"{package} {took:.2f}" for package, took in packages[:MOST] if took >= LEAST]
        total = sum(took for _, took in packages)
        took = spread([each.seconds for each in runs]), spread([each.cpu for each in runs])
        rows.append([name, *took, f"{len(found)}", f"{total:.2f}", ", ".join(heavy)])
    header = ["path", "seconds", "CPU s", "modules", "s of imports", "packages, s of their own modules"]
    show("What each path imports", header, rows)


def by_package(found: list[tuple[str, str]]) -> list[tuple[str, float]]:
    """Seconds of each top package's own modules, most first; Python's own together."""
    seconds: dict[str, float] = defaultdict(float)
    for microseconds, module in found:
        package = module.split(".")[0]
        seconds["(Python)" if package in sys.stdlib_module_names else package] += int(microseconds) / 1e6
    return sorted(seconds.items(), key=lambda pair: -pair[1])


def ready_table(environ: Environ, repeat: int) -> None:
    """How soon the server is ready, and the steps of the last boot."""
    runs, torch = [], []
    for _ in range(repeat):
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import torch"], check=True)
        torch.append(time.perf_counter() - begin)
        runs.append(run(["serve"], environ))
    answers, ready = [each.answers for each in runs], [each.seconds for each in runs]
    less = [one - other for one, other in zip(ready, torch, strict=True)]
    rows = [
        ["import torch, alone", spread(torch), spread(ratios(torch, torch))],
        ["serve, until it answers", spread(answers), spread(ratios(answers, torch))],
        ["serve, until ready", spread(ready), spread(ratios(ready, torch))],
        ["the difference", spread(less), spread(ratios(less, torch))],
    ]
    show("From the start of the process to ready, three models", ["what", "seconds", "/ import torch"], rows)
    steps = [[name, begin, rest] for name, begin, rest in STEP.findall(runs[-1].told)]
    show("Timeline of the last boot, from its begin", ["step", "from, s", "took"], steps)


if __name__ == "__main__":
    main()
