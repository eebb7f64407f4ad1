"""CLIP's image half: the original's arithmetic and transformers' numbers, names and shapes, loading."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from app.boot import checkpoint
from app.boot.tensorfile import compare_tensors, read_index
from app.errors import ConfigError, UnavailableError
from app.models.source import Source
from app.models.wan.clip import DEVIATION, MEAN, ImageEncoder, load_image_encoder, preprocess
from app.models.wan.clip_config import (
    CLIP_NANO,
    CLIP_VIT_H,
    DROPPED,
    CLIPConfig,
    clip_tensors,
    recognise_clip,
)
from app.progress import Silent
from tests import seeded

CPU = torch.device("cpu")
ODD = CLIPConfig(dim=80, hidden_dim=100, layers=4, patch=8, grid=3, out_dim=7)


def error(out: Tensor, reference: Tensor) -> float:
    assert out.shape == reference.shape
    return float((out.float() - reference.float()).norm() / reference.float().norm())


def drawn(config: CLIPConfig) -> dict[str, Tensor]:
    return {name: seeded.weight(name, shape, "clip/") for name, shape in clip_tensors(config).items()}


def file_of(folder: Path, tensors: dict[str, Tensor]) -> Source:
    path = folder / "clip.pth"
    torch.save(tensors, path)
    return Source(path, "torch", path)


def loaded(config: CLIPConfig, source: Source, dtype: torch.dtype = torch.float32) -> ImageEncoder:
    pytest.importorskip("transformers")
    return load_image_encoder(config, source, device=CPU, dtype=dtype, readers=2, progress=Silent())


def original(config: CLIPConfig, weights: dict[str, Tensor], images: Tensor) -> Tensor:
    """The original's forward pass in plain functions, one token sequence at a time."""

    def affine(name: str, x: Tensor) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    out = []
    for image in images:
        patches = image.unfold(1, config.patch, config.patch).unfold(2, config.patch, config.patch)
        patches = patches.permute(1, 2, 0, 3, 4).flatten(0, 1).flatten(1)  # (patches, 3 * patch * patch)
        x = patches @ weights["visual.patch_embedding.weight"].flatten(1).T
        x = torch.cat([weights["visual.cls_embedding"][0], x]) + weights["visual.pos_embedding"][0]
        x = norm("visual.pre_norm", x)
        for layer in range(config.layers - 1):
            prefix = f"visual.transformer.{layer}"
            q, k, v = affine(f"{prefix}.attn.to_qkv", norm(f"{prefix}.norm1", x)).split(config.dim, -1)
            heads = []
            for head in range(config.heads):
                own = slice(80 * head, 80 * (head + 1))
                heads.append(torch.softmax(q[:, own] @ k[:, own].T / 80**0.5, -1) @ v[:, own])
            x = x + affine(f"{prefix}.attn.proj", torch.cat(heads, -1))
            hidden = affine(f"{prefix}.mlp.0", norm(f"{prefix}.norm2", x))
            hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
            x = x + affine(f"{prefix}.mlp.2", hidden)
        out.append(x)
    return torch.stack(out)


@pytest.mark.parametrize("config", [CLIP_NANO, ODD], ids=["nano", "odd"])
def test_the_originals_arithmetic(config: CLIPConfig, tmp_path: Path) -> None:
    weights = drawn(config)
    encoder = loaded(config, file_of(tmp_path, weights))
    images = seeded.randn("clip/images", 2, 3, 40, 56).clamp(-1, 1)
    features = encoder.features(images)
    assert features.shape == (2, config.tokens, config.dim)
    assert error(features, original(config, weights, preprocess(images, config.image_size))) < 1e-5


@torch.no_grad()
def test_the_last_layer_but_one_of_transformers_whole_model(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    encoder = loaded(ODD, file_of(tmp_path, drawn(ODD)))
    whole = transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(
            hidden_size=ODD.dim,
            intermediate_size=ODD.hidden_dim,
            num_hidden_layers=ODD.layers,
            num_attention_heads=ODD.heads,
            image_size=ODD.image_size,
            patch_size=ODD.patch,
            hidden_act="gelu",
        )
    ).eval()
    result = whole.load_state_dict(encoder.model.state_dict(), strict=False)
    assert not result.unexpected_keys
    assert {name.split(".")[0] for name in result.missing_keys} == {"encoder", "post_layernorm"}
    assert all(f".layers.{ODD.layers - 1}." in n for n in result.missing_keys if n.startswith("encoder"))
    images = seeded.randn("clip/images", 1, 3, 24, 24).clamp(-1, 1)
    states = whole(pixel_values=preprocess(images, ODD.image_size), output_hidden_states=True).hidden_states
    assert error(encoder.features(images), states[-2]) < 1e-6


def test_images_are_prepared_as_in_the_original() -> None:
    images = seeded.randn("clip/images", 2, 3, 300, 500).clamp(-1, 1)
    resized = F.interpolate(images, size=(224, 224), mode="bicubic", align_corners=False)
    expected = torch.empty_like(resized)
    for channel in range(3):
        expected[:, channel] = (resized[:, channel] / 2 + 0.5 - MEAN[channel]) / DEVIATION[channel]
    kept = images.clone()
    assert error(preprocess(images, 224), expected) < 1e-6
    assert torch.equal(images, kept)
    mean = torch.tensor(MEAN).view(1, 3, 1, 1).expand(1, 3, 50, 70) * 2 - 1
    assert preprocess(mean, 224).abs().max() < 1e-5


def test_real_size_passes_on_meta() -> None:
    shapes = clip_tensors(CLIP_VIT_H)
    assert CLIP_VIT_H.tokens == 257
    assert CLIP_VIT_H.heads == 16
    assert shapes["visual.transformer.31.attn.to_qkv.weight"] == (3840, 1280)
    assert len(shapes) == 8 + 32 * 12
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 632_076_800


@pytest.mark.parametrize("config", [CLIP_VIT_H, CLIP_NANO, ODD], ids=["vit-h", "nano", "odd"])
def test_recognised_by_its_tensors(config: CLIPConfig) -> None:
    assert recognise_clip(clip_tensors(config) | {"textual.head.0.weight": (3, 3)}) == config


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"visual.patch_embedding.weight": None}, "patch_embedding"),
        ({"visual.pos_embedding": None}, "pos_embedding"),
        ({"visual.pos_embedding": (1, 256, 160)}, "256 positions"),
        ({"visual.pos_embedding": (1, 1, 160)}, "1 positions"),
        ({"visual.head": None}, "visual.head"),
        ({"visual.transformer.0.mlp.0.weight": None}, "mlp"),
        ({"visual.patch_embedding.weight": (96, 3, 14, 14)}, "96"),
    ],
)
def test_another_checkpoint_is_not_recognised(change: dict[str, Any], names: str) -> None:
    shapes = {name: shape for name, shape in (clip_tensors(CLIP_NANO) | change).items() if shape}
    with pytest.raises(ValueError, match=names):
        recognise_clip(shapes)


def test_only_what_is_used_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text half is in the file, as published; neither it nor the last layer is read."""
    weights = drawn(CLIP_NANO)
    text = {"textual.token_embedding.weight": torch.zeros(5000, 8), "log_scale": torch.zeros(())}
    source = file_of(tmp_path, weights | text)
    read: list[str] = []
    reading = checkpoint.read_tensors

    def recording(index: Any, wanted: Any, *rest: Any) -> None:
        wanted = list(wanted)
        read.extend(entry.name for entry, _ in wanted)
        reading(index, wanted, *rest)

    monkeypatch.setattr(checkpoint, "read_tensors", recording)
    loaded(CLIP_NANO, source)
    left = set(weights) - set(read)
    assert len(read) == len(weights) - len(left)
    assert left == {n for n in weights if "transformer.2." in n or n.split(".")[1] in ("head", "post_norm")}
    assert not compare_tensors(clip_tensors(CLIP_NANO), read_index(source.path, "torch"), dropped=DROPPED)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 0.03), (torch.float16, 0.004)])
def test_sixteen_bits(tmp_path: Path, dtype: torch.dtype, limit: float) -> None:
    source = file_of(tmp_path, drawn(CLIP_NANO))
    images = seeded.randn("clip/images", 1, 3, 64, 64).clamp(-1, 1)
    low = loaded(CLIP_NANO, source, dtype).features(images)
    assert low.dtype == dtype
    assert error(low, loaded(CLIP_NANO, source).features(images)) < limit


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"visual.pre_norm.weight": None}, "missing: visual.pre_norm.weight"),
        ({"visual.extra": (3,)}, "left over: visual.extra"),
        ({"visual.cls_embedding": (1, 1, 80)}, "another shape: visual.cls_embedding"),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path: Path, change: dict[str, Any], names: str) -> None:
    weights = drawn(CLIP_NANO)
    for name, shape in change.items():
        weights.pop(name, None)
        if shape:
            weights[name] = torch.zeros(shape)
    with pytest.raises(ConfigError, match=names) as refused:
        loaded(CLIP_NANO, file_of(tmp_path, weights))
    assert refused.value.code == "checkpoint_tensors"


def test_a_width_that_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="100"):
        replace(CLIP_NANO, dim=100)


def test_without_transformers_the_sentence_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = file_of(tmp_path, drawn(ODD))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UnavailableError, match="transformers") as refused:
        load_image_encoder(ODD, source, device=CPU, dtype=torch.float32, readers=1, progress=Silent())
    assert refused.value.code == "package_missing"


def test_the_modules_do_not_import_what_they_may_not_need() -> None:
    code = "import sys, app.models.wan.clip_config; assert 'torch' not in sys.modules\n"
    code += "import app.models.wan.clip; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])
