"""Wan 2.1's causal video VAE: 8x in space, 4x in time, 16 channels (Wan, arXiv:2503.20314).

    vae = WanVAE(VAEConfig.published())          # or load(lambda: WanVAE(config), file, "torch", ...)
    latents = vae.encode(clip)                   # a whole clip: 1 + 4 k frames -> 1 + k latents
    frames = vae.decode(latents)                 # the first latent gives one frame, every other four
    state = vae.new_state()                      # or block by block, with the same numbers
    for block in blocks: frames = vae.decode(block, state)
    for frames in vae.decode_stream(blocks): ... # the same, one latent at a time: constant memory

Latents are the posterior mean, normalised channel by channel: what Wan's transformers read and write.
Attribute names are the checkpoint's tensor names. Knows nothing of files, devices or transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from app.models.wan.vae_config import Block, VAEConfig, down_layers, up_layers
from app.nn.causal_conv import CausalConv3d, CausalState, convolve

# Elements that pass a norm at a time on a CPU: they stay in a core's cache.
_BLOCK = 2**19
# Elsewhere: what lies between a norm and its activation stays small beside them.
_PART = 2**26


class WanVAE(nn.Module):
    """The autoencoder, for inference: its weights take no gradients. Runs in their dtype, on their device."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.conv1 = CausalConv3d(2 * config.z_dim, 2 * config.z_dim, 1)
        self.conv2 = CausalConv3d(config.z_dim, config.z_dim, 1)
        self.decoder = Decoder(config)
        self.requires_grad_(False)  # activations are written in place

    def new_state(self) -> CausalState:
        """The state of a clip that has not begun. Encoding and decoding may share one."""
        return CausalState()

    def encode(self, x: Tensor, state: CausalState | None = None) -> Tensor:
        """Normalised latents (the posterior's mean) of a whole clip or, with a `state`, of its next slice.

        x: (batch, 3, frames, height, width) in [-1, 1]; frames = temporal_factor * k + 1, of a later slice
        temporal_factor * k; height and width multiples of spatial_factor. Gives (batch, z_dim, k + 1 or k,
        height / spatial_factor, width / spatial_factor), float32. ValueError for other sizes.
        """
        self.config.check_frames(x, 3, first=state is None or self.encoder.conv1 not in state)
        h: Tensor = self.encoder(x.to(self.conv1.weight.dtype), state)
        z_dim = self.config.z_dim  # of the parameters the first half: the other is the log variance
        bias = None if self.conv1.bias is None else self.conv1.bias[:z_dim]
        latents = convolve(h, self.conv1.weight[:z_dim], bias, (1, 1, 1), (0, 0, 0))
        mean, std = self._statistics(x.device)
        return latents.float().sub(mean).div_(std)

    def decode(self, z: Tensor, state: CausalState | None = None) -> Tensor:
        """The frames of all normalised latents of a clip or, with a `state`, of the next ones, one or more.

        z: (batch, z_dim, latents, height, width), any float dtype. Gives (batch, 3, frames, height *
        spatial_factor, width * spatial_factor) in the weights' dtype, not clamped: the clip's first latent
        gives one frame, every other temporal_factor.
        """
        self.config.check_latents(z, self.config.z_dim)
        mean, std = self._statistics(z.device)
        latents = z.float().mul(std).add_(mean).to(self.conv2.weight.dtype)
        frames: Tensor = self.decoder(self.conv2(latents), state)
        return frames

    def encode_stream(self, frames: Iterable[Tensor], latents: int = 1) -> Iterator[Tensor]:
        """Latents of a clip whose frames come in pieces of any lengths, `latents` of them at a time.

        frames: (batch, 3, some, height, width) each, in [-1, 1]. Memory does not grow with the clip.
        ValueError, at its end, for a clip that has not temporal_factor * k + 1 frames.
        """
        state, factor = self.new_state(), self.config.temporal_factor
        waiting: list[Tensor] = []
        taken, wanted = 0, self.config.frames_for(latents)
        for piece in frames:
            waiting.append(piece)
            while sum(part.shape[2] for part in waiting) >= wanted:
                clip = torch.cat(waiting, dim=2) if len(waiting) > 1 else waiting[0]
                waiting = [clip[:, :, wanted:]]
                yield self.encode(clip[:, :, :wanted], state)
                taken, wanted = taken + wanted, latents * factor
        left = torch.cat(waiting, dim=2) if waiting else None
        total = taken + (0 if left is None else left.shape[2])
        self.config.latents_for(total)
        if left is not None and left.shape[2]:
            state.end()
            yield self.encode(left, state)

    def decode_stream(
        self, blocks: Iterable[Tensor], state: CausalState | None = None, latents: int = 1
    ) -> Iterator[Tensor]:
        """The frames of blocks of latents as they come, `latents` of them at a time.

        blocks: (batch, z_dim, some, height, width) each. Memory grows neither with the clip nor with the
        blocks. state: of a clip that has begun.
        """
        state = self.new_state() if state is None else state
        for block in blocks:
            for part in torch.split(block, latents, dim=2):
                yield self.decode(part, state)

    def _statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        mean, std = (
            torch.tensor(values, dtype=torch.float32, device=device).view(1, -1, 1, 1, 1)
            for values in (self.config.latents_mean, self.config.latents_std)
        )
        return mean, std


class Encoder(nn.Module):
    """Frames to the parameters of the posterior, before the last 1x1x1 convolution."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        width = config.widths[-1]
        self.conv1 = CausalConv3d(3, config.dim, padding=1, zeros=True)
        self.downsamples = nn.ModuleList(
            ResidualBlock(layer.width, layer.out)
            if isinstance(layer, Block)
            else Downsample(layer.width, layer.time)
            for layer in down_layers(config)
        )
        self.middle = middle(width)
        self.last = ChannelNorm(width, 1, 1, 1), CausalConv3d(width, 2 * config.z_dim, padding=1, zeros=True)
        self.head = numbered({0: self.last[0], 2: self.last[1]})

    def forward(self, x: Tensor, state: CausalState | None) -> Tensor:
        """x: (batch, 3, frames, height, width), a whole clip or its next slice."""
        x = self.conv1(x, state)
        for layer in (*self.downsamples, *self.middle):
            x = layer(x, state)
        window = activated(x, *self.last)
        del x
        return self.last[1].over(window, state)


class Decoder(nn.Module):
    """Latents, after the first 1x1x1 convolution, to frames."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        width = config.widths[-1]
        self.conv1 = CausalConv3d(config.z_dim, width, padding=1, zeros=True)
        self.middle = middle(width)
        self.upsamples = nn.ModuleList(
            ResidualBlock(layer.width, layer.out)
            if isinstance(layer, Block)
            else Upsample(layer.width, layer.time)
            for layer in up_layers(config)
        )
        width = config.widths[0]
        self.last = ChannelNorm(width, 1, 1, 1), CausalConv3d(width, 3, padding=1, zeros=True)
        self.head = numbered({0: self.last[0], 2: self.last[1]})

    def forward(self, z: Tensor, state: CausalState | None) -> Tensor:
        """z: (batch, z_dim, latents, height, width), a whole clip or its next ones."""
        x = self.conv1(z, state)
        for layer in (*self.middle, *self.upsamples):
            x = layer(x, state)
        window = activated(x, *self.last)
        del x
        return self.last[1].over(window, state)


def middle(width: int) -> nn.ModuleList:
    """A residual block, attention within each frame, a residual block."""
    return nn.ModuleList([ResidualBlock(width, width), FrameAttention(width), ResidualBlock(width, width)])


def numbered(layers: Mapping[int, nn.Module]) -> nn.ModuleDict:
    """Layers under their numbers in the original's lists, which also number what has no weights."""
    return nn.ModuleDict({str(number): layer for number, layer in layers.items()})


class ChannelNorm(nn.Module):
    """Each position over the root of the mean square of its channels, times gamma (no shift).

    RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467); what is squared and summed is float32.
    """

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(shape))

    def forward(self, x: Tensor) -> Tensor:
        """x: (positions, channels)."""
        # The original bounds the root of the sum of squares by 1e-12 from below.
        return F.rms_norm(x, x.shape[-1:], self.gamma.flatten(), 1e-24 / x.shape[-1])

    def silu(self, x: Tensor, out: Tensor) -> None:
        """Write silu(norm(x)) to `out`; both (batch, channels, frames, height, width)."""
        for item, target in zip(x, out, strict=True):
            rows = item.permute(1, 2, 3, 0).reshape(-1, x.shape[1])
            targets = target.permute(1, 2, 3, 0).view(-1, x.shape[1])
            if x.is_cpu and x.dtype == torch.float32:
                self._silu_in_cache(rows, targets)
            else:
                parts = (torch.split(part, max(1, _PART // x.shape[1])) for part in (rows, targets))
                for row, into in zip(*parts, strict=True):
                    torch.ops.aten.silu.out(self(row), out=into)

    def _silu_in_cache(self, rows: Tensor, targets: Tensor) -> None:
        """Few positions at a time: torch's own norm passes over memory six times."""
        if rows.is_meta:  # whoever counts memory: these take none worth counting
            return
        channels = rows.shape[1]
        gamma = self.gamma.flatten() * channels**0.5
        at_once = max(1, _BLOCK // channels)
        for row, target in zip(torch.split(rows, at_once), torch.split(targets, at_once), strict=True):
            length = torch.linalg.vector_norm(row, dim=1, keepdim=True).clamp_min_(1e-12)
            F.silu(torch.mul(row, gamma, out=target).div_(length), inplace=True)


def activated(x: Tensor, norm: ChannelNorm, conv: CausalConv3d) -> Tensor:
    """The window of `conv` that holds silu(norm(x)): written once, where the convolution reads it."""
    window = conv.window(x, *x.shape[2:])
    norm.silu(x, out=conv.own(window))
    return window


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1x1 convolution of x where the width changes."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.first = ChannelNorm(width, 1, 1, 1), CausalConv3d(width, out, padding=1, zeros=True)
        self.second = ChannelNorm(out, 1, 1, 1), CausalConv3d(out, out, padding=1, zeros=True)
        self.residual = numbered({0: self.first[0], 2: self.first[1], 3: self.second[0], 6: self.second[1]})
        self.shortcut = CausalConv3d(width, out, 1) if width != out else None

    def forward(self, x: Tensor, state: CausalState | None) -> Tensor:
        """x: (batch, channels, frames, height, width), a whole clip or its next slice."""
        h = self.first[1].over(activated(x, *self.first), state)
        window = activated(h, *self.second)
        del h  # at full resolution each of these is the size of everything else together
        h = self.second[1].over(window, state)
        del window
        return h.add_(x if self.shortcut is None else self.shortcut(x))


class FrameAttention(nn.Module):
    """Attention of one head over the positions of each frame, with a residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(width, 1, 1)
        self.to_qkv = nn.Conv2d(width, 3 * width, 1)
        self.proj = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, state: CausalState | None) -> Tensor:
        """x: (batch, channels, frames, height, width). Frames do not see each other: `state` is not used."""
        batch, width, frames, height, across = x.shape
        tokens = self.norm(x.permute(0, 2, 3, 4, 1)).reshape(batch * frames, 1, height * across, width)
        qkv = F.linear(tokens, self.to_qkv.weight.flatten(1), self.to_qkv.bias)
        q, k, v = qkv.chunk(3, dim=-1)
        out = F.scaled_dot_product_attention(q, k, v)
        out = F.linear(out, self.proj.weight.flatten(1), self.proj.bias)
        return x + out.view(batch, frames, height, across, width).permute(0, 4, 1, 2, 3)


class Downsample(nn.Module):
    """Half the height and width by a convolution, then where `time` half the frames after the first by
    another: the clip's first frame passes as it is, and the first window begins with it."""

    def __init__(self, width: int, time: bool) -> None:
        super().__init__()
        self.resample = numbered({1: nn.Conv2d(width, width, 3, stride=2)})  # 0 pads bottom and right
        self.time_conv = nn.Conv3d(width, width, (3, 1, 1), stride=(2, 1, 1)) if time else None

    def forward(self, x: Tensor, state: CausalState | None) -> Tensor:
        """x: (batch, channels, frames, height, width): a whole clip or its next slice."""
        x = by_frame(lambda frames: self.resample["1"](F.pad(frames, (0, 1, 0, 1))), x)
        if self.time_conv is None:
            return x
        last = state.tail(self) if state is not None else None
        if state is not None:
            state.keep(self, x[:, :, -1:].clone())
        if last is not None:
            return self._halve(torch.cat([last, x], dim=2))
        return x if x.shape[2] == 1 else torch.cat([x[:, :, :1], self._halve(x)], dim=2)

    def _halve(self, x: Tensor) -> Tensor:
        assert self.time_conv is not None
        return convolve(x, self.time_conv.weight, self.time_conv.bias, (2, 1, 1), (0, 0, 0))


class Upsample(nn.Module):
    """Where `time` twice the frames after the first by a causal convolution, which never sees the first;
    then twice the height and width by repeating pixels, and a convolution to half the channels."""

    def __init__(self, width: int, time: bool) -> None:
        super().__init__()
        self.resample = numbered({1: nn.Conv2d(width, width // 2, 3, padding=1)})  # 0 repeats pixels
        self.time_conv = CausalConv3d(width, 2 * width, (3, 1, 1), zeros=True) if time else None

    def forward(self, x: Tensor, state: CausalState | None) -> Tensor:
        """x: (batch, channels, frames, height, width): a whole clip or its next slice."""
        if self.time_conv is None:
            return by_frame(self._enlarge, x)
        begun = state is not None and self in state
        if state is not None and not begun:
            state.keep(self, x[:, :, :0].clone())  # marks that the first frame has passed
        first, later = x[:, :, : 0 if begun else 1], x[:, :, 0 if begun else 1 :]
        if not later.shape[2]:
            return by_frame(self._enlarge, first)
        # Channels of the convolution: those of the earlier frame, then those of the later.
        doubled = self.time_conv(later, state)
        pairs = doubled.view(doubled.shape[0], 2, -1, *doubled.shape[2:])
        later = pairs.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)
        return by_frame(self._enlarge, torch.cat([first, later], dim=2) if first.shape[2] else later)

    def _enlarge(self, frames: Tensor) -> Tensor:
        """frames: (frames, channels, height, width)."""
        # A 3x3 window over repeated pixels sees 2x2 different ones. So each of the four pixels that a pixel
        # becomes is a 2x2 convolution of the small frame: 4/9 of the work, and nothing large to read.
        conv = self.resample["1"]
        assert isinstance(conv, nn.Conv2d) and conv.bias is not None
        weight = repeated_pixels(conv.weight.float()).flatten(0, 2).to(frames.dtype)
        quarters = F.conv2d(frames, weight, conv.bias.repeat(4), padding=1)
        count, width, height, across = len(frames), conv.out_channels, *frames.shape[2:]
        big = torch.empty(
            (count, width, 2 * height, 2 * across),
            dtype=frames.dtype,
            device=frames.device,
            memory_format=torch.channels_last,
        )
        targets = big.view(count, width, height, 2, across, 2)
        quarters = quarters.view(count, 2, 2, width, height + 1, across + 1)
        for down in (0, 1):
            for right in (0, 1):
                part = quarters[:, down, right, :, down : down + height, right : right + across]
                targets[:, :, :, down, :, right] = part
        return big


def repeated_pixels(weight: Tensor) -> Tensor:
    """The 2x2 kernels that equal a 3x3 one on an image whose every pixel was repeated down and right.

    weight: (out, channels, 3, 3). Gives (2, 2, out, channels, 2, 2): for the upper and the lower, the left
    and the right of the four pixels; the upper left kernel begins one pixel up and left of its pixel.
    """

    def halves(taps: Tensor) -> Tensor:
        """Over the last dimension, 3 -> 2: before and at the pixel; at and after it, in front."""
        first, middle, last = taps.unbind(-1)
        return torch.stack([torch.stack([first, middle + last], -1), torch.stack([first + middle, last], -1)])

    rows = halves(weight.transpose(2, 3))  # (2, out, channels, 3 columns, 2 rows)
    return halves(rows.transpose(3, 4)).transpose(0, 1)


def by_frame(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`function` of images (frames, channels, height, width), over all frames of a clip
    (batch, channels, frames, height, width)."""
    out = function(x.transpose(1, 2).flatten(0, 1))
    return out.view(x.shape[0], x.shape[2], *out.shape[1:]).transpose(1, 2)
