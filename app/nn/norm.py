"""Normalisations that several models share."""

from __future__ import annotations

from torch import Tensor, nn


class FrameGroupNorm(nn.GroupNorm):
    """Group normalisation of each frame by its own statistics (Wu & He 2018, arXiv:1803.08494).

    A frame's result does not depend on the frames beside it, so a clip may pass in slices.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, channels, frames, height, width)."""
        batch, _, frames = x.shape[:3]
        normed: Tensor = super().forward(x.transpose(1, 2).flatten(0, 1))
        return normed.view(batch, frames, *normed.shape[1:]).transpose(1, 2)
