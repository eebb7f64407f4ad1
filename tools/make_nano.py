#!/usr/bin/env python3
"""Write the checkpoints of the nano SeedVR2, in the original names and formats, into a volume.

    python tools/make_nano.py WORKSPACE

The weights are drawn by name, so every run writes the same numbers. They were never trained: what nano
restores is faint noise over the colours of its source. It is for trying out everything around a model.
"""

from __future__ import annotations

import argparse
import math
import sys
import zlib
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from app.models.seedvr2.dit import DiT
from app.models.seedvr2.vae import VideoVAE
from app.models.seedvr2.variants import VARIANTS

FOLDER = Path("nano/seedvr2")
PROMPTS = {"pos_emb.pt": 58, "neg_emb.pt": 64}  # tokens, as in the published embeddings


def main(workspace: Path) -> None:
    """Write the four files under `workspace`."""
    folder = workspace / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    nano = VARIANTS["nano"]
    torch.save(drawn(DiT(nano.dit)), folder / "seedvr2_ema_nano.pth")
    torch.save(drawn(VideoVAE(nano.vae)), folder / "ema_vae.pth")
    for name, tokens in PROMPTS.items():
        torch.save(_normal(name, (tokens, nano.dit.text_dim)).bfloat16(), folder / name)
    for path in sorted(folder.iterdir()):
        print(f"{path} {path.stat().st_size:,} bytes")


def drawn(model: nn.Module) -> dict[str, Tensor]:
    """A state dict whose matrices keep the size of what passes through them, and whose scales are near 1.
    Buffers keep what the model computes."""
    state = model.state_dict()
    for name, parameter in model.named_parameters():
        x = _normal(name, tuple(parameter.shape))
        if parameter.ndim > 1:
            x /= math.sqrt(parameter[0].numel())
        else:
            x = 0.1 * x + (1.0 if name.endswith("weight") or "scale" in name else 0.0)
        state[name] = x
    if "decoder.conv_out.weight" in state:
        state["decoder.conv_out.weight"] *= 0.2  # faint noise, so that the colours of the source show
    return state


def _normal(name: str, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    arguments.add_argument("workspace", type=Path)
    main(arguments.parse_args().workspace)
