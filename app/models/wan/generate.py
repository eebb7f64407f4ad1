"""The generate pipeline: a prompt in, frames out, block by block.

    text -> (start, poses) -> latents, block by block -> decode

Each block is decoded and handed over before the next one begins. Knows nothing of files or requests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from collections.abc import Generator as Generating
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from app.boot.checkpoint import give_back
from app.memory import Room
from app.models.wan import unipc
from app.models.wan.clip_config import CLIP_VIT_H, CLIPConfig
from app.models.wan.condition import first_frame
from app.models.wan.config import TRAINED_FRAMES
from app.models.wan.layout import Conditions, Layout
from app.models.wan.length import FACTOR, Length, latent_of
from app.models.wan.parts import Abilities
from app.models.wan.sampler import Block, FewStep, ManyStep, generate_blocks
from app.models.wan.schedule import SHIFT, FlowMatch, Noise, SeededNoise
from app.models.wan.text import TextEncoder
from app.models.wan.transformer import Transformer
from app.models.wan.vae import WanVAE
from app.timing import Stopwatch

if TYPE_CHECKING:
    from app.models.wan.clip import ImageEncoder
    from app.models.wan.memory import Estimate, Task
    from app.models.wan.pose import PoseEmbedder

Frames = Generating[Tensor]
Stays = Literal["device", "host", "nowhere"]  # of the text encoder, once it has read the prompts

# The published negative prompt of Wan 2.1, in the language that it was trained with.
NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)
STAYS: Mapping[str, Stays] = {"auto": "device", "host": "host", "release": "nowhere"}  # by setting


@dataclass(frozen=True)
class GenerateOptions:
    """Parameters of a clip.

    prompts: frame of the result -> prompt; 0 is among them. length: see `length`. height, width: in pixels,
    multiples of `Abilities.multiple`. steps: of each block, None for the model's own. shift: of the schedule
    towards noise, None for the model's own. guidance: scale of classifier-free guidance, 1 for none.
    window, sink: latents that a block sees, and how many of the clip's first stay among them. section: the
    state dict of the transformer's file, None for the default. decode: latents that are decoded at a time,
    None for a block; the frames are the same. text: where the text encoder is once it has read the prompts,
    None for what the settings say.
    """

    prompts: Mapping[int, str]
    length: Length
    height: int
    width: int
    seed: int = 0
    negative: str = NEGATIVE
    steps: int | None = None
    shift: float | None = None
    guidance: float = 1.0
    window: int | None = None
    sink: int = 0
    section: str | None = None
    decode: int | None = None
    text: Stays | None = None

    @property
    def latents_seen(self) -> int:
        """Latents that a block sees at most: what memory goes by."""
        rolling = self.window or max(TRAINED_FRAMES, self.sink + self.length.block)
        return min(rolling, self.length.given + self.length.made)


@dataclass(frozen=True)
class Guide:
    """Pictures that a clip is made from, beside its prompt.

    start: (frames, 3, height, width) in [-1, 1]: one frame to begin with, or a clip to go on from.
    poses: (frames, 3, height, width) uint8, a rendered pose for each frame of the result.
    reference: (3, height, width) uint8: the pose of the start's image.
    """

    start: Tensor | None = None
    poses: Tensor | None = None
    reference: Tensor | None = None


def _nothing() -> None: ...


class Generator:
    """A loaded Wan. What a job may need and most do not is loaded when it is first asked for, once."""

    def __init__(
        self,
        *,
        able: Abilities,
        transformer: Transformer,
        vae: WanVAE,
        text: TextEncoder,
        load_transformer: Callable[[str | None], Transformer],
        load_pose: Callable[[], PoseEmbedder],
        load_clip: Callable[[], ImageEncoder],
        text_stays: Literal["auto", "host", "release"] = "auto",
        text_read: Callable[[], None] = _nothing,
        clip: CLIPConfig = CLIP_VIT_H,
    ) -> None:
        """text_stays: where T5 stays between prompts. text_read: called when T5's file is not needed more.
        clip: of what `load_clip` loads."""
        self.able = able
        self.text = text
        self._transformer: Transformer | None = transformer
        self._device, self._dtype = transformer.device, transformer.dtype
        self._section = able.sections[0] if able.sections else None
        self._vae = vae
        self._load_transformer = load_transformer
        self._load_pose, self._load_clip = load_pose, load_clip
        self._pose: PoseEmbedder | None = None
        self._clip: ImageEncoder | None = None
        self.text_stays, self._text_read = text_stays, text_read
        self._clip_config = clip

    def close(self) -> None:
        """Give back what was kept for later: staged copies of files that no job has needed."""
        self._text_read()

    def generate(
        self,
        options: GenerateOptions,
        guide: Guide | None = None,
        on_step: Callable[[], None] = _nothing,
        clock: Stopwatch | None = None,
    ) -> Frames:
        """Make a clip. What it is made from is encoded at once; blocks are made as they are asked for.

        on_step: Called before each pass of the transformer; may raise to stop. clock: Gets the seconds of
        "text", "start", "pose", "transformer" and "decode".

        Yields:
            (frames, 3, height, width) float in about [-1, 1], block by block, or what `options.decode` makes
            of one; `options.length.frames` in all.
            The image that a clip begins with is its first frame; of a clip that is gone on from there is
            nothing.
        """
        guide, clock = guide or Guide(), clock or Stopwatch()
        with clock("text"):
            prompts, negative = self._texts(options)
        model = self._model(options.section)
        with torch.inference_mode(), clock("start"):
            initial, image, y = self._start(options, guide)
        if guide.poses is not None:
            with torch.inference_mode(), clock("pose"):
                pose = self._poses(guide.poses, on_step)
                if y is not None and guide.reference is not None:
                    reference = self._pose_embedder().reference(guide.reference[None].to(self._device))
                    y = y + reference.to(y)
        else:
            pose = None
        given = 0 if initial is None else initial.shape[2]
        conditions = Conditions(
            prompts={_latent(frame, given): text for frame, text in prompts.items()},
            initial=initial, negative=negative, guidance=options.guidance, image=image, y=y, pose=pose,
        )  # fmt: skip
        noise, layout = self._noise(options.seed), self.layout(options)
        blocks = generate_blocks(model, layout, conditions, noise, self.sampler(options), on_step)
        return self._decoded(initial, blocks, options.decode, clock)

    def layout(self, options: GenerateOptions) -> Layout:
        """The clip of latents that these options ask for."""
        return Layout(
            frames=options.length.made,
            height=options.height // self.able.spatial_factor,
            width=options.width // self.able.spatial_factor,
            block=options.length.block,
            independent_first=options.length.given == 1,
            window=options.window,
            sink=options.sink,
        )

    def _decoded(
        self, initial: Tensor | None, blocks: Iterator[Block], at_once: int | None, clock: Stopwatch
    ) -> Frames:
        state = self._vae.new_state()
        if initial is not None:
            with torch.inference_mode(), clock("decode"):
                begun = [self._vae.decode(part, state) for part in torch.split(initial, 1, dim=2)]
            if len(begun) == 1:
                yield begun[0][0].transpose(0, 1)
        for block in clock.around("transformer", blocks):
            for part in torch.split(block.latents, at_once or block.latents.shape[2], dim=2):
                with torch.inference_mode(), clock("decode"):
                    frames = self._vae.decode(part, state)[0].transpose(0, 1)
                yield frames
                del frames  # nothing of it stays while the next ones are made

    # -------------------------------------------------------------- conditions

    def _texts(self, options: GenerateOptions) -> tuple[dict[int, Tensor], Tensor | None]:
        prompts = {frame: self.text.encode([prompt]) for frame, prompt in options.prompts.items()}
        negative = self.text.encode([options.negative]) if options.guidance != 1 else None
        if self.text.loaded:
            stays = options.text or STAYS[self.text_stays]
            if self.text_stays != "release":
                self._text_read()
            if stays == "nowhere":
                self.text.release()
            elif stays == "host":
                self.text.offload()
        return {frame: text.to(self._device, self._dtype) for frame, text in prompts.items()}, (
            None if negative is None else negative.to(self._device, self._dtype)
        )

    def _start(
        self, options: GenerateOptions, guide: Guide
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Latents that are given, an image's features, and the condition `y`."""
        if guide.start is None:
            return None, None, None
        frames = guide.start.transpose(0, 1)[None].to(self._device, self._vae_dtype)
        if not self.able.image:
            return torch.cat(list(self._vae.encode_stream([frames])), dim=2), None, None
        blank = torch.zeros_like(frames).expand(-1, -1, FACTOR, -1, -1)
        pieces = (frames if number == 0 else blank for number in range(options.length.made))
        y = first_frame(torch.cat(list(self._vae.encode_stream(pieces)), dim=2))
        image = self._image_encoder().features(guide.start.to(self._device))
        return None, image.to(self._dtype), y.to(self._dtype)

    def _poses(self, poses: Tensor, on_step: Callable[[], None]) -> Tensor:
        """Tokens of rendered poses, (1, 5120, latents, height / 16, width / 16), a few latents at a time."""
        embedder = self._pose_embedder()
        clip = poses.transpose(0, 1)[None].to(self._device)
        latents = 1 + (clip.shape[2] - 1) // FACTOR
        parts = []
        for start in range(0, latents, 3):
            on_step()
            parts.append(embedder.frames(clip, start, min(start + 3, latents)))
        return torch.cat(parts, dim=2)

    # -------------------------------------------------------------- memory

    @cached_property
    def estimate(self) -> Estimate:
        """What this model takes of memory, by size; sizes that were asked for once are remembered."""
        from app.models.wan.memory import Estimate

        return Estimate(
            self.able, self._vae.config, self.text.config, self._clip_config,
            self._dtype, self._vae_dtype, self._device.type,
            nbytes_of(self._model(self._section), self._vae),
        )  # fmt: skip

    def room(self) -> Room:
        """What this model and its work may fill, with what it fills now."""
        own = nbytes_of(self._transformer, self._vae, self._pose, self._clip)
        own += self.text.nbytes_on(self._device.type)
        return Room.on(self._device, own, waiting=self.text.nbytes_on("cpu"))

    @property
    def stays(self) -> tuple[Stays, ...]:
        """Where the text encoder may be once it has read the prompts, best first, as the settings say."""
        if self.text_stays != "auto":
            return (STAYS[self.text_stays],)
        if self._device.type != "cuda":
            return "device", "nowhere"
        return ("device", "host", "nowhere") if self.text.device.type == "cuda" else ("host", "nowhere")

    def task(
        self, options: GenerateOptions, start: int = 0, poses: int = 0, *, reference: bool = False
    ) -> Task:
        """What a clip will take memory for. start, poses: frames of its guide's; reference: whether it has
        one."""
        from app.models.wan.memory import Task

        prompts = [*options.prompts.values(), *([options.negative] if options.guidance != 1 else [])]
        reads = not all(map(self.text.knows, prompts))
        place: Literal["device", "host"] = "device" if self.text.device.type == self._device.type else "host"
        loaded = {"pose": self._pose or poses, "clip": self._clip or (self.able.image and start)}
        return Task(
            options, start, poses, reference,
            parts=frozenset(part for part, needed in loaded.items() if needed),
            text=self.text.weights if reads or self.text.loaded else 0,
            reads=place if reads else None,
        )  # fmt: skip

    # -------------------------------------------------------------- what is loaded

    @property
    def _vae_dtype(self) -> torch.dtype:
        return next(self._vae.parameters()).dtype

    def _model(self, section: str | None) -> Transformer:
        """The transformer with the weights asked for: the others are dropped first. Where loading fails,
        the next job tries again."""
        wanted = section or (self.able.sections[0] if self.able.sections else None)
        if wanted != self._section or self._transformer is None:
            self._transformer = None
            give_back()
            with torch.inference_mode(False):  # readers have threads of their own, which the mode is not in
                self._transformer = self._load_transformer(wanted)
            self._section = wanted
        return self._transformer

    def _pose_embedder(self) -> PoseEmbedder:
        if self._pose is None:
            with torch.inference_mode(False):
                self._pose = self._load_pose()
        return self._pose

    def _image_encoder(self) -> ImageEncoder:
        if self._clip is None:
            with torch.inference_mode(False):
                self._clip = self._load_clip()
        return self._clip

    def _noise(self, seed: int) -> Noise:
        return SeededNoise(seed, self._device)

    def sampler(self, options: GenerateOptions) -> FewStep | ManyStep:
        if self.able.sampling == "many":
            return many_steps(options.steps, options.shift)
        return few_steps(options.steps, options.shift)


def few_steps(count: int | None, shift: float | None) -> FewStep:
    """Self-Forcing's sampler with `count` steps, evenly spaced before the shift; four by default."""
    match = FlowMatch() if shift is None else FlowMatch(shift)
    steps = [round(1000 * (1 - step / (count or 4))) for step in range(count or 4)]
    return FewStep(match, match.warped(steps))


def many_steps(count: int | None, shift: float | None) -> ManyStep:
    """The undistilled model's sampler; fifty steps by default."""
    return ManyStep(unipc.steps(count or 50, SHIFT if shift is None else shift))


def nbytes_of(*modules: nn.Module | None) -> int:
    """Bytes of the weights of those that are loaded."""
    there = [module for module in modules if module is not None]
    return sum(x.nbytes for module in there for x in (*module.parameters(), *module.buffers()))


def _latent(frame: int, given: int) -> int:
    """The latent, counted with those given, that a frame of the result belongs to."""
    if given > 1:  # what is given is no part of the result
        return given + frame // FACTOR if frame else 0
    return latent_of(frame)
