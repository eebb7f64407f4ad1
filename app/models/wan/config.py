"""The parameters of a Wan transformer and the tensors it consists of.

Torch-free, so that `check` can compare a checkpoint with what a model needs in milliseconds, and a plan can
count bytes before anything is loaded. It knows nothing of files: shapes come in, a configuration or a list
of names goes out.

Wan 2.1 (Wan Team, 2025, arXiv:2503.20314) and what was distilled from it, such as Self-Forcing (Huang et
al., 2025, arXiv:2506.08009), have the same tensors. Two kinds are told apart by them: text to video takes
16 channels; the image-conditioned kind takes 36 (noise 16, first-frame mask 4, latents 16) and has keys and
values for the tokens of an image. `pose_proj`, where a checkpoint has it, takes pose tokens in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]

HEAD_DIM = 128  # of every Wan; the tensors do not tell
POSE_DIM = 5120  # channels of pose tokens, the width of the 14B
IMAGE_CHANNELS = 20  # what conditions on an image beside the noise: mask 4, latents 16
LATENT_CHANNELS = 16
TRAINED_FRAMES = 21  # latent frames of a training clip, 81 frames
TRAINED_BLOCK = 3  # latent frames that Self-Forcing denoises at a time
SECTIONS = ("generator_ema", "generator")  # of a distilled checkpoint; the first one present is the default
_WRAPPERS = ("model.", "_fsdp_wrapped_module.")


@dataclass(frozen=True)
class TransformerConfig:
    """Parameters of a Wan diffusion transformer; the defaults are the published text-to-video 1.3B.

    `image`: conditions on an image. `pose`: holds a projection of pose tokens.
    """

    dim: int = 1536
    ffn_dim: int = 8960
    heads: int = 12
    layers: int = 30
    in_channels: int = LATENT_CHANNELS
    out_channels: int = LATENT_CHANNELS
    text_dim: int = 4096
    text_length: int = 512
    time_sinusoids: int = 256
    image: bool = False
    image_dim: int = 1280
    pose: bool = False
    patch_size: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.dim % self.heads or self.head_dim % 2:
            raise ValueError(f"width {self.dim} does not divide into {self.heads} heads of an even width")
        if self.patch_size[0] != 1:
            raise ValueError(f"patch_size {self.patch_size} joins frames; every Wan's begins with 1")

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def patch_volume(self) -> int:
        return math.prod(self.patch_size)

    @property
    def takes_pose(self) -> bool:
        """Whether pose tokens can be added: those of the 14B's width need no projection."""
        return self.pose or self.dim == POSE_DIM

    @classmethod
    def from_original(cls, original: Mapping[str, Any], *, pose: bool = False) -> TransformerConfig:
        """The configuration as the original's `config.json` spells it; what it leaves out has the original
        code's default where every published model shares it.

        Raises:
            ValueError: `model_type` is neither "t2v" nor "i2v", or a norm that every Wan has is off.
        """
        kind = original.get("model_type", "t2v")
        if kind not in ("t2v", "i2v"):
            raise ValueError(f"model_type {kind!r} is neither 't2v' nor 'i2v'")
        for norm in ("qk_norm", "cross_attn_norm"):
            if not original.get(norm, True):
                raise ValueError(f"{norm} is off, and every Wan has it")
        image = kind == "i2v"
        return cls(
            dim=original["dim"],
            ffn_dim=original["ffn_dim"],
            heads=original["num_heads"],
            layers=original["num_layers"],
            in_channels=original.get("in_dim", LATENT_CHANNELS + IMAGE_CHANNELS * image),
            out_channels=original.get("out_dim", LATENT_CHANNELS),
            text_dim=original.get("text_dim", 4096),
            text_length=original.get("text_len", 512),
            time_sinusoids=original.get("freq_dim", 256),
            image=image,
            pose=pose,
            patch_size=tuple(original.get("patch_size", (1, 2, 2))),
            eps=original.get("eps", 1e-6),
        )

    def tokens(self, height: int, width: int) -> int:
        """Tokens of one latent frame of height x width.

        Raises:
            ValueError: The size does not divide into patches.
        """
        _, rows, columns = self.patch_size
        if height % rows or width % columns:
            raise ValueError(f"latents of {height}x{width} do not divide into patches of {rows}x{columns}")
        return (height // rows) * (width // columns)

    def cache_bytes(self, height: int, width: int, frames: int, *, batch: int = 1, itemsize: int = 2) -> int:
        """Memory of the self-attention cache of `frames` latent frames of height x width: 288 MB a frame
        for the 1.3B at 60 x 104 in 16 bits. Guidance holds two caches."""
        return 2 * self.layers * batch * frames * self.tokens(height, width) * self.dim * itemsize

    def cross_bytes(self, *, batch: int = 1, image_tokens: int = 0, itemsize: int = 2) -> int:
        """Memory of the cross-attention keys and values of one prompt."""
        return 2 * self.layers * batch * (self.text_length + image_tokens) * self.dim * itemsize


VARIANTS = {
    "1.3b": TransformerConfig(),
    "nano": TransformerConfig(dim=256, ffn_dim=512, heads=2, layers=3, text_dim=64, pose=True),
    "nano-i2v": TransformerConfig(
        dim=256, ffn_dim=512, heads=2, layers=3, text_dim=64, pose=True,
        image=True, in_channels=LATENT_CHANNELS + IMAGE_CHANNELS,
    ),
}  # fmt: skip


def current_name(name: str) -> str:
    """The model's name of a tensor: checkpoints of training carry the names of what wrapped the model."""
    while name.startswith(_WRAPPERS):
        name = name.split(".", 1)[1]
    return name.replace("._fsdp_wrapped_module.", ".")


def tensors(config: TransformerConfig) -> dict[str, Shape]:
    """Every tensor of a checkpoint of this configuration: original name -> shape."""
    dim = config.dim
    shapes: dict[str, Shape] = {
        "patch_embedding.weight": (dim, config.in_channels, *config.patch_size),
        "patch_embedding.bias": (dim,),
        **_linear("text_embedding.0", config.text_dim, dim),
        **_linear("text_embedding.2", dim, dim),
        **_linear("time_embedding.0", config.time_sinusoids, dim),
        **_linear("time_embedding.2", dim, dim),
        **_linear("time_projection.1", dim, 6 * dim),
        "head.modulation": (1, 2, dim),
        **_linear("head.head", dim, config.out_channels * config.patch_volume),
    }
    if config.image:
        shapes |= {
            **_norm("img_emb.proj.0", config.image_dim),
            **_linear("img_emb.proj.1", config.image_dim, config.image_dim),
            **_linear("img_emb.proj.3", config.image_dim, dim),
            **_norm("img_emb.proj.4", dim),
        }
    if config.pose and dim != POSE_DIM:
        shapes |= _linear("pose_proj", POSE_DIM, dim)
    for layer in range(config.layers):
        shapes |= {f"blocks.{layer}.{name}": shape for name, shape in _block_tensors(config).items()}
    return shapes


def _block_tensors(config: TransformerConfig) -> dict[str, Shape]:
    dim = config.dim
    shapes: dict[str, Shape] = {
        "modulation": (1, 6, dim),
        **_norm("norm3", dim),
        **_linear("ffn.0", dim, config.ffn_dim),
        **_linear("ffn.2", config.ffn_dim, dim),
    }
    for attention in ("self_attn", "cross_attn"):
        image = config.image and attention == "cross_attn"
        for part in ("q", "k", "v", "o", *(("k_img", "v_img") if image else ())):
            shapes |= _linear(f"{attention}.{part}", dim, dim)
        for part in ("norm_q", "norm_k", *(("norm_k_img",) if image else ())):
            shapes[f"{attention}.{part}.weight"] = (dim,)
    return shapes


def _linear(name: str, dim_in: int, dim_out: int) -> dict[str, Shape]:
    return {f"{name}.weight": (dim_out, dim_in), f"{name}.bias": (dim_out,)}


def _norm(name: str, dim: int) -> dict[str, Shape]:
    return {f"{name}.weight": (dim,), f"{name}.bias": (dim,)}


def recognise(shapes: Shapes) -> TransformerConfig:
    """The configuration of a checkpoint, from its tensors alone (names as `current_name` gives them).

    Raises:
        ValueError: This is not a Wan transformer; the sentence says what it lacks.
    """
    marks = {
        name: shapes.get(name)
        for name in (
            "patch_embedding.weight", "text_embedding.0.weight", "time_embedding.0.weight",
            "blocks.0.ffn.0.weight", "head.head.weight",
        )
    }  # fmt: skip
    for name, shape in marks.items():
        if shape is None or len(shape) < 2:
            raise ValueError(f"it holds no {name}, as every Wan transformer does")
    patch, text, time, ffn, head = (shape or () for shape in marks.values())
    if len(patch) != 5 or patch[0] % HEAD_DIM:
        raise ValueError(
            f"its patch_embedding.weight is {patch}, expected (heads x {HEAD_DIM}, channels, 1, 2, 2)"
        )
    image = "img_emb.proj.1.weight" in shapes
    return TransformerConfig(
        dim=patch[0],
        ffn_dim=ffn[0],
        heads=patch[0] // HEAD_DIM,
        layers=1 + max(int(name.split(".")[1]) for name in shapes if _is_block(name)),
        in_channels=patch[1],
        out_channels=head[0] // math.prod(patch[2:]),
        text_dim=text[1],
        time_sinusoids=time[1],
        image=image,
        image_dim=shapes["img_emb.proj.1.weight"][0] if image else 1280,
        pose="pose_proj.weight" in shapes,
        patch_size=(patch[2], patch[3], patch[4]),
    )


def _is_block(name: str) -> bool:
    parts = name.split(".")
    return len(parts) > 2 and parts[0] == "blocks" and parts[1].isdigit()
