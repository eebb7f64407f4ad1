"""The restore pipeline: frames of a shot in, restored frames out, as a stream.

    resize -> pad -> encode -> windows of the transformer -> decode -> unpad -> colour

Each arrow is a generator, so encoding, windows and decoding interleave and memory does not grow with the
length of a shot. Knows nothing of files, cuts, rates or requests.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from app.errors import InternalError
from app.models.seedvr2 import sampler
from app.models.seedvr2.dit import DiT, Plan
from app.models.seedvr2.vae import SCALE, VideoVAE
from app.models.seedvr2.windowed import Span, in_windows, noise, spans
from app.video.color import ColorFix, repair
from app.video.frames import Crop, center_crop16, pad_reflect_black, resize, to_unit, unpad

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
    original's centre crop. color: colour repair. slice: latents that the VAE takes at once; changes
    memory, never the result.
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
    slice: int = 4


def _nothing() -> None: ...


@dataclass(frozen=True)
class Restorer:
    """A loaded SeedVR2: transformer, VAE and the embeddings of its two prompts, (length, 5120)."""

    dit: DiT
    vae: VideoVAE
    positive: Tensor
    negative: Tensor

    def restore_shot(
        self,
        frames: Iterator[Frame],
        count: int,
        options: RestoreOptions,
        shot: int = 0,
        on_step: Callable[[], None] = _nothing,
    ) -> Iterator[Tensor]:
        """Restore one shot.

        Args:
            frames: (h, w, 3) uint8 or uint16, in order.
            count: Frames of the shot, known beforehand: it fixes the windows.
            options: See `RestoreOptions`.
            shot: Number of the shot in its clip; part of the noise's address.
            on_step: Called before each slice and each step; may raise to stop.

        Yields:
            (1, 3, height, width) float32 in [-1, 1], `count` of them, on the CPU; with fit "crop" each
            side is cut to a multiple of 16.
        """
        sources: deque[Frame] = deque()  # stored as they came: the fewest bytes
        prepared = self._prepared(frames, count, options, sources)
        latents = self._encoded(prepared, count, options, on_step)
        windows = spans(self.vae.config.latents_holding(count), options.window)
        velocity = _Velocity(self, options, shot, on_step)
        restored = in_windows(latents, windows, velocity)
        yield from self._finished(restored, count, options, sources, on_step)

    def _prepared(
        self, frames: Iterator[Frame], count: int, options: RestoreOptions, sources: deque[Frame]
    ) -> Iterator[Tensor]:
        """Frames as the VAE takes them, (1, 3, H, W) in [-1, 1]: resized, fitted, and the last one
        repeated until they fill their latents. Colour repair finds the sources in `sources`."""
        fitted, seen = torch.empty(0), 0
        for frame in frames:
            if options.color != "none":
                sources.append(frame)
            fitted = self._fit(self._resized(frame, options), options)
            seen += 1
            yield fitted
        if seen != count:
            raise InternalError("frames_miscounted", f"A shot of {count} frames held {seen}.")
        for _ in range(self.vae.config.frames_for(self.vae.config.latents_holding(count)) - count):
            yield fitted

    def _resized(self, frame: Frame, options: RestoreOptions) -> Tensor:
        """A source frame at the size of the result, (1, 3, height, width) in [-1, 1]."""
        return resize(to_unit(frame[None]).to(self.device), options.height, options.width) * 2 - 1

    def _fit(self, frame: Tensor, options: RestoreOptions) -> Tensor:
        return center_crop16(frame) if options.fit == "crop" else pad_reflect_black(frame)[0]

    def _encoded(
        self, frames: Iterator[Tensor], count: int, options: RestoreOptions, on_step: Callable[[], None]
    ) -> Iterator[Tensor]:
        """Frames -> scaled latents (n, H, W, 16) float32, in one causal pass over the shot.

        Latents are the posterior's mean: the original draws from the posterior, a difference that stays
        within that of two seeds."""
        config = self.vae.config
        state = self.vae.new_state()
        left = config.latents_holding(count)
        first = True
        while left:
            on_step()
            take = min(options.slice, left)
            length = config.frames_for(take) if first else take * config.temporal_factor
            clip = torch.cat([next(frames) for _ in range(length)])
            clip = clip.transpose(0, 1).unsqueeze(0).to(self.vae_dtype)
            yield self.vae.encode_slice(clip, state)[0].permute(1, 2, 3, 0).float() * SCALE
            left -= take
            first = False

    def _finished(
        self,
        latents: Iterator[Tensor],
        count: int,
        options: RestoreOptions,
        sources: deque[Frame],
        on_step: Callable[[], None],
    ) -> Iterator[Tensor]:
        """Latents -> frames, in one causal pass over the shot; colour repaired against the sources."""
        left = count
        for frames in self._decoded(latents, options, on_step):
            frames = frames[:left]  # the repeated last frame is not part of the shot
            left -= len(frames)
            if options.fit == "pad":
                frames = unpad(frames, Crop(options.height, options.width))
            for i in range(len(frames)):
                frame = frames[i : i + 1]
                if options.color != "none":
                    style = self._resized(sources.popleft(), options)
                    style = center_crop16(style) if options.fit == "crop" else style
                    frame = repair(options.color, frame, style)
                yield frame.clamp_(-1, 1).cpu()

    def _decoded(
        self, latents: Iterator[Tensor], options: RestoreOptions, on_step: Callable[[], None]
    ) -> Iterator[Tensor]:
        """Scaled latents (n, H, W, 16) -> frames (n, 3, H, W) float32: 16-bit results leave 129 levels,
        so that everything after the decoder is float32."""
        state = self.vae.new_state()
        for run in latents:
            for start in range(0, len(run), options.slice):
                on_step()
                part = run[start : start + options.slice] / SCALE
                z = part.permute(3, 0, 1, 2).unsqueeze(0).to(self.vae_dtype)
                frames = self.vae.decode_slice(z, state)[0].transpose(0, 1).float()
                if not torch.isfinite(frames).all():
                    raise InternalError(
                        "decoder_not_finite",
                        f"The decoder gave values that are not finite in {self.vae_dtype}; run it with "
                        "SEEDPOD_DTYPE=float32 and report the clip.",
                    )
                yield frames

    @property
    def device(self) -> torch.device:
        return self.positive.device

    @property
    def vae_dtype(self) -> torch.dtype:
        return next(self.vae.parameters()).dtype


class _Velocity:
    """Restores one window of latents; holds the plans of the window shapes it has met."""

    def __init__(
        self, restorer: Restorer, options: RestoreOptions, shot: int, on_step: Callable[[], None]
    ) -> None:
        self.restorer, self.options, self.shot, self.on_step = restorer, options, shot, on_step
        self.schedule = sampler.timesteps(options.steps)
        self.plans: dict[tuple[int, ...], Plan] = {}

    def __call__(self, latents: Tensor, window: Span) -> Tensor:
        """(T, H, W, 16) low-quality latents -> (T, H, W, 16) restored ones."""
        options = self.options
        start = self._noise("noise", window, latents)
        drowned = self._noise("condition", window, latents) if options.condition_noise else None
        condition = sampler.condition(latents, drowned, options.condition_noise)
        return sampler.sample(
            start,
            self._model(self.restorer.positive, condition),
            self._model(self.restorer.negative, condition),
            self.schedule,
            options.guidance,
            options.rescale,
            self.on_step,
        )

    def _noise(self, kind: str, window: Span, like: Tensor) -> Tensor:
        height, width = like.shape[1:3]
        return noise(self.options.seed, kind, self.shot, window, height, width).to(like.device)

    def _model(self, prompt: Tensor, condition: Tensor) -> sampler.Model:
        dit = self.restorer.dit
        key = (*condition.shape[:3], len(prompt))
        if key not in self.plans:
            self.plans[key] = dit.plan(*key)
        return lambda x, t: dit(
            torch.cat([x, condition], dim=-1).to(prompt.dtype), prompt, t, self.plans[key]
        ).float()
