import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from app.models.wan.config import (
    POSE_DIM,
    VARIANTS,
    TransformerConfig,
    current_name,
    recognise,
    tensors,
)
from app.models.wan.pose import PoseEmbedder
from app.models.wan.pose_config import pose_name, pose_tensors
from app.models.wan.transformer import Transformer

KEYS = Path(__file__).parents[2] / "golden" / "keys"
ORIGINAL = {"model_type": "t2v", "dim": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 30}
KINDS = VARIANTS | {
    "14b": TransformerConfig(dim=5120, ffn_dim=13824, heads=40, layers=40),
    "14b i2v": TransformerConfig(dim=5120, ffn_dim=13824, heads=40, layers=40, image=True, in_channels=36),
    "1.3b with poses": TransformerConfig(pose=True),
}


def published(name: str) -> dict[str, tuple[int, ...]]:
    stored = json.loads((KEYS / f"{name}.json").read_text())["tensors"]
    return {key: tuple(shape) for key, shape in stored.items()}


def on_meta(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in Transformer(config).state_dict().items()}


def test_the_real_model_has_exactly_the_published_names_and_shapes() -> None:
    assert on_meta(TransformerConfig()) == published("wan_1_3b") == tensors(TransformerConfig())


def test_the_pose_embedders_have_exactly_the_published_names_and_shapes() -> None:
    module = {name: tuple(tensor.shape) for name, tensor in PoseEmbedder().state_dict().items()}
    assert module == published("unianimate_pose") == pose_tensors()


@pytest.mark.parametrize("kind", KINDS)
def test_the_torch_free_list_is_the_module(kind: str) -> None:
    assert tensors(KINDS[kind]) == on_meta(KINDS[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_recognised_by_its_tensors(kind: str) -> None:
    assert recognise(tensors(KINDS[kind])) == KINDS[kind]


def test_original_names_give_the_published_configuration() -> None:
    assert TransformerConfig.from_original(ORIGINAL) == TransformerConfig()
    image = TransformerConfig.from_original(ORIGINAL | {"model_type": "i2v"}, pose=True)
    assert image == TransformerConfig(image=True, in_channels=36, pose=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "vace"}, "model_type 'vace'"),
        ({"qk_norm": False}, "qk_norm"),
        ({"num_heads": 11}, "1536 does not divide into 11"),
        ({"patch_size": (2, 2, 2)}, "joins frames"),
    ],
)
def test_an_unknown_original_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransformerConfig.from_original(ORIGINAL | change)


@pytest.mark.parametrize(
    "lost", ["patch_embedding.weight", "text_embedding.0.weight", "blocks.0.ffn.0.weight", "head.head.weight"]
)
def test_what_lacks_a_mark_is_not_recognised(lost: str) -> None:
    shapes = tensors(VARIANTS["nano"])
    del shapes[lost]
    with pytest.raises(ValueError, match=lost):
        recognise(shapes)


@pytest.mark.parametrize("shape", [(100, 16, 1, 2, 2), (256, 16, 2, 2), (256,)])
def test_an_odd_patch_embedding_is_not_recognised(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"patch_embedding\.weight"):
        recognise(tensors(VARIANTS["nano"]) | {"patch_embedding.weight": shape})


@pytest.mark.parametrize(
    "name",
    [
        "model.blocks.0.ffn.0.weight",
        "model._fsdp_wrapped_module.blocks.0.ffn.0.weight",
        "_fsdp_wrapped_module.model.blocks.0._fsdp_wrapped_module.ffn.0.weight",
        "blocks.0.ffn.0.weight",
    ],
)
def test_wrappers_are_taken_off_names(name: str) -> None:
    assert current_name(name) == "blocks.0.ffn.0.weight"


def test_only_the_embedders_are_taken_from_the_pose_checkpoint() -> None:
    assert pose_name("dwpose_embedding.0.weight") == "dwpose_embedding.0.weight"
    assert pose_name("module.randomref_embedding_pose.2.bias") == "randomref_embedding_pose.2.bias"
    assert pose_name("blocks.0.self_attn.q.lora_A.default.weight") is None


def test_memory_is_known_before_anything_is_loaded() -> None:
    config = TransformerConfig()
    assert config.tokens(60, 104) == 1560
    assert config.cache_bytes(60, 104, 21) == 2 * 30 * 32760 * 1536 * 2
    nano = VARIANTS["nano"]
    cache = Transformer(nano).cache(4, 6, 5, sink=1)
    assert cache.nbytes == nano.cache_bytes(4, 6, 5, itemsize=4)
    with pytest.raises(ValueError, match="59x104 do not divide"):
        config.tokens(59, 104)


def test_who_takes_poses() -> None:
    takes = {kind: config.takes_pose for kind, config in KINDS.items()}
    assert takes == {
        "1.3b": False, "nano": True, "nano-i2v": True, "14b": True, "14b i2v": True, "1.3b with poses": True,
    }  # fmt: skip
    assert KINDS["14b"].dim == POSE_DIM


@pytest.mark.parametrize("module", ["config", "pose_config", "layout"])
def test_what_check_needs_is_torch_free(module: str) -> None:
    code = f"import sys, app.models.wan.{module}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=KEYS.parents[2])
