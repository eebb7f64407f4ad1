"""What a Wan transformer remembers: keys and values of the clean past, and those of a prompt.

Both are arguments of a pass, never attributes of the model: one model serves several clips. All indices are
numbers of the host, so a pass never waits for the device, and storage never moves, so a pass can be recorded
as a graph. The cache knows nothing of positions: keys come in already turned.

Storage is a ring behind a fixed sink: a frame's place follows from its number, so nothing is shifted, and
attention does not care in which order keys stand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from app.models.wan.config import TransformerConfig

KeysValues = tuple[Tensor, Tensor]  # (batch, tokens, heads, head_dim) each


@dataclass(frozen=True)
class Place:
    """Where a block of frames stands in a cache.

    `writes`: pairs of slices, of the block's own tokens and of the cache's. `length`: the tokens of the
    cache, from its beginning, that the block attends to; its own are among them.
    """

    writes: tuple[tuple[slice, slice], ...]
    length: int


class KVCache:
    """Keys and values of one clip's past, every layer's, for one prompt.

    Args:
        tokens: Tokens of one latent frame (`config.tokens(height, width)`).
        frames: Latent frames it holds, the sink and the newest block among them.
        sink: First frames of the clip that are never evicted (Xiao et al., 2023, arXiv:2309.17453).

    Raises:
        ValueError: The sink leaves no room for other frames.
    """

    def __init__(
        self,
        config: TransformerConfig,
        tokens: int,
        frames: int,
        *,
        sink: int = 0,
        batch: int = 1,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if not 0 <= sink < frames:
            raise ValueError(f"a sink of {sink} frames leaves no room in a cache of {frames}")
        self.tokens, self.frames, self.sink = tokens, frames, sink
        shape = 2, batch, frames * tokens, config.heads, config.head_dim
        layers = [torch.empty(shape, device=device, dtype=dtype) for _ in range(config.layers)]
        self.layers: Sequence[KeysValues] = [(layer[0], layer[1]) for layer in layers]
        self.count = 0

    def take(self, frames: int) -> Place:
        """The place of the clip's next `frames` frames. It is theirs in every pass over them; what stood
        there before is evicted by the first pass, which overwrites it.

        Raises:
            ValueError: They do not fit beside the sink.
        """
        if frames > self.frames - min(self.sink, self.count):
            raise ValueError(
                f"a block of {frames} frames does not fit into {self.frames} with a sink of {self.sink}"
            )
        slots = [self._slot(frame) for frame in range(self.count, self.count + frames)]
        self.count += frames
        writes = []
        begin = 0
        for i in range(1, frames + 1):
            if i == frames or slots[i] != slots[i - 1] + 1:
                writes.append((self._slice(begin, i), self._slice(slots[begin], slots[begin] + i - begin)))
                begin = i
        return Place(tuple(writes), min(self.count, self.frames) * self.tokens)

    def clear(self) -> None:
        """Forget every frame."""
        self.count = 0

    @property
    def nbytes(self) -> int:
        """Memory it holds, in bytes."""
        return sum(part.nbytes for layer in self.layers for part in layer)

    def _slot(self, frame: int) -> int:
        if frame < self.sink:
            return frame
        return self.sink + (frame - self.sink) % (self.frames - self.sink)

    def _slice(self, begin: int, end: int) -> slice:
        return slice(begin * self.tokens, end * self.tokens)


@dataclass(frozen=True)
class CrossCache:
    """Every layer's keys and values of a prompt, and of an image where the model conditions on one.

    Made by `Transformer.cross`. To change the prompt of a running clip is to pass another one.
    """

    text: Sequence[KeysValues]
    image: Sequence[KeysValues] | None = None
