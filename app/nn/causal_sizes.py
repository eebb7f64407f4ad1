"""How frames and latents of a causal video autoencoder count: the first latent holds one frame, every other
`temporal_factor`. Torch-free; a VAE's configuration inherits it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class CausalSizes:
    """Counts and checks by `spatial_factor` (pixels per latent in height and width) and `temporal_factor`
    (frames per latent, after the first)."""

    @property
    def spatial_factor(self) -> int:
        raise NotImplementedError

    @property
    def temporal_factor(self) -> int:
        raise NotImplementedError

    def latents_for(self, frames: int) -> int:
        """Latents of a clip of `frames` = temporal_factor * k + 1 frames; ValueError for another count."""
        if frames < 1 or (frames - 1) % self.temporal_factor:
            raise ValueError(
                f"A clip has {frames} frames; the VAE takes {self.temporal_factor} k + 1 of them: repeat the "
                f"last frame up to {self.frames_for(self.latents_holding(frames))}."
            )
        return 1 + (frames - 1) // self.temporal_factor

    def latents_holding(self, frames: int) -> int:
        """The fewest latents whose frames include a clip of `frames` frames."""
        return 1 + -(-max(frames - 1, 0) // self.temporal_factor)

    def frames_for(self, latents: int) -> int:
        """Frames of a clip of `latents` latents: the first holds one, the others `temporal_factor` each."""
        return 1 + (latents - 1) * self.temporal_factor

    def check_frames(self, x: Tensor, channels: int, first: bool) -> None:
        """Whether `x` can be encoded: (batch, channels, frames, height, width), a clip's first slice or a
        later one. ValueError otherwise."""
        factor, step = self.spatial_factor, self.temporal_factor
        if x.ndim != 5 or x.shape[1] != channels:
            raise ValueError(
                f"The VAE encodes (batch, {channels}, frames, height, width); got {tuple(x.shape)}."
            )
        frames, height, width = x.shape[2:]
        if not (height and width) or height % factor or width % factor:
            raise ValueError(
                f"The VAE encodes heights and widths that are multiples of {factor}; got {height}x{width}: "
                "pad or crop the frames."
            )
        if first:
            self.latents_for(frames)
        elif not frames or frames % step:
            raise ValueError(
                f"A later slice of a clip has {frames} frames; the VAE takes a multiple of {step} there."
            )

    @staticmethod
    def check_latents(z: Tensor, channels: int) -> None:
        """Whether `z` can be decoded: (batch, channels, latents, height, width). ValueError otherwise."""
        if z.ndim != 5 or z.shape[1] != channels or not z.numel():
            raise ValueError(
                f"The VAE decodes (batch, {channels}, latents, height, width), none of them 0; got "
                f"{tuple(z.shape)}."
            )
