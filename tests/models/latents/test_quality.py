from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from app.models.latents.patterns import Kind, pattern
from app.models.latents.quality import POINTS, CurveOf, measure, ssim


def _noisy(frame: NDArray[np.uint8], seed: int) -> NDArray[np.uint8]:
    noise = np.random.default_rng(seed).normal(0, 20, frame.shape)
    return np.clip(frame + noise, 0, 255).astype(np.uint8)


def test_psnr_and_changes_by_hand() -> None:
    first = [np.full((12, 12, 3), value, np.uint8) for value in (100, 110, 110)]
    second = [np.full((12, 12, 3), value, np.uint8) for value in (100, 114, 111)]
    measured = measure(zip(first, second, strict=True))
    assert measured.frames == 3
    assert measured.psnr == pytest.approx(10 * np.log10(255**2 / ((0 + 16 + 1) / 3)))
    assert measured.psnr_worst == pytest.approx(10 * np.log10(255**2 / 16))
    assert (measured.temporal, measured.temporal_other) == (5.0, 8.5)
    assert measured.temporal_error == 3.5  # |14 - 10| and |-3 - 0|
    assert measured.psnr_curve.values[0] == 100


def test_ssim_of_flat_pictures_by_hand() -> None:
    """Without variance only the term of the means is left: (2 a b + c1) / (a^2 + b^2 + c1)."""
    a, b = torch.full((1, 11, 11), 100.0), torch.full((1, 11, 11), 150.0)
    c1 = (0.01 * 255) ** 2
    assert ssim(a, b) == pytest.approx((2 * 100 * 150 + c1) / (100**2 + 150**2 + c1), abs=1e-5)


@pytest.mark.parametrize("kind", ["circle", "gradients", "noise", "text", "checkerboard"])
def test_psnr_and_ssim_equal_scikit_image(kind: Kind) -> None:
    metrics = pytest.importorskip("skimage.metrics", reason="scikit-image is the peer of this test")
    frame = next(pattern(kind, 1, 45, 70, 1))
    other = _noisy(frame, 0)
    measured = measure([(frame, other)])
    peer = metrics.structural_similarity(
        frame, other, channel_axis=2, data_range=255, gaussian_weights=True, sigma=1.5,
        use_sample_covariance=False,
    )  # fmt: skip
    assert measured.ssim == pytest.approx(peer, abs=2e-5)
    assert measured.psnr == pytest.approx(metrics.peak_signal_noise_ratio(frame, other, data_range=255))


def test_equal_clips_one_frame_and_small_frames() -> None:
    frame = next(pattern("rainbow", 1, 10, 40))
    same = measure([(frame, frame)])
    assert same.psnr is None and same.ssim is None and same.temporal is None and same.ssim_curve is None
    larger = next(pattern("rainbow", 1, 11, 40))
    assert measure([(larger, larger)]).ssim == pytest.approx(1)


def test_clips_without_frames_are_refused() -> None:
    with pytest.raises(ValueError, match="no frames"):
        measure([])


@pytest.mark.parametrize("count", [1, POINTS - 1, POINTS, 5 * POINTS + 3])
def test_a_curve_stays_short_and_keeps_its_mean(count: int) -> None:
    curve = CurveOf()
    for value in range(count):
        curve.add(value)
    made = curve.curve()
    assert len(made.values) <= POINTS and -(-count // made.every) == len(made.values)
    assert all(b > a for a, b in itertools.pairwise(made.values))
    assert made.values[0] == (made.every - 1) / 2 if count > 1 else made.values == (0.0,)
