"""Memory of a generated clip: predicted against measured, and what the published model takes by arithmetic.

`python -m benchmarks.memory generate` prints it; see there for what is measured and how.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn, cast

import torch
from torch import Tensor

from app.errors import UnavailableError
from app.memory import Room
from app.models.wan.clip_config import CLIP_NANO, CLIP_VIT_H
from app.models.wan.config import VARIANTS, TransformerConfig
from app.models.wan.fitting import Fit, Limits, fit
from app.models.wan.generate import GenerateOptions, Generator, Guide, Stays, nbytes_of
from app.models.wan.length import Start, length
from app.models.wan.memory import Choice, Estimate, Task
from app.models.wan.parts import Abilities
from app.models.wan.pose import PoseEmbedder
from app.models.wan.text import TextEncoder
from app.models.wan.transformer import Transformer
from app.models.wan.umt5_config import UMT5_NANO, UMT5_XXL
from app.models.wan.vae import WanVAE
from app.models.wan.vae_config import VAEConfig
from app.models.wan.variants import Sampling
from app.nn.allocations import Allocations
from benchmarks.cases import draw, ready

GB = 10**9
T5 = 11_361_820_672  # bytes of the published text encoder
SIZE = 480, 832
SECONDS = {"5 s": 81, "20 s": 321}  # frames
NARROW = replace(VARIANTS["nano"], layers=4), VAEConfig(dim=32, num_res_blocks=1)
NANO = VARIANTS["nano"], VAEConfig.nano()


@dataclass(frozen=True)
class Case:
    """A clip on the CPU. start, poses: frames of its guide's."""

    models: tuple[TransformerConfig, VAEConfig]
    options: GenerateOptions
    start: int = 0
    poses: int = 0


def _options(frames: int, height: int, width: int, start: int = 0, **changes: Any) -> GenerateOptions:
    """Options of a clip made block by block, of nothing, an image, or a clip of `start` frames."""
    kind: Start = "nothing" if not start else "image" if start == 1 else "clip"
    made = length(frames, kind, blocks=True, given=(start + 3) // 4)
    options = GenerateOptions({0: "a prompt"}, made, height, width)
    return replace(options, **changes)


def _at_once(frames: int, height: int, width: int) -> GenerateOptions:
    made = length(frames, "nothing", blocks=False)
    return GenerateOptions({0: "a prompt"}, made, height, width, guidance=5.0, steps=4)


CASES = {
    "nano, 45 frames of 240x160": Case(NANO, _options(45, 160, 240)),
    "nano, 117 frames of 96x64, window of 9": Case(NANO, _options(117, 64, 96, window=9, sink=3)),
    "nano, 25 frames of 240x160 from an image": Case(NANO, _options(25, 160, 240, 1), 1),
    "nano, 24 frames of 160x96 after 33": Case(NANO, _options(24, 96, 160, 33), 33),
    "nano, 33 frames of 160x96 with poses": Case(NANO, _options(33, 96, 160), 0, 33),
    "narrow, 33 frames of 144x96": Case(NARROW, _options(33, 96, 144)),
    "narrow, 33 frames of 144x96, guided": Case(NARROW, _options(33, 96, 144, guidance=3.0)),
    "narrow, 33 frames of 144x96, one by one": Case(NARROW, _options(33, 96, 144, decode=1)),
    "narrow, 17 frames of 96x64 at once": Case(NARROW, _at_once(17, 64, 96)),
}


# ------------------------------------------------------------------ measured


def predicted(case: Case) -> int:
    """Bytes that the clip is said to take, on the device and beside it: here these are one."""
    config, vae = case.models
    able = Abilities("few", (), False, config.pose, frozenset(), config, vae.spatial_factor)
    able = replace(able, sampling="many") if case.options.length.at_once else able
    estimate = Estimate(able, vae, replace(UMT5_NANO, dim=config.text_dim), CLIP_NANO,
                        torch.float32, torch.float32, "cpu")  # fmt: skip
    parts = frozenset({"pose"} if case.poses else ())
    task = Task(case.options, case.start, case.poses, parts=parts)
    need = estimate.need(task, Choice(case.options.window, case.options.decode))
    return need.device + need.host


def measured(case: Case) -> int:
    """Bytes of the weights, and the most that tensors hold beside them while a job makes the clip."""
    config, vae = case.models
    sampling: Sampling = "many" if case.options.length.at_once else "few"
    pose = ready(PoseEmbedder, torch.float32, "cpu")
    made = Generator(
        able=Abilities(sampling, (), False, config.pose, frozenset(), config, vae.spatial_factor),
        transformer=ready(lambda: Transformer(config), torch.float32, "cpu"),
        vae=ready(lambda: WanVAE(vae), torch.float32, "cpu"),
        text=cast(TextEncoder, Drawn(config.text_dim)),
        load_transformer=_never, load_pose=lambda: pose, load_clip=_never,
    )  # fmt: skip
    weights = nbytes_of(made._transformer, made._vae, pose if case.poses else None)
    size = 3, case.options.height, case.options.width
    with torch.inference_mode(), Allocations("cpu") as counted:
        guide = Guide(
            torch.zeros(case.start, *size) if case.start else None,
            torch.zeros(case.poses, *size, dtype=torch.uint8) if case.poses else None,
        )
        pieces = made.generate(case.options, guide)
        del guide
        for frames in pieces:
            shown = frames.float().clamp(-1, 1)
            del frames, shown
    return weights + int(counted.peak)


class Drawn:
    """The text encoder of prompts that were encoded before."""

    loaded = False

    def __init__(self, width: int) -> None:
        self.width = width

    def encode(self, prompts: Sequence[str]) -> Tensor:
        return draw(torch.float32, "cpu", len(prompts), 512, self.width)


def _never(*arguments: object) -> NoReturn:
    raise AssertionError("nothing is to be loaded")


# ------------------------------------------------------------------ by arithmetic


def published(rooms: dict[int, Room]) -> list[list[str]]:
    """The planner's choices for the published model in 16 bits and a new prompt: rows of the table."""
    estimate, rows = card_estimate(), []
    for name, frames in SECONDS.items():
        options = _options(frames - frames % 12 + 9 - 12 * (frames % 12 < 9), *SIZE)
        for gib, room in rooms.items():
            start = [f"{SIZE[1]}x{SIZE[0]}, {name}", f"{gib} GiB"]
            try:
                found = _fit(estimate, options, room)
            except UnavailableError:
                rows.append([*start, "-", "-", "does not fit", "-", "-"])
                continue
            choice, need = found.choice, found.need
            pieces = "3 at a time" if choice.decode is None else "one by one"
            where = {"device": "card", "host": "host", "nowhere": "-"}[choice.text]
            where = where if found.task.reads == "device" else "host, computes there"
            rows.append([*start, f"{found.window}", pieces, where,
                         f"{need.device / GB:.1f}", f"{need.host / GB:.1f}"])  # fmt: skip
    return rows


def card_estimate() -> Estimate:
    """Of the published model as it runs on a card."""
    config, vae = VARIANTS["1.3b"], VAEConfig.published()
    able = Abilities("few", (), False, False, frozenset(), config, vae.spatial_factor)
    return Estimate(able, vae, UMT5_XXL, CLIP_VIT_H, torch.bfloat16, torch.float16, "cuda")


def _fit(estimate: Estimate, options: GenerateOptions, room: Room) -> Fit:
    """As a job would be done, after a load that put the text encoder where it has room."""
    fits = room.holds(replace(estimate.need(Task(options), Choice(None)), device=T5 + estimate.weights()))
    stays: tuple[Stays, ...] = ("device", "host", "nowhere") if fits else ("host", "nowhere")
    task = Task(options, text=T5, reads="device" if fits else "host")
    return fit(estimate, task, room, Limits(stays), "A clip")


HEAD = ["clip", "card", "window", "decoded", "text encoder", "card's GB", "host's GB"]
