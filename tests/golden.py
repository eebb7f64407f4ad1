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
from app.models.wan.config import TransformerConfig
from app.models.wan.layout import Conditions, Layout
from app.models.wan.pose import PoseEmbedder
from app.models.wan.sampler import FewStep, generate_blocks
from app.models.wan.schedule import FlowMatch
from app.models.wan.transformer import Transformer
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


def _wan_causal(meta: Meta) -> Outputs:
    for i, case in enumerate(meta["cases"]):
        config = TransformerConfig.from_original(case, pose=case["pose"])
        yield f"lat{i}", _generate(draw(Transformer(config), meta["salt"]), case)


def _generate(model: nn.Module, case: Meta) -> Tensor:
    """The clip of latents (1, frames, 16, h, w), the given ones first."""
    tag, size = case["tag"], (case["h"], case["w"])
    given = case["initial_frames"]
    initial = seeded.randn(f"{tag}/initial", 1, given, 16, *size).transpose(1, 2) if given else None
    start_noise = seeded.randn(f"{tag}/noise", 1, case["frames"], 16, *size).transpose(1, 2)
    prompt = seeded.randn(f"{tag}/prompt", 1, case["text_len"], case["text_dim"])
    prompt[:, case["text_len"] // 2 :] = 0
    window = case["local_attn_size"]
    layout = Layout(
        case["frames"], *size, case["num_frame_per_block"], case["independent_first_frame"],
        window if window > 0 else given + case["frames"], case["sink_size"],
    )  # fmt: skip
    pose = seeded.randn(f"{tag}/pose", 1, 5120, case["frames"], *(side // 2 for side in size))
    made = layout.blocks(given)[1]
    calls = iter(range(10**6))

    def noise(block: int, step: int, shape: tuple[int, ...]) -> Tensor:
        if step == 0:
            start = sum(made[:block])
            return start_noise[:, :, start : start + shape[2]]
        drawn = seeded.randn(f"{tag}/renoise{next(calls)}", shape[2], shape[1], *size)
        return drawn.transpose(0, 1)[None]

    timesteps = tuple(case["denoising_timesteps"])
    blocks = generate_blocks(
        model, layout,
        Conditions({0: prompt}, initial, pose=pose if case["pose"] else None),
        noise,
        FewStep(FlowMatch(case["timestep_shift"]), timesteps, case["context_noise"]),
    )  # fmt: skip
    latents = [block.latents for block in blocks]
    return torch.cat(latents if initial is None else [initial, *latents], dim=2).transpose(1, 2)


def _pose(meta: Meta) -> Outputs:
    case = meta["case"]
    model = draw(PoseEmbedder(), meta["salt"])
    height, width = case["h"], case["w"]
    poses = 255 * torch.sigmoid(seeded.randn(case["dw_tag"], 3, case["frames"], height, width))
    reference = 255 * torch.sigmoid(seeded.randn(case["ref_tag"], height, width, 3)).permute(2, 0, 1)
    yield "dwpose_emb", model.frames(poses[None])
    yield "randomref_emb", model.reference(reference[None])


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
    if "denoising_timesteps" in meta.get("cases", [{}])[0]:
        return _wan_causal
    if "dw_tag" in meta.get("case", {}):
        return _pose
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
