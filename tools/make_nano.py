#!/usr/bin/env python3
"""Write the checkpoints of the nano models, in the original names and formats, into a volume.

    python tools/make_nano.py WORKSPACE [seedvr2] [wan] [latents]

Weights that were trained ship with the code, under `weights/`, and are copied: `nano` restores, and
`nano-vae` reconstructs (docs/nano.md). The others are drawn by name, so every run writes the same numbers;
they were never trained: what `nano-wan` generates is noise that moves, and is for trying out everything
around a model.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from app.models.wan.clip_config import clip_tensors
from app.models.wan.pose import PoseEmbedder
from app.models.wan.transformer import Transformer
from app.models.wan.umt5 import UMT5Encoder
from app.models.wan.vae import WanVAE
from app.models.wan.variants import VARIANTS as WAN
from tools import nano_latents
from tools.nano_tokenizer import nano_tokenizer

FAMILIES = ("seedvr2", "wan", "latents")
TRAINED = Path(__file__).resolve().parents[1] / "weights"


def main(workspace: Path, families: Sequence[str] = FAMILIES) -> None:
    """Write the files of these families under `workspace`."""
    for name in families:
        folder = workspace / "nano" / name
        folder.mkdir(parents=True, exist_ok=True)
        {"seedvr2": seedvr2, "wan": wan, "latents": nano_latents.write}[name](folder)
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            print(f"{path} {path.stat().st_size:,} bytes")


def seedvr2(folder: Path) -> None:
    """Transformer, VAE and the two prompts."""
    for path in (TRAINED / "seedvr2").iterdir():
        shutil.copyfile(path, folder / path.name)


def wan(folder: Path) -> None:
    """Transformer (both sets of weights, as training leaves them), VAE, text encoder and its tokenizer, pose
    embedders, and the image half of CLIP."""
    nano = WAN["nano"]
    sections = {
        section: {
            f"model.{name}": tensor for name, tensor in drawn(Transformer(nano.transformer), section).items()
        }
        for section in ("generator", "generator_ema")
    }
    torch.save(sections, folder / "self_forcing_nano.pt")
    torch.save(drawn(WanVAE(nano.vae)), folder / "Wan_VAE.pth")
    t5 = {name: tensor.bfloat16() for name, tensor in drawn(UMT5Encoder(nano.text)).items()}
    torch.save(t5, folder / "models_t5_nano.pth")
    tokenizer = folder / "google/umt5-nano/tokenizer.json"
    tokenizer.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.write_text(nano_tokenizer())
    torch.save(drawn(PoseEmbedder()), folder / "pose.ckpt")
    clip = {name: _scaled(name, shape).half() for name, shape in clip_tensors(nano.clip).items()}
    torch.save(clip, folder / "models_clip_nano.pth")


def drawn(model: nn.Module, salt: str = "") -> dict[str, Tensor]:
    """A state dict whose matrices keep the size of what passes through them, and whose scales are near 1.
    Buffers keep what the model computes. Another `salt`, other numbers."""
    state = model.state_dict()
    for name, parameter in model.named_parameters():
        state[name] = _scaled(salt + name, tuple(parameter.shape))
    return state


def _scaled(name: str, shape: tuple[int, ...]) -> Tensor:
    x = _normal(name, shape)
    if "gamma" in name:
        return 0.1 * x + 1
    if len(shape) > 1:
        return x / math.sqrt(math.prod(shape[1:]))
    return 0.1 * x + (1.0 if name.endswith("weight") or "scale" in name else 0.0)


def _normal(name: str, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    arguments.add_argument("workspace", type=Path)
    arguments.add_argument(
        "families", nargs="*", metavar="FAMILY", help=f"{', '.join(FAMILIES)}; all unless named"
    )
    options = arguments.parse_args()
    main(options.workspace, options.families or FAMILIES)
