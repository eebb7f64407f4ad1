"""What an image-conditioned Wan sees of its image in every frame: a mask and latents."""

from __future__ import annotations

import torch
from torch import Tensor


def first_frame(latents: Tensor, reference: Tensor | None = None) -> Tensor:
    """The condition `y` of the sampler.

    Args:
        latents: (B, 16, F, H, W): the VAE's latents of a clip whose first frame is the image, in [-1, 1], and
            whose other 4 F - 4 frames are zero.
        reference: (B, 20, 1, H, W): `PoseEmbedder.reference`, where there are poses.

    Returns:
        (B, 20, F, H, W): the mask (4 channels, one for each pixel frame of a latent; 1 where it is given: the
        first latent), the latents; and the reference added to all frames.
    """
    mask = torch.zeros_like(latents[:, :4])
    mask[:, :, 0] = 1
    y = torch.cat([mask, latents], dim=1)
    return y if reference is None else y + reference.to(y)
