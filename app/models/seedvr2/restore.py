"""The restore pipeline: frames of a shot in, restored frames out, as a stream.

    resize -> pad -> encode -> windows of the transformer -> decode -> unpad -> colour

Each arrow is a generator, so encoding, windows and decoding interleave and memory does not grow with the
length of a shot. Knows nothing of files, cuts, rates or requests.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from app.errors import InternalError
from app.memory import Room
from app.models.seedvr2 import sampler
from app.models.seedvr2.dit import DiT, Plan
from app.models.seedvr2.memory import Estimate
from app.models.seedvr2.offload import is_streamed, place_blocks
from app.models.seedvr2.parallel import SharedDiT
from app.models.seedvr2.segment import Segment, Span, segment
from app.models.seedvr2.tiles import HOST, Tiled, Whole
from app.models.seedvr2.vae import SCALE, VideoVAE
from app.models.seedvr2.vae_config import VAEConfig
from app.models.seedvr2.windowed import cut, in_windows, noise
from app.nn.float8 import Product
from app.timing import Stopwatch
from app.video.color import ColorFix, repair
from app.video.frames import (
    MULTIPLE,
    Crop,
    center_crop16,
    pad_reflect_black,
    padded_size,
    resize,
    to_unit,
    unpad,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Frame = NDArray[np.uint8] | NDArray[np.uint16]


@dataclass(frozen=True)
class RestoreOptions:
    """Parameters of a restoration.

    height, width: size of the result in pixels. seed: of the noise. steps: Euler steps. guidance: scale
    of classifier-free guidance, 1 for none. rescale: guidance rescale in [0, 1]. condition_noise: how
    much the condition is noised, in [0, 1]. window: latents that the transformer sees at once. fit: how a
    size that the model cannot take is made to fit, "pad" keeps all of the picture, "crop" is the
    original's centre crop. color: colour repair. slice: latents that the VAE takes at once; more take
    more memory and no less time (a latent is four frames), and the result is the same. tile: latents in
    height and width that the VAE takes at once, None for whole frames; see `tiles`. stream: whether the
    transformer's blocks stay in the host's memory, see `offload`; the result is the same.
    """

    height: int
    width: int
    seed: int = 0
    steps: int = 1
    guidance: float = 1.0
    rescale: float = 0.0
    condition_noise: float = 0.0
    window: int = 31
    fit: Literal["pad", "crop"] = "pad"
    color: ColorFix = "lab"
    slice: int = 1
    tile: int | None = None
    stream: bool = False


def latent_size(options: RestoreOptions, config: VAEConfig) -> tuple[int, int]:
    """(height, width) of the frames' latents."""
    height, width = options.height, options.width
    if options.fit == "crop":
        height, width = height // MULTIPLE * MULTIPLE, width // MULTIPLE * MULTIPLE
    else:
        height, width = padded_size(height, width)
    return height // config.spatial_factor, width // config.spatial_factor


def _nothing() -> None: ...


@dataclass(frozen=True)
class Restorer:
    """A loaded SeedVR2: transformer, VAE and the embeddings of its two prompts, (length, 5120). Several cards
    may share the transformer; the VAE is on one. float8: how products are made of the transformer's matrices,
    where they are in 8 bits."""

    dit: DiT | SharedDiT
    vae: VideoVAE
    positive: Tensor
    negative: Tensor
    float8: Product | None = None

    def restore_shot(
        self,
        frames: Iterator[Frame],
        count: int,
        options: RestoreOptions,
        shot: int = 0,
        on_step: Callable[[], None] = _nothing,
        clock: Stopwatch | None = None,
    ) -> Iterator[Tensor]:
        """Restore one shot of `count` frames, which fix the windows; else as `restore_segment`."""
        whole = segment(count, Span(0, count), options.window, self.vae.config)
        return self.restore_segment(frames, whole, options, shot, on_step, clock)

    def restore_segment(
        self,
        frames: Iterator[Frame],
        wanted: Segment,
        options: RestoreOptions,
        shot: int = 0,
        on_step: Callable[[], None] = _nothing,
        clock: Stopwatch | None = None,
    ) -> Iterator[Tensor]:
        """Restore a segment of a shot: with the default `slice`, bit for bit what the whole shot gives there.

        Args:
            frames: (h, w, 3) uint8 or uint16, in order: `wanted.read` of the shot.
            wanted: Made with `options.window` and the VAE's configuration.
            options: See `RestoreOptions`.
            shot: Number of the shot in its clip; part of the noise's address.
            on_step: Called before each slice and each step; may raise to stop.
            clock: Gets the seconds of "resize", "encode", "transformer", "decode" and "colour".

        Yields:
            (1, 3, height, width) float32 in [-1, 1], `wanted.made` of the shot, on the CPU; with fit "crop"
            each side is cut to a multiple of 16.
        """
        place_blocks(self.dit, self.device, stream=options.stream)
        work = _Work(self, options, shot, wanted, on_step, clock or Stopwatch())
        first, last = wanted.windows[0], wanted.windows[-1]
        latents = cut(
            work.encoded(work.prepared(frames)), first.start - wanted.encoded.start, last.stop - first.start
        )
        restored = in_windows(latents, list(wanted.windows), work.velocity)
        restored = cut(restored, wanted.decoded.start - first.start, len(wanted.decoded))
        return work.finished(work.decoded(restored))

    def close(self) -> None:
        """Let go of other cards."""
        if isinstance(self.dit, SharedDiT):
            self.dit.close()

    @cached_property
    def estimate(self) -> Estimate:
        """What this model takes of memory, by size; sizes that were asked for once are remembered."""
        return Estimate(
            self.dit.config,
            self.vae.config,
            self.positive.dtype,
            self.vae_dtype,
            self.device.type,
            self.float8,
        )

    def room(self) -> Room:
        """What this model and its work may fill, with what it fills now."""
        streamed = isinstance(self.dit, DiT) and is_streamed(self.dit)
        own = self.estimate.other_bytes() + (0 if streamed else sum(self.estimate.block_bytes()))
        return Room.on(self.device, own, waiting=self.estimate.waiting_bytes() if streamed else 0)

    @property
    def device(self) -> torch.device:
        return self.positive.device

    @property
    def vae_dtype(self) -> torch.dtype:
        return next(self.vae.parameters()).dtype


class _Work:
    """The steps of one segment, each a generator over the one before."""

    def __init__(
        self,
        restorer: Restorer,
        options: RestoreOptions,
        shot: int,
        segment: Segment,
        on_step: Callable[[], None],
        clock: Stopwatch,
    ) -> None:
        self.restorer, self.options, self.shot, self.segment = restorer, options, shot, segment
        self.on_step, self._clock = on_step, clock
        self.vae, self.dit = restorer.vae, restorer.dit
        self.schedule = sampler.timesteps(options.steps)
        self.plans: dict[tuple[int, ...], Plan] = {}
        self.sources: deque[Frame | Tensor] = deque()  # for colour repair, in whichever form is smaller

    def prepared(self, frames: Iterator[Frame]) -> Iterator[Tensor]:
        """Frames as the VAE takes them, (1, 3, H, W) in [-1, 1]: resized, fitted, and the last one
        repeated until they fill their latents."""
        read, made = self.segment.read, self.segment.made
        fitted, number = torch.empty(0), read.start
        for frame in frames:
            with self._timed("resize"):
                resized = self._resized(frame)
                fitted = self._fitted(resized)
            if self.options.color != "none" and made.start <= number < made.stop:
                smaller = resized.nbytes < frame.nbytes
                self.sources.append(resized.cpu() if smaller else frame)
            number += 1
            yield fitted
        if number != read.stop:
            raise InternalError(
                "frames_miscounted", f"A shot of {len(read)} frames held {number - read.start}."
            )
        for _ in range(self.vae.config.frames_for(len(self.segment.encoded)) - len(read)):
            yield fitted

    def encoded(self, frames: Iterator[Tensor]) -> Iterator[Tensor]:
        """Frames -> scaled latents (n, H, W, 16) float32, in one causal pass over the segment.

        Latents are the posterior's mean: the original draws from the posterior, a difference that stays
        within that of two seeds.
        """
        slices = self._clips(frames)
        coder = self._coder(len(self.segment.encoded))
        while clips := list(islice(slices, self._at_once)):
            with self._timed("encode"):
                means = coder.encode(clips, self.on_step)
                clips.clear()
            for mean in means:
                yield mean[0].permute(1, 2, 3, 0).float() * SCALE

    def _clips(self, frames: Iterator[Tensor]) -> Iterator[Tensor]:
        """Frames as slices of the clip, (1, 3, n, H, W), that the VAE takes."""
        config, latents = self.vae.config, len(self.segment.encoded)
        for start in range(0, latents, self.options.slice):
            take = min(self.options.slice, latents - start)
            length = take * config.temporal_factor if start else config.frames_for(take)
            clip = torch.cat([next(frames) for _ in range(length)]).transpose(0, 1).unsqueeze(0)
            clip = clip.to(self.restorer.vae_dtype)
            yield clip if self.options.tile is None else clip.to(HOST)

    def _coder(self, latents: int) -> Whole | Tiled:
        """What takes a clip of so many latents through a half of the VAE."""
        if self.options.tile is None:
            return Whole(self.vae, latents)
        return Tiled(self.vae, latents, *latent_size(self.options, self.vae.config), self.options.tile)

    @property
    def _at_once(self) -> int:
        """Slices that one call of a coder gets: of tiles as many as a window has, since each tile's state
        comes and goes once a call."""
        return 1 if self.options.tile is None else math.ceil(self.options.window / self.options.slice)

    def velocity(self, latents: Tensor, window: Span) -> Tensor:
        """Restore one window: (T, H, W, 16) low-quality latents -> (T, H, W, 16) restored ones."""
        options = self.options
        with self._timed("transformer"):
            # Rounded as the model will see it: the step away from it then cancels exactly.
            start = self._noise("noise", window, latents).to(self.restorer.positive.dtype).float()
            drowned = self._noise("condition", window, latents) if options.condition_noise else None
            condition = sampler.condition(latents, drowned, options.condition_noise)
            guided = options.guidance != 1.0
            restored = sampler.sample(
                start,
                self._model(self.restorer.positive, condition),
                self._model(self.restorer.negative, condition) if guided else None,
                self.schedule,
                options.guidance,
                options.rescale,
                self.on_step,
            )
            self._refuse_not_finite(restored, "transformer", self.restorer.positive.dtype)
        return restored

    def decoded(self, latents: Iterator[Tensor]) -> Iterator[Tensor]:
        """Scaled latents (n, H, W, 16) -> frames (n, 3, H, W) float32: 16-bit results leave 129 levels,
        so that everything after the decoder is float32."""
        coder = self._coder(len(self.segment.decoded))
        for run in latents:
            scaled = (run / SCALE).permute(3, 0, 1, 2).unsqueeze(0).to(self.restorer.vae_dtype)
            slices = iter(torch.split(scaled, self.options.slice, dim=2))
            while parts := list(islice(slices, self._at_once)):
                with self._timed("decode"):
                    clips = deque(coder.decode(parts, self.on_step))
                while clips:
                    with self._timed("decode"):
                        frames = clips.popleft()[0].transpose(0, 1).to(self.restorer.device).float()
                        self._refuse_not_finite(frames, "decoder", self.restorer.vae_dtype)
                    yield frames

    def _refuse_not_finite(self, x: Tensor, step: str, dtype: torch.dtype) -> None:
        if not torch.isfinite(x).all():
            raise InternalError(
                "result_not_finite",
                f"The {step} gave values that are not finite in {str(dtype).removeprefix('torch.')}; set "
                "SEEDPOD_DTYPE=float32 and run the clip again.",
            )

    def finished(self, decoded: Iterator[Tensor]) -> Iterator[Tensor]:
        """Frames of the decoder -> the result, one by one; colour repaired against the sources."""
        made = self.segment.made
        # The first of a clip's latents gives the last of the frames that it stands for. What comes before
        # and after those that are wanted is the past that they need, and the repeated last frame.
        early = made.start - self.segment.decoded.start * self.vae.config.temporal_factor
        for frames in cut(decoded, early, len(made)):
            if self.options.fit == "pad":
                frames = unpad(frames, Crop(self.options.height, self.options.width))
            for i in range(len(frames)):
                frame = frames[i : i + 1]
                if self.options.color != "none":
                    with self._timed("colour"):
                        frame = repair(self.options.color, frame, self._style())
                yield frame.clamp_(-1, 1).cpu()

    def _style(self) -> Tensor:
        source = self.sources.popleft()
        style = source.to(self.restorer.device) if isinstance(source, Tensor) else self._resized(source)
        return center_crop16(style) if self.options.fit == "crop" else style

    def _resized(self, frame: Frame) -> Tensor:
        """A source frame at the size of the result, (1, 3, height, width) in [-1, 1]."""
        unit = to_unit(frame[None]).to(self.restorer.device)
        return resize(unit, self.options.height, self.options.width) * 2 - 1

    def _fitted(self, frame: Tensor) -> Tensor:
        return center_crop16(frame) if self.options.fit == "crop" else pad_reflect_black(frame)[0]

    def _noise(self, kind: str, window: Span, like: Tensor) -> Tensor:
        height, width = like.shape[1:3]
        return noise(self.options.seed, kind, self.shot, window, height, width).to(like.device)

    def _model(self, prompt: Tensor, condition: Tensor) -> sampler.Model:
        key = (*condition.shape[:3], len(prompt))
        if key not in self.plans:
            self.plans[key] = self.dit.plan(*key)
        plan = self.plans[key]

        def velocity(x: Tensor, timestep: float) -> Tensor:
            out: Tensor = self.dit(torch.cat([x, condition], dim=-1).to(prompt.dtype), prompt, timestep, plan)
            return out.float()

        return velocity

    @contextmanager
    def _timed(self, step: str) -> Iterator[None]:
        with self._clock(step):
            yield
            if self.restorer.device.type == "cuda":
                torch.cuda.synchronize(self.restorer.device)
