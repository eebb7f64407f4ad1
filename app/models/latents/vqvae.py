"""A VQ-VAE of video: an autoencoder whose latents are entries of a codebook (van den Oord, Vinyals &
Kavukcuoglu 2017, arXiv:1711.00937), with causal 3D convolutions.

    vqvae = VQVAE(VQConfig())                # or load(lambda: VQVAE(config), file, "safetensors", ...)
    indices = vqvae.encode(clip)             # 1 + t k frames -> 1 + k planes of numbers of codes
    frames = vqvae.decode(indices)
    out = vqvae(clip)                        # for training: frames, indices and the two losses

A clip passes whole or, with a `state` and the same numbers, in slices of any length. Attribute names are the
checkpoint's tensor names. How a codebook learns is `train.py`; files and devices are others' too.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from app.models.latents.vqvae_config import VQConfig
from app.nn.causal_conv import CausalConv3d, CausalState

_DISTANCES = 2**24  # that are held at a time


class Quantised(NamedTuple):
    """vectors: the nearest codes, with the gradient of what they replace. indices: int64, their numbers.
    commitment: mean squared distance, whose gradient draws the encoder to its codes. codebook: the same
    number, whose gradient draws the codes to what the encoder gives."""

    vectors: Tensor
    indices: Tensor
    commitment: Tensor
    codebook: Tensor


class Output(NamedTuple):
    """What a pass of training gives: `frames` as `decode` gives them, `encoded` before it was quantised
    (batch, dim, latents, height, width), the rest as in `Quantised`."""

    frames: Tensor
    encoded: Tensor
    indices: Tensor
    commitment: Tensor
    codebook: Tensor


def nearest(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Numbers of the nearest codes by Euclidean distance, int64: (..., dim) and (codes, dim) give (...).
    Of codes equally near the first is taken."""
    flat, codes = vectors.flatten(0, -2).float(), codebook.float()
    length = codes.square().sum(1)  # |v - c|^2 less |v|^2, which is the same for every code
    parts = [
        torch.addmm(length, part, codes.T, alpha=-2).argmin(1)
        for part in torch.split(flat, max(1, _DISTANCES // len(codes)))
    ]
    return torch.cat(parts).view(vectors.shape[:-1]) if parts else flat.new_empty(0, dtype=torch.int64)


def quantise(vectors: Tensor, codebook: Tensor) -> Quantised:
    """The quantiser with its straight-through gradient, equations 1 to 3 of the paper.

    vectors: (..., dim); codebook: (codes, dim).
    """
    indices = nearest(vectors.detach(), codebook.detach())
    codes = F.embedding(indices, codebook)
    return Quantised(
        vectors + (codes - vectors).detach(),
        indices,
        F.mse_loss(vectors, codes.detach()),
        F.mse_loss(codes, vectors.detach()),
    )


class VQVAE(nn.Module):
    """The autoencoder. Runs in the dtype of its weights, on their device; distances in float32."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        # Each code within 1 / codes of zero: as near to each other as they can spread from. Drawn so at
        # once: a quotient on the meta device imports torch's compiler, a second and more.
        bound = 1 / config.codes
        self.codebook = nn.Parameter(torch.empty(config.codes, config.dim).uniform_(-bound, bound))
        self.decoder = Decoder(config)

    def forward(self, x: Tensor) -> Output:
        """A whole clip, (batch, 3, frames, height, width) in [-1, 1], through the quantiser and back."""
        self._check_frames(x, first=True)
        encoded: Tensor = self.encoder(x, None)
        quantised = quantise(encoded.movedim(1, -1), self.codebook)
        frames = self.decoder(quantised.vectors.movedim(-1, 1), None)
        return Output(frames, encoded, quantised.indices, quantised.commitment, quantised.codebook)

    def encode(self, x: Tensor, state: CausalState | None = None) -> Tensor:
        """Numbers of codes of a whole clip or, with a `state`, of its next slice.

        x: (batch, 3, frames, height, width) in [-1, 1]; frames = temporal_factor * k + 1, of a later slice
        temporal_factor * k; height and width multiples of spatial_factor. Gives int64 (batch, k + 1 or k,
        height / spatial_factor, width / spatial_factor). ValueError for other sizes.
        """
        self._check_frames(x, first=state is None or self.encoder.conv_in not in state)
        return self.nearest(self.encoder(x, state))

    def decode(self, indices: Tensor, state: CausalState | None = None) -> Tensor:
        """The frames of a whole clip of numbers of codes or, with a `state`, of the next ones; not clamped.
        The first plane gives one frame, every other temporal_factor. ValueError for other numbers."""
        if indices.ndim != 4 or not indices.numel():
            raise ValueError(
                f"The VQ-VAE decodes (batch, latents, height, width), none of them 0; got "
                f"{tuple(indices.shape)}."
            )
        frames: Tensor = self.decoder(self.vectors(indices).to(self.decoder.conv_in.weight), state)
        return frames

    def new_state(self) -> CausalState:
        """The state of a clip that has not begun. Encoding and decoding may share one."""
        return CausalState()

    def nearest(self, z: Tensor) -> Tensor:
        """(batch, dim, latents, height, width) -> numbers of the nearest codes, (batch, latents, height,
        width) int64."""
        return nearest(z.movedim(1, -1), self.codebook)

    def vectors(self, indices: Tensor) -> Tensor:
        """Codes by their numbers: (batch, latents, height, width) -> (batch, dim, latents, height, width).

        ValueError for numbers that are none of a code.
        """
        if indices.is_meta:  # which has no numbers
            return F.embedding(indices, self.codebook).movedim(-1, 1)
        low, high = indices.aminmax()
        if indices.is_floating_point() or low < 0 or high >= len(self.codebook):
            raise ValueError(
                f"Codes have whole numbers from 0 to {len(self.codebook) - 1}; got {indices.dtype} from "
                f"{low.item()} to {high.item()}."
            )
        return F.embedding(indices.long(), self.codebook).movedim(-1, 1)

    def _check_frames(self, x: Tensor, first: bool) -> None:
        factor, step = self.config.spatial_factor, self.config.temporal_factor
        if x.ndim != 5 or x.shape[1] != 3:
            raise ValueError(f"The VQ-VAE encodes (batch, 3, frames, height, width); got {tuple(x.shape)}.")
        frames, height, width = x.shape[2:]
        if not (height and width) or height % factor or width % factor:
            raise ValueError(
                f"The VQ-VAE encodes heights and widths that are multiples of {factor}; got {height}x{width}."
            )
        if frames < 1 or (frames - first) % step:
            expected = f"{step} k + 1" if first else f"a multiple of {step}"
            raise ValueError(f"The slice has {frames} frames; the VQ-VAE takes {expected} there.")


class Encoder(nn.Module):
    """Frames to vectors that are not yet quantised."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        width = config.width
        self.conv_in = CausalConv3d(3, width, padding=1)
        self.down = nn.ModuleList(
            CausalConv3d(width, width, (3, 4, 4) if time else (1, 4, 4), stride=(1 + time, 2, 2), padding=1)
            for time in config.halves_time
        )
        self.blocks = nn.ModuleList(ResidualBlock(width, config.inner) for _ in range(config.blocks))
        self.conv_out = CausalConv3d(width, config.dim, 1)

    def forward(self, x: Tensor, state: CausalState | None) -> Tensor:
        x = self.conv_in(x, state)
        for conv in self.down:
            x = conv(F.relu(x), state)
        for block in self.blocks:
            x = block(x, state)
        out: Tensor = self.conv_out(F.relu(x), state)
        return out


class Decoder(nn.Module):
    """Codes to frames."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        width = config.width
        self.times = [2 if time else 1 for time in config.halves_time[::-1]]
        self.conv_in = CausalConv3d(config.dim, width, padding=1)
        self.blocks = nn.ModuleList(ResidualBlock(width, config.inner) for _ in range(config.blocks))
        self.up = nn.ModuleList(
            CausalConv3d(width, width, (3 if time == 2 else 1, 3, 3), padding=1) for time in self.times
        )
        self.conv_out = CausalConv3d(width, 3, padding=1)

    def forward(self, z: Tensor, state: CausalState | None) -> Tensor:
        begin = state is None or self.conv_in not in state
        x = self.conv_in(z, state)
        for block in self.blocks:
            x = block(x, state)
        for conv, time in zip(self.up, self.times, strict=True):
            x = F.relu(x)
            if time == 2:  # a clip's first latent stands for one frame, not two
                x = x.repeat_interleave(2, 2)[:, :, int(begin) :]
            x = conv(x.repeat_interleave(2, 3).repeat_interleave(2, 4), state)
        out: Tensor = self.conv_out(F.relu(x), state)
        return out


class ResidualBlock(nn.Module):
    """x + conv1x1(relu(conv3x3(relu(x)))), section 4.1 of the paper."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.conv1 = CausalConv3d(width, inner, padding=1)
        self.conv2 = CausalConv3d(inner, width, 1)

    def forward(self, x: Tensor, state: CausalState | None) -> Tensor:
        """x: (batch, channels, frames, height, width), a whole clip or its next slice."""
        out: Tensor = x + self.conv2(F.relu(self.conv1(F.relu(x), state)), state)
        return out
