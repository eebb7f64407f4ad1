#!/usr/bin/env python3
"""Train nano-vae, the toy of Stable Diffusion's autoencoder, on drawn scenes, and ship its weights.

    python tools/train_nano_vae.py train OUT [--minutes M]     # goes on where OUT stopped
    python tools/train_nano_vae.py export OUT [--into weights] # in 16 bits
    python tools/train_nano_vae.py measure [--into weights]    # on clips that it was not trained on

On a CPU a training that goes on gives the same bits as one that never stopped. OUT gets `training.pt`,
`losses.csv`, `losses.png` where matplotlib is installed, and the codec in 32 bits.

With its residual branches off an AutoencoderKL is a stack of convolutions between two norms. It begins as
those alone, which learn in a minute what a linear code can do; then the branches join, and add what
it cannot.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from app.device import place
from app.errors import InputError, SeedpodError
from app.models.latents.codecs import ImageCodec
from app.models.latents.load import load_sd_codec
from app.models.latents.pixels import from_bytes, to_bytes
from app.models.latents.quality import Quality, measure
from app.models.latents.sd_config import SDConfig
from app.models.latents.train import Losses, Recipe, Trainer
from app.models.source import Loading, Source
from app.progress import Progress, Silent, shown_progress
from tools.make_nano import TRAINED
from tools.measure_nano import clips
from tools.nano_data import Clip, scene
from tools.train_latents import PLOT, STATE, plot, read_state, save, train, write
from tools.training_data import Data, digest

SCENES, FRAMES, HEIGHT, WIDTH = 320, 17, 128, 160
EVERY = 4  # of their frames: neighbours are nearly the same picture
STRAIGHT = 1500  # steps without the branches
STEPS = 3000
WARM_UP = 30
RATE = 4e-3
BATCH, CROP = 8, 64
DIVERGENCE = 3e-8
BALLAST = 30.0  # beside values of about 1: see `begin_linear`
LOGVAR = -6.0


class NanoTrainer(Trainer):
    """A VAE that begins linear, and a rate that falls to nothing along a cosine."""

    def __init__(self, recipe: Recipe, device: torch.device | str = "cpu") -> None:
        super().__init__(recipe, device)
        begin_linear(self.module)
        for group in self.optimiser.param_groups:
            group["betas"] = (0.9, 0.99)
        self.optimiser.register_step_pre_hook(self._clip)

    def _clip(self, *_: Any) -> None:
        clip_grad_norm_(self.module.parameters(), 1.0)

    def step(self, batch: Tensor) -> Losses:
        """See `Trainer.step`."""
        share = 0.5 + 0.5 * math.cos(math.pi * min(1.0, self.steps / STEPS))
        for group in self.optimiser.param_groups:
            group["lr"] = self.recipe.rate * share * min(1.0, (self.steps + 1) / WARM_UP)
        if self.steps < STRAIGHT:
            with straight(self.module):
                return super().step(batch)
        return super().step(batch)


@torch.no_grad()
def begin_linear(vae: Any) -> None:
    """Weights with which both halves are linear, up to some parts in a thousand.

    Residual branches end in zeros. What each half's last norm reads is pairs v, -v, and two constants that
    are large beside them: its mean is 0 and its deviation is theirs whatever v is, and
    silu(u) - silu(-u) = u undoes the activation that follows.
    """
    latents = vae.post_quant_conv.in_channels
    for name, parameter in vae.named_parameters():
        if ("resnets" in name and ".conv2." in name) or ".to_out.0." in name:
            parameter.zero_()
    halves = [(vae.encoder, vae.encoder.down_blocks, latents), (vae.decoder, vae.decoder.up_blocks, 3)]
    for half, blocks, values in halves:
        last, out = blocks[-1].resnets[0].conv_shortcut, half.conv_out
        last.weight[values : 2 * values] = -last.weight[:values]
        last.weight[2 * values : 2 * values + 2] = 0
        last.weight[2 * values + 2 :] *= 0.1
        last.bias.zero_()
        last.bias[2 * values : 2 * values + 2] = torch.tensor([BALLAST, -BALLAST])
        deviation = BALLAST * math.sqrt(2 / last.out_channels)
        out.weight.zero_()
        out.bias.zero_()
        middle = out.weight[:values, :, 1, 1]
        middle[:, : 2 * values] = torch.cat([torch.eye(values), -torch.eye(values)], 1) * deviation
    vae.encoder.conv_out.bias[latents:] = LOGVAR
    for conv in (vae.quant_conv, vae.post_quant_conv):
        conv.weight.copy_(torch.eye(conv.out_channels)[..., None, None])
        conv.bias.zero_()


@contextmanager
def straight(vae: nn.Module) -> Iterator[None]:
    """For a while residual blocks and attentions pass on what their branches would be added to."""

    def beside(block: Any) -> Callable[..., Tensor]:
        shortcut = getattr(block, "conv_shortcut", None)
        return lambda x, *_, **__: x if shortcut is None else shortcut(x)

    blocks = [block for block in vae.modules() if type(block).__name__ in ("ResnetBlock2D", "Attention")]
    for block in blocks:
        block.forward = beside(block)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


# ------------------------------------------------------------------ the training


def scenes(seeds: Sequence[int], progress: Progress) -> Data:
    """Pictures of moving scenes."""
    progress.start("draw", len(seeds), "scenes")
    clips = []
    for seed in seeds:
        clips.append(scene(seed, FRAMES, HEIGHT, WIDTH)[::EVERY].copy())
        progress.advance(1)
    progress.finish()
    return Data(tuple(clips), digest(clips))


def run(options: argparse.Namespace, progress: Progress) -> None:
    """The training in OUT, from its beginning or from where it stopped."""
    options.out.mkdir(parents=True, exist_ok=True)
    device = place(options.device, "float32").device
    data = scenes(range(SCENES), progress)
    path = options.out / STATE
    if path.exists():
        state = read_state(path)
        trainer, settings, losses = (
            NanoTrainer.of(state["trainer"], device),
            state["settings"],
            state["losses"],
        )
    else:
        recipe = Recipe("vae", asdict(SDConfig.nano()), RATE, options.seed, divergence=DIVERGENCE)
        settings = {"seed": options.seed, "batch": BATCH, "frames": 1, "size": CROP, "digest": data.digest}
        trainer, losses = NanoTrainer(recipe, device), []
    if settings["digest"] != data.digest:
        raise InputError(
            "training_data_changed",
            f"The scenes are drawn otherwise than those that the training in {options.out} began with: other "
            "packages hold other photographs; expected the same: begin anew in another folder.",
        )
    try:
        train(trainer, data, settings, losses, options, progress)
    finally:
        if losses and len(losses) == trainer.steps:
            save(options.out, trainer, settings, losses)
    for made in [*trainer.export(options.out), *plot(options.out / PLOT, losses)]:
        print(made)


# ------------------------------------------------------------------ what ships


def export(options: argparse.Namespace, progress: Progress) -> None:
    """The two files of the codec, its latents normalised, its weights in float16."""
    state = read_state(options.out / STATE)
    vae: Any = NanoTrainer.of(state["trainer"]).module.eval()
    normalise(vae, scenes(range(0, SCENES, 5), progress))
    folder = options.into / "latents" / "sd-vae"
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.half().contiguous() for name, tensor in vae.state_dict().items()}
    contents = {
        "config.json": (json.dumps(SDConfig.nano().to_dict(), indent=2) + "\n").encode(),
        "diffusion_pytorch_model.safetensors": to_safetensors(tensors, {"format": "pt"}),
    }
    for name, content in contents.items():
        write(folder / name, partial(Path.write_bytes, data=content))
        print(f'{name}: size = {len(content)}, sha256 = "{hashlib.sha256(content).hexdigest()}"')


@torch.no_grad()
def normalise(vae: Any, data: Data) -> None:
    """Give every channel of the latents mean 0 and variance 1 over `data`. The decoder makes of them what it
    made before."""
    channels = vae.post_quant_conv.in_channels
    means = torch.cat([vae.encode(from_bytes(clip)).latent_dist.mean for clip in data.clips])
    mean, std = means.mean((0, 2, 3)), means.std((0, 2, 3))
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.bias[:channels] -= mean
    quant.bias[:channels] /= std
    quant.weight[:channels] /= std[:, None, None, None]
    quant.bias[channels:] -= 2 * std.log()  # the posterior's log-variances
    post.bias += post.weight[..., 0, 0] @ mean
    post.weight *= std[:, None, None]


# ------------------------------------------------------------------ what it can do


def shipped(into: Path = TRAINED) -> ImageCodec:
    """The codec from the files that ship, through the product's own loader."""
    folder = into / "latents" / "sd-vae"
    weights, config = folder / "diffusion_pytorch_model.safetensors", folder / "config.json"
    files = {"vae": Source(weights, "safetensors", weights), "config": Source(config, "data", config)}
    return load_sd_codec("nano", files, Loading(place("cpu", "float32"), 1, Silent()))


def reconstruction(codec: ImageCodec, clip: Clip) -> Quality:
    """How near a clip is to itself after encoding and decoding."""
    again = [to_bytes(part) for part in codec.decode(codec.encode([from_bytes(clip)]))]
    return measure(zip(clip, np.concatenate(again), strict=True))


def tell(options: argparse.Namespace, progress: Progress) -> None:
    """A table in Markdown."""
    codec, found = shipped(options.into), []
    print("| clip | frames | PSNR | SSIM |\n|---|---|---|---|")
    for name, clip in clips():
        quality = reconstruction(codec, clip)
        found.append((quality.psnr or math.inf, quality.ssim or math.nan))
        size = f"{len(clip)}, {clip.shape[2]}x{clip.shape[1]}"
        print(f"| {name} | {size} | {found[-1][0]:.2f} dB | {found[-1][1]:.3f} |", flush=True)
    print("| mean | | {:.2f} dB | {:.3f} |".format(*np.mean(found, 0)))


WHAT = {"train": run, "export": export, "measure": tell}


def main(arguments: Sequence[str]) -> int:
    """Train, export or measure; gives the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("what", choices=tuple(WHAT))
    parser.add_argument("out", type=Path, metavar="OUT", nargs="?", help="of train and export")
    parser.add_argument("--into", type=Path, default=TRAINED, help="the folder of latents/sd-vae")
    parser.add_argument("--steps", type=int, default=STEPS, help="how far; to the end unless given")
    parser.add_argument("--minutes", type=float, help="of this run; until it is done unless given")
    parser.add_argument("--every", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto unless given; cpu, cuda")
    options = parser.parse_args(arguments)
    if options.out is None and options.what != "measure":
        parser.error(f"{options.what} needs OUT")
    try:
        with shown_progress() as progress:
            WHAT[options.what](options, progress)
    except SeedpodError as error:
        print(f"{error.code}: {error.message}", file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
