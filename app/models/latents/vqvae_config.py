"""The shape of the VQ-VAE: its parameters and the tensors they imply.

Torch-free, so that a checkpoint can be recognised and checked without loading a framework. Everything shows
in the tensors' shapes: a file needs no other configuration. Knows nothing of the computation (`vqvae.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from app.errors import ConfigError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class VQConfig:
    """Parameters of the VQ-VAE.

    width: channels of every layer.
    inner: channels inside of a residual block.
    blocks: residual blocks of the encoder, and of the decoder.
    halves_time: for each halving of height and width, finest first, whether it also halves time.
    codes, dim: vectors of the codebook, and numbers of each.
    """

    width: int = 128
    inner: int = 32
    blocks: int = 2
    halves_time: tuple[bool, ...] = (True, True)
    codes: int = 512
    dim: int = 64

    def __post_init__(self) -> None:
        for name in ("width", "inner", "codes", "dim"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise _invalid(name, getattr(self, name), "a whole number above 0")
        if type(self.blocks) is not int or self.blocks < 0:
            raise _invalid("blocks", self.blocks, "a whole number, 0 or above")

    @classmethod
    def nano(cls) -> VQConfig:
        """Every kind of layer, toy width: 512 codes over 4 x 4 pixels of 4 frames."""
        return cls(width=8, inner=8, blocks=1, dim=4)

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent in height and in width."""
        return int(2 ** len(self.halves_time))

    @property
    def temporal_factor(self) -> int:
        """Frames per latent, after the first."""
        return int(2 ** sum(self.halves_time))


def _invalid(name: str, value: object, expected: str) -> ConfigError:
    return ConfigError("vae_config_invalid", f"{name} of the VQ-VAE is {value!r}; expected {expected}.")


_Tensors = Iterator[tuple[str, Shape]]


def vqvae_tensors(config: VQConfig) -> dict[str, Shape]:
    """Name and shape of every tensor of a checkpoint."""
    return dict(_tensors(config))


def _tensors(config: VQConfig) -> _Tensors:
    width = config.width
    yield "codebook", (config.codes, config.dim)
    yield from _conv("encoder.conv_in", 3, width, (3, 3, 3))
    for i, time in enumerate(config.halves_time):
        yield from _conv(f"encoder.down.{i}", width, width, (3 if time else 1, 4, 4))
    yield from _blocks("encoder", config)
    yield from _conv("encoder.conv_out", width, config.dim, (1, 1, 1))
    yield from _conv("decoder.conv_in", config.dim, width, (3, 3, 3))
    yield from _blocks("decoder", config)
    for i, time in enumerate(config.halves_time[::-1]):
        yield from _conv(f"decoder.up.{i}", width, width, (3 if time else 1, 3, 3))
    yield from _conv("decoder.conv_out", width, 3, (3, 3, 3))


def _blocks(name: str, config: VQConfig) -> _Tensors:
    for i in range(config.blocks):
        yield from _conv(f"{name}.blocks.{i}.conv1", config.width, config.inner, (3, 3, 3))
        yield from _conv(f"{name}.blocks.{i}.conv2", config.inner, config.width, (1, 1, 1))


def _conv(name: str, width: int, out: int, kernel: Shape) -> _Tensors:
    yield f"{name}.weight", (out, width, *kernel)
    yield f"{name}.bias", (out,)


def recognise_vqvae(shapes: Mapping[str, Shape]) -> VQConfig:
    """The configuration of a checkpoint, from its tensors' names and shapes alone.

    Raises:
        ConfigError: `vae_not_recognised`: the tensors are not those of such a VQ-VAE. That all of them are
            there is for `vqvae_tensors` to check.
    """

    def shape(name: str, sides: int) -> Shape:
        if len(shapes.get(name, ())) != sides or not all(shapes[name]):
            held = "not" if name not in shapes else f"as {shapes[name]}"
            raise ConfigError(
                "vae_not_recognised",
                f"The file holds {len(shapes)} tensors but {name!r} {held}, expected one of {sides} "
                "dimensions as every VQ-VAE of Seedpod has; give a file that tools/train_latents.py wrote.",
            )
        return tuple(shapes[name])

    codes, dim = shape("codebook", 2)
    width = shape("encoder.conv_in.weight", 5)[0]
    times: list[bool] = []
    blocks = 0
    while f"encoder.down.{len(times)}.weight" in shapes:
        times.append(shape(f"encoder.down.{len(times)}.weight", 5)[2] == 3)
    while f"encoder.blocks.{blocks}.conv1.weight" in shapes:
        blocks += 1
    inner = shape("encoder.blocks.0.conv1.weight", 5)[0] if blocks else VQConfig.inner
    return VQConfig(width, inner, blocks, tuple(times), codes, dim)
