"""Convolution over time that sees only the past, and what it remembers between slices of a clip.

Knows nothing of the networks built from it. What is remembered is an argument (`CausalState`), never an
attribute: one module can serve several clips at once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CausalState:
    """The last input frames of every causal convolution, for one clip that passes in slices.

    Slices of a clip must pass in order, each once. A fresh state means that the clip has not begun.
    """

    def __init__(self) -> None:
        self._tails: dict[nn.Module, Tensor] = {}

    def __contains__(self, conv: nn.Module) -> bool:
        """Whether a slice of the clip has passed through `conv`."""
        return conv in self._tails

    def tail(self, conv: nn.Module) -> Tensor | None:
        """The frames that `conv` kept of the slices before, or None at the start of the clip."""
        return self._tails.get(conv)

    def keep(self, conv: nn.Module, tail: Tensor) -> None:
        """Remember `tail`, the last input frames of `conv`, for the next slice."""
        self._tails[conv] = tail


class CausalConv3d(nn.Conv3d):
    """A 3D convolution whose output frame depends on its own and earlier input frames only.

    Before the first frame of a clip stand copies of it. Between slices the last kernel - stride frames
    are kept: the next window begins there as long as every slice gives a whole number of strides (the
    first slice one frame more).
    """

    def forward(self, x: Tensor, state: CausalState | None = None) -> Tensor:
        """x: (batch, channels, frames, height, width), the clip from its start or, with a `state`, its
        next slice."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        if kernel > 1:
            head = state.tail(self) if state is not None else None
            if head is None:
                head = x[:, :, :1].expand(-1, -1, kernel - 1, -1, -1)
            x = torch.cat([head, x], dim=2)
            if state is not None:
                state.keep(self, x[:, :, stride - kernel :].clone())
        return F.conv3d(x, self.weight, self.bias, self.stride, self.padding)
