"""What a clip of latents is to be: its size, how it is divided into blocks, and what it is made from.

Everything that can be refused is refused here, before any work, and without torch. It knows nothing of
models' insides or of how latents are made.

Latent frames count from the clip's first one, be it given or generated. Layout of latents: (batch, 16,
frames, height, width), normalised as the VAE's encoder leaves them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from app.errors import InputError
from app.models.wan.config import LATENT_CHANNELS, POSE_DIM, TRAINED_BLOCK, TRAINED_FRAMES, TransformerConfig

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """The size of a clip of latents, and how it is made.

    Attributes:
        frames: Latent frames to generate, those of `Conditions.initial` not among them.
        height, width: Of a latent frame; both even.
        block: Latent frames denoised at a time. Where one block is the whole clip, there is no cache: this
            is how the undistilled model was trained.
        independent_first: The clip's first frame is a block of its own.
        window: Latent frames that a block sees, its own and the sink among them. `None`: all of them, and no
            more than a training clip's 21: past that the window rolls.
        sink: First frames of the clip that stay in the window.
    """

    frames: int
    height: int
    width: int
    block: int = TRAINED_BLOCK
    independent_first: bool = False
    window: int | None = None
    sink: int = 0

    def blocks(self, initial: int = 0) -> tuple[list[int], list[int]]:
        """Frames of each block that is given, and of each that is generated.

        Args:
            initial: Latent frames that are given.

        Raises:
            InputError: `frames_not_blocks`: frames do not divide into blocks.
        """
        first = int(self.independent_first)
        given = [1] * (first if initial else 0)
        made = [1] * (0 if initial else first)
        given += self._whole(initial - len(given), len(given), "the start has")
        made += self._whole(self.frames - len(made), len(made), "the clip to make has")
        if not made:
            raise InputError("frames_not_blocks", f"frames is {self.frames}, expected at least one block.")
        return given, made

    def capacity(self, initial: int = 0) -> int:
        """Frames of the cache, 0 where there is no past to keep.

        Raises:
            InputError: `window_too_small`: the window holds no block beside the sink.
        """
        given, made = self.blocks(initial)
        total = initial + self.frames
        if len(given) + len(made) == 1:
            return 0
        largest = max(*given, *made)
        rolling = max(TRAINED_FRAMES, self.sink + largest) if self.window is None else self.window
        if rolling < self.sink + largest:
            raise InputError(
                "window_too_small",
                f"the window is {rolling} latent frames, the sink {self.sink} and a block {largest}; "
                f"expected a window of at least {self.sink + largest}.",
            )
        return min(total, rolling)

    def _whole(self, frames: int, before: int, what: str) -> list[int]:
        if frames < 0 or frames % self.block:
            one = f"{before} and " if before else ""
            raise InputError(
                "frames_not_blocks",
                f"{what} {frames + before} latent frames, expected {one}a multiple of {self.block}, "
                "the frames of a block.",
            )
        return [self.block] * (frames // self.block)


@dataclass(frozen=True)
class Conditions:
    """What a clip is made from. Frames count from the clip's first one, be it given or generated.

    Attributes:
        prompts: First latent frame -> embedding (B, L, text_dim); 0 must be among them. A prompt holds from
            the first block that begins at its frame or after it.
        initial: (B, 16, f, H, W): clean latents that the clip begins with (an image or a clip's end).
        negative: Embedding of the negative prompt; needed where `guidance` is not 1.
        guidance: Scale of classifier-free guidance; 1 is none, and half the work.
        image: (B, 257, image_dim): an image's features, for models that condition on images.
        y: (B, 20, f + frames, H, W): `condition.first_frame(...)`, for the same models.
        pose: (B, 5120, f + frames, H / 2, W / 2): embedded poses.
        recache: On a change of prompt, compute the window's keys and values again under the new one, as
            LongLive does (Yang et al., 2025, arXiv:2509.22622). Otherwise the old one lingers for a window.
    """

    prompts: Mapping[int, Tensor]
    initial: Tensor | None = None
    negative: Tensor | None = None
    guidance: float = 1.0
    image: Tensor | None = None
    y: Tensor | None = None
    pose: Tensor | None = None
    recache: bool = True

    @property
    def frames(self) -> int:
        """Latent frames that are given."""
        return 0 if self.initial is None else self.initial.shape[2]


def check(config: TransformerConfig, layout: Layout, conditions: Conditions) -> None:
    """Refuse what cannot be generated, before any work.

    Raises:
        InputError: `frames_not_blocks`, `window_too_small`, and `pose_length`: poses and clip differ.
        ValueError: A tensor's shape is wrong, or an input is missing or not taken by this model.
    """
    layout.capacity(conditions.frames)
    tokens = config.patch_size[1:]
    config.tokens(layout.height, layout.width)
    if 0 not in conditions.prompts:
        raise ValueError("no prompt begins at frame 0")
    batch, total = conditions.prompts[0].shape[0], conditions.frames + layout.frames
    if conditions.pose is not None and conditions.pose.shape[2] != total:
        raise InputError(
            "pose_length",
            f"the poses are of {conditions.pose.shape[2]} latent frames, and the clip has {total}; "
            "expected a pose for each of its frames.",
        )
    if conditions.initial is not None and not conditions.frames:
        raise ValueError("initial holds no frame; expected None where nothing is given")
    if conditions.guidance != 1 and conditions.negative is None:
        raise ValueError(f"guidance {conditions.guidance} needs a negative prompt")
    if conditions.pose is not None and not config.takes_pose:
        raise ValueError("this model was not trained for poses: it has no pose_proj")
    if (conditions.y is not None) != config.image:
        raise ValueError(f"this model takes {'a' if config.image else 'no'} condition y")
    size = layout.height, layout.width
    grid = size[0] // tokens[0], size[1] // tokens[1]
    expected = {
        "initial": (conditions.initial, (batch, LATENT_CHANNELS, conditions.frames, *size)),
        "y": (conditions.y, (batch, config.in_channels - LATENT_CHANNELS, total, *size)),
        "pose": (conditions.pose, (batch, POSE_DIM, total, *grid)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)}, expected {shape}")
