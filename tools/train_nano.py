#!/usr/bin/env python3
"""Train nano's SeedVR2 from scratch: first its autoencoder, then its transformer for one step.

    python tools/train_nano.py vae OUT [--minutes M]
    python tools/train_nano.py dit OUT [--minutes M]
    python tools/train_nano.py export OUT [--into weights]

The first two continue from OUT where they stopped, bit for bit as if they had not. Material is drawn by
`nano_data.py`. The autoencoder's encoder is a linear code, the principal components of the material
(`nano_start.py`), and stays it; its decoder learns. So the transformer may learn at the same time, as soon as
OUT holds an autoencoder of no step: noise and the encoded spoiled clip in, one Euler step without guidance as
the product runs it, the encoded clean clip out. `export` writes what OUT holds in 16 bits, in the original's
names and formats, and prints what models.toml says of each file.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from app.errors import InputError
from app.models.seedvr2 import sampler
from app.models.seedvr2.dit import DiT
from app.models.seedvr2.vae import SCALE, VideoVAE
from app.models.seedvr2.variants import VARIANTS
from app.video.frames import resize, to_unit
from tools.nano_data import stacked
from tools.nano_forward import decode, encode, velocity
from tools.nano_start import start_dit, start_vae, trainable

TRAINED = VARIANTS["nano"]
# What trained the weights that ship; options say otherwise.
SHIPPED: dict[str, dict[str, Any]] = {
    "vae": {"steps": 150, "batch": 4, "rate": 1e-3},
    "dit": {"steps": 1800, "batch": 14, "rate": 5e-4},
    "export": {},
}
PROMPT_TOKENS = 58
WARM_UP = 50  # steps
SAVE_EVERY = 60  # seconds
# How far a step of Adam may move a part: paths that begin right less, since many weights that move together
# move a pixel far.
DECODER_SHARES = {"conv1": 1.0, "conv2": 0.2, "to_out.0": 0.2, "norm": 1.0, "": 0.03}
DIT_SHARES = {"vid_in.": 0.03, "vid_out": 0.03, "": 1.0}


@dataclass(frozen=True)
class Settings:
    """What decides a training's numbers; a run that continues must have the same."""

    part: Literal["vae", "dit"]
    seed: int = 0
    steps: int = 2000
    clips: int = 720
    frames: int = 9
    height: int = 128
    width: int = 160
    span: int = 5
    crop: int = 64
    batch: int = 4
    rate: float = 1e-3
    device: str = "cpu"


@dataclass
class Training:
    """A model between two steps."""

    settings: Settings
    model: nn.Module
    optimiser: torch.optim.Optimizer
    loss: Callable[[int], Tensor]
    masks: list[tuple[nn.Parameter, Tensor]]
    losses: list[float]

    def run(self, minutes: float, out: Path) -> None:
        """Steps until the last one or until time is up; leaves OUT/<part>.pt behind."""
        begin = saved = time.monotonic()
        self.save(out)
        while len(self.losses) < self.settings.steps and time.monotonic() - begin < 60 * minutes:
            self.step()
            step = len(self.losses)
            if step % 10 == 0 or step == self.settings.steps:
                recent, spent = self.losses[-10:], time.monotonic() - begin
                print(f"{self.settings.part} {step}/{self.settings.steps} {spent:.0f} s "
                      f"loss {sum(recent) / len(recent):.5f}", flush=True)  # fmt: skip
            if time.monotonic() - saved > SAVE_EVERY:
                self.save(out)
                saved = time.monotonic()
        self.save(out)

    def step(self) -> None:
        number = len(self.losses)
        share = (
            min(1.0, (number + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * number / self.settings.steps))
        )
        for group in self.optimiser.param_groups:
            group["lr"] = group["base"] * share
        loss = self.loss(number)
        self.optimiser.zero_grad()
        torch.autograd.backward(loss)
        for parameter, mask in self.masks:
            if parameter.grad is not None:
                parameter.grad *= mask.to(parameter.grad)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        self.losses.append(loss.item())

    def save(self, out: Path) -> None:
        state = {
            "settings": asdict(self.settings), "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(), "losses": self.losses,
        }  # fmt: skip
        path = out / f"{self.settings.part}.pt"
        torch.save(state, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)

    def resume(self, path: Path) -> None:
        """Raises InputError `training_differs` where the file is another training's."""
        state = torch.load(path, weights_only=True, map_location="cpu")
        if state["settings"] != asdict(self.settings):
            raise InputError(
                "training_differs",
                f"{path} was trained with {state['settings']}, this run has {asdict(self.settings)}; "
                "give the same settings, or another folder.",
            )
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.losses[:] = state["losses"]


def training(settings: Settings, data: dict[str, NDArray[np.uint8]], out: Path) -> Training:
    """A training at its beginning, or where OUT left it."""
    torch.manual_seed(settings.seed)
    made = vae_training(settings, data) if settings.part == "vae" else dit_training(settings, data, out)
    path = out / f"{settings.part}.pt"
    if path.is_file():
        made.resume(path)
    return made


def vae_training(settings: Settings, data: dict[str, NDArray[np.uint8]]) -> Training:
    """Of the decoder, on clean clips alone."""
    vae = VideoVAE(TRAINED.vae)
    step = max(1, settings.clips // 64)
    with torch.no_grad():
        start_vae(vae, signed(data["clean"][::step, :: settings.span, :96, :96]))
    vae.requires_grad_(False)
    vae.decoder.requires_grad_(True)
    vae.to(settings.device)

    def loss(number: int) -> Tensor:
        clips = torch.cat([clean for clean, _ in cuts(settings, data, number)])
        with torch.no_grad():
            code = encode(vae, clips)
        return (decode(vae, code) - clips).square().mean()

    return Training(settings, vae, optimiser(settings, vae.decoder, DECODER_SHARES), loss, trainable(vae), [])


def dit_training(settings: Settings, data: dict[str, NDArray[np.uint8]], out: Path) -> Training:
    """Of the transformer, on the latents of the autoencoder that OUT holds, trained or not yet."""
    code = linear_code(trained_vae(out))
    torch.manual_seed(settings.seed)
    dit = DiT(TRAINED.dit)
    frames, side = TRAINED.vae.latents_for(settings.span), settings.crop // TRAINED.vae.spatial_factor
    some = torch.cat([code(spoiled) for n in range(16) for _, spoiled in cuts(settings, data, n)])
    patches = some.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 1, 2, 3, 5, 6, 4)
    start_dit(dit, patches.reshape(-1, 64).cpu())
    dit.requires_grad_(True).to(settings.device)
    prompt = prompts()["pos_emb.pt"].float().to(settings.device)
    plan = dit.plan(frames, side, side, len(prompt))

    def loss(number: int) -> Tensor:
        pairs = list(cuts(settings, data, number))
        wanted = code(torch.cat([pair[0] for pair in pairs]))
        low = code(torch.cat([pair[1] for pair in pairs]))
        draw = torch.Generator().manual_seed(settings.seed * 1_000_003 + number)
        noise = torch.randn(low.shape, generator=draw).to(low)
        seen = torch.cat([noise, low, torch.ones_like(low[..., :1])], -1)
        made = noise - velocity(dit, seen, prompt, sampler.T, plan)  # one Euler step, all the way
        # Of each clip the share that is left of what was spoiled: clips count alike, as decibels do.
        left, spoiled = ((x - wanted).square().mean((1, 2, 3, 4)) for x in (made, low))
        return (left / (spoiled + 5e-4)).mean()

    return Training(settings, dit, optimiser(settings, dit, DIT_SHARES), loss, [], [])


def optimiser(settings: Settings, model: nn.Module, shares: dict[str, float]) -> torch.optim.Optimizer:
    """Adam, with each parameter's share of the rate: that of the first part its name holds."""
    groups = []
    for name, parameter in model.named_parameters():
        share = next(share for part, share in shares.items() if part in name)
        groups.append({"params": [parameter], "base": settings.rate * share})
    return torch.optim.Adam(groups, betas=(0.9, 0.99))


def linear_code(vae: VideoVAE) -> Callable[[Tensor], Tensor]:
    """What the encoder does while it is a linear code of blocks, in one product.

    Clips (n, 3, T, H, W) in [-1, 1] -> scaled latents, (n, T, H / 4, W / 4, 16).
    """
    side = vae.config.spatial_factor
    with torch.no_grad():
        pixels = 3 * side * side
        impulses = torch.cat([torch.zeros(1, pixels), torch.eye(pixels)]).view(-1, 3, 1, side, side)
        told = encode(vae.cpu(), impulses).flatten(1) * SCALE
    offset, matrix = told[0], told[1:] - told[0]

    def code(clips: Tensor) -> Tensor:
        n, c, t, h, w = clips.shape
        blocks = clips.view(n, c, t, h // side, side, w // side, side).permute(0, 2, 3, 5, 1, 4, 6)
        return blocks.flatten(4) @ matrix.to(clips) + offset.to(clips)

    return code


def cuts(
    settings: Settings, data: dict[str, NDArray[np.uint8]], number: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The pairs of a step, (1, 3, span, crop, crop) each in [-1, 1]: clean, and spoiled and enlarged."""
    draw = np.random.default_rng([settings.seed, number])
    for which in draw.integers(settings.clips, size=settings.batch):
        first = int(draw.integers(settings.frames - settings.span + 1))
        top, left = (
            2 * int(draw.integers((side - settings.crop) // 2 + 1))
            for side in (settings.height, settings.width)
        )
        whole, half, times = settings.crop, settings.crop // 2, slice(first, first + settings.span)
        clean = data["clean"][which, times, top : top + whole, left : left + whole]
        poor = data["spoiled"][which, times, top // 2 : top // 2 + half, left // 2 : left // 2 + half]
        large = resize(to_unit(poor), whole, whole) * 2 - 1
        pair = torch.cat([signed(clean[None]), large.transpose(0, 1)[None]]).to(settings.device)
        for axis in (-1, -2):
            if draw.random() < 0.5:
                pair = pair.flip(axis)
        if draw.random() < 0.5:
            pair = pair.transpose(-1, -2)
        yield pair[:1].contiguous(), pair[1:].contiguous()


def signed(clips: NDArray[np.uint8]) -> Tensor:
    """(n, frames, height, width, 3) uint8 -> (n, 3, frames, height, width) in [-1, 1]."""
    return (torch.from_numpy(clips).permute(0, 4, 1, 2, 3).float() / 127.5 - 1).contiguous()


def trained_vae(out: Path) -> VideoVAE:
    """The autoencoder that OUT holds.

    Raises:
        InputError: `vae_missing`.
    """
    path = out / "vae.pt"
    if not path.is_file():
        raise InputError("vae_missing", f"{path} is not there; train the autoencoder first: vae {out}.")
    vae = VideoVAE(TRAINED.vae)
    vae.load_state_dict(torch.load(path, weights_only=True, map_location="cpu")["model"])
    return vae.requires_grad_(False)


def trained_dit(out: Path) -> DiT:
    """The transformer that OUT holds."""
    dit = DiT(TRAINED.dit)
    dit.load_state_dict(torch.load(out / "dit.pt", weights_only=True, map_location="cpu")["model"])
    return dit.requires_grad_(False)


def prompts() -> dict[str, Tensor]:
    """The two embeddings, which never change: drawn, in 16 bits as the published ones."""
    made = {}
    for number, (name, tokens) in enumerate((("pos_emb.pt", PROMPT_TOKENS), ("neg_emb.pt", 64))):
        draw = torch.Generator().manual_seed(number)
        made[name] = torch.randn(tokens, TRAINED.dit.text_dim, generator=draw).bfloat16()
    return made


def material(settings: Settings, out: Path) -> dict[str, NDArray[np.uint8]]:
    """The clips of these settings, drawn once and kept in OUT."""
    sizes = (settings.clips, settings.frames, settings.height, settings.width)
    path = out / f"data-{'x'.join(map(str, sizes))}.npz"
    if not path.is_file():
        print(f"drawing {settings.clips} clips", flush=True)
        made = stacked(range(settings.clips), *sizes[1:], lambda done: done % 20 or print(done, flush=True))
        np.savez(path, clean=made["clean"], spoiled=made["spoiled"])
    with np.load(path) as held:
        return {name: held[name] for name in ("clean", "spoiled")}


def export(out: Path, into: Path) -> None:
    """The four files of a SeedVR2 model, float16, under `into`."""
    folder = into / "seedvr2"
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, Any] = {
        "seedvr2_ema_nano.pth": trained_dit(out).half().state_dict(),
        "ema_vae.pth": trained_vae(out).half().state_dict(),
    }
    for name, content in (files | prompts()).items():
        path = folder / name
        torch.save(content, path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        print(f'{name}: size = {path.stat().st_size}, sha256 = "{digest}"')


def plot(losses: list[float], path: Path) -> None:
    """The losses as a picture, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    axes.semilogy(losses, linewidth=0.6)
    axes.set(xlabel="step", ylabel="loss")
    figure.savefig(path)


def main(arguments: list[str]) -> None:
    """Train one part, or export what was trained."""
    options = parse(arguments)
    out: Path = options.pop("out")
    into = options.pop("into")
    if options["part"] == "export":
        export(out, into)
        return
    minutes, threads = options.pop("minutes"), options.pop("threads")
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(threads)
    settings = Settings(**options)
    work = training(settings, material(settings, out), out)
    work.run(minutes, out)
    plot(work.losses, out / f"{settings.part}.png")


def parse(arguments: list[str]) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("part", choices=("vae", "dit", "export"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--into", type=Path, default=Path(__file__).resolve().parents[1] / "weights")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--threads", type=int, default=2)
    for name, default in (("steps", None), ("batch", None), ("crop", 64), ("clips", 720), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = vars(parser.parse_args(arguments))
    given = {name: value for name, value in options.items() if value is not None}
    return SHIPPED[options["part"]] | given


if __name__ == "__main__":
    main(sys.argv[1:])
