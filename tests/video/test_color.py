import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from app.video.color import COLOR_FIXES, ColorFix, _from_lab, _to_lab, adain, lab, repair, wavelet
from tests.seeded import randn

PIXELS = Path(__file__).parent.parent / "golden" / "seedvr2_pixels.safetensors"


@pytest.mark.parametrize("name", ["wavelet", "adain"])
def test_colour_repair_gives_the_original_numbers(name: ColorFix) -> None:
    with safe_open(PIXELS, "pt") as golden:
        color = json.loads(golden.metadata()["color"])
        reference = golden.get_tensor(name)
    content = randn(color["content"], *color["shape"]).clamp(-1, 1)
    style = randn(color["style"], *color["shape"]).clamp(-1, 1)
    out = repair(name, content, style)
    error = ((out - reference).norm() / reference.norm()).item()
    print(f"{name}: {error:.2e}")
    assert error < 1e-5


def test_wavelet_is_its_definition() -> None:
    """Detail of the content + residual of the style, each by two-dimensional dilated convolutions."""
    content, style = torch.rand(2, 3, 40, 24) * 2 - 1, torch.rand(2, 3, 40, 24) * 2 - 1
    binomial = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]).div(16).expand(3, 1, 3, 3)

    def residual(x: torch.Tensor) -> torch.Tensor:
        for d in (1, 2, 4, 8, 16):
            x = F.conv2d(F.pad(x, (d, d, d, d), mode="replicate"), binomial, dilation=d, groups=3)
        return x

    reference = content - residual(content) + residual(style)
    assert (wavelet(content, style) - reference).abs().max() < 1e-5


def test_adain_moves_the_statistics() -> None:
    content, style = torch.rand(2, 3, 32, 32) - 0.3, torch.rand(2, 3, 32, 32) * 0.5
    out = adain(content, style)
    assert torch.allclose(out.mean((-2, -1)), style.mean((-2, -1)), atol=1e-6)
    assert torch.allclose(out.std((-2, -1)), style.std((-2, -1)), rtol=1e-3)


@pytest.mark.parametrize(
    ("rgb", "expected"),
    [  # published values, Lindbloom's calculator, D65
        ((255, 255, 255), (100.0, 0.0, 0.0)),
        ((0, 0, 0), (0.0, 0.0, 0.0)),
        ((255, 0, 0), (53.24, 80.09, 67.20)),
        ((0, 255, 0), (87.73, -86.18, 83.18)),
        ((0, 0, 255), (32.30, 79.19, -107.86)),
        ((119, 119, 119), (50.03, 0.0, 0.0)),
    ],
)
def test_lab_is_the_published_space(rgb: tuple[int, ...], expected: tuple[float, ...]) -> None:
    pixel = torch.tensor(rgb).float().div(127.5).sub(1).reshape(1, 3, 1, 1)
    assert _to_lab(pixel).flatten().tolist() == pytest.approx(expected, abs=0.03)


def test_lab_and_back_is_the_identity() -> None:
    frames = torch.rand(2, 3, 16, 16) * 2 - 1
    assert (_from_lab(_to_lab(frames)) - frames).abs().max() < 1e-4


def picture(height: int = 64, width: int = 96) -> torch.Tensor:
    """(2, 3, h, w) in [-0.8, 0.8]: smooth colours."""
    coarse = torch.rand(2, 3, 6, 8, generator=torch.Generator().manual_seed(0)) * 1.6 - 0.8
    return F.interpolate(coarse, (height, width), mode="bilinear", align_corners=True)


def test_lab_undoes_a_tint() -> None:
    style = picture()
    tinted = (style * 0.9 + torch.tensor([0.1, -0.05, 0.05]).reshape(1, 3, 1, 1)).clamp(-1, 1)
    before, after = (tinted - style).square().mean(), (lab(tinted, style) - style).square().mean()
    print(f"mean squared error {before:.5f} -> {after:.5f}")
    assert after < before / 4


def test_lab_keeps_restored_detail_and_does_not_bring_noise() -> None:
    clean = picture()
    noisy = (clean + 0.2 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))).clamp(-1, 1)
    assert (lab(clean, noisy) - clean).abs().mean() < 0.02


@pytest.mark.parametrize("value", [-1.0, 0.0, 1.0])
def test_flat_frames_do_not_blow_up(value: float) -> None:
    flat = torch.full((1, 3, 24, 24), value)
    speck = flat + 0.004 * torch.randn(flat.shape, generator=torch.Generator().manual_seed(2))
    for method in COLOR_FIXES:
        out = repair(method, speck.clamp(-1, 1), flat)
        assert out.isfinite().all()
        assert (out - flat).abs().max() < 0.05


@pytest.mark.parametrize("method", COLOR_FIXES)
def test_chunks_change_nothing_and_inputs_are_left_alone(method: ColorFix) -> None:
    content, style = torch.rand(5, 3, 33, 47) * 2 - 1, torch.rand(5, 3, 33, 47) * 2 - 1
    copies = content.clone(), style.clone()
    whole = repair(method, content, style)
    parts = torch.cat([repair(method, content[i : i + 2], style[i : i + 2]) for i in (0, 2, 4)])
    assert torch.equal(whole, parts)
    assert torch.equal(content, copies[0])
    assert torch.equal(style, copies[1])


@pytest.mark.parametrize("method", COLOR_FIXES)
def test_frames_smaller_than_the_kernels_work(method: ColorFix) -> None:
    content, style = torch.rand(1, 3, 3, 5), torch.rand(1, 3, 3, 5)
    assert repair(method, content, style).isfinite().all()
