"""Normalisations that several models share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Elements of a frame that the CPU's statistics take at a time: a megabyte, near the core.
_BLOCK = 2**18


class FrameGroupNorm(nn.GroupNorm):
    """Group normalisation of each frame by its own statistics (Wu & He 2018, arXiv:1803.08494).

    A frame's result does not depend on the frames beside it, so a clip may pass in slices. Statistics are
    float32 whatever the dtype of the frames.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, channels, frames, height, width)."""
        out = torch.empty_like(x)
        for frame, target in zip(x.unbind(2), out.unbind(2), strict=True):
            self._normalise(frame, target)
        return out

    def silu(self, x: Tensor, out: Tensor) -> None:
        """Write silu(norm(x)) to `out`, frame by frame: what lies between the two stays small and near."""
        for frame, target in zip(x.unbind(2), out.unbind(2), strict=True):
            self._normalise(frame, target)
            F.silu(target, inplace=True)

    def _normalise(self, frame: Tensor, target: Tensor) -> None:
        if frame.device.type == "cpu":
            scale, shift = self._scale_and_shift(frame)
            torch.addcmul(shift, frame, scale, out=target)
        else:
            target.copy_(super().forward(frame))

    def _scale_and_shift(self, frame: Tensor) -> tuple[Tensor, Tensor]:
        """norm(frame) = frame * scale + shift, both (batch, channels, 1, 1).

        torch's own kernel for frames with the channels innermost adds up squares in one running sum: at
        1400x1400 it is wrong in the fourth digit. These sums are pairwise, of values around the mean.
        """
        batch, channels, height, width = frame.shape
        groups = batch, self.num_groups, channels // self.num_groups

        def over_groups(per_channel: Tensor) -> Tensor:
            mean = per_channel.view(groups).mean(2, keepdim=True)
            return mean.expand(groups).reshape(batch, channels, 1, 1)

        mean = over_groups(frame.mean((2, 3), dtype=torch.float32))
        rows = max(1, _BLOCK // (batch * channels * width))
        squares = torch.zeros(batch, channels, device=frame.device)
        for block in torch.split(frame, rows, dim=2):
            squares += torch.sub(block, mean).square_().sum((2, 3))
        variance = over_groups(squares / (height * width))
        scale = torch.rsqrt(variance + self.eps) * self.weight.view(-1, 1, 1)
        return scale, self.bias.view(-1, 1, 1) - mean * scale
