import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from app.errors import UsageError
from app.video.frames import (
    Crop,
    area_size,
    center_crop16,
    pad_reflect_black,
    padded_size,
    preprocess_original,
    resize,
    target_size,
    to_unit,
    unpad,
)
from tests.seeded import randn

PIXELS = Path(__file__).parent.parent / "golden" / "seedvr2_pixels.safetensors"


def test_preprocessing_gives_the_original_numbers() -> None:
    with safe_open(PIXELS, "pt") as golden:
        for i, case in enumerate(json.loads(golden.metadata()["cases"])):
            x = torch.sigmoid(randn(case["x"], case["t"], 3, case["h"], case["w"]))
            reference = golden.get_tensor(f"pre{i}")
            out = preprocess_original(x, case["res_h"], case["res_w"])
            assert out.shape == reference.shape
            error = ((out - reference).norm() / reference.norm()).item()
            print(f"pre{i}: {error:.2e}")
            assert error < 1e-5


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_the_range_of_integers_becomes_the_unit_interval(dtype: type) -> None:
    peak = np.iinfo(dtype).max
    frames = np.zeros((2, 4, 6, 3), dtype)
    frames[1, 2, 3] = (peak, peak // 3, 0)
    out = to_unit(frames)
    assert out.shape == (2, 3, 4, 6)
    assert out.dtype == torch.float32
    assert out[1, :, 2, 3].tolist() == pytest.approx([1, (peak // 3) / peak, 0], abs=1e-7)
    assert out[0].abs().sum() == 0


def test_resizing_stays_within_the_range() -> None:
    edges = (torch.arange(32) // 4 % 2).float().expand(1, 3, 32, 32)
    out = resize(edges, 100, 64)
    assert out.shape == (1, 3, 100, 64)
    assert out.min() == 0
    assert out.max() == 1
    assert resize(edges, 32, 32) is edges


def test_resizing_down_is_antialiased() -> None:
    stripes = (torch.arange(256) % 2).float().expand(1, 3, 256, 256)
    assert resize(stripes, 64, 64)[..., 8:-8].sub(0.5).abs().max() < 0.05


@pytest.mark.parametrize(
    ("size", "area", "expected"),
    [
        ((45, 80), (96, 160), (93, 165)),
        ((1080, 1920), (720, 1280), (720, 1280)),
        ((50, 50), (70, 100), (84, 84)),
    ],
)
def test_area_size(size: tuple[int, int], area: tuple[int, int], expected: tuple[int, int]) -> None:
    assert area_size(*size, *area) == expected


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, (181, 321)),
        ({"scale": 1}, (181, 321)),
        ({"scale": 2}, (362, 642)),
        ({"scale": 1.5}, (272, 482)),
        ({"scale": 1.5, "multiple": 2}, (272, 482)),
        ({"scale": 0.5, "multiple": 2}, (90, 160)),
        ({"short_side": 720, "multiple": 2}, (720, 1276)),
        ({"short_side": 720}, (720, 1277)),
        ({"to_height": 361}, (361, 640)),
        ({"to_width": 640}, (361, 640)),
        ({"to_width": 100, "to_height": 333, "multiple": 2}, (333, 100)),
    ],
)
def test_target_size(asked: dict[str, Any], expected: tuple[int, int]) -> None:
    assert target_size(181, 321, **asked) == expected


def test_a_source_keeps_its_own_size_unless_no_encoder_takes_it() -> None:
    assert target_size(1, 16384) == (1, 16384)
    for height, width in ((1, 16385), (100_000, 1)):  # few pixels, and hours in one layer's attention
        with pytest.raises(UsageError, match=f"{width}x{height}.*16 to 16384") as caught:
            target_size(height, width)
        assert caught.value.code == "size_invalid"


@pytest.mark.parametrize(
    ("asked", "code", "names"),
    [
        ({"scale": 2, "short_side": 720}, "size_conflict", "720"),
        ({"scale": 2, "to_width": 640}, "size_conflict", "640"),
        ({"scale": 0}, "size_invalid", "0"),
        ({"scale": -1}, "size_invalid", "-1"),
        ({"scale": float("nan")}, "size_invalid", "nan"),
        ({"scale": 0.01}, "size_invalid", "16 to 16384"),
        ({"to_height": 0}, "size_invalid", "x0"),
        ({"to_width": -640}, "size_invalid", "-640"),
        ({"short_side": 20000}, "size_invalid", "20000"),
    ],
)
def test_a_size_without_sense_is_refused(asked: dict[str, Any], code: str, names: str) -> None:
    with pytest.raises(UsageError) as caught:
        target_size(181, 321, **asked)
    assert caught.value.code == code
    assert names in caught.value.message


def test_the_centre_is_kept_by_cropping() -> None:
    frames = torch.arange(35 * 50).reshape(1, 1, 35, 50)
    out = center_crop16(frames)
    assert out.shape == (1, 1, 32, 48)
    assert out[0, 0, 0, 0] == 2 * 50 + 1  # 1.5 rows round to the even 2


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((720, 1280), (752, 1280)),
        ((1080, 1920), (1104, 1920)),
        ((360, 640), (384, 640)),
        ((361, 641), (400, 656)),
        ((1, 1), (32, 16)),
    ],
)
def test_padded_size(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert padded_size(*size) == expected
    assert pad_reflect_black(torch.zeros(1, 3, *size))[0].shape[-2:] == expected


@pytest.mark.parametrize("size", [(720, 64), (1080, 30), (40, 33), (5, 3), (2, 17), (1, 1)])
def test_padding_reflects_then_blackens(size: tuple[int, int]) -> None:
    height, width = size
    frames = torch.rand(2, 3, height, width) * 2 - 1
    padded, crop = pad_reflect_black(frames)
    assert crop == Crop(height, width)
    assert torch.equal(unpad(padded, crop), frames)
    assert (padded[..., -16:, :] == -1).all()
    reflected = padded[..., height:-16, :width]
    assert reflected.shape[-2] >= 8
    for row in range(min(height - 1, reflected.shape[-2])):
        assert torch.equal(reflected[..., row, :], frames[..., height - 2 - row, :])
    for column in range(min(width - 1, padded.shape[-1] - width)):
        assert torch.equal(padded[..., :height, width + column], frames[..., width - 2 - column])


def test_padding_of_a_large_picture_is_that_of_torch() -> None:
    frames = torch.rand(1, 3, 72, 53)
    padded, _ = pad_reflect_black(frames)
    reference = torch.nn.functional.pad(frames, (0, 11, 0, 8), mode="reflect")
    assert torch.equal(padded[..., :-16, :], reference)
