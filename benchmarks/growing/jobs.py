"""Jobs of growing length or area in one process, with nano models whose weights are drawn.

A job is what a job of the program is but for its model, which is there: a file in, a file out. Time is split
by attention, whose operations grow with the square of a frame's area by the published architectures: that of
one head is the autoencoders', within a frame; that of several is the transformers'. Memory is this process's
peak beyond what it held before the job: ffmpeg's processes are not in it.

    python -m benchmarks.growing.jobs restore length FOLDER 9 21
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast
from unittest import mock

import imageio_ffmpeg
import torch
import torch.nn.functional as F

from app.boot.checkpoint import give_back
from app.device import place
from app.job.autoencode import run_autoencode
from app.job.autoencode_plan import plan_autoencode
from app.job.autoencode_request import AutoencodeRequest
from app.job.generate import run_generate
from app.job.generate_plan import Pictures, plan_generate
from app.job.generate_request import GenerateRequest
from app.job.request import RestoreRequest
from app.job.restore import look, plan_restore, run_restore
from app.job.result import Limits
from app.models.latents.codecs import WanCodec
from app.models.seedvr2.variants import VARIANTS as SEEDVR2
from app.models.wan.config import VARIANTS as WAN
from app.models.wan.generate import Generator
from app.models.wan.parts import Abilities
from app.models.wan.text import TextEncoder
from app.models.wan.vae import WanVAE
from app.models.wan.vae_config import VAEConfig
from app.progress import Silent
from benchmarks.card import generate
from benchmarks.card.bench import Bench, drawn
from benchmarks.card.restore import restorer
from benchmarks.measure import host_peak, reset_host_peak

TASKS = ("restore", "generate", "autoencode")
SIDES = 64, 96  # height and width of clips that grow in length
FRAMES = 9  # of clips that grow in area
LIMITS = Limits(pixels=10**8, frames=10**6)
Job = Callable[[Path, int, int, int], object]  # output, frames, height, width


@dataclass(frozen=True)
class Point:
    """`x`: frames, or pixels of a frame, or jobs. `core`: seconds of processors, ffmpeg's among them.
    `frame_attention`, `attention`: core seconds of one head's and of several heads'. `memory`: bytes."""

    x: int
    seconds: float
    core: float
    memory: int
    frame_attention: float = 0.0
    attention: float = 0.0


def main(task: str, axis: str, folder: Path, *sizes: str) -> None:
    """Measure a job of each size, "21" frames or "64x96" pixels, after the smallest once; print JSON."""
    with torch.inference_mode():
        job = JOBS[task](folder)
        wanted = [dimensions(axis, size) for size in sizes]
        measured(job, folder, axis, *wanted[0])
        print(json.dumps([asdict(measured(job, folder, axis, *size)) for size in wanted]))


def dimensions(axis: str, size: str) -> tuple[int, int, int]:
    """Frames, height and width."""
    if axis == "length":
        return int(size), *SIDES
    height, width = map(int, size.split("x"))
    return FRAMES, height, width


def measured(job: Job, folder: Path, axis: str, frames: int, height: int, width: int) -> Point:
    source(folder, frames, height, width)
    output = folder / "out"
    give_back()
    with attention() as spent:
        before = reset_host_peak()
        core, begin = sum(os.times()[:4]), time.perf_counter()
        job(output, frames, height, width)
        took, worked = time.perf_counter() - begin, sum(os.times()[:4]) - core
        memory = host_peak() - before
    for made in folder.glob("out*"):
        shutil.rmtree(made) if made.is_dir() else made.unlink()
    x = frames if axis == "length" else height * width
    return Point(x, took, worked, memory, spent["one"], spent["several"])


@contextmanager
def attention() -> Iterator[dict[str, float]]:
    """Core seconds spent in attention, of one head and of several."""
    spent, plain = {"one": 0.0, "several": 0.0}, F.scaled_dot_product_attention

    def timed(q: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        begin = time.process_time()
        out = plain(q, *rest, **named)
        spent["one" if q.shape[-3] == 1 else "several"] += time.process_time() - begin
        return out

    with mock.patch.object(F, "scaled_dot_product_attention", timed):
        yield spent


def source(folder: Path, frames: int, height: int, width: int) -> Path:
    """A clip of ffmpeg's test picture."""
    path = folder / f"{frames}x{height}x{width}.mp4"
    if not path.exists():
        made = ["-f", "lavfi", "-i", f"testsrc2=size={width}x{height}:rate=24", "-frames:v", str(frames)]
        subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *made, str(path)], check=True)
    return path


# ------------------------------------------------------------------ the tasks


def restore_job(folder: Path) -> Job:
    model = restorer(SEEDVR2["nano"], here())

    def job(output: Path, frames: int, height: int, width: int) -> object:
        clip, made = source(folder, frames, height, width), output.with_suffix(".mp4")
        planned = plan_restore(RestoreRequest(scale=1), look(clip, LIMITS), made, LIMITS)
        return run_restore(model, "nano", planned, Silent())

    return job


def generate_job(folder: Path) -> Job:
    config, vae = WAN["nano"], VAEConfig.nano()
    made = generate.models(config, vae, here())
    able = Abilities("few", (), False, False, frozenset(), config, vae.spatial_factor)
    model = Generator(
        able=able, transformer=made.transformer, vae=made.vae, text=cast(TextEncoder, Short(made.prompt)),
        load_transformer=generate.never, load_pose=generate.never, load_clip=generate.never,
    )  # fmt: skip

    def job(output: Path, frames: int, height: int, width: int) -> object:
        request = GenerateRequest(prompt="a prompt", frames=frames, height=height, width=width)
        planned = plan_generate(request, able, Pictures(), output.with_suffix(".mp4"), LIMITS)
        return run_generate(model, "nano-wan", planned, Silent())

    return job


def autoencode_job(folder: Path) -> Job:
    codec = WanCodec(drawn(lambda: WanVAE(VAEConfig.nano()), torch.device("cpu"), torch.float32))

    def job(output: Path, frames: int, height: int, width: int) -> object:
        clip = source(folder, frames, height, width)
        planned = plan_autoencode(AutoencodeRequest(report=False), clip, {}, output, LIMITS)
        return run_autoencode(codec, "nano-wan-vae", planned, Silent())

    return job


class Short(generate.Known):
    """The text encoder of a prompt that is not too long."""

    note = None

    def tokens(self, prompt: str) -> Short:
        return self


def here() -> Bench:
    return Bench(place("cpu", "float32"), 1.0, 0.0)


JOBS: dict[str, Callable[[Path], Job]] = dict(
    zip(TASKS, (restore_job, generate_job, autoencode_job), strict=True)
)

if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), *sys.argv[4:])
