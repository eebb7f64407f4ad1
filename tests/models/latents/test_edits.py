from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from app.errors import InputError, UsageError
from app.models.latents import edits
from app.models.latents.edit_mix import cell
from app.models.latents.edit_request import Edits, Grid, clips_of
from app.models.latents.spool import chunks, held, held_to_length, spool

SHAPE = (4, 13, 3, 5)
DESCRIBED = TypeAdapter(Edits)


def _clip(seed: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


A, B, C = _clip(0), _clip(1), _clip(2)


def _apply(described: list[Any], folder: Path, **clips: Tensor) -> Tensor:
    given = {"a": A, "b": B, "c": C, **clips}
    edited = edits.apply(DESCRIBED.validate_python(described), {n: held(c) for n, c in given.items()}, folder)
    return torch.cat(list(chunks(edited)), 1)


EVERY: list[str] = [
    "noise strength=0.5 seed=3",
    "scale factor=2 bias=-1 channels=1,3",
    "smooth sigma=1.3",
    "sharpen sigma=0.8 amount=2",
    "interpolate clip=b weight=0 end_weight=1 method=spherical",
    "path points=a,b@0.5,c",
    "grid corners=a,b,c,a@0 rows=3 columns=4",
    "arithmetic factor=0.5",
    "motion amount=2 still_from=b",
    "quantise bits=3",
    "mask top=0.5 stop=0.6 outside=true clip=b",
    "shuffle block=3 seed=1",
]


@pytest.mark.parametrize("text", EVERY)
def test_an_edit_changes_the_clip_and_no_cut_into_chunks_changes_the_edit(text: str, tmp_path: Path) -> None:
    described = DESCRIBED.validate_python([text])
    clips = {name: held(clip) for name, clip in {"a": A, "b": B, "c": C}.items()}
    lazy = edits._EDITS[described[0].kind](described[0], clips["a"], clips)
    whole = lazy.read(0, SHAPE[1])
    assert whole.shape == SHAPE and not torch.equal(whole, A)
    for size in (1, 3, 8):
        assert torch.equal(torch.cat(list(chunks(lazy, size)), 1), whole)
    assert edits.apply(described, clips, tmp_path).shape == SHAPE


def test_every_kind_is_described_and_done() -> None:
    assert sorted(edits._EDITS) == sorted(text.split()[0] for text in EVERY)
    assert {edit.kind for edit in DESCRIBED.validate_python(EVERY)} == set(edits._EDITS)


def test_all_edits_in_a_row_equal_one_after_the_other(tmp_path: Path) -> None:
    step = A
    for number, text in enumerate(EVERY):
        (folder := tmp_path / str(number)).mkdir()
        given = {"a": held(step), "b": held(B), "c": held(C)}
        described = DESCRIBED.validate_python([text])
        if "a" in described[0].clips():  # the clip as it was before the first edit
            original = DESCRIBED.validate_python(
                [text.replace("a@", "z@").replace("=a,", "=z,").replace(",a", ",z")]
            )
            described, given["z"] = original, held(A)
        step = torch.cat(list(chunks(edits.apply(described, given, folder))), 1)
    assert torch.equal(_apply(EVERY, tmp_path), step)


def test_only_the_result_stays_in_the_folder(tmp_path: Path) -> None:
    _apply(EVERY, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [f"edited-{len(EVERY)}"]


def test_no_edits_are_the_clip_itself(tmp_path: Path) -> None:
    assert torch.equal(_apply([], tmp_path), A)
    assert not list(tmp_path.iterdir())


def test_noise_has_its_strength_its_seed_and_its_latents(tmp_path: Path) -> None:
    added = _apply(["noise strength=0.5 seed=3"], tmp_path, a=torch.zeros(4, 50, 20, 20))
    assert added.std() == pytest.approx(0.5, rel=0.02) and added.mean().abs() < 0.01
    assert not torch.equal(added[:, 0], added[:, 1])
    assert not torch.equal(
        added, _apply(["noise strength=0.5 seed=4"], tmp_path, a=torch.zeros(4, 50, 20, 20))
    )
    shorter = _apply(["noise strength=0.5 seed=3"], tmp_path, a=torch.zeros(4, 20, 20, 20))
    assert torch.equal(added[:, :20], shorter)
    still = _apply(["noise strength=0.5 still=true"], tmp_path, a=torch.zeros(SHAPE))
    assert torch.equal(still, still[:, :1].expand(SHAPE))


def test_scale_and_bias_of_chosen_channels(tmp_path: Path) -> None:
    edited = _apply(["scale factor=2 bias=-1 channels=1,3"], tmp_path)
    assert torch.equal(edited[[0, 2]], A[[0, 2]])
    assert torch.equal(edited[[1, 3]], A[[1, 3]] * 2 - 1)


def test_smoothing_keeps_what_is_still_and_is_a_gaussian(tmp_path: Path) -> None:
    still = A[:, :1].expand(SHAPE)
    torch.testing.assert_close(_apply(["smooth sigma=2"], tmp_path, a=still), still)
    impulse = torch.zeros(1, 21, 1, 1)
    impulse[0, 10] = 1
    taps = [math.exp(-0.5 * (shift / 1.5) ** 2) for shift in range(-5, 6)]
    smoothed = _apply(["smooth sigma=1.5"], tmp_path, a=impulse).flatten()
    torch.testing.assert_close(smoothed[5:16], torch.tensor(taps) / sum(taps))


def test_sharpening_adds_what_smoothing_takes(tmp_path: Path) -> None:
    blurred, sharp = _apply(["smooth sigma=1"], tmp_path), _apply(["sharpen sigma=1 amount=1.5"], tmp_path)
    torch.testing.assert_close(sharp, A + 1.5 * (A - blurred))


def test_interpolation_ramps_from_one_clip_to_the_other(tmp_path: Path) -> None:
    for method in ("linear", "spherical"):
        edited = _apply([f"interpolate clip=b weight=0 end_weight=1 method={method}"], tmp_path)
        assert torch.equal(edited[:, 0], A[:, 0]) and torch.equal(edited[:, -1], B[:, -1])
    constant = _apply(["interpolate clip=b weight=0.25"], tmp_path)
    torch.testing.assert_close(constant, 0.75 * A + 0.25 * B)


def test_spherical_interpolation_of_a_right_angle_by_hand(tmp_path: Path) -> None:
    x, y = torch.tensor([1.0, 0.0]).view(2, 1, 1, 1), torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)
    edited = _apply(["interpolate clip=b weight=0.3333333333 method=spherical"], tmp_path, a=x, b=y)
    assert edited.flatten().tolist() == pytest.approx([math.cos(math.pi / 6), 0.5])
    opposite = _apply(["interpolate clip=b weight=0.25 method=spherical"], tmp_path, a=x, b=-x)
    assert opposite.flatten().tolist() == pytest.approx([0.5, 0])


def test_a_path_passes_its_points_and_one_point_is_a_still(tmp_path: Path) -> None:
    edited = _apply(["path points=a@0,b@0.5,c"], tmp_path)
    assert torch.equal(edited[:, 0], A[:, 0]) and torch.equal(edited[:, 6], B[:, 6])
    assert torch.equal(edited[:, -1], C[:, -1])
    torch.testing.assert_close(edited[:, 3], (A[:, 0] + B[:, 6]) / 2)
    assert torch.equal(_apply(["path points=b@1"], tmp_path), B[:, -1:].expand(SHAPE))


def test_a_moment_is_of_its_own_clip_and_a_short_clip_holds_its_last_latent(tmp_path: Path) -> None:
    short = B[:, :3]
    assert torch.equal(_apply(["path points=b@0.5"], tmp_path, b=short), short[:, 1:2].expand(SHAPE))
    assert torch.equal(_apply(["path points=b"], tmp_path, b=short)[:, 2:], short[:, 2:].expand(4, 11, 3, 5))
    cut = held_to_length(held(short), 7)
    whole = torch.cat([short, short[:, -1:].expand(4, 4, 3, 5)], 1)
    assert torch.equal(cut.read(0, 7), whole) and torch.equal(cut.read(5, 7), whole[:, 5:])
    assert torch.equal(held_to_length(held(B), 4).read(1, 4), B[:, 1:4])


def test_a_grid_goes_through_its_corners_and_every_cell(tmp_path: Path) -> None:
    one, two, three, four = (torch.full((1, 1, 1, 1), value) for value in (0.0, 2.0, 20.0, 22.0))
    edited = _apply(
        ["grid corners=a@0,b@0,c@0,d@0 rows=3 columns=3"],
        tmp_path,
        a=one.expand(1, 9, 1, 1), b=two, c=three, d=four,
    )  # fmt: skip
    assert edited.flatten().tolist() == pytest.approx([0, 1, 2, 12, 11, 10, 20, 21, 22])
    (grid,) = DESCRIBED.validate_python(["grid corners=a,a,a,a rows=2 columns=3"])
    assert isinstance(grid, Grid)
    assert [cell(grid, number, 6) for number in range(6)] == [(0, 0), (0, 1), (0, 2), (1, 2), (1, 1), (1, 0)]


def test_arithmetic_and_motion(tmp_path: Path) -> None:
    torch.testing.assert_close(_apply(["arithmetic factor=2"], tmp_path), A + 2 * (B - C))
    mean, other = A.mean(1, keepdim=True), B.mean(1, keepdim=True)
    torch.testing.assert_close(_apply(["motion amount=0"], tmp_path), mean.expand(SHAPE))
    torch.testing.assert_close(_apply(["motion motion_from=b"], tmp_path), mean + B - other)
    torch.testing.assert_close(_apply(["motion still_from=b amount=3"], tmp_path), other + 3 * (A - mean))


def test_quantised_values_by_hand(tmp_path: Path) -> None:
    values = torch.tensor([-9.0, -3.9, -0.1, 0.0, 1.9, 2.0, 9.0]).view(1, 7, 1, 1)
    edited = _apply(["quantise bits=2 span=4"], tmp_path, a=values)
    assert edited.flatten().tolist() == [-3, -3, -1, 1, 1, 3, 3]
    assert len(_apply(["quantise bits=4"], tmp_path).unique()) <= 16
    assert (_apply(["quantise bits=16 span=10"], tmp_path) - A).abs().max() <= 10 / 2**16 + 1e-5


def test_a_mask_replaces_its_part_or_all_but_it(tmp_path: Path) -> None:
    region = "mask channels=1 top=0 bottom=0.4 left=0.6 right=1 start=0 stop=0.5"
    expected = A.clone()
    expected[1, :6, :1, 3:] = 7
    assert torch.equal(_apply([region + " value=7"], tmp_path), expected)
    outside = torch.zeros(SHAPE)
    outside[1, :6, :1, 3:] = A[1, :6, :1, 3:]
    assert torch.equal(_apply([region + " outside=true"], tmp_path), outside)
    assert torch.equal(_apply(["mask clip=b start=0.99"], tmp_path)[:, -1], B[:, -1])


def test_a_shuffle_moves_whole_blocks_and_loses_none(tmp_path: Path) -> None:
    numbers = torch.arange(13.0).view(1, 13, 1, 1)
    order = _apply(["shuffle block=3 seed=5"], tmp_path, a=numbers).flatten().int().tolist()
    assert sorted(order) == list(range(13)) and order != list(range(13))
    assert all(order[i + 1] == n + 1 for i, n in enumerate(order[:-1]) if n % 3 != 2 and n != 12)
    assert order != _apply(["shuffle block=3 seed=6"], tmp_path, a=numbers).flatten().int().tolist()


@pytest.mark.parametrize(
    ("described", "said"),
    [
        ({"kind": "melt"}, "melt"),
        ("noise", "strength"),
        ("noise strength=11", "10"),
        ("noise strength=nan", "finite"),
        ("noise strength=1 strength=2", "twice"),
        ("noise strength", "name=value"),
        ("noise strength=1 colour=red", "colour"),
        ("noise strength=1 channels=-1", "channels"),
        ("smooth sigma=0", "greater than 0"),
        ("quantise bits=17", "16"),
        ("mask top=0.5 bottom=0.5", "less than"),
        ("mask left=2", "less than or equal to 1"),
        ("shuffle block=0", "block"),
        ("grid corners=a,b,c", "corners"),
        ("path points=../x", "pattern"),
        ("interpolate clip=B", "pattern"),
        ("{broken", "JSON"),
        ("", "kind"),
        (7, "dictionary"),
    ],
)
def test_what_is_unknown_or_out_of_range_is_refused(described: Any, said: str) -> None:
    with pytest.raises(ValidationError) as refused:
        DESCRIBED.validate_python([described])
    assert said in str(refused.value)


def test_more_edits_than_there_may_be_are_refused() -> None:
    with pytest.raises(ValidationError):
        DESCRIBED.validate_python(["shuffle"] * 33)


@pytest.mark.parametrize(
    ("text", "clips", "code"),
    [
        ("interpolate clip=d", {}, "clip_unknown"),
        ("arithmetic", {"c": torch.zeros(4, 13, 3, 6)}, "clip_mismatch"),
        ("scale channels=4", {}, "channel_unknown"),
        ("grid corners=a,b,c,a rows=4 columns=4", {}, "grid_too_fine"),
    ],
)
def test_what_does_not_fit_the_clips_is_refused_before_work(
    text: str, clips: Mapping[str, Tensor], code: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError) as refused:
        _apply(["noise strength=1", "smooth sigma=1", text], tmp_path, **clips)
    assert refused.value.code == code and refused.value.message.startswith("Edit 3")
    assert not list(tmp_path.iterdir())


def test_a_request_survives_json_and_names_its_clips() -> None:
    described = DESCRIBED.validate_python(EVERY)
    assert DESCRIBED.validate_json(DESCRIBED.dump_json(described)) == described
    assert clips_of(described) == {"b", "c"}


def test_a_spool_reads_what_was_written(tmp_path: Path) -> None:
    written = spool(tmp_path / "latents", iter(A.split([1, 4, 8], 1)))
    assert written.shape == SHAPE
    assert torch.equal(torch.cat(list(chunks(written, 4)), 1), A)
    assert torch.equal(written.read(3, 5), A[:, 3:5])


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_latents_that_are_no_numbers_are_refused(value: float, tmp_path: Path) -> None:
    with pytest.raises(InputError) as refused:
        spool(tmp_path / "latents", [A, torch.full(SHAPE, value)])
    assert refused.value.code == "latents_not_finite" and "13 to 25" in refused.value.message


def test_a_clip_without_latents_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError) as refused:
        spool(tmp_path / "latents", [])
    assert refused.value.code == "clip_empty"


def test_a_stop_while_edits_are_made_leaves_the_loop(tmp_path: Path) -> None:
    class StopError(Exception): ...

    def stop() -> None:
        raise StopError

    with pytest.raises(StopError):
        edits.apply(DESCRIBED.validate_python(["scale"]), {"a": held(A)}, tmp_path, stop)
