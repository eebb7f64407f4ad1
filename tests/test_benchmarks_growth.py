"""What `benchmarks.growth` measures, and the exponents that it tells."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks import growth
from benchmarks.growing import jobs, plot
from benchmarks.growing.jobs import Point


def point(x: int, seconds: float, memory: int = 1) -> Point:
    return Point(x, seconds, seconds, memory)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_an_exponent_is_that_of_a_power(power: float) -> None:
    points = [point(x, 3 * x**power) for x in (1, 2, 8, 100)]
    assert growth.exponent(points, lambda each: each.seconds) == pytest.approx(power)


def test_fixed_costs_flatten_the_last_step_least() -> None:
    points = [point(x, 100 + x**2) for x in (1, 10, 100, 1000)]
    whole, last = (growth.exponent(points[at:], lambda each: each.seconds) for at in (0, -2))
    assert whole < last < 2 and last == pytest.approx(2, abs=0.01)
    assert growth.exponents([points], lambda each: each.seconds) == (f"{whole:.3g}", f"{last:.3g}")


def test_nothing_at_all_has_an_exponent() -> None:
    assert growth.exponent([point(1, 0.0), point(2, 0.0)], lambda each: each.seconds) == 0


def test_attention_is_timed_by_its_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = F.scaled_dot_product_attention

    def slow(*args: torch.Tensor) -> torch.Tensor:
        end = time.process_time() + 0.01 * args[0].shape[-3]
        while time.process_time() < end:
            ...
        return plain(*args)

    monkeypatch.setattr(F, "scaled_dot_product_attention", slow)
    one, several = torch.randn(2, 1, 5, 4), torch.randn(2, 3, 5, 4)
    with jobs.attention() as spent:
        assert torch.equal(F.scaled_dot_product_attention(one, one, one), plain(one, one, one))
        F.scaled_dot_product_attention(several, several, several)
    assert 0.01 <= spent["one"] < spent["several"]
    assert F.scaled_dot_product_attention is slow


@pytest.mark.parametrize(
    ("task", "heads"),
    [("restore", {"frame_attention", "attention"}), ("generate", {"frame_attention", "attention"}),
     ("autoencode", {"frame_attention"})],
)  # fmt: skip
def test_a_job_is_measured_whole(task: str, heads: set[str], tmp_path: Path) -> None:
    with torch.inference_mode():
        job = jobs.JOBS[task](tmp_path)
        found = jobs.measured(job, tmp_path, "area", 9, 32, 48)
    assert found.x == 32 * 48
    assert found.seconds > 0 and found.core > 0 and found.memory >= 0
    assert {name for name in ("frame_attention", "attention") if getattr(found, name)} == heads
    assert not list(tmp_path.glob("out*"))


def test_the_same_points_give_the_same_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rounds = {"restore": [[point(1, 1.0, 10), point(2, 2.0, 20)], [point(1, 1.1, 10), point(2, 2.2, 25)]]}
    for name in ("one.svg", "two.svg"):
        plot.draw(tmp_path / name, "area", rounds)
    one, two = (tmp_path / "one.svg").read_bytes(), (tmp_path / "two.svg").read_bytes()
    assert one == two and b"<svg" in one
