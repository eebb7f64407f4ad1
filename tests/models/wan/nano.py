"""Nano's Wan from its files, as the boot chain loads it, and how it was loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from app.boot.manifest import Format
from app.device import place
from app.models.source import Loading, Source
from app.models.wan.generate import GenerateOptions, Generator, Guide
from app.models.wan.length import Length, Start, length
from app.models.wan.load import load_generator
from app.models.wan.transformer import Transformer
from app.models.wan.variants import VARIANTS
from tools.make_nano import drawn

FILES = {
    "transformer": "self_forcing_nano.pt",
    "vae": "Wan_VAE.pth",
    "t5": "models_t5_nano.pth",
    "tokenizer": "google/umt5-nano/tokenizer.json",
    "pose": "pose.ckpt",
    "clip": "models_clip_nano.pth",
}
SIZE = 32, 48  # pixels of most clips here


@dataclass
class Told:
    """A progress that remembers the steps it was told of."""

    steps: list[str] = field(default_factory=list)

    def start(self, label: str, total: float | None, unit: str) -> None:
        self.steps.append(label)

    def advance(self, amount: float) -> None: ...

    def finish(self, note: str = "") -> None: ...

    @property
    def loaded(self) -> list[str]:
        return [step.removeprefix("load ") for step in self.steps if step.startswith("load ")]


def sources(volume: Path, **others: Path) -> dict[str, Source]:
    """The files of nano's Wan; others in place of some."""
    files = {part: volume / "nano/wan" / name for part, name in FILES.items()} | others
    forms: Mapping[str, Format] = {"tokenizer": "data"}
    return {part: Source(path, forms.get(part, "torch"), path) for part, path in files.items()}


def load(
    volume: Path | Mapping[str, Source], *, variant: str = "nano", told: Told | None = None, **loading: Any
) -> Generator:
    files = sources(volume) if isinstance(volume, Path) else volume
    spot = place("cpu", "float32")
    return load_generator(variant, files, Loading(spot, 2, told or Told(), **loading))


def image_transformer(path: Path, *, pose: bool = True) -> Path:
    """A nano transformer that conditions on an image, as one state dict."""
    config = replace(VARIANTS["nano"].transformer, image=True, in_channels=36, pose=pose)
    torch.save(drawn(Transformer(config), "image"), path)
    return path


def one_section(volume: Path, path: Path, section: str | None, *, without: str = "nothing") -> Path:
    """The nano transformer's file with one set of weights, without the tensors whose name holds `without`."""
    whole = torch.load(volume / "nano/wan" / FILES["transformer"], weights_only=True)
    state = {name: x for name, x in whole[section or "generator_ema"].items() if without not in name}
    torch.save({section: state} if section else state, path)
    return path


def options(frames: int = 21, start: Start = "nothing", *, given: int = 0, **changes: Any) -> GenerateOptions:
    made = changes.pop("length", None) or length(frames, start, blocks=True, given=given)
    assert isinstance(made, Length)
    height, width = SIZE
    prompts = changes.pop("prompts", {0: "a cat in the snow"})
    return GenerateOptions(prompts, made, height, width, **changes)


def at_once(frames: int, **changes: Any) -> GenerateOptions:
    return options(length=length(frames, "nothing", blocks=False), **changes)


def clip(generator: Generator, asked: GenerateOptions, guide: Guide | None = None) -> Tensor:
    """All frames, (frames, 3, height, width)."""
    return torch.cat(list(generator.generate(asked, guide)))


def bytes_alive(tensors: Iterable[Any]) -> int:
    """Bytes of the distinct storages behind those of these objects that are tensors."""
    storages = {
        thing.untyped_storage().data_ptr(): thing.untyped_storage().nbytes()
        for thing in tensors
        if type(thing) is Tensor
    }
    return sum(storages.values())
