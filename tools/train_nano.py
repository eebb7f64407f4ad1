#!/usr/bin/env python3
"""Train nano's SeedVR2 from scratch: first its autoencoder, then its transformer for one step.

    python tools/train_nano.py vae OUT [--steps N] [--minutes M]
    python tools/train_nano.py dit OUT [--steps N] [--minutes M]

Both continue from OUT where they stopped, bit for bit as if they had not. Material is drawn by
`nano_data.py`. The transformer learns what the product runs: noise and the encoded spoiled clip in, one Euler
step without guidance, the encoded clean clip out; in its second half also through the decoder, in pixels.
"""

from __future__ import annotations

import argparse
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
from app.models.seedvr2.config import config_3b
from app.models.seedvr2.dit import DiT
from app.models.seedvr2.vae import SCALE, VideoVAE
from app.models.seedvr2.vae_config import VAEConfig
from app.models.seedvr2.variants import Variant
from app.video.frames import resize, to_unit
from tools.nano_data import stacked
from tools.nano_forward import decode, encode, velocity
from tools.nano_start import start_dit, start_vae, trainable

TRAINED = Variant(
    config_3b(dim=96, heads=2, head_dim=48, layers=4, separate=2, text_dim=64),
    VAEConfig((8, 16, 32), layers_per_block=1, norm_num_groups=1, temporal_scale_num=1),
)
PROMPT_TOKENS = 58
WARM_UP = 20  # steps
SAVE_EVERY = 60  # seconds
# Parts of the autoencoder, by how far a step of Adam may move them: the path beside the residual branches
# begins right, and 27 taps that move together move a pixel far.
SHARES = {"conv1": 1.0, "conv2": 0.2, "to_out.0": 0.2, "norm": 1.0}
PATH_SHARE = 0.05


@dataclass(frozen=True)
class Settings:
    """What decides a training's numbers; a run that continues must have the same."""

    part: Literal["vae", "dit"]
    seed: int = 0
    steps: int = 2000
    clips: int = 160
    frames: int = 9
    height: int = 128
    width: int = 160
    crop: int = 64
    batch: int = 4
    rate: float = 1e-3


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
        loss.backward()  # type: ignore[no-untyped-call]
        for parameter, mask in self.masks:
            if parameter.grad is not None:
                parameter.grad *= mask
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
        state = torch.load(path, weights_only=True)
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
    """Of the autoencoder, on clean clips alone."""
    vae = VideoVAE(TRAINED.vae)
    step = max(1, settings.clips // 16)
    with torch.no_grad():
        start_vae(vae, signed(data["clean"][::step, :, :96, :96]))
    vae.requires_grad_(True)
    groups = []
    for name, parameter in vae.named_parameters():
        share = next((share for part, share in SHARES.items() if part in name), PATH_SHARE)
        groups.append({"params": [parameter], "base": settings.rate * share})

    def loss(number: int) -> Tensor:
        clips = torch.cat([clean for clean, _ in cuts(settings, data, number)])
        return (decode(vae, encode(vae, clips)) - clips).square().mean()

    return Training(settings, vae, torch.optim.Adam(groups), loss, trainable(vae), [])


def dit_training(settings: Settings, data: dict[str, NDArray[np.uint8]], out: Path) -> Training:
    """Of the transformer, on the latents of the trained autoencoder."""
    vae = trained_vae(out)
    torch.manual_seed(settings.seed)
    dit = DiT(TRAINED.dit)
    prompt = prompts()["pos_emb.pt"].float()
    frames, side = TRAINED.vae.latents_for(settings.frames), settings.crop // TRAINED.vae.spatial_factor
    plan = dit.plan(frames, side, side, len(prompt))

    def latents(clips: Tensor) -> Tensor:
        with torch.no_grad():
            return encode(vae, clips).permute(0, 2, 3, 4, 1) * SCALE

    some = [latents(spoiled) for n in range(16) for _, spoiled in cuts(settings, data, n)]
    patches = torch.cat(some).unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 1, 2, 3, 5, 6, 4)
    start_dit(dit, patches.reshape(-1, 64))
    dit.requires_grad_(True)

    def loss(number: int) -> Tensor:
        pairs = list(cuts(settings, data, number))
        clean, spoiled = torch.cat([pair[0] for pair in pairs]), torch.cat([pair[1] for pair in pairs])
        wanted, low = latents(clean), latents(spoiled)
        draw = torch.Generator().manual_seed(settings.seed * 1_000_003 + number)
        noise = torch.randn(low.shape, generator=draw)
        seen = torch.cat([noise, low, torch.ones_like(low[..., :1])], -1)
        made = noise - velocity(dit, seen, prompt, sampler.T, plan)  # one Euler step, all the way
        total = (made - wanted).square().mean()
        if number >= settings.steps // 2:
            picture = decode(vae, made.permute(0, 4, 1, 2, 3) / SCALE)
            total = total + 10 * (picture - clean).square().mean()
        return total

    groups = [{"params": list(dit.parameters()), "base": settings.rate}]
    return Training(settings, dit, torch.optim.Adam(groups), loss, [], [])


def cuts(
    settings: Settings, data: dict[str, NDArray[np.uint8]], number: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The pairs of a step, (1, 3, frames, crop, crop) each in [-1, 1]: clean, and spoiled and enlarged."""
    draw = np.random.default_rng([settings.seed, number])
    for which in draw.integers(settings.clips, size=settings.batch):
        top, left = (
            2 * int(draw.integers((side - settings.crop) // 2 + 1))
            for side in (settings.height, settings.width)
        )
        whole, half = settings.crop, settings.crop // 2
        clean = data["clean"][which, :, top : top + whole, left : left + whole]
        poor = data["spoiled"][which, :, top // 2 : top // 2 + half, left // 2 : left // 2 + half]
        large = resize(to_unit(poor), whole, whole) * 2 - 1
        pair = torch.cat([signed(clean[None]), large.transpose(0, 1)[None]])
        if draw.random() < 0.5:
            pair = pair.flip(-1)
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
    vae.load_state_dict(torch.load(path, weights_only=True)["model"])
    return vae


def trained_dit(out: Path) -> DiT:
    """The transformer that OUT holds."""
    dit = DiT(TRAINED.dit)
    dit.load_state_dict(torch.load(out / "dit.pt", weights_only=True)["model"])
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
        np.savez(path, **made)
    with np.load(path) as held:
        return {name: held[name] for name in ("clean", "spoiled")}


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
    """Train one part."""
    options = parse(arguments)
    out: Path = options.pop("out")
    minutes, threads = options.pop("minutes"), options.pop("threads")
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(threads)
    settings = Settings(**options)
    work = training(settings, material(settings, out), out)
    work.run(minutes, out)
    plot(work.losses, out / f"{settings.part}.png")


def parse(arguments: list[str]) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("part", choices=("vae", "dit"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--threads", type=int, default=2)
    for name, default in (("steps", 2000), ("batch", 4), ("crop", 64), ("clips", 160), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rate", type=float, default=1e-3)
    return vars(parser.parse_args(arguments))


if __name__ == "__main__":
    main(sys.argv[1:])
