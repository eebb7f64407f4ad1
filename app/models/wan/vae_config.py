"""The shape of Wan 2.1's causal video VAE: its parameters and the tensors they imply.

Torch-free, so that a checkpoint can be recognised and checked without loading a framework. Knows
nothing of files or of the computation (`vae.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from app.errors import ConfigError
from app.nn.causal_sizes import CausalSizes

Shape = tuple[int, ...]

# The published VAE's latents over its training clips, channel by channel.
MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip

# Settings of the original that name the only architecture it can run: attention at other scales is written
# there, but fails when called.
_FIXED: Mapping[str, object] = {"attn_scales": []}
# A setting that changes no number: it matters in training alone.
_MEANINGLESS = frozenset({"dropout"})
_SPELLING = {"temperal_downsample": "temporal_downsample"}  # the original's


@dataclass(frozen=True)
class VAEConfig(CausalSizes):
    """Parameters of the VAE, in the original's names.

    dim: channels at full resolution, before `dim_mult`.
    z_dim: channels of a latent.
    dim_mult: width of each resolution over `dim`, finest first; every step halves height and width.
    num_res_blocks: residual blocks of an encoder stage; a decoder stage has one more.
    temporal_downsample: which of the halvings, finest first, also halve time.
    latents_mean, latents_std: of each channel; a normalised latent is (latent - mean) / std.
    """

    dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    latents_mean: tuple[float, ...] = MEAN
    latents_std: tuple[float, ...] = STD

    def __post_init__(self) -> None:
        halvings = len(self.dim_mult) - 1
        if halvings < 0 or min(self.dim_mult) < 1:
            raise _invalid("dim_mult", self.dim_mult, "one whole factor above 0 for each resolution")
        if len(self.temporal_downsample) != halvings:
            expected = f"{halvings} of true and false, one less than dim_mult has"
            raise _invalid("temperal_downsample", self.temporal_downsample, expected)
        odd = [width for width in self.widths[1:] if width % 2]
        if odd:
            raise _invalid("dim", self.dim, f"one whose widths are even (they hold {odd[0]})")
        for name in ("dim", "z_dim", "num_res_blocks"):
            if getattr(self, name) < 1:
                raise _invalid(name, getattr(self, name), "a whole number above 0")
        for name in ("latents_mean", "latents_std"):
            if len(getattr(self, name)) != self.z_dim:
                raise _invalid(name, getattr(self, name), f"z_dim = {self.z_dim} numbers")
        if min(self.latents_std) <= 0:
            raise _invalid("latents_std", self.latents_std, "numbers above 0")

    @classmethod
    def published(cls) -> VAEConfig:
        """The configuration of the released `Wan2.1_VAE.pth`."""
        return cls()

    @classmethod
    def nano(cls) -> VAEConfig:
        """Every kind of layer, the same latents, toy width."""
        return cls(dim=8, num_res_blocks=1)

    @classmethod
    def from_original(cls, original: Mapping[str, Any]) -> VAEConfig:
        """Read the original's configuration.

        Raises:
            ConfigError: `vae_config_unknown`, `vae_config_unsupported` or `vae_config_invalid`: a setting
                that names another model.
        """
        known = cls.__dataclass_fields__
        values: dict[str, Any] = {}
        for key, value in original.items():
            name = _SPELLING.get(key, key)
            if name in known:
                values[name] = tuple(value) if isinstance(value, list) else value
            elif key in _FIXED and list(value) != _FIXED[key]:
                raise ConfigError(
                    "vae_config_unsupported",
                    f"{key} of the VAE is {value!r}; the Wan 2.1 VAE has {_FIXED[key]!r}.",
                )
            elif key not in _FIXED and key not in _MEANINGLESS:
                raise ConfigError(
                    "vae_config_unknown",
                    f"The VAE's configuration holds the unknown key {key!r} (value {value!r}); remove it or "
                    f"use one of {', '.join(known)}.",
                )
        return cls(**values)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each resolution, finest first."""
        return tuple(self.dim * factor for factor in self.dim_mult)

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent in height and in width (8 as published)."""
        return int(2 ** (len(self.dim_mult) - 1))

    @property
    def temporal_factor(self) -> int:
        """Frames per latent, after the first (4 as published)."""
        return int(2 ** sum(self.temporal_downsample))


def _invalid(name: str, value: object, expected: str) -> ConfigError:
    return ConfigError("vae_config_invalid", f"{name} of the VAE is {value!r}; expected {expected}.")


@dataclass(frozen=True)
class Block:
    """A residual block from `width` to `out` channels."""

    width: int
    out: int


@dataclass(frozen=True)
class Resampling:
    """Half (encoder) or twice (decoder) the height and width, and where `time` the frames after the first.

    The encoder keeps the width, the decoder halves it.
    """

    width: int
    time: bool


Layer = Block | Resampling


def down_layers(config: VAEConfig) -> Iterator[Layer]:
    """The encoder's layers between its first convolution and its middle, in the checkpoint's numbering."""
    width = config.dim
    for stage, out in enumerate(config.widths):
        for _ in range(config.num_res_blocks):
            yield Block(width, out)
            width = out
        if stage < len(config.temporal_downsample):
            yield Resampling(width, config.temporal_downsample[stage])


def up_layers(config: VAEConfig) -> Iterator[Layer]:
    """The decoder's layers between its middle and its head, in the checkpoint's numbering."""
    width = config.widths[-1]
    times = config.temporal_downsample[::-1]
    for stage, out in enumerate(config.widths[::-1]):
        for _ in range(config.num_res_blocks + 1):
            yield Block(width, out)
            width = out
        if stage < len(times):
            yield Resampling(width, times[stage])
            width //= 2


def decode_bytes(config: VAEConfig, height: int, width: int, *, latents: int = 1, item: int = 2) -> int:
    """Memory that decoding to height x width takes, `latents` at a time, beside weights and results: what
    is remembered between blocks, and the largest layer's tensors. item: bytes of a number. A device's own
    workspace comes on top."""
    pixels = height * width // config.spatial_factor**2
    kept, largest = 2 * pixels * (config.z_dim + 4 * config.widths[-1]), 0
    for layer in up_layers(config):
        if isinstance(layer, Block):
            kept += 2 * pixels * (layer.width + layer.out)
            largest = max(largest, _block_numbers(layer, latents, pixels))
        else:
            kept += 2 * pixels * layer.width * layer.time
            latents, pixels = latents * (1 + layer.time), pixels * 4
    return item * (kept + 2 * pixels * config.widths[0] + largest)


def encode_bytes(config: VAEConfig, height: int, width: int, *, latents: int = 1, item: int = 2) -> int:
    """The same for encoding clips of height x width."""
    pixels, frames = height * width, latents * config.temporal_factor
    kept, largest = 2 * pixels * 3, 0
    for layer in down_layers(config):
        if isinstance(layer, Block):
            kept += 2 * pixels * (layer.width + layer.out)
            largest = max(largest, _block_numbers(layer, frames, pixels))
        else:
            frames, pixels = frames // (1 + layer.time), pixels // 4
            kept += pixels * layer.width * layer.time
    return item * (kept + 2 * pixels * 5 * config.widths[-1] + largest)


def _block_numbers(block: Block, frames: int, pixels: int) -> int:
    """Numbers in a residual block's input, the second convolution's window, what that remembered of the
    block before, and its output."""
    return pixels * (frames * block.width + (frames + 4) * block.out + frames * block.out)


def vae_tensors(config: VAEConfig) -> dict[str, Shape]:
    """Name and shape of every tensor of the checkpoint, in the original's names."""
    return dict([*_encoder(config), *_quantisation(config), *_decoder(config)])


_Tensors = Iterator[tuple[str, Shape]]


def _encoder(config: VAEConfig) -> _Tensors:
    yield from _conv("encoder.conv1", 3, config.dim, (3, 3, 3))
    for i, layer in enumerate(down_layers(config)):
        name = f"encoder.downsamples.{i}"
        if isinstance(layer, Block):
            yield from _block(name, layer.width, layer.out)
        else:
            yield from _conv(f"{name}.resample.1", layer.width, layer.width, (3, 3))
            if layer.time:
                yield from _conv(f"{name}.time_conv", layer.width, layer.width, (3, 1, 1))
    width = config.widths[-1]
    yield from _middle("encoder.middle", width)
    yield "encoder.head.0.gamma", (width, 1, 1, 1)
    yield from _conv("encoder.head.2", width, 2 * config.z_dim, (3, 3, 3))


def _quantisation(config: VAEConfig) -> _Tensors:
    yield from _conv("conv1", 2 * config.z_dim, 2 * config.z_dim, (1, 1, 1))
    yield from _conv("conv2", config.z_dim, config.z_dim, (1, 1, 1))


def _decoder(config: VAEConfig) -> _Tensors:
    yield from _conv("decoder.conv1", config.z_dim, config.widths[-1], (3, 3, 3))
    yield from _middle("decoder.middle", config.widths[-1])
    for i, layer in enumerate(up_layers(config)):
        name = f"decoder.upsamples.{i}"
        if isinstance(layer, Block):
            yield from _block(name, layer.width, layer.out)
        else:
            yield from _conv(f"{name}.resample.1", layer.width, layer.width // 2, (3, 3))
            if layer.time:
                yield from _conv(f"{name}.time_conv", layer.width, 2 * layer.width, (3, 1, 1))
    yield "decoder.head.0.gamma", (config.widths[0], 1, 1, 1)
    yield from _conv("decoder.head.2", config.widths[0], 3, (3, 3, 3))


def _middle(name: str, width: int) -> _Tensors:
    yield from _block(f"{name}.0", width, width)
    yield f"{name}.1.norm.gamma", (width, 1, 1)
    yield from _conv(f"{name}.1.to_qkv", width, 3 * width, (1, 1))
    yield from _conv(f"{name}.1.proj", width, width, (1, 1))
    yield from _block(f"{name}.2", width, width)


def _block(name: str, width: int, out: int) -> _Tensors:
    yield f"{name}.residual.0.gamma", (width, 1, 1, 1)
    yield from _conv(f"{name}.residual.2", width, out, (3, 3, 3))
    yield f"{name}.residual.3.gamma", (out, 1, 1, 1)
    yield from _conv(f"{name}.residual.6", out, out, (3, 3, 3))
    if width != out:
        yield from _conv(f"{name}.shortcut", width, out, (1, 1, 1))


def _conv(name: str, width: int, out: int, kernel: Shape) -> _Tensors:
    yield f"{name}.weight", (out, width, *kernel)
    yield f"{name}.bias", (out,)


def recognise_vae(shapes: Mapping[str, Shape]) -> VAEConfig:
    """The configuration of a checkpoint, from its tensors' names and shapes alone.

    Latents are taken to be distributed as the published VAE's: means and deviations are in no checkpoint.

    Raises:
        ConfigError: `vae_not_recognised`: the tensors are not those of such a VAE. That all of them are
            there is for `vae_tensors` to check.
    """

    def shape(name: str) -> Shape:
        if name not in shapes:
            raise ConfigError(
                "vae_not_recognised",
                f"The file holds {len(shapes)} tensors but not {name!r}, which every Wan 2.1 VAE has; give "
                "the VAE's own checkpoint (Wan2.1_VAE.pth).",
            )
        return tuple(shapes[name])

    dim, z_dim = shape("encoder.conv1.weight")[0], shape("conv2.weight")[0]
    shape("decoder.conv1.weight")
    widths, times, layer, blocks = [0], [], 0, 0
    while True:
        name = f"encoder.downsamples.{layer}"
        if f"{name}.residual.6.weight" in shapes:
            widths[-1] = shapes[f"{name}.residual.6.weight"][0]
            blocks += len(widths) == 1
        elif f"{name}.resample.1.weight" in shapes:
            times.append(f"{name}.time_conv.weight" in shapes)
            widths.append(0)
        else:
            break
        layer += 1
    if not blocks:
        shape("encoder.downsamples.0.residual.6.weight")
    return VAEConfig(dim, z_dim, tuple(width // dim for width in widths), blocks, tuple(times))
