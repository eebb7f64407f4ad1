"""What making a clip takes of memory, told from its sizes alone, by passing nothing through the model.

The pipeline's own code runs on torch's meta device, where tensors have sizes and no values, with one layer of
the transformer, and the tensors that it makes are counted; what the other layers keep is added. Knows nothing
of how much memory there is.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

import torch
from torch import Tensor, nn

from app.boot.tensorfile import matches
from app.memory import Need
from app.models.wan.clip import ImageEncoder
from app.models.wan.clip_config import CLIPConfig, clip_tensors, unused_tensors
from app.models.wan.config import LATENT_CHANNELS, Shape, tensors
from app.models.wan.generate import GenerateOptions, Generator, Guide, Stays
from app.models.wan.length import FACTOR
from app.models.wan.parts import Abilities
from app.models.wan.pose import PoseEmbedder
from app.models.wan.pose_config import pose_tensors
from app.models.wan.schedule import Noise
from app.models.wan.text import TextEncoder
from app.models.wan.tokenizer import LENGTH
from app.models.wan.transformer import Transformer
from app.models.wan.umt5 import UMT5Encoder
from app.models.wan.umt5_config import UMT5Config
from app.models.wan.vae import WanVAE
from app.models.wan.vae_config import VAEConfig, vae_tensors
from app.nn.allocations import Allocations, Stand, taken

STEPS: Final = {"few": 2, "many": 3}  # of a block: more take no more, but for what is kept of each timestep
SETTLED: Final = 9  # frames of a clip made at once after which decoding latent by latent takes no more


@dataclass(frozen=True)
class Choice:
    """A way to make a clip. window: as asked for, or less. decode: latents that are decoded at a time, None
    for a block. text: where the text encoder is once it has read the prompts."""

    window: int | None
    decode: int | None = None
    text: Stays = "device"


@dataclass(frozen=True)
class Task:
    """What is asked, as far as memory depends on it.

    start, poses: frames of the guide's. reference: whether it has one. parts: optional ones that are loaded
    or will be. text: bytes of the text encoder, 0 where it neither is nor will be in memory. reads: where it
    must read a prompt, None where it knows them all.
    """

    options: GenerateOptions
    start: int = 0
    poses: int = 0
    reference: bool = False
    parts: frozenset[str] = frozenset()
    text: int = 0
    reads: Literal["device", "host"] | None = None


@dataclass(frozen=True)
class _Peaks:
    """Bytes beside the weights: until the first block is begun, and from then on."""

    start: int
    blocks: int


class Estimate:
    """What a model takes on a device of one type; `dtype` of the transformer, `conv_dtype` of the VAE."""

    def __init__(
        self,
        able: Abilities,
        vae: VAEConfig,
        text: UMT5Config,
        clip: CLIPConfig,
        dtype: torch.dtype,
        conv_dtype: torch.dtype,
        device: str,
        weights: int | None = None,
    ) -> None:
        """weights: bytes of the transformer and the VAE, None for what their shapes take in these types."""
        self.config, self.vae, self.text = able.config, vae, text
        self.dtype, self.conv_dtype, self.device = dtype, conv_dtype, device
        self.one = replace(able.config, layers=1)
        self._weights = (
            weights
            if weights is not None
            else (
                _numbers(tensors(able.config)) * dtype.itemsize
                + _numbers(vae_tensors(vae)) * conv_dtype.itemsize
            )
        )
        used = unused_tensors(clip)
        self._parts = {
            "pose": _numbers(pose_tensors()) * dtype.itemsize,
            "clip": _numbers({name: shape for name, shape in clip_tensors(clip).items()
                              if not matches(name, used)}) * dtype.itemsize,
        }  # fmt: skip
        with torch.device("meta"):
            self._sized = _Sized(
                replace(able, config=self.one, sections=()),
                Transformer(self.one).to(dtype).requires_grad_(False),
                WanVAE(vae).to(conv_dtype),
                _Text(text.dim, dtype),
                PoseEmbedder().to(dtype).requires_grad_(False),
                _Eye(clip, dtype),
            )
        self._most_steps = STEPS[able.sampling]
        self._known: dict[Hashable, _Peaks] = {}

    def need(self, task: Task, choice: Choice) -> Need:
        """What a clip takes when it is made in this way."""
        weights = self.weights(task.parts)
        peaks = self._peaks(task, choice.decode)
        device = weights + max(peaks.start, peaks.blocks + self._kept(task, choice))
        device += task.text if choice.text == "device" else 0
        if task.reads == "device":
            device = max(device, weights + task.text + self._reading())
        host = task.text if choice.text == "host" else 0
        if task.reads == "host":
            host = task.text + self._reading()  # wherever it goes then
        if self.device == "cuda":
            host += self._guide_bytes(task)
        return Need(device, host)

    def weights(self, parts: frozenset[str] = frozenset()) -> int:
        """Bytes of the transformer, the VAE, and of these optional parts."""
        return self._weights + sum(self._parts[part] for part in parts)

    # ------------------------------------------------------------------ passes

    def _peaks(self, task: Task, decode: int | None) -> _Peaks:
        """What the pipeline takes with one layer and the least cache; it is remembered."""
        options = replace(
            task.options, prompts={0: ""}, window=self._least_window(task.options), decode=decode, seed=0,
            steps=min(self._steps(task.options), self._most_steps), text=None, section=None,
        )  # fmt: skip
        key = replace(options, prompts={}, negative=""), task.start, task.poses, task.reference
        named = repr(key)
        if named not in self._known:
            self._known[named] = self._passed(task, options)
        return self._known[named]

    def _passed(self, task: Task, options: GenerateOptions) -> _Peaks:
        length = options.length
        enough = SETTLED if length.at_once else FACTOR * length.block + 2  # some of the second block
        made = 0
        apart = self._start(task, options) if self._is_copied else None
        with torch.inference_mode(), Allocations("meta") as counted, Stand(self.device):
            guide = Guide(
                apart if self._is_copied else self._start(task, options),
                _pictures(options, task.poses) if task.poses else None,
                _pictures(options) if task.reference else None,
            )
            pieces = self._sized.generate(options, guide)
            del guide
            start, counted.peak = counted.peak, counted.bytes
            for frames in pieces:
                shown = frames.float().clamp(-1, 1)
                made += len(shown)
                del frames, shown
                if made >= enough:
                    break
        return _Peaks(start, counted.peak)

    @property
    def _is_copied(self) -> bool:
        """Whether a start lies in the host's memory, and a copy of it on the device."""
        return self.device == "cuda" and self.conv_dtype != torch.float32

    def _reading(self) -> int:
        """What the text encoder takes beside its weights."""
        key = "text"
        if key not in self._known:
            with torch.device("meta"):
                model = UMT5Encoder(replace(self.text, layers=1, vocab=1)).to(torch.bfloat16)
                ids = torch.empty(1, LENGTH, dtype=torch.int64)
            peak = taken(lambda: model.requires_grad_(False)(ids, ids), self.device).peak
            self._known[key] = _Peaks(peak, peak)
        return self._known[key].start

    # ------------------------------------------------------------------ what is kept

    def _kept(self, task: Task, choice: Choice) -> int:
        """Bytes that the blocks keep beyond what those of one layer with the least cache do."""
        config, one, options = self.config, self.one, task.options
        branches = 1 + (options.guidance != 1)
        size = options.height // self.vae.spatial_factor, options.width // self.vae.spatial_factor
        item = self.dtype.itemsize
        run = self._sized.layout(replace(options, window=self._least_window(options)))
        whole = self._sized.layout(replace(options, window=choice.window))
        least, seen = (layout.capacity(options.length.given) for layout in (run, whole))
        cache = config.cache_bytes(*size, seen, itemsize=item) - one.cache_bytes(*size, least, itemsize=item)
        cross = config.cross_bytes(itemsize=item, image_tokens=self._image_tokens) - one.cross_bytes(
            itemsize=item, image_tokens=self._image_tokens
        )
        times = self._times(config.layers, self._steps(options))
        times -= self._times(1, min(self._steps(options), self._most_steps))
        latents = (seen - least) * LATENT_CHANNELS * math.prod(size) * 4
        changes = len(options.prompts) - 1
        prompts = changes * LENGTH * self.text.dim * item
        prompts += config.cross_bytes(itemsize=item, image_tokens=self._image_tokens) * bool(changes)
        return branches * (cache + cross) + times + latents + prompts

    def _times(self, layers: int, steps: int) -> int:
        """Bytes of what timesteps do to the layers and the head; the clean pass has one of its own."""
        return (steps + 1) * (6 * layers + 2) * self.config.dim * 4

    def _steps(self, options: GenerateOptions) -> int:
        return self._sized.sampler(options).steps

    @property
    def _image_tokens(self) -> int:
        return self._sized.eye.config.tokens if self.config.image else 0

    def _least_window(self, options: GenerateOptions) -> int | None:
        """The window of the pass that is counted: two blocks beside the sink, or what is asked for if that is
        less. None where a block is all there is."""
        return (
            None
            if options.length.at_once
            else min(options.latents_seen, options.sink + 2 * options.length.block)
        )

    # ------------------------------------------------------------------ the guide

    def _start(self, task: Task, options: GenerateOptions) -> Tensor | None:
        if not task.start:
            return None
        return torch.empty(task.start, 3, options.height, options.width, device="meta")

    def _guide_bytes(self, task: Task) -> int:
        """Of the guide in the host's memory: twice while it is put together."""
        area = 3 * task.options.height * task.options.width
        return 2 * area * (4 * task.start + task.poses + task.reference)


def _pictures(options: GenerateOptions, *frames: int) -> Tensor:
    return torch.empty(*frames, 3, options.height, options.width, dtype=torch.uint8, device="meta")


def _numbers(shapes: Mapping[str, Shape]) -> int:
    return sum(map(math.prod, shapes.values()))


# ------------------------------------------------------------------ the pipeline with sizes alone


class _Sized(Generator):
    """The pipeline over meta tensors: nothing is read, drawn or loaded."""

    def __init__(
        self,
        able: Abilities,
        transformer: Transformer,
        vae: WanVAE,
        text: TextEncoder,
        pose: PoseEmbedder,
        eye: ImageEncoder,
    ) -> None:
        self.eye = eye
        super().__init__(
            able=able, transformer=transformer, vae=vae, text=text,
            load_transformer=lambda section: transformer, load_pose=lambda: pose, load_clip=lambda: eye,
        )  # fmt: skip

    def _noise(self, seed: int) -> Noise:
        return lambda block, step, shape: torch.empty(shape, device="meta")


class _Text(TextEncoder):
    """Embeddings without values."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        self.width, self.dtype = width, dtype

    def encode(self, prompts: Sequence[str]) -> Tensor:
        return torch.empty(len(prompts), LENGTH, self.width, dtype=self.dtype, device="meta")

    @property
    def loaded(self) -> bool:
        return False


class _Eye(ImageEncoder):
    """An image's features without values; what CLIP takes for them is little beside the VAE."""

    def __init__(self, config: CLIPConfig, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.config, self.dtype = config, dtype

    def features(self, images: Tensor) -> Tensor:
        return torch.empty(len(images), self.config.tokens, self.config.dim, dtype=self.dtype, device="meta")
