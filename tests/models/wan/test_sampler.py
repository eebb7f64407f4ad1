from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from app.models.wan.condition import first_frame
from app.models.wan.layout import Conditions, Layout
from app.models.wan.sampler import Block, FewStep, ManyStep, generate_blocks
from app.models.wan.schedule import FlowMatch, SeededNoise, clean, noised
from app.models.wan.transformer import Transformer
from app.models.wan.unipc import steps
from tests import seeded
from tests.models.wan.small import IMAGE, SIZE, SMALL, latents, model, noise, plain, pose, prompt

TWO = FewStep(timesteps=FlowMatch().warped((1000, 500)))


def clip(
    layout: Layout, conditions: Conditions | None = None, sampler: Any = TWO, ours: Transformer | None = None
) -> Tensor:
    """Generated latents (1, 16, frames, H, W)."""
    blocks = generate_blocks(ours or model(), layout, conditions or Conditions({0: prompt()}), noise, sampler)
    return torch.cat([block.latents for block in blocks], dim=2)


def sight(blocks: list[int], window: int, sink: int) -> Tensor:
    """(frames, frames): which frames a frame sees, by its block."""
    total = sum(blocks)
    sees = torch.zeros(total, total, dtype=torch.bool)
    end = 0
    for frames in blocks:
        rows = slice(end, end + frames)
        end += frames
        first = max(min(sink, end), end - (window - sink)) if end > window else 0
        sees[rows, first:end] = True
        sees[rows, : min(sink, end)] = True
    return sees


@pytest.mark.parametrize(
    ("frames", "block", "independent", "given", "window", "sink", "posed"),
    [
        (9, 3, False, 0, None, 0, False),
        (9, 3, False, 0, 6, 0, True),
        (12, 3, False, 0, 7, 2, False),
        (9, 2, True, 0, 5, 0, False),
        (6, 3, True, 4, 5, 1, True),
        (5, 1, False, 2, 4, 3, False),
    ],
)
def test_block_by_block_equals_a_pass_over_everything_without_a_cache(
    frames: int, block: int, independent: bool, given: int, window: int | None, sink: int, posed: bool
) -> None:
    ours, total = model(), given + frames
    layout = Layout(frames, *SIZE, block, independent, window, sink)
    initial = latents("initial", given) if given else None
    tokens = pose(total) if posed else None
    found = clip(layout, Conditions({0: prompt()}, initial, pose=tokens))

    before, made = layout.blocks(given)
    sees = sight([*before, *made], window or total, sink)
    done = torch.zeros(1, 16, 0, *SIZE, dtype=torch.float64) if initial is None else initial.double()
    for index, count in enumerate(made):
        start = done.shape[2]
        shape = 1, 16, count, *SIZE
        x = noise(index, 0, shape).double()
        for step, timestep in enumerate(TWO.timesteps):
            sigma = TWO.match.sigma(timestep)
            if step:
                x = noised(x, noise(index, step, shape), sigma)
            times = [0.0] * start + [timestep] * count
            part = slice(0, start + count)
            flow = plain(
                ours, torch.cat([done, x], 2), times, prompt(), sees[part, part],
                None if tokens is None else tokens[:, :, part],
            )  # fmt: skip
            x = x - sigma * flow[:, :, start:]
        done = torch.cat([done, x], 2)
    expected = done[:, :, given:]
    assert ((found - expected).norm() / expected.norm()) < 1e-5


class Counted(nn.Module):
    """A transformer that counts its passes."""

    def __init__(self, inner: Transformer) -> None:
        super().__init__()
        self.inner, self.passes = inner, 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.passes += 1
        return self.inner(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name == "inner" else getattr(self.inner, name)


def counted() -> Counted:
    return Counted(model())


def test_a_block_leaves_before_its_clean_pass_and_the_last_one_has_none() -> None:
    ours, passes, starts = counted(), [], []
    for block in generate_blocks(ours, Layout(9, *SIZE), Conditions({0: prompt()}), noise):
        passes.append(ours.passes)
        starts.append((block.index, block.start))
    assert passes == [4, 9, 14]
    assert ours.passes == 14
    assert starts == [(0, 0), (1, 3), (2, 6)]


def test_what_is_given_comes_first_and_is_not_yielded() -> None:
    conditions = Conditions({0: prompt()}, latents("initial", 4))
    made = list(generate_blocks(model(), Layout(6, *SIZE, independent_first=True), conditions, noise, TWO))
    assert [(block.start, block.latents.shape[2]) for block in made] == [(4, 3), (7, 3)]


def test_nothing_happens_before_the_first_block_is_asked_for() -> None:
    ours = counted()
    blocks = generate_blocks(ours, Layout(3, *SIZE), Conditions({0: prompt()}), noise)
    assert ours.passes == 0
    next(blocks)
    assert ours.passes == 4


def test_the_same_seed_gives_the_same_clip_and_another_one_another() -> None:
    clips = [
        torch.cat(
            [
                block.latents
                for block in generate_blocks(
                    model(), Layout(6, *SIZE), Conditions({0: prompt()}), SeededNoise(seed), TWO
                )
            ],
            2,
        )
        for seed in (1, 1, 2)
    ]
    assert torch.equal(clips[0], clips[1])
    assert (clips[0] - clips[2]).norm() > 1


def test_a_longer_clip_begins_like_a_shorter_one() -> None:
    assert torch.equal(clip(Layout(9, *SIZE))[:, :, :6], clip(Layout(6, *SIZE)))


def test_past_a_training_clip_the_window_rolls_by_default() -> None:
    layout = Layout(27, 2, 2)
    assert layout.capacity() == 21
    rolled = clip(layout)
    assert torch.equal(rolled, clip(replace(layout, window=21)))
    whole = clip(replace(layout, window=27))
    torch.testing.assert_close(rolled[:, :, :21], whole[:, :, :21])
    assert (rolled[:, :, 21:] - whole[:, :, 21:]).norm() > 1e-3


def test_a_sink_larger_than_the_clip_changes_nothing() -> None:
    assert torch.equal(clip(Layout(6, *SIZE, sink=30)), clip(Layout(6, *SIZE)))


@pytest.mark.parametrize(("window", "sink"), [(9, 0), (6, 0), (7, 2)])
def test_a_new_prompt_looks_anew_at_what_the_window_holds(window: int, sink: int) -> None:
    layout = Layout(12, *SIZE, window=window, sink=sink)
    old, new = prompt("old"), prompt("new")
    made = clip(layout, Conditions({0: old, 8: new}))
    assert torch.equal(made[:, :, :9], clip(layout, Conditions({0: old}))[:, :, :9])
    lingering = clip(layout, Conditions({0: old, 8: new}, recache=False))
    assert torch.equal(made[:, :, :9], lingering[:, :, :9])
    assert (made[:, :, 9:] - lingering[:, :, 9:]).norm() > 1e-3

    # By hand: an empty cache, filled under the new prompt with the frames that the block will see.
    ours = model()
    cache, cross = ours.cache(*SIZE, window, sink=sink), ours.cross(new)
    kept = [*range(sink), *range(9 - (window - sink - 3), 9)]
    pieces = [[f for f in kept if f < sink]] if sink else []
    pieces += [[f for f in kept if f >= sink and f // 3 == block] for block in range(3)]
    for piece in filter(None, pieces):
        plan = ours.plan(len(piece), *SIZE, start=piece[0], cache=cache)
        ours(made[:, :, piece], torch.zeros(1, len(piece)), cross, plan, cache)
    plan = ours.plan(3, *SIZE, start=9, cache=cache)
    shape = 1, 16, 3, *SIZE
    x = noise(3, 0, shape)
    for step, timestep in enumerate(TWO.timesteps):
        sigma = TWO.match.sigma(timestep)
        x = noised(x, noise(3, step, shape), sigma) if step else x
        x = clean(x, ours(x, torch.full((1, 3), timestep), cross, plan, cache), sigma)
    torch.testing.assert_close(made[:, :, 9:], x, rtol=1e-4, atol=1e-5)


def test_many_steps_under_guidance_equal_a_loop_with_two_caches() -> None:
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: no peer to compare with")
    ours, positive, negative, scale = model(), prompt("positive"), prompt("negative"), 3.0
    schedule = steps(6)
    found = clip(
        Layout(6, *SIZE), Conditions({0: positive}, negative=negative, guidance=scale), ManyStep(schedule)
    )
    sides = [(ours.cross(text), ours.cache(*SIZE, 6)) for text in (positive, negative)]
    made = []
    for block in range(2):
        plans = [ours.plan(3, *SIZE, start=3 * block, cache=cache) for _, cache in sides]

        def flows(x: Tensor, t: float, plans: list[Any] = plans) -> list[Tensor]:
            return [
                ours(x, torch.full((1, 3), t), cross, plan, cache)
                for (cross, cache), plan in zip(sides, plans, strict=True)
            ]

        peer = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
        peer.set_timesteps(6)
        peer.sigmas = torch.tensor(schedule.sigmas)
        peer.timesteps = torch.tensor(schedule.timesteps)
        x = noise(block, 0, (1, 16, 3, *SIZE))
        for t in schedule.timesteps:
            cond, uncond = flows(x, t)
            x = peer.step(uncond + scale * (cond - uncond), torch.tensor(t), x).prev_sample
        flows(x, 0.0)
        made.append(x)
    expected = torch.cat(made, 2)
    assert ((found - expected).norm() / expected.norm()) < 1e-4


def test_guidance_of_one_is_none() -> None:
    ours = counted()
    list(generate_blocks(ours, Layout(3, *SIZE), Conditions({0: prompt()}), noise, ManyStep(steps(5))))
    assert ours.passes == 5
    guided = Conditions({0: prompt()}, negative=prompt("negative"), guidance=2.0)
    list(generate_blocks(ours, Layout(3, *SIZE), guided, noise, ManyStep(steps(5))))
    assert ours.passes == 15
    with pytest.raises(ValueError, match="needs a negative"):
        clip(Layout(3, *SIZE), Conditions({0: prompt()}, guidance=2.0))


def test_a_clip_of_one_block_needs_no_cache_and_equals_one_that_has_one() -> None:
    assert Layout(7, *SIZE, block=7).capacity() == 0
    alone = clip(Layout(7, *SIZE, block=7))
    cached = clip(Layout(14, *SIZE, block=7))
    torch.testing.assert_close(alone, cached[:, :, :7])


def test_an_image_conditions_every_block() -> None:
    ours, y = model(IMAGE), first_frame(latents("y", 6))
    seen = seeded.randn("small/image", 1, 257, 20)
    conditions = Conditions({0: prompt()}, image=seen, y=y)
    made = clip(Layout(6, *SIZE), conditions, ours=ours)
    changed = y.clone()
    changed[:, :, 4] += 1
    other = clip(Layout(6, *SIZE), replace(conditions, y=changed), ours=ours)
    assert torch.equal(made[:, :, :3], other[:, :, :3])
    assert (made[:, :, 3:] - other[:, :, 3:]).norm() > 1e-3
    unseen = clip(Layout(6, *SIZE), replace(conditions, image=torch.zeros_like(seen)), ours=ours)
    assert (made[:, :, :3] - unseen[:, :, :3]).norm() > 1e-3


def test_a_batch_is_two_clips() -> None:
    def twice(block: int, step: int, shape: tuple[int, ...]) -> Tensor:
        return noise(block, step, (1, *shape[1:])).expand(shape)

    pair = Conditions({0: torch.cat([prompt("a"), prompt("b")])})
    both = torch.cat(
        [block.latents for block in generate_blocks(model(), Layout(6, *SIZE), pair, twice, TWO)], 2
    )
    for i, name in enumerate("ab"):
        one = clip(Layout(6, *SIZE), Conditions({0: prompt(name)}))
        torch.testing.assert_close(both[i : i + 1], one, rtol=1e-4, atol=1e-5)


def test_stopping_between_steps() -> None:
    calls: list[int] = []

    def stop() -> None:
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt

    blocks: Iterator[Block] = generate_blocks(
        model(), Layout(9, *SIZE), Conditions({0: prompt()}), noise, on_step=stop
    )
    next(blocks)
    with pytest.raises(KeyboardInterrupt):
        next(blocks)


def test_sixteen_bits_make_float32_latents() -> None:
    half = Transformer(SMALL).bfloat16()
    half.load_state_dict(model().state_dict())
    made, wide = clip(Layout(6, *SIZE), ours=half.eval()), clip(Layout(6, *SIZE))
    assert made.dtype == torch.float32
    assert ((made - wide).norm() / wide.norm()) < 0.05
