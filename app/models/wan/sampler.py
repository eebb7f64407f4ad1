"""Sampling of Wan: latents block by block, each as soon as it exists.

    for block in generate_blocks(model, layout, conditions, SeededNoise(seed, model.device)):
        frames = vae.decode(block.latents, state)     # emit them; only then does the next block begin

A block is denoised by `FewStep` (Self-Forcing: four steps, fresh noise between them) or `ManyStep` (UniPC,
for undistilled models, under guidance). Then a pass over its clean latents leaves its keys and values in the
cache for the blocks to come: it runs after the block was handed over, when the next one is asked for. The
sampler knows nothing of pixels, text or files.

Layout of latents: (batch, 16, frames, height, width), float32, normalised as the VAE's encoder leaves them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from app.models.wan import schedule, unipc
from app.models.wan.cache import CrossCache, KVCache
from app.models.wan.config import LATENT_CHANNELS
from app.models.wan.layout import Conditions, Layout, check
from app.models.wan.schedule import FlowMatch, Noise
from app.models.wan.transformer import Plan, Times, Transformer
from app.models.wan.unipc import Flow

OnStep = Callable[[], None]
Draw = Callable[[int], Tensor]  # step -> noise of the block's shape


@dataclass(frozen=True)
class FewStep:
    """Self-Forcing's sampler (arXiv:2506.08009): to the clean latents, and back to less noise.

    `context`: the timestep of the pass that leaves a block's keys and values in the cache.
    """

    match: FlowMatch = field(default_factory=FlowMatch)
    timesteps: tuple[float, ...] = field(default_factory=lambda: FlowMatch().warped())
    context: float = 0.0

    @property
    def steps(self) -> int:
        return len(self.timesteps)

    def denoise(self, draw: Draw, flow: Flow, on_step: OnStep) -> Tensor:
        x = draw(0)
        for step, timestep in enumerate(self.timesteps):
            on_step()
            sigma = self.match.sigma(timestep)
            if step:
                x = schedule.noised(x, draw(step), sigma)
            x = schedule.clean(x, flow(x, timestep), sigma)
        return x


@dataclass(frozen=True)
class ManyStep:
    """UniPC, for undistilled models."""

    schedule: unipc.Steps = field(default_factory=unipc.steps)
    context: float = 0.0

    @property
    def steps(self) -> int:
        return len(self.schedule.timesteps)

    def denoise(self, draw: Draw, flow: Flow, on_step: OnStep) -> Tensor:
        return unipc.sample(draw(0), flow, self.schedule, on_step)


@dataclass(frozen=True)
class Block:
    """Generated latents (B, 16, frames, H, W) float32; `start`: the first one's number in the clip."""

    index: int
    start: int
    latents: Tensor


@dataclass
class _Branch:
    """Passes under one prompt: its keys and values, and those of the past under it."""

    cross: CrossCache
    cache: KVCache | None


@dataclass(frozen=True)
class _Inputs:
    """What the passes over one block share beside a branch's plan."""

    start: int
    y: Tensor | None
    pose: Tensor | None


class _Past:
    """Clean latents that the cache holds, block by block, in case it must be filled again."""

    def __init__(self, capacity: int, sink: int) -> None:
        self.capacity, self.sink = capacity, sink
        self.first: list[tuple[int, Tensor]] = []
        self.recent: deque[tuple[int, Tensor]] = deque()

    def add(self, start: int, latents: Tensor) -> None:
        if start < self.sink:
            self.first.append((start, latents[:, :, : self.sink - start]))
        own = max(0, self.sink - start)
        if own < latents.shape[2]:
            self.recent.append((start + own, latents[:, :, own:]))
        while (
            len(self.recent) > 1
            and sum(block.shape[2] for _, block in self.recent) - self.recent_first >= self.capacity
        ):
            self.recent.popleft()

    @property
    def recent_first(self) -> int:
        return self.recent[0][1].shape[2] if self.recent else 0

    def seen(self, frames: int) -> list[tuple[int, Tensor]]:
        """(start, latents) of all that a new block of `frames` frames will see, in order."""
        room = self.capacity - self.sink - frames
        blocks: list[tuple[int, Tensor]] = []
        for start, latents in reversed(self.recent):
            kept = min(room, latents.shape[2])
            if kept > 0:
                blocks.insert(0, (start + latents.shape[2] - kept, latents[:, :, -kept:]))
            room -= kept
        return [*self.first, *blocks]


class _Run:
    """One clip in the making."""

    def __init__(self, model: Transformer, layout: Layout, conditions: Conditions, context: float) -> None:
        self.model, self.layout, self.conditions, self.context = model, layout, conditions, context
        capacity = layout.capacity(conditions.frames)
        self.batch = conditions.prompts[0].shape[0]
        rolls = capacity < conditions.frames + layout.frames
        self.past = _Past(capacity, layout.sink if rolls else 0)
        self.prompt = conditions.prompts[0]
        embeddings = [self.prompt]
        if conditions.guidance != 1 and conditions.negative is not None:
            embeddings.append(conditions.negative)
        self.branches = [_Branch(self._cross(text), self._cache(capacity)) for text in embeddings]
        self.known: dict[float, Times] = {}

    def inputs(self, start: int, frames: int) -> _Inputs:
        y, pose = self.conditions.y, self.conditions.pose
        return _Inputs(
            start,
            None if y is None else y[:, :, start : start + frames],
            None if pose is None else self.model.pose_tokens(pose[:, :, start : start + frames]),
        )

    def plans(self, start: int, frames: int) -> list[Plan]:
        size = frames, self.layout.height, self.layout.width
        return [self.model.plan(*size, start=start, cache=branch.cache) for branch in self.branches]

    def flows(self, x: Tensor, timestep: float, plans: list[Plan], inputs: _Inputs) -> list[Tensor]:
        if timestep not in self.known:
            self.known[timestep] = self.model.times(torch.full((self.batch, 1), timestep))
        times = self.known[timestep]
        return [
            self.model(x, times, branch.cross, plan, branch.cache, y=inputs.y, pose=inputs.pose)
            for branch, plan in zip(self.branches, plans, strict=True)
        ]

    def guided(self, x: Tensor, timestep: float, plans: list[Plan], inputs: _Inputs) -> Tensor:
        """The flow, under guidance (Ho and Salimans, 2022, arXiv:2207.12598) where there is some."""
        positive, *others = self.flows(x, timestep, plans, inputs)
        if not others:
            return positive
        (negative,) = (flow.float() for flow in others)
        return negative + self.conditions.guidance * (positive.float() - negative)

    def remember(self, latents: Tensor, plans: list[Plan], inputs: _Inputs) -> None:
        """Leave a block's clean keys and values in the caches."""
        self.flows(latents, self.context, plans, inputs)
        self.past.add(inputs.start, latents)

    def prompt_of(self, start: int, frames: int) -> None:
        """Take up the prompt of a block, and with it look anew at what the block will see."""
        newest = max(first for first in self.conditions.prompts if first <= start)
        prompt = self.conditions.prompts[newest]
        if prompt is self.prompt:
            return
        self.prompt = prompt
        positive = self.branches[0]
        positive.cross = self._cross(prompt)
        if not self.conditions.recache or positive.cache is None:
            return
        seen = self.past.seen(frames)
        self.branches, others = [positive], self.branches[1:]
        positive.cache.clear()
        for first, latents in seen:
            inputs = self.inputs(first, latents.shape[2])
            self.flows(latents, self.context, self.plans(first, latents.shape[2]), inputs)
        self.branches += others

    def _cross(self, text: Tensor) -> CrossCache:
        return self.model.cross(text, self.conditions.image)

    def _cache(self, capacity: int) -> KVCache | None:
        if not capacity:
            return None
        size = self.layout.height, self.layout.width
        return self.model.cache(*size, capacity, sink=self.past.sink, batch=self.batch)


@torch.inference_mode()
def generate_blocks(
    model: Transformer,
    layout: Layout,
    conditions: Conditions,
    noise: Noise,
    sampler: FewStep | ManyStep | None = None,
    on_step: OnStep = lambda: None,
) -> Iterator[Block]:
    """Generate a clip of latents, block by block.

    Args:
        noise: `SeededNoise(seed, device)`, or anything that gives a block's noise for its index and step.
        sampler: `FewStep()` by default.
        on_step: Called before each pass of `sampler.steps` a block; may raise to stop.

    Yields:
        Each generated block. What was given (`conditions.initial`) is not among them.

    Raises:
        InputError, ValueError: as `layout.check`, when the first block is asked for.
    """
    check(model.config, layout, conditions)
    sampler = sampler or FewStep()
    run = _Run(model, layout, conditions, sampler.context)
    given, made = layout.blocks(conditions.frames)
    start = 0
    initial = (
        []
        if conditions.initial is None
        else torch.split(conditions.initial.to(model.device).float(), given, 2)
    )
    for latents in initial:
        frames = latents.shape[2]
        run.prompt_of(start, frames)
        run.remember(latents, run.plans(start, frames), run.inputs(start, frames))
        start += frames
    for index, frames in enumerate(made):
        run.prompt_of(start, frames)
        plans, inputs = run.plans(start, frames), run.inputs(start, frames)
        shape = run.batch, LATENT_CHANNELS, frames, layout.height, layout.width

        def draw(step: int, index: int = index, shape: tuple[int, ...] = shape) -> Tensor:
            return noise(index, step, shape)

        def flow(x: Tensor, t: float, plans: list[Plan] = plans, inputs: _Inputs = inputs) -> Tensor:
            return run.guided(x, t, plans, inputs)

        latents = sampler.denoise(draw, flow, on_step)
        yield Block(index, start, latents)
        if index + 1 < len(made):
            run.remember(latents, plans, inputs)
        start += frames
