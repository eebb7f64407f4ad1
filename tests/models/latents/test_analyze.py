from __future__ import annotations

import builtins
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from app.errors import UnavailableError
from app.models.latents import analyze
from app.models.latents.codec import Facts
from app.models.latents.spool import held

FACTS = Facts("test", channels=4, spatial=4, temporal=4, first=1, multiple=4, scale="as drawn")


def _drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_statistics_equal_those_of_the_whole_clip() -> None:
    clip = _drawn(3, 21, 6, 5) * torch.tensor([1.0, 0.1, 3.0]).view(3, 1, 1, 1)
    clip[1] += 1000  # a large mean costs no digits
    for channel, values in zip(analyze.channel_statistics(held(clip)), clip.double(), strict=True):
        assert channel.mean == pytest.approx(float(values.mean()), abs=1e-6)
        assert channel.std == pytest.approx(float(values.std(correction=0)), rel=1e-6)
        assert (channel.least, channel.most) == (values.min(), values.max())
        assert channel.change == pytest.approx(float(values.diff(dim=0).abs().mean()))
        assert sum(channel.histogram) == pytest.approx(1)
    wide = analyze.channel_statistics(held(clip))
    assert wide[0].histogram[0] == 0 and wide[1].histogram[-1] == 1 and wide[2].histogram[-1] > 0


def test_one_latent_does_not_change() -> None:
    (channel,) = analyze.channel_statistics(held(torch.full((1, 1, 2, 2), 3.0)))
    assert channel.change is None and channel.std == 0 and channel.mean == 3


def test_components_find_the_line_that_a_clip_moves_along() -> None:
    pytest.importorskip("sklearn")
    way = torch.linspace(-1, 1, 30)
    direction = _drawn(4, 1, 3, 3)
    line = direction * way.view(1, -1, 1, 1) + 5
    tracks = analyze.principal_components(
        {"original": held(line), "edited": held(line + 0.001 * _drawn(4, 30, 3, 3))}
    )
    assert tracks.explained[0] > 0.99
    first = torch.tensor([point[0] for point in tracks.points["original"]])
    assert torch.corrcoef(torch.stack([first, way]))[0, 1].abs() > 0.9999
    assert len(tracks.points["edited"]) == 30


def test_components_of_a_long_clip_take_a_bounded_number_and_of_a_still_one_are_zero() -> None:
    pytest.importorskip("sklearn")
    tracks = analyze.principal_components({"a": held(_drawn(1, 2000, 2, 2))})
    assert len(tracks.numbers["a"]) == analyze.SAMPLES
    assert (tracks.numbers["a"][0], tracks.numbers["a"][-1]) == (0, 1999)
    still = analyze.principal_components({"a": held(torch.ones(2, 5, 3, 3))})
    assert all(share == 0 for share in still.explained)
    assert len(analyze.principal_components({"a": held(_drawn(2, 1, 3, 3))}).points["a"]) == 1


def test_the_map_says_which_channel_holds_what() -> None:
    frames = torch.nn.functional.interpolate(_drawn(9, 3, 8, 12, seed=3), scale_factor=4, mode="bicubic") / 4
    luma = 0.299 * frames[:, 0] + 0.587 * frames[:, 1] + 0.114 * frames[:, 2]
    groups = [slice(0, 1), slice(1, 5), slice(5, 9)]
    pool = torch.nn.functional.adaptive_avg_pool2d
    light = torch.stack([pool(luma[g].mean(0, keepdim=True), (8, 12))[0] for g in groups])
    blue = torch.stack([pool((frames[g, 2] - luma[g]).mean(0, keepdim=True), (8, 12))[0] for g in groups])
    latents = torch.stack([light * 3 + 1, -blue, torch.zeros_like(light), _drawn(3, 8, 12, seed=9)])
    for size in (1, 4, 9):
        found = analyze.channel_map(frames.split(size), held(latents), FACTS)
        assert found[0]["luma"] == pytest.approx(1, abs=1e-5)
        assert found[1]["blue"] == pytest.approx(-1, abs=1e-5)
        assert set(found[2].values()) == {0.0}
        assert abs(found[3]["luma"]) < 0.2


def test_the_map_sees_motion_and_edges() -> None:
    frames = torch.zeros(9, 3, 8, 8)
    frames[5:, :, :4, :4] = 0.5 * torch.tensor([1.0, -1, 1, -1]).view(4, 1, 1, 1)
    moving = torch.zeros(3, 2, 2)
    moving[2, 0, 0] = 1
    found = analyze.channel_map([frames], held(moving.expand(1, 3, 2, 2)), FACTS)
    assert found[0]["motion"] > 0.99 and found[0]["edges"] > 0.9


def test_compression_by_hand() -> None:
    made = analyze.compression(held(torch.zeros(4, 3, 8, 8)), 9, 30, 32, FACTS)
    assert made.values == 9 * 30 * 32 * 3 / (4 * 3 * 8 * 8)
    assert made.bytes_16 == made.values / 2 and made.bytes_32 == made.values / 4
    assert made.codebook is None
    coded = Facts("vq", 4, 4, 4, 1, 4, "none", codebook=256)
    assert (
        analyze.compression(held(torch.zeros(4, 3, 8, 8)), 9, 30, 32, coded).codebook == 9 * 30 * 32 * 3 / 192
    )


def test_latents_as_colours_lie_in_range_for_any_number_of_channels() -> None:
    for channels in (1, 2, 4, 16):
        pictures = analyze.colours(held(_drawn(channels, 5, 6, 7)), (0, 0.5, 1))
        assert [picture.shape for picture in pictures] == [(6, 7, 3)] * 3
        assert all(picture.min() >= 0 and picture.max() <= 1 for picture in pictures)
    assert torch.equal(analyze.colours(held(torch.ones(4, 1, 2, 2)), (0,))[0], torch.full((2, 2, 3), 0.5))


def test_without_scikit_learn_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.decomposition", None)
    with pytest.raises(UnavailableError) as refused:
        analyze.principal_components({"a": held(_drawn(1, 3, 2, 2))})
    assert refused.value.code == "package_missing" and "seedpod[latents]" in refused.value.message


def test_figures_need_no_extra_package(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *rest: Any) -> Any:
        assert name.split(".")[0] not in ("sklearn", "matplotlib")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    analyze.channel_statistics(held(_drawn(1, 3, 2, 2)))
    analyze.compression(held(torch.zeros(4, 3, 8, 8)), 9, 30, 32, FACTS)
