"""What Wan's image-conditioned variants see of their image: features of CLIP's ViT-H (Radford et al.
2021, arXiv:2103.00020), from the last layer but one.

    encoder = load_image_encoder(config, source, device=..., dtype=..., readers=8, progress=Silent())
    features = encoder.features(images)     # (n, 257, 1280)

The layers are transformers'; a name table brings the original's tensors to them, and only those of the
image half are read. transformers is imported when an encoder is loaded: it takes seconds, and a
text-to-video model does without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from app.boot.checkpoint import load
from app.boot.tensorfile import matches
from app.errors import UnavailableError
from app.models.source import Source
from app.models.wan.clip_config import CLIPConfig, Shape, clip_tensors, unused_tensors
from app.progress import Progress

if TYPE_CHECKING:
    from transformers import CLIPVisionModel

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of the images that CLIP was trained with, in [0, 1]
DEVIATION = (0.26862954, 0.26130258, 0.27577711)

_TOP = {"patch_embedding": "embeddings.patch_embedding", "pre_norm": "pre_layrnorm"}
_LAYER = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.proj": "self_attn.out_proj",
    "mlp.0": "mlp.fc1",
    "mlp.2": "mlp.fc2",
}


def preprocess(images: Tensor, size: int) -> Tensor:
    """(n, 3, height, width) in [-1, 1] -> (n, 3, size, size), float32, normalised as CLIP wants it.

    Bicubic, without regard to the aspect ratio and without smoothing before it shrinks, as the original:
    the model was trained with that.
    """
    resized = F.interpolate(images.float(), size=(size, size), mode="bicubic", align_corners=False)
    mean, deviation = (
        torch.tensor(values, device=images.device).view(3, 1, 1) for values in (MEAN, DEVIATION)
    )
    return (resized * 0.5 + 0.5 - mean) / deviation


class ImageEncoder(nn.Module):
    """CLIP's image half up to its last layer but one."""

    def __init__(self, config: CLIPConfig, model: CLIPVisionModel) -> None:
        super().__init__()
        self.config = config
        self.model = model

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """images: (n, 3, height, width) in [-1, 1], of any size. Returns (n, tokens, dim), the class token
        first, in the dtype of the weights; 257 x 1280 as published."""
        weight = self.model.embeddings.patch_embedding.weight
        pixels = preprocess(images.to(weight.device), self.config.image_size)
        out: Tensor = self.model(pixel_values=pixels.to(weight.dtype)).last_hidden_state
        return out


def load_image_encoder(
    config: CLIPConfig,
    source: Source,
    *,
    device: torch.device,
    dtype: torch.dtype,
    readers: int,
    progress: Progress,
) -> ImageEncoder:
    """The encoder with the weights of `source`, of which only the image half's layers in use are read.

    Raises:
        UnavailableError: `package_missing`: transformers is not installed.
        ConfigError: The file's tensors are not this model's.
        FileError: The file cannot be read.
    """
    model = _transformers_model(config)
    unused = unused_tensors(config)
    shapes = {name: shape for name, shape in clip_tensors(config).items() if not matches(name, unused)}
    stored = load(
        lambda: _Stored(shapes), source.now(), source.format,
        device=device, dtype=dtype, dropped=unused, readers=readers, progress=progress,
    )  # fmt: skip
    model.load_state_dict(transformers_tensors(stored.state_dict()), assign=True)
    positions = torch.arange(config.tokens, device=device)[None]
    model.embeddings.register_buffer("position_ids", positions, persistent=False)
    return ImageEncoder(config, model).requires_grad_(False).eval()


def transformers_tensors(original: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the image half under transformers' names; no memory is copied."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in original.items():
        part, _, end = name.removeprefix("visual.").rpartition(".")
        if part.startswith("transformer."):
            _, layer, part = part.split(".", 2)
            prefix = f"encoder.layers.{layer}"
            if part == "attn.to_qkv":
                for which, third in zip("qkv", tensor.chunk(3), strict=True):
                    tensors[f"{prefix}.self_attn.{which}_proj.{end}"] = third
            else:
                tensors[f"{prefix}.{_LAYER[part]}.{end}"] = tensor
        elif end == "cls_embedding":
            tensors["embeddings.class_embedding"] = tensor.view(-1)
        elif end == "pos_embedding":
            tensors["embeddings.position_embedding.weight"] = tensor[0]
        else:
            tensors[f"{_TOP[part]}.{end}"] = tensor
    return tensors


def _transformers_model(config: CLIPConfig) -> CLIPVisionModel:
    """transformers' model on meta, without the layer and the norm that the features do not pass."""
    try:
        from transformers import CLIPVisionConfig, CLIPVisionModel
    except ImportError as error:
        raise UnavailableError(
            "package_missing",
            f"transformers cannot be imported ({error}); image-conditioned models need version 5 of it: "
            "install it with `pip install transformers`, or use the image, which has it.",
        ) from error
    settings = CLIPVisionConfig(
        hidden_size=config.dim,
        intermediate_size=config.hidden_dim,
        num_hidden_layers=config.layers - 1,
        num_attention_heads=config.heads,
        image_size=config.image_size,
        patch_size=config.patch,
        hidden_act="gelu",
        layer_norm_eps=1e-5,
    )
    with torch.device("meta"):
        model = CLIPVisionModel(settings)
    model.add_module("post_layernorm", nn.Identity())
    return model


class _Stored(nn.Module):
    """Parameters under the names of a checkpoint, for `load` to fill."""

    def __init__(self, shapes: Mapping[str, Shape]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            *path, last = name.split(".")
            owner: nn.Module = self
            for part in path:
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            owner.register_parameter(last, nn.Parameter(torch.empty(shape), requires_grad=False))
