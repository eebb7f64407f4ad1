"""What every video autoencoder of the laboratory looks like from outside: `Facts` and the `Codec` protocol.

    latents = codec.encode(frames)      # iterators of chunks: memory does not grow with the clip
    frames = codec.decode(latents)

Importing this needs no torch. It knows no codec and no file: those are `codecs.py` and `load.py`; sizes and
lengths that a codec does not take are for `fit.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Facts:
    """What a codec's latents are.

    name: of the kind of codec ("wan-vae").
    channels: of a latent.
    spatial: pixels that a latent covers, per side.
    temporal: frames that a latent covers, after the first; 1 for codecs of images.
    first: frames that the first latent covers: 1.
    multiple: the sides of frames must be multiples of this.
    scale: how latents are normalised, for a person.
    codebook: how many different vectors a latent can be; None where its numbers are continuous.
    """

    name: str
    channels: int
    spatial: int
    temporal: int
    first: int
    multiple: int
    scale: str
    codebook: int | None = None

    def latents_holding(self, frames: int) -> int:
        """The fewest latents whose frames include a clip of `frames` frames, 1 or more."""
        return 1 + -(-max(frames - self.first, 0) // self.temporal)

    def frames_for(self, latents: int) -> int:
        """Frames of a clip of `latents` latents, 1 or more."""
        return self.first + (latents - 1) * self.temporal

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of the latents of frames whose sides are multiples of `multiple`."""
        return height // self.spatial, width // self.spatial


class Codec(Protocol):
    """An autoencoder of clips. One instance may encode and decode several clips, also in turn: what is
    carried from chunk to chunk belongs to the iterator. Weights take no gradients."""

    @property
    def facts(self) -> Facts:
        """What its latents are."""

    @property
    def module(self) -> torch.nn.Module:
        """The network, for `weights.py`: changed parameters show in what is made next."""

    def encode(self, frames: Iterable[Tensor]) -> Iterator[Tensor]:
        """Latents of one clip, in order.

        frames: chunks (n, 3, height, width) of any lengths n, any float dtype, [-1, 1], on any device; sides
        multiples of `facts.multiple`; `facts.frames_for(k)` frames in all for some k >= 1. Gives chunks
        (channels, n, height / spatial, width / spatial), float32, about unit variance, on the codec's
        device. The result does not depend on how the clip is cut into chunks. ValueError for other sizes.
        """

    def decode(self, latents: Iterable[Tensor]) -> Iterator[Tensor]:
        """Frames of one clip of latents, in order.

        latents: chunks as `encode` gives them, of any lengths, on any device. Gives chunks (n, 3, height,
        width), float32, about [-1, 1] but not clamped, on the codec's device; `facts.frames_for(latents)`
        frames in all. ValueError for other shapes.
        """
