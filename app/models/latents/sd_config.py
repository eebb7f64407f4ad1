"""The shape of Stable Diffusion's image VAE (diffusers' AutoencoderKL): its `config.json`, and the tensors
that it implies (Latent Diffusion, arXiv:2112.10752).

Torch-free, so that a folder can be checked without loading a framework. Names and defaults are diffusers'.
Knows nothing of the computation, which is diffusers' own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

from app.boot.regular import open_regular
from app.errors import ConfigError, FileError
from app.models.autoencoder_kl import (
    Keys,
    Shape,
    Tensors,
    bad_setting,
    conv,
    count,
    middle,
    parameters,
    resnet,
    vectors,
)

CLASS: Final = "AutoencoderKL"
_LARGEST_FILE = 2**20  # bytes of a config.json
_LARGEST = 2**16  # of any width or count
_KERNEL = (3, 3)
_FIXED: Mapping[str, tuple[object, ...]] = {
    "_class_name": (CLASS,),
    "act_fn": ("silu", "swish"),
    "in_channels": (3,),
    "out_channels": (3,),
}
_BLOCKS = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
KEYS = Keys(_FIXED, _BLOCKS, ignored=frozenset({"sample_size"}))


@dataclass(frozen=True)
class SDConfig:
    """Parameters of the VAE, in diffusers' names and with its defaults.

    block_out_channels: channels of each resolution, finest first; every step but the last halves both sides.
    layers_per_block: residual blocks of an encoder stage; a decoder stage has one more.
    scaling_factor, shift_factor: a latent is (mean - shift) * factor.
    latents_mean, latents_std: where given, of each channel: a latent is (mean - its mean) * factor / its std.
    force_upcast: it overflows float16, and runs in float32.
    """

    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    @classmethod
    def published(cls) -> SDConfig:
        """The configuration of stabilityai/sd-vae-ft-mse."""
        return cls(block_out_channels=(128, 256, 512, 512), layers_per_block=2)

    @classmethod
    def nano(cls) -> SDConfig:
        """A toy, trained by tools/train_nano_vae.py: sixteen channels of about unit variance over squares of
        4 x 4 pixels."""
        return cls(
            block_out_channels=(16, 24, 40), latent_channels=16, norm_num_groups=1, scaling_factor=1.0,
            force_upcast=False,
        )  # fmt: skip

    @classmethod
    def from_original(cls, original: Mapping[str, Any], where: str = "config.json") -> SDConfig:
        """Read the content of a `config.json`.

        Raises:
            ConfigError: `vae_config_unsupported`, `vae_config_unknown` or `vae_config_invalid`, naming
                `where`, the key and its value.
        """
        config = cls(**parameters(original, cls(), KEYS, where))
        config.check(where)
        return config

    def check(self, where: str) -> None:
        """Refuse values that are no configuration: a file may hold anything."""
        widths = self.block_out_channels
        counts = {"layers_per_block": self.layers_per_block, "latent_channels": self.latent_channels}
        for name, value in (counts | {"norm_num_groups": self.norm_num_groups}).items():
            if type(value) is not int or not 1 <= value <= _LARGEST:
                raise bad_setting("invalid", where, name, value, f"a whole number from 1 to {_LARGEST}")
        if type(widths) is not tuple or not 1 <= len(widths) <= 16:
            raise bad_setting("invalid", where, "block_out_channels", widths, "a list of 1 to 16 widths")
        for width in widths:
            if type(width) is not int or not 1 <= width <= _LARGEST or width % self.norm_num_groups:
                expected = (
                    f"whole numbers to {_LARGEST}, multiples of norm_num_groups = {self.norm_num_groups}"
                )
                raise bad_setting("invalid", where, "block_out_channels", widths, expected)
        if not _number(self.scaling_factor) or self.scaling_factor <= 0:
            raise bad_setting("invalid", where, "scaling_factor", self.scaling_factor, "a number above 0")
        if self.shift_factor is not None and not _number(self.shift_factor):
            raise bad_setting("invalid", where, "shift_factor", self.shift_factor, "a number, or null")
        self._check_statistics(where)
        for name in ("force_upcast", "use_quant_conv", "use_post_quant_conv", "mid_block_add_attention"):
            if type(getattr(self, name)) is not bool:
                raise bad_setting("invalid", where, name, getattr(self, name), "true or false")

    def _check_statistics(self, where: str) -> None:
        for name in ("latents_mean", "latents_std"):
            values = getattr(self, name)
            if values is None:
                continue
            if (
                type(values) is not tuple
                or len(values) != self.latent_channels
                or not all(map(_number, values))
            ):
                raise bad_setting(
                    "invalid", where, name, values, f"latent_channels = {self.latent_channels} numbers"
                )
        if (self.latents_mean is None) != (self.latents_std is None):
            raise bad_setting(
                "invalid", where, "latents_std", self.latents_std, "both of latents_mean and latents_std"
            )
        if self.latents_std is not None and min(self.latents_std) <= 0:
            raise bad_setting("invalid", where, "latents_std", self.latents_std, "numbers above 0")

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent in height and in width (8 as published)."""
        return int(2 ** (len(self.block_out_channels) - 1))

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """What is taken from each channel of the posterior's mean, and what it is then divided by."""
        if self.latents_mean is not None and self.latents_std is not None:
            return self.latents_mean, tuple(std / self.scaling_factor for std in self.latents_std)
        one = (1.0,) * self.latent_channels
        return tuple((self.shift_factor or 0.0) * x for x in one), tuple(x / self.scaling_factor for x in one)

    @property
    def scale(self) -> str:
        """The same in words."""
        if self.latents_mean is not None:
            return f"posterior mean, normalised channel by channel, times {self.scaling_factor}"
        shift = f", less {self.shift_factor}" if self.shift_factor else ""
        return f"posterior mean{shift}, times {self.scaling_factor}"

    def frame_bytes(self, height: int, width: int, item: int) -> int:
        """About what the largest layer of the decoder takes for one frame of that size: an activation, its
        norm, what a convolution reads, and its result; `item` bytes a number."""
        widths = self.block_out_channels
        return 4 * height * width * max(widths[: min(2, len(widths))]) * item

    def to_dict(self) -> dict[str, Any]:
        """As diffusers' `config.json` holds it."""
        stages = len(self.block_out_channels)
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        types = {key: [name] * stages for key, name in _BLOCKS.items()}
        fixed = {key: values[0] for key, values in _FIXED.items()}
        listed = {key: list(value) if isinstance(value, tuple) else value for key, value in own.items()}
        return {**fixed, **types, **listed}


def read_config(path: Path) -> SDConfig:
    """The configuration in the file `config.json` of an AutoencoderKL folder.

    Raises:
        ConfigError: `vae_config_not_json`, and those of `SDConfig.from_original`.
        FileError: `file_unreadable`.
    """
    try:
        with open_regular(path) as file:
            data = file.read(_LARGEST_FILE + 1)
    except OSError as error:
        raise FileError(
            "file_unreadable",
            f"{path} cannot be read: {error.strerror or error}; expected the config.json of an {CLASS}.",
        ) from error
    try:
        if len(data) > _LARGEST_FILE:
            raise ValueError(f"it is larger than {_LARGEST_FILE:,} bytes")
        content = json.loads(data)
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            "vae_config_not_json",
            f"{path} is not the configuration of an {CLASS}: {error}; expected a JSON object: download "
            "config.json again.",
        ) from None
    return SDConfig.from_original(content, str(path))


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def recognise(shapes: Mapping[str, Shape]) -> SDConfig:
    """The configuration that the tensors tell of. The number of groups, scales and precision leave no trace
    in them: those are defaults (one group, so that any width passes).

    Raises:
        ConfigError: `vae_not_recognised`. That all tensors are there is for `sd_tensors` to check.
    """

    def shape(name: str, sides: int) -> Shape:
        if len(shapes.get(name, ())) != sides:
            held = "not" if name not in shapes else f"it as {shapes[name]}:"
            raise ConfigError(
                "vae_not_recognised",
                f"The file holds {len(shapes)} tensors but {held} {name!r}, a tensor of {sides} dimensions "
                f"that every {CLASS} has; give the VAE's own file (diffusion_pytorch_model.safetensors).",
            )
        return tuple(shapes[name])

    stages = count(shapes, "encoder.down_blocks.{}.resnets.0.conv1.weight")
    widths = [shape(f"encoder.down_blocks.{i}.resnets.0.conv1.weight", 4)[0] for i in range(max(stages, 1))]
    return SDConfig(
        block_out_channels=tuple(widths),
        layers_per_block=count(shapes, "encoder.down_blocks.0.resnets.{}.conv1.weight"),
        latent_channels=shape("decoder.conv_in.weight", 4)[1],
        norm_num_groups=1,
        use_quant_conv="quant_conv.weight" in shapes,
        use_post_quant_conv="post_quant_conv.weight" in shapes,
        mid_block_add_attention="encoder.mid_block.attentions.0.group_norm.weight" in shapes,
    )


def sd_tensors(config: SDConfig) -> dict[str, Shape]:
    """Name and shape of every tensor of the checkpoint, in diffusers' names."""
    return dict([*_encoder(config), *_decoder(config)])


def _encoder(config: SDConfig) -> Tensors:
    widths, latents = config.block_out_channels, 2 * config.latent_channels
    yield from conv("encoder.conv_in", 3, widths[0], _KERNEL)
    width = widths[0]
    for stage, out in enumerate(widths):
        for layer in range(config.layers_per_block):
            yield from resnet(f"encoder.down_blocks.{stage}.resnets.{layer}", width, out, _KERNEL)
            width = out
        if stage < len(widths) - 1:
            yield from conv(f"encoder.down_blocks.{stage}.downsamplers.0.conv", width, width, _KERNEL)
    yield from middle("encoder.mid_block", width, _KERNEL, attention=config.mid_block_add_attention)
    yield from vectors("encoder.conv_norm_out", width)
    yield from conv("encoder.conv_out", width, latents, _KERNEL)
    if config.use_quant_conv:
        yield from conv("quant_conv", latents, latents, (1, 1))


def _decoder(config: SDConfig) -> Tensors:
    widths, latents = config.block_out_channels[::-1], config.latent_channels
    if config.use_post_quant_conv:
        yield from conv("post_quant_conv", latents, latents, (1, 1))
    yield from conv("decoder.conv_in", latents, widths[0], _KERNEL)
    yield from middle("decoder.mid_block", widths[0], _KERNEL, attention=config.mid_block_add_attention)
    width = widths[0]
    for stage, out in enumerate(widths):
        for layer in range(config.layers_per_block + 1):
            yield from resnet(f"decoder.up_blocks.{stage}.resnets.{layer}", width, out, _KERNEL)
            width = out
        if stage < len(widths) - 1:
            yield from conv(f"decoder.up_blocks.{stage}.upsamplers.0.conv", width, width, _KERNEL)
    yield from vectors("decoder.conv_norm_out", width)
    yield from conv("decoder.conv_out", width, 3, _KERNEL)
