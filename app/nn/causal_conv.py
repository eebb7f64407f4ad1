"""Convolution over time that sees only the past, and what it remembers between slices of a clip.

Knows nothing of the networks built from it. What is remembered is an argument (`CausalState`), never an
attribute: one module can serve several clips at once.

A convolution reads its input from a *window*: the frames it remembers, then the slice's own frames, in one
piece of memory with the channels innermost. Whoever computes the input may write it there directly, so that
nothing is concatenated or padded afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from app.nn.linear import slow_in

LARGEST = 2**31 - 1  # elements of a convolution's input, and of what it gives
WIDENED = 2**22  # elements of an input that are widened to float32 at a time
_onednn_is_available: Callable[[], bool] = torch.backends.mkldnn.is_available


class CausalState:
    """The last input frames of every causal convolution, for one clip that passes in slices.

    Slices of a clip must pass in order, each once. A fresh state means that the clip has not begun.
    """

    def __init__(self) -> None:
        self._tails: dict[nn.Module, Tensor] = {}
        self._ending = False

    def end(self) -> None:
        """The next slice is the clip's last: what no later one needs is let go as it passes."""
        self._ending = True

    def __contains__(self, conv: nn.Module) -> bool:
        """Whether a slice of the clip has passed through `conv`."""
        return conv in self._tails

    def tail(self, conv: nn.Module) -> Tensor | None:
        """The frames that `conv` kept of the slices before, or None at the start of the clip."""
        return self._tails.get(conv)

    def keep(self, conv: nn.Module, tail: Tensor) -> None:
        """Remember `tail`, the last input frames of `conv`, for the next slice."""
        self._tails[conv] = tail

    @property
    def ending(self) -> bool:
        """Whether the clip's last slice is passing."""
        return self._ending


class CausalConv3d(nn.Conv3d):
    """A 3D convolution whose output frame depends on its own and earlier input frames only.

    Before the first frame of a clip stand copies of it or, with `zeros`, frames of zeros. Between slices
    the last kernel - stride frames are kept: the next window begins there as long as every slice gives a
    whole number of strides (the first slice one frame more).

    margin: rows of zeros below each frame and columns of zeros to its right, beside the usual padding.
    """

    def __init__(
        self,
        width: int,
        out: int,
        kernel: int | tuple[int, int, int] = 3,
        *,
        stride: int | tuple[int, int, int] = 1,
        padding: int = 0,
        margin: int = 0,
        zeros: bool = False,
    ) -> None:
        super().__init__(width, out, kernel, stride)
        self.border = (0, padding, padding)
        self.margin = margin
        self.zeros = zeros
        self.past = self.kernel_size[0] - 1

    def forward(self, x: Tensor, state: CausalState | None = None) -> Tensor:
        """x: (batch, channels, frames, height, width), a whole clip or, with a `state`, its next slice."""
        if not self.past and not self.margin:
            return convolve(x, self.weight, self.bias, self.stride, self.border)
        window = self.window(x, *x.shape[2:])
        self.own(window).copy_(x)
        return self.over(window, state)

    def window(self, like: Tensor, frames: int, height: int, width: int) -> Tensor:
        """Memory for an input of that size on the device and in the dtype of `like`: fill `own` of it, then
        pass it to `over`. (batch, in_channels, past + frames, height + margin, width + margin)."""
        shape = like.shape[0], self.in_channels, self.past + frames, height + self.margin, width + self.margin
        window = torch.empty(
            shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last_3d
        )
        if self.margin:
            window[..., height:, :] = 0
            window[..., width:] = 0
        return window

    def own(self, window: Tensor) -> Tensor:
        """The part of a window that the caller fills: (batch, in_channels, frames, height, width)."""
        height, width = window.shape[3] - self.margin, window.shape[4] - self.margin
        return window[:, :, self.past :, :height, :width]

    def over(self, window: Tensor, state: CausalState | None = None) -> Tensor:
        """The convolution of a window; its past is filled in here, from the slices before or, at the start
        of a clip, with the first frame or zeros."""
        tail = state.tail(self) if state is not None else None
        begin = 0 if tail is None else self.past - tail.shape[2]
        if tail is not None:
            window[:, :, begin : self.past] = tail
        elif self.zeros:
            window[:, :, : self.past] = 0
        else:
            window[:, :, : self.past] = window[:, :, self.past : self.past + 1]
        if state is not None and self.past:
            kept = window[:, :, self.stride[0] - self.kernel_size[0] :]
            state.keep(self, (kept[:, :, :0] if state.ending else kept).clone())
        if tail is None and window.shape[2] == self.past + 1:
            # An image, or a clip's first latent: one tap, for the others see zeros or the same frame.
            if self.zeros:
                weight = self.weight[:, :, -1:]
            else:
                weight = self.weight.sum(2, keepdim=True, dtype=torch.float32).to(self.weight.dtype)
            return convolve(window[:, :, self.past :], weight, self.bias, self.stride, self.border)
        return convolve(window[:, :, begin:], self.weight, self.bias, self.stride, self.border)


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    """`conv3d`, by oneDNN wherever it can.

    On a CPU torch itself looks at the sizes of batch, channels, frames and height alone to decide whether an
    input is worth oneDNN, and takes a path four times slower for small frames. In 16 bits a CPU without
    16-bit arithmetic is a hundred times slower: there few frames at a time are widened to float32.
    """
    if x.device.type == "cpu" and x.dtype == torch.float32 and _onednn_is_available():
        return torch.mkldnn_convolution(x, weight, bias, padding, stride, (1, 1, 1), 1)
    kernel = weight, stride, padding
    if x.device.type == "cpu" and slow_in(x.dtype):
        wide = weight.float(), None if bias is None else bias.float()
        own = WIDENED // (x.numel() // x.shape[2])
        return _in_parts(x, lambda part: convolve(part.float(), *wide, stride, padding), *kernel, own)
    largest = x.numel() // x.shape[1] * max(x.shape[1], len(weight))
    if largest > LARGEST:
        # Kernels index with 32 bits, and what torch does beyond is many times slower.
        own = LARGEST // (largest // x.shape[2])
        return _in_parts(x, lambda part: F.conv3d(part, weight, bias, stride, padding), *kernel, own)
    return F.conv3d(x, weight, bias, stride, padding)


def _in_parts(
    x: Tensor,
    way: Callable[[Tensor], Tensor],
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    own: int,
) -> Tensor:
    """A convolution, `way`, of few frames at a time: of `own` of the input, or those of one frame of the
    result."""
    kernel, step = weight.shape[2], stride[0]
    frames, height, width = (
        (x.shape[2 + axis] + 2 * padding[axis] - weight.shape[2 + axis]) // stride[axis] + 1
        for axis in range(3)
    )
    shape = len(x), len(weight), frames, height, width
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)
    at_once = max(1, (own - kernel) // step + 1)
    for begin in range(0, frames, at_once):
        end = min(begin + at_once, frames)
        out[:, :, begin:end] = way(x[:, :, begin * step : (end - 1) * step + kernel])
    return out
