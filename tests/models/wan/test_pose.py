from functools import cache

import pytest
import torch

from app.errors import InputError
from app.models.wan.condition import first_frame
from app.models.wan.pose import PoseEmbedder, check, latents_of
from tests import seeded
from tests.golden import draw


@cache
def embedder() -> PoseEmbedder:
    made = draw(PoseEmbedder(), "pose/")
    assert isinstance(made, PoseEmbedder)
    return made.requires_grad_(False)


def poses(frames: int, height: int = 16, width: int = 32) -> torch.Tensor:
    return 255 * torch.sigmoid(seeded.randn("poses", 1, 3, frames, height, width))


def test_81_frames_and_3_give_21_latents() -> None:
    assert embedder().frames(poses(81)).shape == (1, 5120, 21, 1, 2)
    assert [latents_of(frames) for frames in (1, 5, 9, 81, 85)] == [1, 2, 3, 21, 22]
    assert embedder().reference(poses(1)[:, :, 0]).shape == (1, 20, 1, 2, 4)


def test_latent_j_reads_frames_4j_minus_10_to_4j_plus_4() -> None:
    wanted = poses(41).requires_grad_()
    for latent in (3, 6, 8):
        (read,) = torch.autograd.grad(embedder().frames(wanted)[:, :, latent].sum(), wanted)
        frames = read.abs().amax((0, 1, 3, 4)).nonzero().flatten().tolist()
        assert frames == list(range(4 * latent - 10, 4 * latent + 5))


@pytest.mark.parametrize("span", [(0, 1), (0, 3), (3, 6), (5, 7), (6, 7), (0, 7), (2, 5)])
def test_a_span_of_latents_is_that_of_the_whole(span: tuple[int, int]) -> None:
    whole = embedder().frames(poses(25))
    part = embedder().frames(poses(25), *span)
    torch.testing.assert_close(part, whole[:, :, slice(*span)], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("span", [(-1, 2), (2, 2), (3, 2), (0, 8)])
def test_a_span_beyond_the_clip_is_refused(span: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="of 7"):
        embedder().frames(poses(25), *span)


@pytest.mark.parametrize(
    ("given", "code", "message"),
    [
        ((80, 480, 832), "pose_length", "80 pose frames, and the clip has 81"),
        ((84, 480, 832), "pose_length", "84 pose frames"),
        ((0, 480, 832), "pose_length", "0 pose frames"),
        ((81, 832, 480), "pose_size", "480x832 pixels, and the clip is 832x480"),
        ((81, 480, 840), "pose_size", "840x480"),
    ],
)
def test_poses_of_another_length_or_size_are_refused(
    given: tuple[int, int, int], code: str, message: str
) -> None:
    check((81, 480, 832), (21, 60, 104))
    with pytest.raises(InputError, match=message) as refused:
        check(given, (21, 60, 104))
    assert refused.value.code == code


def test_the_condition_of_an_image_is_a_mask_latents_and_a_reference() -> None:
    latents, reference = torch.randn(1, 16, 5, 2, 3), torch.randn(1, 20, 1, 2, 3)
    # As the original makes it of pixel frames: the first one stands for four.
    pixels = torch.zeros(1, 17, 2, 3)
    pixels[:, 0] = 1
    pixels = torch.cat([pixels[:, :1].repeat_interleave(4, 1), pixels[:, 1:]], 1)
    mask = pixels.view(1, 5, 4, 2, 3).transpose(1, 2)
    assert torch.equal(first_frame(latents), torch.cat([mask, latents], 1))
    assert torch.equal(first_frame(latents, reference), torch.cat([mask, latents], 1) + reference)
