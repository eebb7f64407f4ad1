"""Evaluate golden files: `python -m tests.golden FILE…`.

A golden file holds outputs of an original implementation; its metadata gives the configuration, the
cases and the salt of the weights (see seeded.py). Any file of a known layout is evaluated, whatever its
widths, depths and sizes. Prints each case's relative error; exits 1 when one is at or above 1e-4.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from app.models.seedvr2 import sampler
from app.models.seedvr2.config import DiTConfig
from app.models.seedvr2.dit import DiT
from app.models.seedvr2.vae import VideoVAE
from app.models.seedvr2.vae_config import VAEConfig
from app.models.wan.umt5 import UMT5Encoder
from app.models.wan.umt5_config import UMT5Config
from app.models.wan.vae import WanVAE
from app.models.wan.vae_config import VAEConfig as WanVAEConfig
from app.video import color
from app.video.frames import preprocess_original
from tests import seeded

LIMIT = 1e-4
FILES = sorted((Path(__file__).parent / "golden").glob("*.safetensors"))
INPUTS = {"ids", "mask"}  # tensors that a file holds beside its outputs, read with the metadata

Meta = dict[str, Any]
Outputs = Iterator[tuple[str, Tensor]]  # (name of the stored output, ours)


def draw(model: nn.Module, salt: str) -> nn.Module:
    """Fill a model's parameters by name; buffers keep what the model computes."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(seeded.weight(name, parameter.shape, salt))
    return model.eval()


def _dit(meta: Meta) -> Outputs:
    model = draw(DiT(DiTConfig.from_original(meta["config"])), meta["salt"])
    config = model.config
    for i, case in enumerate(meta["cases"]):
        size = case["t"], case["h"], case["w"]
        vid = seeded.randn(case["vid"], case["t"] * case["h"] * case["w"], config.in_channels)
        txt = seeded.randn(case["txt"], case["txt_len"], config.text_dim)
        plan = model.plan(*size, case["txt_len"])
        yield f"out{i}", model(vid.view(*size, -1), txt, case["timestep"], plan)


def _sampler(meta: Meta) -> Outputs:
    models = {
        kind: draw(DiT(DiTConfig.from_original(config)), meta["salt"])
        for kind, config in meta["configs"].items()
    }
    counts = dict.fromkeys(models, 0)
    for case in meta["cases"]:
        kind = case["model"]
        yield f"{kind}_{counts[kind]}", _sample(models[kind], case, meta)
        counts[kind] += 1


def _sample(model: nn.Module, case: Meta, meta: Meta) -> Tensor:
    tag, size = case["tag"], (case["t"], case["h"], case["w"])
    noise, aug, low = (seeded.randn(f"{tag}/{part}", *size, 16) for part in ("noise", "aug", "lq"))
    condition = sampler.condition(low, aug, case["cond_noise_scale"])

    def velocity(prompt: str) -> Callable[[Tensor, float], Tensor]:
        txt = seeded.randn(f"{tag}/{prompt}", meta[f"{prompt}_len"], meta["txt_dim"])
        plan = model.plan(*size, len(txt))
        return lambda x, t: model(torch.cat([x, condition], -1), txt, t, plan)

    steps = sampler.timesteps(case["steps"])
    return sampler.sample(
        noise, velocity("pos"), velocity("neg"), steps, case["cfg_scale"], case["cfg_rescale"]
    )


def _vae(meta: Meta) -> Outputs:
    model = draw(VideoVAE(VAEConfig.from_original(meta["config"])), meta["salt"])
    for i, case in enumerate(meta["cases"]):
        x = seeded.randn(case["x"], 1, 3, case["t"], case["h"], case["w"]).clamp(-1, 1)
        mean, logvar = model.encode(x)
        yield f"mean{i}", mean
        yield f"logvar{i}", logvar
        yield f"dec{i}", model.decode(mean)


def _wan_vae(meta: Meta) -> Outputs:
    config = WanVAEConfig.from_original(meta["config"])
    model = draw(WanVAE(config), meta["salt"])
    for i, case in enumerate(meta["cases"]):
        x = seeded.randn(case["x"], 1, 3, case["t"], case["h"], case["w"]).clamp(-1, 1)
        # The original leaves out the last frames of a clip that has not 4 k + 1 of them.
        z = model.encode(x[:, :, : case["t"] - (case["t"] - 1) % 4])
        yield f"z{i}", z
        yield f"y{i}", model.decode(z)
    # The metadata gives the blocks, but not the size of their latents.
    stream, (height, width) = meta["stream"], meta["shapes"]["stream"][3:]
    size = height // config.spatial_factor, width // config.spatial_factor
    z = seeded.randn(stream["z"], 1, config.z_dim, sum(stream["blocks"]), *size)
    state = model.new_state()
    yield "stream", torch.cat([model.decode(block, state) for block in z.split(stream["blocks"], dim=2)], 2)


def _pixels(meta: Meta) -> Outputs:
    for i, case in enumerate(meta["cases"]):
        x = torch.sigmoid(seeded.randn(case["x"], case["t"], 3, case["h"], case["w"]))
        yield f"pre{i}", preprocess_original(x, case["res_h"], case["res_w"])
    content, style = (
        seeded.randn(meta["color"][part], *meta["color"]["shape"]).clamp(-1, 1)
        for part in ("content", "style")
    )
    yield "wavelet", color.wavelet(content, style)
    yield "adain", color.adain(content, style)


def _umt5(meta: Meta) -> Outputs:
    model = draw(UMT5Encoder(UMT5Config.from_original(meta["config"])), meta["salt"])
    yield "out", model(meta["ids"], meta["mask"])


def _layout(meta: Meta) -> Callable[[Meta], Outputs]:
    if "configs" in meta:
        return _sampler
    if "color" in meta:
        return _pixels
    if "vid_dim" in meta.get("config", {}):
        return _dit
    if "spatial_downsample_factor" in meta.get("config", {}):
        return _vae
    if "encoder_layers" in meta.get("config", {}):
        return _umt5
    if "temperal_downsample" in meta.get("config", {}):
        return _wan_vae
    raise ValueError(f"the metadata ({', '.join(sorted(meta))}) is of no known layout")


def read_metadata(path: Path) -> Meta:
    """A golden file's metadata, its JSON strings parsed."""
    with safe_open(path, "pt") as file:
        strings = file.metadata()
    return {k: v if k in ("salt", "note") else json.loads(v) for k, v in strings.items()} | {
        "salt": strings.get("salt", "").strip('"')
    }


def evaluate(path: Path) -> dict[str, float]:
    """Relative error ||ours - stored|| / ||stored|| of every output of a golden file."""
    meta = read_metadata(path)
    errors = {}
    with safe_open(path, "pt") as file, torch.inference_mode():
        meta["shapes"] = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        left = set(file.keys()) - INPUTS
        meta |= {name: file.get_tensor(name) for name in INPUTS & set(file.keys())}
        for name, ours in _layout(meta)(meta):
            stored = file.get_tensor(name)
            if ours.shape != stored.shape:
                raise ValueError(f"{name} is {tuple(ours.shape)}, stored is {tuple(stored.shape)}")
            errors[name] = ((ours - stored).norm() / stored.norm()).item()
            left.remove(name)
    if left:
        raise ValueError(f"{path.name} holds outputs that were not evaluated: {sorted(left)}")
    return errors


def main(paths: list[Path]) -> int:
    worst = 0.0
    for path in paths or FILES:
        for name, error in evaluate(path).items():
            worst = max(worst, error if error == error else float("inf"))
            print(f"{path.stem:24} {name:10} {error:.2e}  {'ok' if error < LIMIT else 'WRONG'}")
    return int(worst >= LIMIT)


if __name__ == "__main__":
    sys.exit(main([Path(argument) for argument in sys.argv[1:]]))
