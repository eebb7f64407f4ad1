"""The VQ-VAE: its quantiser by hand, slices equal to the whole, and its tensors."""

import pytest
import torch

from app.errors import ConfigError
from app.models.latents.vqvae import VQVAE, nearest, quantise
from app.models.latents.vqvae_config import VQConfig, recognise_vqvae, vqvae_tensors
from tests.golden import draw
from tests.models.latents.small import clip, error

CONFIGS = [
    VQConfig.nano(),
    VQConfig(),
    VQConfig(width=6, inner=3, blocks=0, halves_time=(False, True, True), codes=5, dim=2),
    VQConfig(width=4, inner=32, blocks=2, halves_time=(False,), codes=7, dim=3),
    VQConfig(width=4, inner=2, blocks=1, halves_time=(), codes=1, dim=1),
]


def test_quantiser_by_hand():
    codebook = torch.tensor([[0.0, 0.0], [1.0, 1.0], [4.0, 0.0]], requires_grad=True)
    vectors = torch.tensor([[0.4, 0.4], [0.9, 0.5], [3.0, 1.0], [0.5, 0.5]], requires_grad=True)
    # Squared distances to the three codes:
    #   (.4, .4): 0.32, 0.72, 13.12 -> 0      (.9, .5): 1.06, 0.26, 9.86 -> 1
    #   (3, 1):   10, 4, 2 -> 2               (.5, .5): 0.5, 0.5, 12.5 -> 0, the first of two as near
    out = quantise(vectors, codebook)
    assert out.indices.tolist() == [0, 1, 2, 0]
    assert out.vectors.tolist() == [[0, 0], [1, 1], [4, 0], [0, 0]]
    # Mean over the eight numbers of 0.32 + 0.26 + 2 + 0.5.
    assert out.commitment.item() == pytest.approx(3.08 / 8)
    assert out.codebook.item() == pytest.approx(3.08 / 8)

    # Straight through: the gradient at the codes is that at the vectors, and the codebook gets none.
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]])
    (out.vectors * weight).sum().backward(retain_graph=True)
    assert torch.equal(vectors.grad, weight) and codebook.grad is None
    # The commitment draws vectors to their codes: 2 (v - c) / 8.
    vectors.grad = None
    out.commitment.backward(retain_graph=True)
    assert torch.allclose(
        vectors.grad, torch.tensor([[0.1, 0.1], [-0.025, -0.125], [-0.25, 0.25], [0.125, 0.125]])
    )
    assert codebook.grad is None
    # The codebook's loss draws codes to their vectors: the sum of 2 (c - v) / 8 over those of each.
    vectors.grad = None
    out.codebook.backward()
    assert torch.allclose(codebook.grad, torch.tensor([[-0.225, -0.225], [0.025, 0.125], [0.25, -0.25]]))
    assert vectors.grad is None


def test_nearest_by_the_definition():
    vectors, codebook = torch.randn(3, 50, 6), torch.randn(40, 6)
    distances = (vectors[:, :, None] - codebook).square().sum(-1)
    assert torch.equal(nearest(vectors, codebook), distances.argmin(-1))
    assert nearest(vectors[:, :0], codebook).numel() == 0


def test_nearest_in_parts(monkeypatch):
    vectors, codebook = torch.randn(101, 6), torch.randn(40, 6)
    whole = nearest(vectors, codebook)
    monkeypatch.setattr("app.models.latents.vqvae._DISTANCES", 400)
    assert torch.equal(nearest(vectors, codebook), whole)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_tensors_are_the_modules_own_and_tell_the_configuration(config):
    with torch.device("meta"):
        own = {name: tuple(t.shape) for name, t in VQVAE(config).state_dict().items()}
    assert vqvae_tensors(config) == own
    assert vqvae_tensors(recognise_vqvae(own)) == own
    if config.blocks:
        assert recognise_vqvae(own) == config


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@torch.no_grad()
def test_slices_equal_the_whole(config):
    vqvae = draw(VQVAE(config), "vq/")
    step = config.temporal_factor
    x = clip(1 + 5 * step).transpose(0, 1)[None]
    indices = vqvae.encode(x)
    assert indices.shape == (1, 6, 16 // config.spatial_factor, 24 // config.spatial_factor)
    state, taken, parts = vqvae.new_state(), 0, []
    for latents in (1, 2, 1, 2):
        frames = latents * step + (1 - step if not taken else 0)
        parts.append(vqvae.encode(x[:, :, taken : taken + frames], state))
        taken += frames
    assert torch.equal(torch.cat(parts, 1), indices)
    whole, state = vqvae.decode(indices), vqvae.new_state()
    assert whole.shape == x.shape
    sliced = torch.cat([vqvae.decode(part, state) for part in indices.split([1, 3, 2], 1)], 2)
    assert error(sliced, whole) < 1e-5
    # What training passes through is what is encoded and decoded.
    out = vqvae(x)
    assert torch.equal(out.indices, indices) and error(out.frames, whole) < 1e-5


@torch.no_grad()
def test_a_frame_depends_on_no_later_one():
    vqvae = draw(VQVAE(VQConfig.nano()), "vq/")
    x = clip(13).transpose(0, 1)[None]
    y = x.clone()
    y[:, :, 9:] = 0
    assert torch.equal(vqvae.encode(x)[:, :3], vqvae.encode(y)[:, :3])
    assert not torch.equal(vqvae.encode(x)[:, 3:], vqvae.encode(y)[:, 3:])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"codebook": None}, "'codebook' not, expected one of 2 dimensions"),
        ({"codebook": (512,)}, "as (512,)"),
        ({"codebook": (0, 4)}, "as (0, 4)"),
        ({"encoder.conv_in.weight": None}, "'encoder.conv_in.weight' not"),
        ({"encoder.down.0.weight": (8, 8)}, "'encoder.down.0.weight' as (8, 8)"),
    ],
)
def test_refuses_other_tensors(change, words):
    shapes = vqvae_tensors(VQConfig.nano()) | change
    with pytest.raises(ConfigError) as caught:
        recognise_vqvae({name: shape for name, shape in shapes.items() if shape is not None})
    assert caught.value.code == "vae_not_recognised" and words in caught.value.message


@pytest.mark.parametrize(
    ("field", "value"), [("codes", 0), ("dim", -1), ("width", 1.5), ("blocks", -1), ("inner", "8")]
)
def test_refuses_wrong_parameters(field, value):
    with pytest.raises(ConfigError, match=f"{field} of the VQ-VAE is"):
        VQConfig(**{field: value})
