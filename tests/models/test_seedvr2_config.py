import json
from pathlib import Path

import pytest
import torch

from app.models.seedvr2.config import DiTConfig, config_3b, config_7b, dit_tensors, recognise_dit
from app.models.seedvr2.dit import DiT

KEYS = Path(__file__).parents[1] / "golden" / "keys"
KINDS = {
    "3b": config_3b(),
    "7b": config_7b(),
    "small 3b": config_3b(dim=64, heads=2, head_dim=32, layers=3, separate=1, text_dim=16),
    "small 7b": config_7b(dim=64, heads=2, head_dim=48, layers=2, text_dim=64),
    "3b that shares nothing": config_3b(dim=64, heads=1, layers=2, separate=2, text_dim=16),
}


def published(name: str) -> dict[str, tuple[int, ...]]:
    tensors = json.loads((KEYS / f"seedvr2_{name}.json").read_text())["tensors"]
    return {key: tuple(shape) for key, shape in tensors.items()}


def on_meta(config: DiTConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in DiT(config).state_dict().items()}


@pytest.mark.parametrize("kind", ["3b", "7b"])
def test_real_models_have_exactly_the_published_names_and_shapes(kind: str) -> None:
    assert on_meta(KINDS[kind]) == published(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_the_torch_free_list_is_the_module(kind: str) -> None:
    assert dit_tensors(KINDS[kind]) == on_meta(KINDS[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_recognised_by_its_tensors(kind: str) -> None:
    assert recognise_dit(dit_tensors(KINDS[kind])) == KINDS[kind]


@pytest.mark.parametrize("lost", ["vid_in.proj.weight", "blocks.0.attn.norm_q.vid.weight"])
def test_what_lacks_a_mark_is_not_recognised(lost: str) -> None:
    shapes = dit_tensors(KINDS["3b"])
    del shapes[lost]
    with pytest.raises(ValueError, match=lost):
        recognise_dit(shapes)


def test_nothing_is_not_recognised() -> None:
    with pytest.raises(ValueError, match=r"blocks\.0"):
        recognise_dit({"vid_in.proj.weight": (4, 4)})


@pytest.mark.parametrize(
    ("change", "message"),
    [({"txt_dim": 3}, "txt_dim 3"), ({"window_method": ["win"] * 4}, "window_method")],
)
def test_an_unknown_original_is_refused(change: dict[str, object], message: str) -> None:
    from tests.golden import FILES, read_metadata

    file = next(path for path in FILES if path.stem == "seedvr2_dit_3b")
    with pytest.raises(ValueError, match=message):
        DiTConfig.from_original(read_metadata(file)["config"] | change)
