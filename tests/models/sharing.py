"""Orders for ranks in tests: led processes find them here by name."""

from __future__ import annotations

import os
import signal
import time

import torch

from app.models.seedvr2 import parallel, windows
from app.models.seedvr2.config import DiTConfig, config_3b, config_7b
from app.models.seedvr2.dit import DiT
from app.nn.exchange import broadcast
from app.nn.ranks import Member
from tests.golden import draw

SMALL = {
    "3b": config_3b(dim=64, heads=2, head_dim=32, layers=4, separate=2, text_dim=16),
    "7b": config_7b(dim=64, heads=2, head_dim=32, layers=4, text_dim=16),
}


def made(config: DiTConfig, dtype: torch.dtype, run_tokens: int) -> DiT:
    windows.RUN_TOKENS = run_tokens  # small clips in several runs
    return draw(DiT(config), "").to(dtype)


def hold(member: Member, kind: str, dtype: torch.dtype, run_tokens: int) -> None:
    parallel.hold(member, f"{kind} {dtype}", made(SMALL[kind], dtype, run_tokens).to(member.device))


def meet(member: Member) -> None:
    broadcast(torch.zeros(1))


def fail(member: Member) -> None:
    raise ValueError("no luck")


def run_out(member: Member) -> None:
    raise torch.OutOfMemoryError("a lot")


def die(member: Member) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def sleep(member: Member) -> None:
    time.sleep(600)
