"""Poses for Wan: the two embedders of UniAnimate-DiT (Wang et al., 2025, arXiv:2504.11289).

`frames` turns rendered poses, one picture a frame, into tokens on the transformer's grid (`pose` of the
sampler's conditions); `reference` turns the pose of the reference image into what is added to the latents of
the image (`condition.first_frame`). Attribute names are the checkpoint's, which holds other weights beside
these. It knows nothing of how poses are found or drawn.

The first frame stands three times in front of the clip, then time shrinks to a quarter as in the VAE: 81
frames give 21 latents, and latent j sees frames 4j - 10 to 4j + 4.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from app.errors import InputError
from app.models.wan.config import IMAGE_CHANNELS, POSE_DIM
from app.models.wan.pose_config import STEPS, WIDTH

REPEATED = 3  # times that the first frame stands in front
REACH = 2, 1  # latents that must be computed before and after those wanted, so that those see all they read


class PoseEmbedder(nn.Module):
    """Both embedders; random weights are noise: load them."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for channels, (time, space) in zip((3, *[WIDTH] * (len(STEPS) - 1)), STEPS, strict=True):
            layers += [nn.Conv3d(channels, WIDTH, 3, stride=(time, space, space), padding=1), nn.SiLU()]
        patch = nn.Conv3d(WIDTH, POSE_DIM, (1, 2, 2), stride=(1, 2, 2))
        self.dwpose_embedding = nn.Sequential(*layers, patch)
        widths = [3, *[WIDTH] * (len(STEPS) - 1), IMAGE_CHANNELS]
        layers = []
        for (channels, out), (_, space) in zip(pairwise(widths), STEPS, strict=True):
            layers += [nn.Conv2d(channels, out, 3, stride=space, padding=1), nn.SiLU()]
        self.randomref_embedding_pose = nn.Sequential(*layers[:-1])

    def frames(self, poses: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Tokens of poses, or those of latents `start` to `stop` alone: memory grows with them, and the
        numbers are the same.

        Args:
            poses: (B, 3, T, H, W) in [0, 255], T = 4 n - 3 for n latents (see `check`).

        Returns:
            (B, 5120, stop - start, H / 16, W / 16), of the weights' type.

        Raises:
            ValueError: `start` and `stop` are not in order, or beyond the clip.
        """
        latents = latents_of(poses.shape[2])
        stop = latents if stop is None else stop
        if not 0 <= start < stop <= latents:
            raise ValueError(f"latents {start} to {stop} of {latents}")
        first, last = max(0, start - REACH[0]), min(latents, stop + REACH[1])
        begin, end = 4 * first - REPEATED, 4 * last - REPEATED
        weight = self.dwpose_embedding.get_parameter("0.weight")
        part = poses[:, :, max(0, begin) : end].to(weight) / 255
        if begin < 0:
            part = torch.cat([part[:, :, :1].expand(-1, -1, -begin, -1, -1), part], dim=2)
        tokens: Tensor = self.dwpose_embedding(part)
        return tokens[:, :, start - first : stop - first]

    def reference(self, pose: Tensor) -> Tensor:
        """What the reference image's pose adds to its mask and latents in every frame.

        Args:
            pose: (B, 3, H, W) in [0, 255].

        Returns:
            (B, 20, 1, H / 8, W / 8), of the weights' type.
        """
        weight = self.randomref_embedding_pose.get_parameter("0.weight")
        embedded: Tensor = self.randomref_embedding_pose(pose.to(weight) / 255)
        return embedded.unsqueeze(2)


def latents_of(frames: int) -> int:
    """Latents of a clip of poses: 21 of 81."""
    return -(-(frames + REPEATED) // 4)


def check(poses: tuple[int, int, int], latents: tuple[int, int, int]) -> None:
    """Refuse poses of another length or size than the clip.

    Args:
        poses: Frames, height and width of the rendered poses.
        latents: Frames, height and width of the whole clip of latents.

    Raises:
        InputError: `pose_length` or `pose_size`.
    """
    frames, size = 4 * latents[0] - 3, (8 * latents[1], 8 * latents[2])
    if poses[0] != frames:
        raise InputError(
            "pose_length",
            f"there are {poses[0]} pose frames, and the clip has {frames}; expected one pose for each frame: "
            "cut the poses, or ask for a clip of their length.",
        )
    if poses[1:] != size:
        raise InputError(
            "pose_size",
            f"the poses are {poses[2]}x{poses[1]} pixels, and the clip is {size[1]}x{size[0]}; expected "
            "poses drawn at the clip's size.",
        )
