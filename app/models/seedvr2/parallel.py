"""SeedVR2's transformer on several cards: each does some of the attention windows of every layer.

The video meets itself only inside windows, so a rank keeps the tokens of its windows through a whole layer;
where the next layer's windows lie elsewhere, tokens move, each once. The text's copies meet in a sum, which
every rank adds up in the order that one card would. Runs of windows are never split, so that every product
has the shape that it has on one card: the result is the same, bit for bit.

The original (`sp_size`) splits tokens evenly, and heads within attention: two moves of queries, keys and
values, and two of the result, in each layer. Knows nothing of processes, noise or pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from app.models.seedvr2.dit import DiT, Plan, TextMean
from app.models.seedvr2.windows import Partition, Run
from app.nn.exchange import Exchange, Spread, broadcast, exchange, shares

if TYPE_CHECKING:
    from pathlib import Path

    from app.nn.ranks import Member, Ranks

Load = Callable[..., DiT]

PLANS = 8  # that a led rank remembers: two prompts, and windows of few lengths
LOAD_SECONDS = 3600.0  # that another rank may take longer to load than this one


@dataclass(frozen=True)
class _Share(Partition):
    """The part of a partition that is one rank's: `order` is that of its own tokens, and groups begin where
    they lie among these. `whole`: windows of all ranks. `texts`: from a rank's groups to everybody's."""

    whole: int
    texts: Exchange


@dataclass(frozen=True)
class SharedPlan(Plan):
    """A plan whose partitions are one rank's shares. `key`: what `DiT.plan` made it of. `exchanges`: as
    `moves`, of which only the first is one of this rank alone. `no_text`: (0, L, h d) float32."""

    key: tuple[int, ...]
    exchanges: tuple[Exchange | None, ...]
    no_text: Tensor

    def moved(self, vid: Tensor, layer: int) -> Tensor:
        """As `Plan.moved`: at first every rank has all tokens, and behind the last layer again."""
        if layer == 0:
            return vid.index_select(0, self.partitions[0].order)
        move = self.exchanges[layer]
        return vid if move is None else move(vid)

    def text_mean(self, windows: Partition) -> TextMean:
        assert isinstance(windows, _Share)
        return _SharedTextMean(windows, self.no_text)


class _SharedTextMean(TextMean):
    """Collects the sums of this rank's groups, and adds those of all groups up in their order."""

    def __init__(self, windows: _Share, no_text: Tensor) -> None:
        super().__init__(windows.whole)
        self._gather, self._no_text = windows.texts, no_text
        self._own: list[Tensor] = []

    def add(self, text: Tensor) -> None:
        self._own.append(text)

    def mean(self) -> Tensor:
        for text in self._gather(torch.stack(self._own) if self._own else self._no_text):
            super().add(text)
        return super().mean()


def share(plan: Plan, key: tuple[int, ...], inner_dim: int, rank: int, count: int) -> SharedPlan:
    """The part of `rank` of `count` in a plan. `inner_dim`: the attention's width, h d."""
    device = plan.partitions[0].order.device
    everywhere = [torch.arange(plan.size[0] * plan.size[1] * plan.size[2])] * count
    shared, spreads = {}, {}
    for windows in {id(each): each for each in plan.partitions}.values():
        shared[id(windows)] = _share(windows, _cuts(windows, count), rank)
        spreads[id(windows)] = spread(windows, count)
    known: dict[tuple[int, int], Exchange] = {}
    exchanges: list[Exchange | None] = [None]
    route = [*(id(each) for each in plan.partitions), 0]
    spreads[0] = everywhere
    for step in pairwise(route):
        if step[0] != step[1] and step not in known:  # layers alternate between few partitions
            known[step] = exchange(spreads[step[0]], spreads[step[1]], rank, device)
        exchanges.append(known.get(step))
    whole = {each.name: getattr(plan, each.name) for each in fields(plan)}
    return SharedPlan(
        **whole | {"partitions": tuple(shared[id(each)] for each in plan.partitions)},
        key=key, exchanges=tuple(exchanges),
        no_text=torch.empty(0, plan.text_length, inner_dim, device=device),
    )  # fmt: skip


def spread(windows: Partition, count: int) -> Spread:
    """The tokens of each of `count` ranks, in raster numbers."""
    order = windows.order.cpu()
    return [order[slice(*_tokens(windows, cut))] for cut in _cuts(windows, count)]


def _cuts(windows: Partition, count: int) -> list[range]:
    """The runs of each rank."""
    return shares([run[-1].stop - run[0].start for run in windows.runs], count)


def _share(windows: Partition, cuts: Sequence[range], rank: int) -> _Share:
    start, stop = _tokens(windows, cuts[rank])
    runs: list[Run] = [
        tuple(replace(group, start=group.start - start) for group in windows.runs[number])
        for number in cuts[rank]
    ]
    groups = [sum(len(windows.runs[number]) for number in cut) for cut in cuts]
    ends = [sum(groups[: number + 1]) for number in range(len(groups))]
    held = [torch.arange(end - count, end) for end, count in zip(ends, groups, strict=True)]
    device = windows.order.device
    return _Share(
        windows.order[start:stop],
        tuple(runs),
        windows.count,
        exchange(held, [torch.arange(sum(groups))] * len(cuts), rank, device),
    )


def _tokens(windows: Partition, cut: range) -> tuple[int, int]:
    """The first token of some runs, and the one after their last."""
    if not cut:
        return 0, 0
    return windows.runs[cut.start][0].start, windows.runs[cut.stop - 1][-1].stop


# ------------------------------------------------------------------ on the ranks


class SharedDiT:
    """A transformer that all ranks hold, called on rank 0 as if it were there alone."""

    def __init__(self, dit: DiT, name: str, ranks: Ranks) -> None:
        """`dit` is rank 0's; the others hold theirs under `name`."""
        self.config, self._dit, self._name, self._ranks = dit.config, dit, name, ranks

    @classmethod
    def load(cls, load: Load, ranks: Ranks, path: Path, *arguments: object) -> SharedDiT:
        """Let `load` read the file at `path` on every rank: the function of a module, which takes the path,
        a rank's device and `arguments`, and returns the transformer."""
        with ranks.work(_load_share, load, path, *arguments, patience=LOAD_SECONDS) as member:
            return cls(load(path, member.device, *arguments), str(path), ranks)

    def plan(self, frames: int, height: int, width: int, text_length: int) -> SharedPlan:
        """As `DiT.plan`."""
        return _planned(self._dit, (frames, height, width, text_length), self._ranks.member)

    def __call__(self, vid: Tensor, txt: Tensor, timestep: float, plan: Plan) -> Tensor:
        """As `DiT.forward`.

        Raises:
            UnavailableError: `rank_failed`.
        """
        assert isinstance(plan, SharedPlan)
        with self._ranks.work(_pass_share, self._name, vid.shape, txt.shape, timestep, plan.key):
            return _passed(self._dit, vid.contiguous(), txt.contiguous(), timestep, plan)

    def close(self) -> None:
        """End the other ranks."""
        self._ranks.close()


def hold(member: Member, name: str, dit: DiT) -> None:
    """Keep a transformer for the passes to come."""
    member.held[name] = dit, {}


def _load_share(member: Member, load: Load, path: Path, *arguments: object) -> None:
    """An order: load a transformer."""
    # Not in inference mode, as orders are: threads that read and cast weights write into them outside of it.
    with torch.inference_mode(False), torch.no_grad():
        hold(member, str(path), load(path, member.device, *arguments))


def _pass_share(
    member: Member, name: str, vid: Sequence[int], txt: Sequence[int], timestep: float, key: tuple[int, ...]
) -> None:
    """An order: do a share of a pass. `vid`, `txt`: shapes of what rank 0 hands out."""
    dit, plans = member.held[name]
    if key not in plans:
        while len(plans) >= PLANS:
            del plans[next(iter(plans))]
        plans[key] = _planned(dit, key, member)
    like = dit.vid_out.proj.weight
    _passed(dit, like.new_empty(vid), like.new_empty(txt), timestep, plans[key])


def _planned(dit: DiT, key: tuple[int, ...], member: Member) -> SharedPlan:
    frames, height, width, length = key
    plan = dit.plan(frames, height, width, length)
    return share(plan, key, dit.config.inner_dim, member.rank, member.count)


def _passed(dit: DiT, vid: Tensor, txt: Tensor, timestep: float, plan: SharedPlan) -> Tensor:
    broadcast(vid)
    broadcast(txt)
    out: Tensor = dit(vid, txt, timestep, plan)
    return out
