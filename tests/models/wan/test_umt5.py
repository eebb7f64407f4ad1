"""UMT5: the original's and transformers' numbers, names and shapes, padding, loading without a copy."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from app.boot.checkpoint import load
from app.models.wan.umt5 import UMT5Encoder, position_buckets
from app.models.wan.umt5_config import UMT5_NANO, UMT5_XXL, UMT5Config, recognise_umt5, umt5_tensors
from tests.golden import draw

KEYS = Path(__file__).parents[2] / "golden" / "keys" / "umt5_xxl_encoder.json"
ODD = UMT5Config(vocab=50, dim=24, attention_dim=32, hidden_dim=40, heads=2, layers=3, buckets=16)
CONFIGS = {"xxl": UMT5_XXL, "nano": UMT5_NANO, "odd": ODD}


def drawn(config: UMT5Config) -> UMT5Encoder:
    model = draw(UMT5Encoder(config), "umt5/")
    assert isinstance(model, UMT5Encoder)
    return model


def error(out: Tensor, reference: Tensor) -> float:
    assert out.shape == reference.shape
    return float((out.float() - reference.float()).norm() / reference.float().norm())


def padded(rows: list[list[int]], length: int) -> tuple[Tensor, Tensor]:
    ids = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return ids, mask


ROWS = [[7, 3, 9, 30, 1], [*range(2, 49), 1], [1]]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_torch_free_list_is_the_module(name: str) -> None:
    config = CONFIGS[name]
    with torch.device("meta"):
        own = {key: tuple(tensor.shape) for key, tensor in UMT5Encoder(config).state_dict().items()}
    assert umt5_tensors(config) == own
    assert recognise_umt5(own) == config


def test_xxl_has_exactly_the_published_names_and_shapes() -> None:
    published = json.loads(KEYS.read_text())["tensors"]
    assert umt5_tensors(UMT5_XXL) == {name: tuple(shape) for name, shape in published.items()}


def test_the_list_needs_no_torch() -> None:
    code = "import sys, app.models.wan.umt5_config; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])


@pytest.mark.parametrize(
    "lost",
    [
        "token_embedding.weight",
        "blocks.0.attn.q.weight",
        "blocks.0.ffn.fc1.weight",
        "blocks.0.pos_embedding.embedding.weight",
    ],
)
def test_another_checkpoint_is_not_recognised(lost: str) -> None:
    shapes = umt5_tensors(UMT5_NANO)
    del shapes[lost]
    with pytest.raises(ValueError, match=lost):
        recognise_umt5(shapes)


def test_heads_that_do_not_divide_are_refused() -> None:
    shapes = umt5_tensors(UMT5_NANO) | {"blocks.0.pos_embedding.embedding.weight": (32, 3)}
    with pytest.raises(ValueError, match="3 heads"):
        recognise_umt5(shapes)
    with pytest.raises(ValueError, match="3 heads"):
        replace(UMT5_NANO, heads=3)


def test_t5_with_shared_positions_is_refused() -> None:
    with pytest.raises(ValueError, match="shared_pos"):
        UMT5Config.from_original({"shared_pos": True})


@pytest.mark.parametrize("config", [UMT5_NANO, ODD], ids=["nano", "odd"])
@torch.inference_mode()
def test_equals_transformers(config: UMT5Config) -> None:
    transformers = pytest.importorskip("transformers")
    settings = transformers.UMT5Config(
        vocab_size=config.vocab,
        d_model=config.dim,
        d_kv=config.attention_dim // config.heads,
        d_ff=config.hidden_dim,
        num_layers=config.layers,
        num_heads=config.heads,
        relative_attention_num_buckets=config.buckets,
        feed_forward_proj="gated-gelu",
    )
    peer = transformers.UMT5EncoderModel(settings).eval()
    ours = drawn(config)
    inside = {
        "norm1": "layer.0.layer_norm",
        "attn": "layer.0.SelfAttention",
        "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
        "norm2": "layer.1.layer_norm",
        "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
        "ffn.fc1": "layer.1.DenseReluDense.wi_1",
        "ffn.fc2": "layer.1.DenseReluDense.wo",
    }
    top = {"token_embedding.weight": "shared.weight", "norm.weight": "encoder.final_layer_norm.weight"}

    def theirs(name: str) -> str:
        if name in top:
            return top[name]
        _, layer, rest = name.split(".", 2)
        ours = next(prefix for prefix in inside if rest.startswith(f"{prefix}."))
        return f"encoder.block.{layer}.{inside[ours]}{rest.removeprefix(ours)}"

    state = {theirs(name): tensor for name, tensor in ours.state_dict().items()}
    state["encoder.embed_tokens.weight"] = state["shared.weight"]
    result = peer.load_state_dict(state, strict=False)
    assert not result.unexpected_keys
    assert set(result.missing_keys) <= {"encoder.embed_tokens.weight"}
    ids, mask = padded(ROWS, 200)
    reference = peer(input_ids=ids, attention_mask=mask).last_hidden_state * mask[..., None]
    assert error(ours(ids, mask), reference) < 1e-5


@torch.inference_mode()
def test_neither_padding_nor_neighbours_change_a_prompt() -> None:
    model = drawn(UMT5_NANO)
    together = model(*padded(ROWS, 512))
    for row, whole in zip(ROWS, together, strict=True):
        alone = model(*padded([row], len(row)))[0]
        assert error(whole[: len(row)], alone) < 1e-5
        assert not whole[len(row) :].any()


@torch.inference_mode()
def test_positions_matter_and_far_ones_share_a_bucket() -> None:
    model = drawn(UMT5_NANO)
    there, back = (model(*padded([row], 4))[0] for row in ([5, 6, 7, 1], [7, 6, 5, 1]))
    assert error(there[0], back[2]) > 1e-2
    buckets = position_buckets(400, 32)
    assert buckets.shape == (799,)
    assert buckets.min() == 0
    assert buckets.max() == 31
    assert len(set(buckets[399 + 128 :].tolist())) == 1
    assert buckets[399:408].tolist() == [0, 17, 18, 19, 20, 21, 22, 23, 24]
    assert buckets[391:400].tolist() == [8, 7, 6, 5, 4, 3, 2, 1, 0]


@pytest.mark.parametrize("length", [1, 2, 9, 300])
@torch.inference_mode()
def test_a_line_of_biases_equals_a_look_up_for_each_pair(length: int) -> None:
    positions = drawn(UMT5_NANO).blocks[0].pos_embedding
    buckets, each = position_buckets(length, UMT5_NANO.buckets), torch.arange(length)
    pairs = buckets[each[None] - each[:, None] + length - 1]
    unseen = torch.zeros(2, 1, 1, length)
    unseen[1, ..., length // 2 + 1 :] = -torch.inf
    plain = positions.embedding(pairs).permute(2, 0, 1) + unseen
    bias = positions(buckets, unseen)
    assert bias.is_contiguous()
    assert torch.equal(bias, plain)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 0.05), (torch.float16, 0.005)])
@torch.inference_mode()
def test_sixteen_bits(dtype: torch.dtype, limit: float) -> None:
    model = drawn(UMT5_NANO)
    ids, mask = padded(ROWS, 64)
    whole = model(ids, mask)
    low = model.to(dtype)(ids, mask)
    assert low.dtype == dtype
    assert error(low, whole) < limit


@torch.inference_mode()
def test_float16_is_cut_off_where_it_ends() -> None:
    model = drawn(UMT5_NANO).half()
    for block in model.blocks:
        block.ffn.fc2.weight.mul_(3e4)
    assert model(*padded(ROWS, 64)).isfinite().all()


@torch.inference_mode()
def test_loads_as_stored(tmp_path: Path) -> None:
    model = drawn(UMT5_NANO).bfloat16()
    torch.save(model.state_dict(), tmp_path / "t5.pth")
    loaded = load(lambda: UMT5Encoder(UMT5_NANO), tmp_path / "t5.pth", "torch")
    assert loaded.norm.weight.dtype == torch.bfloat16
    ids, mask = padded(ROWS, 64)
    assert torch.equal(loaded(ids, mask), model(ids, mask))


def test_loading_takes_no_second_copy_of_the_file(tmp_path: Path) -> None:
    """Peak memory of a process that loads 300 MB: what the tensors take, and a block for each reader."""
    toy = UMT5Config(vocab=100_000, dim=512, attention_dim=512, hidden_dim=4096, heads=8, layers=14)
    state = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in umt5_tensors(toy).items()}
    path = tmp_path / "toy.pth"
    torch.save(state, path)
    code = f"""
import sys
import torch
from pathlib import Path
from app.boot.checkpoint import load
from app.models.wan.umt5 import UMT5Encoder
from app.models.wan.umt5_config import UMT5Config, UMT5_NANO
def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024
with torch.device("meta"):
    UMT5Encoder(UMT5_NANO)  # the code of torch that building needs is not the file's memory
before = status("VmRSS")
model = load(lambda: UMT5Encoder({toy!r}), Path(sys.argv[1]), "torch", readers=2)
assert {{p.dtype for p in model.parameters()}} == {{torch.bfloat16}}
print(status("VmHWM") - before)
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc to read a process's peak memory from")
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[3],
    )
    size = path.stat().st_size
    assert size > 300e6
    print(f"{size:,} bytes loaded with a peak of {int(done.stdout):,}")
    assert int(done.stdout) < 1.1 * size
