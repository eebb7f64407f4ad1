"""What a restoration takes of memory, told from its sizes alone, by passing nothing through the model.

The model's own code runs on torch's meta device, where tensors have sizes and no values, and the tensors that
it makes are counted: there is no second description of the layers that could be wrong. Only the shape of the
pipeline, what is held while a step runs, is written down here. Knows nothing of how much memory there is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from app.memory import Need
from app.models.seedvr2 import sampler
from app.models.seedvr2.config import DiTConfig, dit_tensors
from app.models.seedvr2.dit import DiT, Plan
from app.models.seedvr2.offload import SLOTS
from app.models.seedvr2.segment import spans
from app.models.seedvr2.tiles import OVERLAP, Half, Whole
from app.models.seedvr2.vae import VideoVAE
from app.models.seedvr2.vae_config import VAEConfig, vae_tensors
from app.nn.allocations import Taken, taken
from app.nn.causal_conv import CausalState
from app.nn.float8 import Product, keep_in_float8, matrix_bytes
from app.video.color import ColorFix, repair

LAYERS: Final = 3  # of the transformer that are passed: both partitions, and what lies between two layers
STEADY: Final = 3  # slices after which a VAE takes no more
PROMPT: Final = 64  # tokens of the longer published prompt

Size = tuple[int, int]  # height, width in latents


@dataclass(frozen=True)
class Choice:
    """A way through the pipeline. window: latents that the transformer sees at once. tile: latents of a
    tile's side, None for whole frames. stream: whether the transformer's blocks wait in the host's memory."""

    window: int
    tile: int | None = None
    stream: bool = False


@dataclass(frozen=True)
class Task:
    """What is asked, as far as memory depends on it. latents: of the longest shot. frame, source: height and
    width in latents; bytes of a frame that is kept for colour repair. unit: pixels of a latent's side."""

    latents: int
    frame: Size
    source: int = 0
    steps: int = 1
    guided: bool = False
    noised: bool = False
    color: ColorFix = "lab"
    unit: int = 8


class Estimate:
    """What a model takes on a device of one type; `dtype` of the transformer, `conv_dtype` of the VAE;
    `float8`: how products are made of matrices in 8 bits, None for none of them."""

    def __init__(
        self,
        dit: DiTConfig,
        vae: VAEConfig,
        dtype: torch.dtype,
        conv_dtype: torch.dtype,
        device: str,
        float8: Product | None = None,
    ) -> None:
        self.dit, self.vae, self.device = dit, vae, device
        self.dtype, self.conv_dtype, self.float8 = dtype, conv_dtype, float8
        layers = min(LAYERS, dit.layers)
        short = replace(
            dit, layers=layers, windows=dit.windows[:layers], shifted=dit.shifted[:layers],
            separate=min(dit.separate, layers),
        )  # fmt: skip
        with torch.device("meta"):
            self._dit = DiT(short).to(dtype)
            keep_in_float8(self._dit.blocks, float8)
            self._vae = VideoVAE(vae).to(conv_dtype)
        self._known: dict[Hashable, Taken] = {}

    def need(self, task: Task, choice: Choice) -> Need:
        """What a task takes when it is done in this way."""
        window = min(choice.window, task.latents)
        many = task.latents > choice.window
        height, width = task.frame
        latents = 2 * window * height * width * self.vae.latent_channels * 4  # held before and after a step
        steps = min(task.steps, 2)  # of which two take as much as many
        transformer = self._of(self._transformer, task.frame, window, steps, task.guided, task.noised).peak
        pictures = 1 if task.latents == 1 else self.vae.temporal_factor
        colour = self._of(self._colour, task.frame, task.color, pictures)
        slices = min(task.latents, STEADY)
        if choice.tile is None:
            encode = self._of(self._encode, task.frame, slices)
            decode = self._of(self._decode, task.frame, slices)
            waits, kept = (encode.left, decode.left) if many else (0, 0)
            device = max(
                encode.peak + kept,
                transformer + waits + kept,
                decode.peak + waits,
                colour.peak + decode.left * many + waits,
            )
            host = 0
        else:
            tile = self.tile_size(task.frame, choice.tile)
            encode = self._of(self._encode_tile, tile, slices)
            decode = self._of(self._decode_tile, tile, slices)
            middles = self._of(self._middles, task.frame)
            device = middles.left + max(encode.peak, decode.peak, middles.peak, transformer, colour.peak)
            host = self._canvases(task, window)
            if many:
                host += self._tiles(task.frame, choice.tile) * (encode.left + decode.left)
                if self.device != "cuda":  # where the tile that is worked on is one of those that wait
                    host -= decode.left
        host += window * self.vae.temporal_factor * task.source
        blocks = self.block_bytes()
        host += self.waiting_bytes() if choice.stream else 0
        on_device = SLOTS * max(blocks) if choice.stream else sum(blocks)
        # Pictures of the slice before are held until their successors are there.
        return Need(device + latents + colour.left + self.other_bytes() + on_device, host)

    # ------------------------------------------------------------------ weights

    def block_bytes(self) -> list[int]:
        """Bytes of each block of the transformer."""
        return block_bytes(self.dit, self.dtype, self.float8)

    def waiting_bytes(self) -> int:
        """Bytes of the host's memory that all blocks wait in."""
        blocks = self.block_bytes()
        return sum(map(_power_of_two, blocks) if self.device == "cuda" else blocks)

    def other_bytes(self) -> int:
        """Bytes of all other weights, and of the two prompts."""
        vae = sum(map(math.prod, vae_tensors(self.vae).values()))
        prompts = 2 * PROMPT * self.dit.text_dim * self.dtype.itemsize
        return rest_bytes(self.dit, self.dtype) + prompts + vae * self.conv_dtype.itemsize

    # ------------------------------------------------------------------ tiles

    def tile_size(self, frame: Size, side: int) -> Size:
        """(height, width) of the largest tile of at most `side` latents."""
        height, width = (max(map(len, spans(length, side, OVERLAP))) for length in frame)
        return height, width

    def _tiles(self, frame: Size, side: int) -> int:
        return math.prod(len(spans(length, side, OVERLAP)) for length in frame)

    def _canvases(self, task: Task, window: int) -> int:
        """Bytes of a run of whole frames, and of what the VAE's middle takes or gives for it."""
        area = math.prod(task.frame)
        frames = window * self.vae.temporal_factor * self.vae.in_channels * self.vae.spatial_factor**2
        return area * (frames + window * self.vae.block_out_channels[-1]) * self.conv_dtype.itemsize

    # ------------------------------------------------------------------ passes

    def _of(self, passes: Callable[..., Taken], *sizes: Hashable) -> Taken:
        """What passes of some size take; it is remembered."""
        key = passes.__name__, *sizes
        if key not in self._known:
            self._known[key] = passes(*sizes)
        return self._known[key]

    def _transformer(self, frame: Size, window: int, steps: int, guided: bool, noised: bool) -> Taken:
        """A window's Euler steps."""
        size = (window, *frame)
        prompt = torch.empty(PROMPT, self.dit.text_dim, dtype=self.dtype, device="meta")
        plan = _shortened(self._dit.plan(*size, PROMPT))
        low = torch.empty(*size, self.vae.latent_channels, device="meta")

        def sampled() -> Tensor:
            start = torch.empty_like(low).to(self.dtype).float()
            drowned = torch.empty_like(low) if noised else None
            condition = sampler.condition(low, drowned, 0.5 if noised else 0.0)

            def model(x: Tensor, timestep: float) -> Tensor:
                out: Tensor = self._dit(
                    torch.cat([x, condition], dim=-1).to(self.dtype), prompt, timestep, plan
                )
                return out.float()

            scale = 2.0 if guided else 1.0
            return sampler.sample(start, model, model if guided else None, sampler.timesteps(steps), scale)

        return taken(sampled, self.device)

    def _encode(self, frame: Size, slices: int) -> Taken:
        """Slices of whole frames through the encoder."""
        coder = Whole(self._vae, _endless(slices))

        def steps() -> object:
            for number in range(slices):
                coder.encode([self._clip(frame, number)], lambda: None)
            return coder

        return taken(steps, self.device)

    def _decode(self, frame: Size, slices: int) -> Taken:
        """Slices of latents through the decoder."""
        coder = Whole(self._vae, _endless(slices))

        def steps() -> object:
            for _ in range(slices):
                z = torch.empty(1, self.vae.latent_channels, 1, *frame, dtype=self.conv_dtype, device="meta")
                (frames,) = coder.decode([z], lambda: None)
                del z
                torch.isfinite(frames.float())
                del frames
            return coder

        return taken(steps, self.device)

    def _encode_tile(self, tile: Size, slices: int) -> Taken:
        return self._tile(self._vae.encoder.features, slices, lambda number: self._clip(tile, number))

    def _decode_tile(self, tile: Size, slices: int) -> Taken:
        size = 1, self.vae.block_out_channels[-1], 1, *tile
        return self._tile(
            self._vae.decoder.frames_of,
            slices,
            lambda number: torch.empty(size, dtype=self.conv_dtype, device="meta"),
        )

    def _tile(self, half: Half, slices: int, part: Callable[[int], Tensor]) -> Taken:
        """Slices of a tile through the outer part of a half of the VAE, and the fade."""
        state = CausalState()

        def steps() -> object:
            for number in range(slices):
                if number == slices - 1 < STEADY - 1:
                    state.end()
                out = half(part(number), state)
                out = out * torch.empty(out.shape[-2:], dtype=out.dtype, device="meta")
                del out
            return state

        return taken(steps, self.device)

    def _middles(self, frame: Size) -> Taken:
        """A slice through the middles, which see whole frames even where the rest passes in tiles."""
        width = self.vae.block_out_channels[-1]
        state = CausalState()

        def steps() -> object:
            features = torch.empty(1, width, 1, *frame, dtype=self.conv_dtype, device="meta")
            self._vae.encoder.parameters_of(features, state)
            z = torch.empty(1, self.vae.latent_channels, 1, *frame, dtype=self.conv_dtype, device="meta")
            self._vae.decoder.features(z, state)
            return state

        return taken(steps, self.device)

    def _colour(self, frame: Size, color: ColorFix, pictures: int) -> Taken:
        """Colour repair of a picture, while those of its slice are held."""
        height, width = (side * self.vae.spatial_factor for side in frame)

        def steps() -> object:
            frames = torch.empty(pictures, 3, height, width, device="meta")
            if color != "none":
                repair(color, frames[:1], torch.empty(1, 3, height, width, device="meta"))
            return frames

        return taken(steps, self.device)

    def _clip(self, frame: Size, number: int) -> Tensor:
        """The frames of a slice of one latent, as the pipeline makes them for the VAE."""
        height, width = (side * self.vae.spatial_factor for side in frame)
        count = self.vae.temporal_factor if number else 1
        clip = torch.cat([torch.empty(1, 3, height, width, device="meta") for _ in range(count)])
        return clip.transpose(0, 1).unsqueeze(0).to(self.conv_dtype)


def block_bytes(dit: DiTConfig, dtype: torch.dtype, float8: Product | None) -> list[int]:
    """Bytes of each block of a transformer."""
    sizes = [0] * dit.layers
    for name, shape in dit_tensors(dit).items():
        if name.startswith("blocks."):
            eight = float8 is not None and len(shape) == 2  # what is no matrix stays as it is
            nbytes = matrix_bytes(shape) if eight else math.prod(shape) * dtype.itemsize
            sizes[int(name.split(".")[1])] += nbytes
    return sizes


def rest_bytes(dit: DiTConfig, dtype: torch.dtype) -> int:
    """Bytes of a transformer's weights outside of its blocks."""
    rest = sum(math.prod(s) for n, s in dit_tensors(dit).items() if not n.startswith("blocks."))
    return rest * dtype.itemsize


def _endless(slices: int) -> int:
    """Latents of a clip of which so many slices pass: the last one ends it, unless it stands for more."""
    return slices if slices < STEADY else slices + 1


def _shortened(plan: Plan) -> Plan:
    """The plan with the longest run of each partition alone: others take no more, and come after it."""
    longest = {
        id(windows): replace(windows, runs=(max(windows.runs, key=lambda run: run[-1].stop - run[0].start),))
        for windows in plan.partitions
    }
    return replace(plan, partitions=tuple(longest[id(windows)] for windows in plan.partitions))


def _power_of_two(count: int) -> int:
    """Bytes of pinned memory that torch takes for so many."""
    return int(2 ** math.ceil(math.log2(count)))
