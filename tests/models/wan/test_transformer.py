from pathlib import Path

import pytest
import torch
from torch import Tensor

from app.boot.checkpoint import load
from app.boot.tensorfile import read_index, rename_tensors
from app.models.wan import transformer
from app.models.wan.config import (
    POSE_DIM,
    SECTIONS,
    VARIANTS,
    TransformerConfig,
    current_name,
    recognise,
)
from app.models.wan.layers import RMSNorm
from app.models.wan.pose import PoseEmbedder
from app.models.wan.pose_config import pose_name
from app.models.wan.rope import axes, rotate, table
from app.models.wan.transformer import Transformer, sinusoids
from tests import seeded
from tests.golden import draw
from tests.models.wan.small import IMAGE, SIZE, SMALL, latents, model, plain, pose, prompt, turn

THEIRS = {  # ours -> diffusers'
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
    ".modulation": ".scale_shift_table",
    ".self_attn.": ".attn1.",
    ".cross_attn.": ".attn2.",
    ".norm3.": ".norm2.",
    ".ffn.0.": ".ffn.net.0.proj.",
    ".ffn.2.": ".ffn.net.2.",
    ".q.": ".to_q.",
    ".k.": ".to_k.",
    ".v.": ".to_v.",
    ".o.": ".to_out.0.",
    ".k_img.": ".add_k_proj.",
    ".v_img.": ".add_v_proj.",
    ".norm_k_img.": ".norm_added_k.",
}


def their_name(name: str) -> str:
    for ours, theirs in THEIRS.items():
        name = name.replace(ours, theirs)
    return name


def everything(frames: int) -> Tensor:
    return torch.ones(frames, frames, dtype=torch.bool)


@pytest.mark.parametrize("image", [False, True], ids=["t2v", "i2v"])
def test_all_frames_in_one_block_at_one_timestep_equal_diffusers(image: bool) -> None:
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: no peer to compare with")
    config = TransformerConfig(
        dim=96, ffn_dim=160, heads=2, layers=3, text_dim=16, text_length=512,
        image=image, image_dim=20, in_channels=36 if image else 16,
    )  # fmt: skip
    ours = draw(Transformer(config), "peer/")
    theirs = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=48, in_channels=config.in_channels, out_channels=16,
        text_dim=16, ffn_dim=160, num_layers=3, image_dim=20 if image else None,
        added_kv_proj_dim=96 if image else None,
    )  # fmt: skip
    theirs.load_state_dict({their_name(name): value for name, value in ours.state_dict().items()})
    x, y = latents("x", 5), latents("y", 5, 20)
    text, seen = seeded.randn("peer/text", 1, 512, 16), seeded.randn("peer/image", 1, 257, 20)
    with torch.inference_mode():
        cross = ours.cross(text, seen if image else None)
        plan = ours.plan(5, *SIZE)
        flow = ours(x, torch.full((1, 5), 437.0), cross, plan, y=y if image else None)
        peer = theirs(
            torch.cat([x, y], 1) if image else x, torch.tensor([437]), text, seen if image else None
        ).sample
    assert ((flow - peer).norm() / peer.norm()) < 1e-5


def test_a_pass_equals_the_equations_with_a_timestep_for_each_frame() -> None:
    x, times = latents("x", 4), [900.0, 500.25, 3.0, 0.0]
    ours = model()
    flow = ours(
        x, torch.tensor([times]), ours.cross(prompt()), ours.plan(4, *SIZE), pose=ours.pose_tokens(pose(4))
    )
    expected = plain(ours, x, times, prompt(), everything(4), pose(4))
    assert ((flow - expected).norm() / expected.norm()) < 1e-6


@pytest.mark.parametrize("config", [SMALL, IMAGE], ids=["t2v", "i2v"])
@pytest.mark.parametrize("at_once", [1, 4, 7])
@torch.inference_mode()
def test_tokens_in_pieces_equal_all_at_once(config, at_once, monkeypatch) -> None:
    """With frames at timesteps of their own or at one, two clips at a time, and places that wrap around."""
    ours = model(config)
    x, y = (seeded.randn(f"pieces/{channels}", 2, channels, 6, *SIZE) for channels in (16, 20))
    text, seen = seeded.randn("pieces/text", 2, 5, 16), seeded.randn("pieces/image", 2, 257, 20)
    cross = ours.cross(text, seen if config.image else None)
    made = []
    for elements in (2**20, at_once * config.dim):
        monkeypatch.setattr(transformer, "_BLOCK", elements)
        cache = ours.cache(*SIZE, 5, sink=1, batch=2)
        flows = []
        for block, times in enumerate(([[900.0, 40.0], [500.0, 500.0]], [[700.0]] * 2, [[9.0]] * 2)):
            part = slice(2 * block, 2 * block + 2)
            plan, given = ours.plan(2, *SIZE, start=part.start, cache=cache), y[:, :, part]
            flow = ours(
                x[:, :, part], torch.tensor(times), cross, plan, cache, y=given if config.image else None
            )
            flows.append(flow)
        whole = ours(x, torch.full((2, 1), 300.0), cross, ours.plan(6, *SIZE), y=y if config.image else None)
        made.append([*flows, whole])
    for pieced, whole in zip(*made, strict=True):
        torch.testing.assert_close(pieced, whole, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_times_once_equal_times_each_pass_and_one_for_all_equals_one_a_frame() -> None:
    ours, x = model(), latents("x", 3)
    cross, plan = ours.cross(prompt()), ours.plan(3, *SIZE)
    each, one = torch.full((1, 3), 437.5), torch.full((1, 1), 437.5)
    flow = ours(x, each, cross, plan)
    assert torch.equal(flow, ours(x, ours.times(each), cross, plan))
    torch.testing.assert_close(flow, ours(x, ours.times(one), cross, plan), rtol=1e-4, atol=1e-5)


def test_the_timesteps_and_the_pose_of_a_frame_matter() -> None:
    ours, x = model(), latents("x", 2)
    cross, plan = ours.cross(prompt()), ours.plan(2, *SIZE)
    flows = [ours(x, torch.tensor([times]), cross, plan) for times in ([900.0, 900.0], [900.0, 100.0])]
    assert (flows[0] - flows[1]).norm() > 0.01
    posed = ours(x, torch.full((1, 2), 900.0), cross, plan, pose=ours.pose_tokens(pose(2)))
    assert (flows[0] - posed).norm() > 0.01


def test_positions_have_no_end_and_only_their_differences_matter() -> None:
    ours, x = model(), latents("x", 3)
    cross = ours.cross(prompt())
    times = torch.full((1, 3), 500.0)
    near, far = (ours(x, times, cross, ours.plan(3, *SIZE, start=start)) for start in (0, 100_000))
    torch.testing.assert_close(near, far, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("start", [0, 1020, 2_000_000])
def test_rotations_are_those_of_complex_numbers(start: int) -> None:
    x = torch.randn(1, 3 * 4 * 5, 2, 48)
    ours = rotate(x, table(48, start, 3, 4, 5, torch.device("cpu")))
    torch.testing.assert_close(ours[0].double(), turn(x[0], start, (3, 4, 5)), rtol=1e-5, atol=1e-6)


def test_a_head_of_128_is_shared_by_44_42_42() -> None:
    assert axes(128) == (44, 42, 42)


def test_sinusoids_are_cosines_then_sines_in_float64() -> None:
    found = sinusoids(torch.tensor([[833.3333129882812]]), 256)
    assert found.dtype == torch.float64
    assert found[0, 0, 0].item() == pytest.approx(torch.tensor(833.3333129882812).double().cos().item())
    assert found[0, 0, 128 + 64].item() == pytest.approx(
        torch.sin(torch.tensor(8.333333129882812, dtype=torch.float64)).item()
    )


def test_rms_norm_is_computed_in_float32_cast_then_scaled() -> None:
    norm = RMSNorm(64, 1e-6).bfloat16()
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(-2, 2, 64))
    x = (torch.randn(5, 64) * 300).bfloat16()
    wide = x.float()
    expected = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).bfloat16() * norm.weight
    assert torch.equal(norm(x), expected)


def test_sixteen_bits_stay_near_thirty_two() -> None:
    ours = model()
    half = draw(Transformer(SMALL), "small/").bfloat16()
    flows = []
    for each in (ours, half):
        cache = each.cache(*SIZE, 4)
        cross = each.cross(prompt())
        with torch.inference_mode():
            plan = each.plan(2, *SIZE, cache=cache)
            flows.append(each(latents("x", 2), torch.full((1, 2), 500.0), cross, plan, cache))
    assert flows[1].dtype == torch.bfloat16
    assert ((flows[0] - flows[1].float()).norm() / flows[0].norm()) < 0.03


def test_a_pass_is_one_graph_that_never_asks_the_device() -> None:
    ours = model()
    cache, cross = ours.cache(*SIZE, 4), ours.cross(prompt())
    plan = ours.plan(2, *SIZE, cache=cache)
    inputs = latents("x", 2), torch.full((1, 2), 500.0), cross, plan, cache
    with torch.no_grad():
        graph = torch.compile(ours, fullgraph=True, backend="eager")
        torch.testing.assert_close(graph(*inputs), ours(*inputs))


def test_a_pass_leaves_its_inputs_alone() -> None:
    ours = model(IMAGE)
    x, y = latents("x", 2), latents("y", 2, 20)
    before = x.clone(), y.clone()
    cross = ours.cross(prompt(), seeded.randn("small/image", 1, 257, 20))
    plan, times = ours.plan(2, *SIZE), torch.full((1, 2), 500.0)
    first = ours(x, times, cross, plan, y=y)
    assert torch.equal(first, ours(x, times, cross, plan, y=y))
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])


def test_missing_text_is_zeros_before_the_embedding() -> None:
    ours = model()
    short, full = prompt(), torch.zeros(1, SMALL.text_length, SMALL.text_dim)
    full[:, :5] = short
    for (k, v), (full_k, full_v) in zip(ours.cross(short).text, ours.cross(full).text, strict=True):
        assert torch.equal(k, full_k)
        assert torch.equal(v, full_v)
        assert v[:, 5:].norm() > 0


def test_what_does_not_fit_is_refused() -> None:
    ours, seen = model(), torch.zeros(1, 257, 20)
    with pytest.raises(ValueError, match="9 text tokens, expected at most 8"):
        ours.cross(torch.zeros(1, 9, 16))
    with pytest.raises(ValueError, match="takes no image"):
        ours.cross(prompt(), seen)
    with pytest.raises(ValueError, match="takes an image"):
        model(IMAGE).cross(prompt())
    with pytest.raises(ValueError, match="do not divide"):
        ours.plan(3, 5, 6)
    bare = Transformer(TransformerConfig(dim=48, ffn_dim=64, heads=2, layers=1, text_dim=16))
    with pytest.raises(ValueError, match="no pose_proj"):
        bare.pose_tokens(torch.zeros(1, POSE_DIM, 1, 2, 3))


def test_a_checkpoint_of_training_loads_by_content(tmp_path: Path) -> None:
    drawn, file = draw(Transformer(VARIANTS["nano"]), "nano/"), tmp_path / "dmd.pt"
    wrapped = {f"model._fsdp_wrapped_module.{name}": value for name, value in drawn.state_dict().items()}
    torch.save({SECTIONS[0]: wrapped}, file)
    index = rename_tensors(read_index(file, "torch", SECTIONS[0]), current_name)
    config = recognise({name: entry.shape for name, entry in index.tensors.items()})
    assert config == VARIANTS["nano"]
    loaded = load(lambda: Transformer(config), file, "torch", rename=current_name, section=SECTIONS[0])
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, drawn.state_dict()[name])


def test_the_pose_embedders_load_out_of_a_checkpoint_of_other_weights(tmp_path: Path) -> None:
    drawn, file = draw(PoseEmbedder(), "nano/"), tmp_path / "pose.ckpt"
    torch.save(drawn.state_dict() | {"blocks.0.self_attn.q.lora_A.default.weight": torch.zeros(4, 4)}, file)
    loaded = load(PoseEmbedder, file, "torch", rename=pose_name)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, drawn.state_dict()[name])
