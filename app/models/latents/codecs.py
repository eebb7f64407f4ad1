"""The codecs: SeedVR2's and Wan's VAEs, Stable Diffusion's of images, and the VQ-VAE, as `Codec`.

Each wraps a network that is there already: `load.py` makes them from files, tests from drawn weights. They
know nothing of files, of pixels' bytes, or of sizes that a network does not take (`fit.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from app.errors import UnavailableError
from app.models.latents.chunks import regroup
from app.models.latents.codec import Facts
from app.models.latents.memory import frames_at_once
from app.models.seedvr2 import vae as seedvr2
from app.models.wan.vae import WanVAE
from app.nn.causal_conv import CausalState

if TYPE_CHECKING:
    from app.models.latents.sd_config import SDConfig
    from app.models.latents.vqvae import VQVAE


class CausalCodec:
    """A codec of video whose network remembers the past: clips pass one latent at a time.

    A subclass gives `facts`, `module` and the two functions of slices, batch of one.
    """

    def __init__(self, facts: Facts, module: nn.Module) -> None:
        self.facts = facts
        self.module = module

    def encode(self, frames: Iterable[Tensor]) -> Iterator[Tensor]:
        """See `Codec.encode`; a chunk a latent."""
        state, weight, begun = CausalState(), _weight(self.module), False
        for piece in regroup(frames, 0, self.facts.first, self.facts.temporal):
            _check(piece, "frames", ("n", 3, "height", "width"))
            begun = True
            with torch.no_grad():
                latents = self.encode_slice(piece.to(weight).transpose(0, 1)[None], state)
            yield latents[0].float()
        if not begun:
            raise ValueError("A clip of no frames cannot be encoded.")

    def decode(self, latents: Iterable[Tensor]) -> Iterator[Tensor]:
        """See `Codec.decode`; a chunk a latent."""
        state, weight, begun = CausalState(), _weight(self.module), False
        for piece in regroup(latents, 1, 1, 1):
            _check(piece, "latents", (self.facts.channels, "n", "height", "width"))
            begun = True
            with torch.no_grad():
                frames = self.decode_slice(piece.to(weight.device, torch.float32)[None], state)
            yield frames[0].transpose(0, 1).float()
        if not begun:
            raise ValueError("A clip of no latents cannot be decoded.")

    def encode_slice(self, x: Tensor, state: CausalState) -> Tensor:
        """The next slice, (1, 3, frames, height, width) in the weights' dtype, to normalised latents."""
        raise NotImplementedError

    def decode_slice(self, z: Tensor, state: CausalState) -> Tensor:
        """The next normalised latents, (1, channels, n, h, w) float32, to frames."""
        raise NotImplementedError


class SeedVR2Codec(CausalCodec):
    """SeedVR2's VAE. Latents are the posterior's mean times 0.9152, as its transformer takes them."""

    module: seedvr2.VideoVAE

    def __init__(self, module: seedvr2.VideoVAE) -> None:
        config = module.config
        facts = Facts(
            "seedvr2-vae", config.latent_channels, config.spatial_factor, config.temporal_factor, 1,
            config.spatial_factor, f"posterior mean times {seedvr2.SCALE}",
        )  # fmt: skip
        super().__init__(facts, module)

    def encode_slice(self, x: Tensor, state: CausalState) -> Tensor:
        return self.module.encode_slice(x, state).float() * seedvr2.SCALE

    def decode_slice(self, z: Tensor, state: CausalState) -> Tensor:
        return self.module.decode_slice((z / seedvr2.SCALE).to(_weight(self.module)), state)


class WanCodec(CausalCodec):
    """Wan 2.1's VAE. Latents are the posterior's mean, normalised channel by channel."""

    module: WanVAE

    def __init__(self, module: WanVAE) -> None:
        config = module.config
        facts = Facts(
            "wan-vae", config.z_dim, config.spatial_factor, config.temporal_factor, 1, config.spatial_factor,
            "posterior mean, less its mean over its deviation, channel by channel",
        )  # fmt: skip
        super().__init__(facts, module)

    def encode_slice(self, x: Tensor, state: CausalState) -> Tensor:
        return self.module.encode(x, state)

    def decode_slice(self, z: Tensor, state: CausalState) -> Tensor:
        return self.module.decode(z, state)


class VQCodec(CausalCodec):
    """The VQ-VAE. Latents are vectors of the codebook, less its mean over its deviation; what is decoded is
    the nearest vector of the codebook, so that an edit shows where it changes the choice.

    Mean and deviation are those of the codebook at the start: changes of weights do not move them.
    """

    module: VQVAE

    def __init__(self, module: VQVAE) -> None:
        config = module.config
        facts = Facts(
            "vqvae", config.dim, config.spatial_factor, config.temporal_factor, 1, config.spatial_factor,
            "vectors of the codebook, less its mean over its deviation, channel by channel", config.codes,
        )  # fmt: skip
        super().__init__(facts, module)
        codes = module.codebook.detach().float()
        self._mean = codes.mean(0).view(1, -1, 1, 1, 1)
        self._std = codes.std(0, correction=0).clamp_min(1e-6).view(1, -1, 1, 1, 1)

    def encode_slice(self, x: Tensor, state: CausalState) -> Tensor:
        return self._normalised(self.module.encode(x, state))

    def decode_slice(self, z: Tensor, state: CausalState) -> Tensor:
        return self.module.decode(self._indices(z), state)

    def indices(self, latents: Iterable[Tensor]) -> Iterator[Tensor]:
        """Chunks of latents to chunks of numbers of codes, (n, h, w) int64 below `facts.codebook`."""
        for chunk in latents:
            _check(chunk, "latents", (self.facts.channels, "n", "height", "width"))
            yield self._indices(chunk.to(_weight(self.module))[None])[0]

    def latents(self, indices: Iterable[Tensor]) -> Iterator[Tensor]:
        """The other way: what `decode` takes. ValueError for a number that is none of a code."""
        for chunk in indices:
            yield self._normalised(chunk.to(_weight(self.module).device)[None])[0]

    def _normalised(self, indices: Tensor) -> Tensor:
        with torch.no_grad():
            vectors = self.module.vectors(indices).float()
            return (vectors - self._mean.to(vectors)) / self._std.to(vectors)

    def _indices(self, z: Tensor) -> Tensor:
        with torch.no_grad():
            return self.module.nearest(z * self._std.to(z) + self._mean.to(z))


class ImageCodec:
    """Stable Diffusion's VAE (diffusers' AutoencoderKL), frame by frame, several at once.

    Latents are the posterior's mean, scaled as the VAE's configuration says: times `scaling_factor`, after
    `shift_factor` is taken away; or, where it has statistics of each channel, normalised by those first.
    """

    def __init__(self, module: Any, config: SDConfig, batch: int | None = None) -> None:
        """module: an AutoencoderKL; batch: frames at once, None to choose by memory."""
        self.module: Any = module
        self.config = config
        self.batch = batch
        self.most: int | None = None  # frames at once, where memory ended at more
        self.facts = Facts(
            "sd-vae", config.latent_channels, config.spatial_factor, 1, 1, config.spatial_factor, config.scale
        )

    def encode(self, frames: Iterable[Tensor]) -> Iterator[Tensor]:
        """See `Codec.encode`."""
        multiple = self.facts.multiple
        for batch in self._batches(frames, 0, ("n", 3, "height", "width"), 1):
            if batch.shape[2] % multiple or batch.shape[3] % multiple:
                size = f"{batch.shape[2]}x{batch.shape[3]}"
                raise ValueError(f"The VAE encodes sides that are multiples of {multiple}; got {size}.")
            mean = self._run(self._encode, batch.to(_weight(self.module)))
            yield self._scaled(mean.float()).transpose(0, 1)

    def decode(self, latents: Iterable[Tensor]) -> Iterator[Tensor]:
        """See `Codec.decode`."""
        layout = (self.facts.channels, "n", "height", "width")
        for batch in self._batches(latents, 1, layout, self.facts.spatial):
            unscaled = self._unscaled(batch.transpose(0, 1).to(_weight(self.module).device, torch.float32))
            yield self._run(self._decode, unscaled.to(_weight(self.module))).float()

    def _encode(self, x: Tensor) -> Tensor:
        mean: Tensor = self.module.encode(x).latent_dist.mean
        return mean

    def _decode(self, z: Tensor) -> Tensor:
        frames: Tensor = self.module.decode(z).sample
        return frames

    def _batches(
        self, chunks: Iterable[Tensor], dim: int, layout: Sequence[object], spatial: int
    ) -> Iterator[Tensor]:
        """`chunks` checked and cut into batches of as many frames as memory takes."""
        chunks = iter(chunks)
        first = next(chunks, None)
        if first is None:
            raise ValueError("A clip of nothing cannot be encoded or decoded.")
        _check(first, "the first chunk", layout)
        count = self.batch or self._at_once(first.shape[2] * spatial, first.shape[3] * spatial)
        count = min(count, self.most or count)
        for batch in regroup(_before(first, chunks), dim, count, count):
            _check(batch, "a chunk", layout)
            yield batch

    def _at_once(self, height: int, width: int) -> int:
        weight = _weight(self.module)
        return frames_at_once(self.config.frame_bytes(height, width, weight.element_size()), weight.device)

    def _run(self, function: Any, batch: Tensor) -> Tensor:
        """`function` of a batch; where memory ends, of its halves."""
        try:
            with torch.no_grad():
                out: Tensor = function(batch)
                return out
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise UnavailableError(
                    "device_memory",
                    f"A frame ({'x'.join(map(str, batch.shape[1:]))}) does not pass through the VAE in the "
                    f"free memory of {batch.device}; expected a smaller one: resize the clip.",
                ) from None
        torch.cuda.empty_cache()
        self.most = -(-len(batch) // 2)  # and no larger one is tried again
        return torch.cat([self._run(function, half) for half in torch.split(batch, self.most)])

    def _scaled(self, z: Tensor) -> Tensor:
        mean, std = self.config.statistics()
        return (z - _channels(mean, z)) / _channels(std, z)

    def _unscaled(self, z: Tensor) -> Tensor:
        mean, std = self.config.statistics()
        return z * _channels(std, z) + _channels(mean, z)


def _channels(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device).view(1, -1, 1, 1)


def _weight(module: nn.Module) -> Tensor:
    """A parameter: its device and dtype are the network's."""
    return next(module.parameters())


def _before(first: Tensor, rest: Iterator[Tensor]) -> Iterator[Tensor]:
    yield first
    yield from rest


def _check(chunk: Tensor, what: str, layout: Sequence[object]) -> None:
    """ValueError unless `chunk` is of `layout`: numbers are fixed, names are not."""
    shape = tuple(chunk.shape)
    same = len(shape) == len(layout) and all(
        side == wanted if isinstance(wanted, int) else side > 0
        for side, wanted in zip(shape, layout, strict=True)
    )
    if not same or not chunk.is_floating_point():
        expected = ", ".join(map(str, layout))
        raise ValueError(
            f"The codec takes {what} of floating-point ({expected}), none of them 0; got {shape} "
            f"{chunk.dtype}."
        )
