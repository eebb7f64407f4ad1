"""Models whose matrices lie in 8 bits: from files, waiting on the host, on several cards, and counted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from app.boot.tensorfile import read_index
from app.device import Placement, place
from app.memory import KERNELS, SLACK, Room
from app.models.seedvr2 import parts
from app.models.seedvr2.config import config_3b, config_7b
from app.models.seedvr2.dit import DiT
from app.models.seedvr2.load import load_dit, load_restorer
from app.models.seedvr2.memory import Choice, Estimate, Task, block_bytes
from app.models.seedvr2.parallel import SharedDiT
from app.models.seedvr2.restore import RestoreOptions, Restorer, latent_size
from app.models.seedvr2.vae import VideoVAE
from app.models.source import Loading, Source
from app.models.wan.generate import nbytes_of
from app.models.wan.load import _text_place, load_generator
from app.models.wan.variants import variant
from app.nn.allocations import Allocations
from app.nn.float8 import FLOAT8, Float8Linear, Product, keep_in_float8
from app.nn.linear import Linear
from app.nn.ranks import Ranks
from app.progress import Silent
from benchmarks.cases import draw, ready
from benchmarks.memory import NARROW
from tests.card import card, on_card
from tests.models.nano import moving
from tests.models.wan import nano as wan
from tests.scaled import needs_scaled_rows

SCALED = pytest.param("scaled", marks=needs_scaled_rows)
OPTIONS = RestoreOptions(height=48, width=64, color="none", window=6)


def restorer(volume: Path, placement: Placement) -> Restorer:
    folder = volume / "nano/seedvr2"
    names = {"dit": "seedvr2_ema_nano", "vae": "ema_vae"}
    files = {part: folder / f"{name}.pth" for part, name in names.items()}
    files |= {"positive": folder / "pos_emb.pt", "negative": folder / "neg_emb.pt"}
    sources = {part: Source(path, "torch", path) for part, path in files.items()}
    return load_restorer("nano", sources, Loading(placement, 2, Silent()))


def restored(model: Restorer, **options: object) -> Tensor:
    with torch.inference_mode():
        return torch.cat(list(model.restore_shot(iter(moving(22)), 22, replace(OPTIONS, **options))))


def in_eight(module: nn.Module) -> list[Float8Linear]:
    return [layer for layer in module.modules() if isinstance(layer, Float8Linear)]


def test_seedvr2_from_files(nano_volume: Path) -> None:
    """All matrices of the blocks, and nothing else; counted as they are."""
    model, plain = (restorer(nano_volume, place("cpu", dtype)) for dtype in ("float8", "float32"))
    assert isinstance(model.dit, DiT) and isinstance(plain.dit, DiT)
    assert len(in_eight(model.dit)) == sum(isinstance(layer, Linear) for layer in plain.dit.blocks.modules())
    for name, tensor in model.dit.named_parameters():
        eight = name.startswith("blocks.") and tensor.ndim == 2
        assert tensor.dtype == (FLOAT8 if eight else torch.bfloat16), name
    own = sum(x.nbytes for x in (*model.dit.blocks.parameters(), *model.dit.blocks.buffers()))
    assert sum(model.estimate.block_bytes()) == pytest.approx(own, rel=0.01)
    made = restored(model)
    assert not torch.equal(made, restored(plain))
    assert torch.equal(restored(model, stream=True), made), "waiting on the host changes nothing"
    assert torch.equal(restored(model), made), "and they come back"


def test_a_published_cast_to_float8_is_restored_with_as_it_is(nano_volume: Path, tmp_path: Path) -> None:
    """Such files hold every tensor in float8, without scales: frequencies, norms and biases too."""
    whole = torch.load(nano_volume / "nano/seedvr2/seedvr2_ema_nano.pth", weights_only=True)
    path = tmp_path / "seedvr2_ema_nano_fp8_e4m3fn.safetensors"
    save_file({name: tensor.clamp(-448, 448).to(FLOAT8) for name, tensor in whole.items()}, path)
    assert parts.contents("nano", "dit", read_index(path, "safetensors")) == []
    wide = load_dit(path, torch.device("cpu"), "safetensors", "nano", torch.bfloat16, None, 2)
    kept = load_dit(path, torch.device("cpu"), "safetensors", "nano", torch.bfloat16, "widened", 2)
    assert wide.blocks[0].mlp["vid"].proj_in.weight.dtype == torch.bfloat16
    plan = wide.plan(2, 8, 12, 5)
    vid, txt = torch.randn(2, 8, 12, 33).bfloat16(), torch.randn(5, 64).bfloat16()
    with torch.inference_mode():
        assert torch.equal(kept(vid, txt, 1000.0, plan), wide(vid, txt, 1000.0, plan))


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the bits of a product may depend on it
    group = Ranks(2, torch.device("cpu"), patience=60)
    yield group
    group.close()
    torch.set_num_threads(threads)


def test_two_processes_share_a_pass_in_float8(nano_volume: Path, ranks: Ranks) -> None:
    path = nano_volume / "nano/seedvr2/seedvr2_ema_nano.pth"
    how = "torch", "nano", torch.bfloat16, "widened", 1
    alone = load_dit(path, torch.device("cpu"), *how)
    shared = SharedDiT.load(load_dit, ranks, path, *how)
    vid, txt = torch.randn(3, 24, 32, 33).bfloat16(), torch.randn(5, 64).bfloat16()
    with torch.inference_mode():
        expected = alone(vid, txt, 1000.0, alone.plan(3, 24, 32, 5))
        assert torch.equal(shared(vid, txt, 1000.0, shared.plan(3, 24, 32, 5)), expected)


def test_wan_from_files(wan_volume: Path) -> None:
    def clip(placement: Placement) -> Tensor:
        made = load_generator("nano", wan.sources(wan_volume), Loading(placement, 2, Silent()))
        transformer = made._transformer
        assert transformer is not None and in_eight(transformer) == in_eight(transformer.blocks)
        assert bool(in_eight(transformer)) == (placement.float8 is not None)
        return wan.clip(made, wan.options(9))

    made, plain = clip(place("cpu", "float8")), clip(place("cpu", "bfloat16"))
    assert made.isfinite().all() and not torch.equal(made, plain)


@pytest.mark.parametrize("dtype", ["bfloat16", "float8"])
def test_wans_text_encoder_has_the_room_that_its_transformer_leaves(
    wan_volume: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, spot = wan.sources(wan_volume), place("cpu", dtype)
    made = load_generator("nano", files, Loading(spot, 2, Silent()))
    need = nbytes_of(made._transformer, made._vae) + made.text.weights
    on_cuda = replace(spot, device=torch.device("cuda"))
    for room, there in ((need, "cuda"), (need - 10_000, "cpu")):
        free = Room(int(SLACK * room) + KERNELS + 1000, 0, apart=True)
        monkeypatch.setattr(Room, "on", lambda *arguments, free=free, **named: free)
        assert _text_place(variant("nano"), made.able, files["t5"], on_cuda).type == there


@pytest.mark.parametrize("config", [config_3b(), config_7b()], ids=["3b", "7b"])
def test_the_published_blocks_take_half(config: object) -> None:
    wide = sum(block_bytes(config, torch.bfloat16, None))
    assert sum(block_bytes(config, torch.bfloat16, "scaled")) == pytest.approx(wide / 2, rel=0.002)


@pytest.mark.parametrize("product", ["widened", SCALED])
def test_the_predicted_peak_is_that_measured(product: Product, capsys: pytest.CaptureFixture[str]) -> None:
    """As on a card: matrices are widened whole, or not at all. In float32, as a CPU's products in bfloat16 go
    other ways than a card's."""
    variant, options = NARROW, RestoreOptions(height=96, width=144)
    dit = DiT(variant.dit).requires_grad_(False)
    keep_in_float8(dit.blocks, product)
    for layer in in_eight(dit):
        layer.weight.data.zero_()
        layer.scale.fill_(1)
    model = Restorer(
        dit,
        ready(lambda: VideoVAE(variant.vae), torch.float32, "cpu"),
        draw(torch.float32, "cpu", 64, variant.dit.text_dim),
        draw(torch.float32, "cpu", 64, variant.dit.text_dim),
        product,
    )
    told = Estimate(variant.dit, variant.vae, torch.float32, torch.float32, "cpu", product)
    assert told.block_bytes() == model.estimate.block_bytes()
    task = Task(variant.vae.latents_holding(9), latent_size(options, variant.vae))
    need = told.need(task, Choice(options.window))
    weights = [*model.dit.parameters(), *model.dit.buffers(), *model.vae.parameters()]
    with torch.inference_mode(), Allocations("cpu") as taken:
        for _ in model.restore_shot(iter(moving(9, 48, 72)), 9, options):
            pass
    found = sum(tensor.nbytes for tensor in (*weights, model.positive, model.negative)) + taken.peak
    with capsys.disabled():
        print(
            f"\n{product}: predicted {(need.device + need.host) / 1e6:.1f} MB, measured {found / 1e6:.1f} MB"
        )
    assert 0.9 < (need.device + need.host) / found < 1.1


@pytest.mark.parametrize(
    ("capability", "product"),
    [((8, 6), "widened"), pytest.param((8, 9), "scaled", marks=needs_scaled_rows)],
)
def test_a_card_decides_how_products_are_made(
    nano_volume: Path, wan_volume: Path, capability: tuple[int, int], product: Product,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    with card(monkeypatch):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        placement = place("cuda", "float8")
        assert placement == Placement(torch.device("cuda"), torch.bfloat16, torch.float16, product)
        model = restorer(nano_volume, placement)
        assert isinstance(model.dit, DiT)
        assert product in {layer.product for layer in in_eight(model.dit)}
        assert all(on_card(x) for layer in in_eight(model.dit) for x in (layer.weight, layer.scale))
        frames = restored(model)
        assert frames.isfinite().all() and torch.equal(restored(model, stream=True), frames)
        made = load_generator("nano", wan.sources(wan_volume), Loading(placement, 2, Silent()))
        assert wan.clip(made, wan.options(9)).isfinite().all()
