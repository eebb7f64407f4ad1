"""The transformer's blocks in the host's memory, each on the device only around its use.

A block's tensors lie in one piece of pinned memory, so that one copy brings it over; while a block computes,
the next one comes. On the device lie two blocks at most. What they compute is the same, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

import torch
from torch import Tensor, nn

from app.boot.checkpoint import give_back
from app.models.seedvr2.dit import DiT

SLOTS: Final = 2  # blocks on the device: one that computes, one that comes
ALIGN: Final = 256  # bytes; where a tensor begins in a slot, as kernels like it


def place_blocks(dit: object, device: torch.device, *, stream: bool) -> None:
    """Move the blocks of a `DiT` to the host's memory or to the device, unless they are there; what is shared
    with other cards stays as it is."""
    if not isinstance(dit, DiT) or is_streamed(dit) == stream:
        return
    # Not in inference mode, even if the caller is: its tensors could not be moved later.
    with torch.inference_mode(False), torch.no_grad():
        if isinstance(dit.blocks, Streamed):
            dit.blocks = dit.blocks.settled()
        else:
            dit.blocks = Streamed(dit.blocks, device)
            for name, module in dit.named_children():
                if name != "blocks":
                    module.to(device)
    give_back()


def is_streamed(dit: DiT) -> bool:
    """Whether the blocks wait in the host's memory."""
    return isinstance(dit.blocks, Streamed)


class Streamed(nn.ModuleList):
    """Blocks in the host's memory. Going through them brings each to `device` while it has its turn."""

    def __init__(self, blocks: nn.ModuleList, device: torch.device) -> None:
        super().__init__()
        self.device = device
        cuda = device.type == "cuda"
        self._packed = [_Packed(block, pin=cuda) for block in blocks]
        self.extend(blocks)
        new_stream: Callable[[torch.device], torch.cuda.Stream] = torch.cuda.Stream
        self._copies = new_stream(device) if cuda else None

    def __iter__(self) -> Iterator[nn.Module]:
        largest = max(len(packed.data) for packed in self._packed)
        slots = [torch.empty(largest, dtype=torch.uint8, device=self.device) for _ in self._packed[:SLOTS]]
        self._bring(0, slots)
        for number, packed in enumerate(self._packed):
            self._wait()
            self._bring(number + 1, slots)
            packed.place(slots[number % SLOTS])
            try:
                yield packed.block
            finally:
                packed.home()

    def settled(self) -> nn.ModuleList:
        """The blocks, on the device for good. This must not be used any more."""
        return nn.ModuleList(packed.block.to(self.device) for packed in self._packed)

    def _bring(self, number: int, slots: list[Tensor]) -> None:
        """Begin to copy a block, once what was queued so far, the slot's last block with it, is computed."""
        if number == len(self._packed):
            return
        block = self._packed[number].data
        slot = slots[number % SLOTS]
        if self._copies is None:
            slot[: len(block)] = block
            return
        self._copies.wait_stream(torch.cuda.current_stream(self.device))
        slot.record_stream(self._copies)
        with torch.cuda.stream(self._copies):
            slot[: len(block)].copy_(block, non_blocking=True)

    def _wait(self) -> None:
        """What is queued from now on finds the blocks that were brought so far."""
        if self._copies is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._copies)


class _Packed:
    """A block whose parameters and buffers are views of one piece of memory."""

    def __init__(self, block: nn.Module, *, pin: bool) -> None:
        self.block = block
        self.data = torch.empty(packed_bytes(block), dtype=torch.uint8, pin_memory=pin)
        self._places: list[tuple[nn.Module, str, int, Tensor]] = []  # owner, name, offset, at home
        offset = 0
        for owner in block.modules():
            for name, tensor in _own_tensors(owner):
                home = _like(tensor, _view(self.data, offset, tensor))
                home.copy_(tensor)
                self._places.append((owner, name, offset, home))
                offset += _aligned(tensor)
        self.home()

    def home(self) -> None:
        """Tensors are where they wait."""
        for owner, name, _, tensor in self._places:
            setattr(owner, name, tensor)

    def place(self, memory: Tensor) -> None:
        """Tensors are in this memory, which holds a copy of `data`."""
        for owner, name, offset, tensor in self._places:
            setattr(owner, name, _like(tensor, _view(memory, offset, tensor)))


def packed_bytes(block: nn.Module) -> int:
    """Memory of a block in one piece."""
    return sum(_aligned(tensor) for owner in block.modules() for _, tensor in _own_tensors(owner))


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


def _like(tensor: Tensor, data: Tensor) -> Tensor:
    """data, as a parameter where tensor is one."""
    return nn.Parameter(data, requires_grad=False) if isinstance(tensor, nn.Parameter) else data


def _aligned(tensor: Tensor) -> int:
    return -(-tensor.nbytes // ALIGN) * ALIGN


def _view(memory: Tensor, offset: int, like: Tensor) -> Tensor:
    return memory[offset : offset + like.nbytes].view(like.dtype).view(like.shape)
