"""Normalisations that several models share."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Elements that pass at a time: enough to keep every core busy, few enough to stay in its cache.
_BLOCK = 2**21


class FrameGroupNorm(nn.GroupNorm):
    """Group normalisation of each frame by its own statistics (Wu & He 2018, arXiv:1803.08494).

    A frame's result does not depend on the frames beside it, so a clip may pass in slices. Statistics are
    float32 whatever the dtype of the frames.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, channels, frames, height, width)."""
        out = torch.empty_like(x)
        for part, target in self._blocks(x, out):
            self._normalise(part, target)
        return out

    def silu(self, x: Tensor, out: Tensor) -> None:
        """Write silu(norm(x)) to `out`, few frames at a time: what lies between them stays small and near."""
        for part, target in self._blocks(x, out):
            self._normalise(part, target)
            F.silu(target, inplace=True)

    def _blocks(self, x: Tensor, out: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        frames = max(1, _BLOCK * x.shape[2] // x.numel())
        return zip(torch.split(x, frames, dim=2), torch.split(out, frames, dim=2), strict=True)

    def _normalise(self, x: Tensor, target: Tensor) -> None:
        if x.device.type == "cpu":
            scale, shift = self._scale_and_shift(x)
            torch.addcmul(shift, x, scale, out=target)
        else:
            normed = super().forward(x.transpose(1, 2).flatten(0, 1))
            target.copy_(normed.view(x.shape[0], -1, *normed.shape[1:]).transpose(1, 2))

    def _scale_and_shift(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """norm(x) = x * scale + shift, both (batch, channels, frames, 1, 1).

        torch's own kernel for frames with the channels innermost adds up squares in one running sum: at
        1400x1400 it is wrong in the fourth digit. These sums are pairwise, of values around the mean.
        """
        pixels = x.permute(0, 2, 3, 4, 1).flatten(2, 3)  # (batch, frames, height * width, channels)
        batch, frames, count, channels = pixels.shape
        groups = batch, frames, 1, self.num_groups, channels // self.num_groups

        def over_groups(per_channel: Tensor) -> Tensor:
            mean = per_channel.view(groups).mean(-1, keepdim=True)
            return mean.expand(groups).reshape(batch, frames, 1, channels)

        mean = over_groups(pixels.mean(2, dtype=torch.float32))
        some = max(1, _BLOCK * count // pixels.numel())
        squares = [torch.sub(part, mean).square_().sum(2) for part in torch.split(pixels, some, dim=2)]
        variance = over_groups(sum(squares[1:], squares[0]) / count)
        scale = torch.rsqrt(variance + self.eps) * self.weight
        shift = self.bias - mean * scale
        return scale.permute(0, 3, 1, 2).unsqueeze(-1), shift.permute(0, 3, 1, 2).unsqueeze(-1)
