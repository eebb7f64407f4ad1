import copy
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from app.models.seedvr2.dit import DiT
from app.models.seedvr2.offload import SLOTS, is_streamed, place_blocks
from app.models.seedvr2.restore import RestoreOptions, Restorer
from app.nn.allocations import Allocations
from tests.card import card, on_card
from tests.models.nano import moving, restorer

OPTIONS = RestoreOptions(height=48, width=64, color="none", window=6)


def own() -> Restorer:
    """A nano restorer of one's own."""
    return replace(restorer(), dit=copy.deepcopy(restorer().dit))


def restored(model: Restorer, **options: object) -> Tensor:
    with torch.inference_mode():
        return torch.cat(list(model.restore_shot(iter(moving(22)), 22, replace(OPTIONS, **options))))


def test_streamed_blocks_give_the_same_bits_and_come_back() -> None:
    model = own()
    names = sorted(model.dit.state_dict())
    plain = restored(model)
    assert torch.equal(restored(model, stream=True, steps=1), plain)
    assert is_streamed(model.dit)
    assert torch.equal(restored(model, stream=True), plain), "a second pass"
    assert sorted(model.dit.state_dict()) == names
    assert torch.equal(restored(model), plain)
    assert not is_streamed(model.dit)
    for name, tensor in restorer().dit.state_dict().items():
        assert torch.equal(model.dit.state_dict()[name], tensor), name


def test_two_blocks_are_all_that_lies_on_the_device() -> None:
    dit = copy.deepcopy(restorer().dit)
    place_blocks(dit, torch.device("cpu"), stream=True)
    block = max(sum(p.nbytes for p in block.parameters()) for block in dit.blocks._modules.values() if block)
    with Allocations("cpu") as taken, torch.inference_mode():
        for _ in dit.blocks:
            pass
    assert SLOTS * block <= taken.peak < SLOTS * block * 1.05


def test_a_pass_that_fails_leaves_every_block_at_home() -> None:
    dit = copy.deepcopy(restorer().dit)
    place_blocks(dit, torch.device("cpu"), stream=True)
    homes = {name: parameter.data_ptr() for name, parameter in dit.named_parameters()}
    blocks = iter(dit.blocks)
    next(blocks), next(blocks)
    assert {name: parameter.data_ptr() for name, parameter in dit.named_parameters()} != homes
    blocks.close()  # type: ignore[attr-defined] # a generator
    assert {name: parameter.data_ptr() for name, parameter in dit.named_parameters()} == homes


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with card(monkeypatch):
        yield


@pytest.mark.usefixtures("there")
def test_blocks_wait_in_pinned_memory_and_compute_on_the_card() -> None:
    device = torch.device("cuda")
    dit = copy.deepcopy(restorer().dit)
    assert isinstance(dit, DiT)
    place_blocks(dit, device, stream=True)
    assert all(on_card(p) for name, p in dit.named_parameters() if not name.startswith("blocks."))
    assert not any(on_card(p) for name, p in dit.named_parameters() if name.startswith("blocks."))
    with torch.inference_mode():
        for block in dit.blocks:
            assert all(on_card(p) for p in block.parameters())
    assert not any(on_card(p) for name, p in dit.named_parameters() if name.startswith("blocks."))
    place_blocks(dit, device, stream=False)
    assert all(on_card(p) for p in dit.parameters())
