#!/usr/bin/env python3
"""Train a small codec of the latent laboratory: a VQ-VAE of video, or a VAE of images.

    python tools/train_latents.py OUT                              # a VQ-VAE on generated patterns
    python tools/train_latents.py OUT --kind vae --data VIDEOS     # a VAE on the videos of a folder
    python tools/train_latents.py OUT --resume --minutes 10        # go on where OUT stopped

OUT gets the codec's checkpoint (`vqvae.safetensors`, or `config.json` and
`diffusion_pytorch_model.safetensors`), `training.pt` to go on from, `losses.csv`, and `losses.png` where
matplotlib is installed. On a CPU a training that goes on gives the same bits as one that never stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from app.errors import ConfigError, FileError, InputError, SeedpodError, UsageError
from app.models.latents.sd_config import SDConfig
from app.models.latents.train import Losses, Recipe, Trainer
from app.models.latents.vqvae_config import VQConfig
from app.progress import Progress, shown_progress
from tools.training_data import Data, patterns, videos

STATE, TABLE, PLOT = "training.pt", "losses.csv", "losses.png"
CHOICES = {  # of options: (type, least, most); a training that goes on keeps what it began with
    "rate": (float, 1e-8, 1.0),
    "seed": (int, 0, 2**31),
    "batch": (int, 1, 4096),
    "frames": (int, 1, 1024),
    "size": (int, 4, 2048),
    "width": (int, 1, 1024),
    "codes": (int, 2, 65536),
    "dim": (int, 1, 1024),
    "divergence": (float, 0.0, 1e3),
    "commitment": (float, 0.0, 1e3),
}
ONLY = {"vqvae": ("codes", "dim", "frames", "codebook", "commitment"), "vae": ("divergence",)}
DEFAULTS = {"kind": "vqvae", "codebook": "ema", "rate": 1e-3, "seed": 0, "batch": 8, "frames": 9, "size": 32}


def main(arguments: Sequence[str]) -> int:
    """Train; gives the exit status."""
    try:
        options = parse(arguments)
        with shown_progress() as progress:
            run(options, progress)
    except SeedpodError as error:
        print(f"{error.code}: {error.message}", file=sys.stderr)
        return error.exit_status
    return 0


def run(options: argparse.Namespace, progress: Progress) -> None:
    """One training, or its continuation, from the first file read to the last one written."""
    options.out.mkdir(parents=True, exist_ok=True)
    trainer, settings, losses = begin(options)
    data = patterns(settings) if settings["data"] is None else videos(Path(settings["data"]), settings)
    if settings.setdefault("digest", data.digest) != data.digest:
        raise InputError(
            "training_data_changed",
            f"{settings['data'] or 'The generated patterns'} now give other frames than those that "
            f"the training in {options.out} began with; expected the same: put them back, or begin anew in "
            "another folder.",
        )
    try:
        train(trainer, data, settings, losses, options, progress)
    finally:  # also where it is interrupted, or diverged
        if losses and len(losses) == trainer.steps:
            save(options.out, trainer, settings, losses)
    for path in [*trainer.export(options.out), *plot(options.out / PLOT, losses)]:
        print(path)


def train(
    trainer: Trainer,
    data: Data,
    settings: dict[str, Any],
    losses: list[Losses],
    options: argparse.Namespace,
    progress: Progress,
) -> None:
    """Steps until there are `options.steps` in all, `options.minutes` have passed, or Ctrl-C."""
    device = next(trainer.module.parameters()).device
    end = math.inf if options.minutes is None else time.monotonic() + 60 * options.minutes
    steps = options.steps or (1000 if options.minutes is None else None)
    progress.start("train", None if steps is None else max(0, steps - trainer.steps), "steps")
    with interruptions() as stopped:
        while (steps is None or trainer.steps < steps) and time.monotonic() < end and not stopped:
            batch = data.batch(
                trainer.steps, settings["seed"], settings["batch"], settings["frames"], settings["size"]
            ).to(device)
            losses.append(trainer.step(batch if trainer.recipe.kind == "vqvae" else batch[:, :, 0]))
            progress.advance(1)
            if trainer.steps % options.every == 0:
                save(options.out, trainer, settings, losses)
    said = (
        ", ".join(f"{name} {value:.4g}" for name, value in losses[-1].items()) if losses else "nothing done"
    )
    progress.finish(f"step {trainer.steps}: {said}")


@contextlib.contextmanager
def interruptions() -> Iterator[list[int]]:
    """A list that Ctrl-C and SIGTERM put their numbers into: a step that began is finished, and saved."""
    stopped: list[int] = []
    kinds = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(kind, lambda number, _: stopped.append(number)) for kind in kinds]
    try:
        yield stopped
    finally:
        for kind, handler in zip(kinds, before, strict=True):
            signal.signal(kind, handler)


# ------------------------------------------------------------------ the beginning


def begin(options: argparse.Namespace) -> tuple[Trainer, dict[str, Any], list[Losses]]:
    """The trainer, its settings and its losses so far: anew, or from where OUT stopped."""
    path = options.out / STATE
    device = torch.device(options.device)
    if options.resume:
        given = [
            name for name in (*CHOICES, "kind", "codebook", "data") if getattr(options, name) is not None
        ]
        if given:
            raise UsageError(
                "training_options",
                f"--{given[0]} is {getattr(options, given[0])!r}, but a training that goes on keeps what it "
                "began with; leave the option out, or begin anew in another folder.",
            )
        state = read_state(path)
        return Trainer.of(state["trainer"], device), state["settings"], state["losses"]
    if path.exists():
        raise UsageError(
            "training_exists",
            f"{options.out} holds a training already; expected an empty folder: add --resume to go on "
            "with it, or name another.",
        )
    kind = options.kind or DEFAULTS["kind"]
    for other, names in ONLY.items():
        for name in names:
            if other != kind and getattr(options, name) is not None:
                raise UsageError(
                    "training_options", f"--{name} is for --kind {other}; leave it out for a {kind}."
                )
    settings = {
        name: DEFAULTS.get(name) if getattr(options, name) is None else getattr(options, name)
        for name in (*CHOICES, "kind", "codebook")
    }
    settings["data"] = None if options.data is None else str(options.data.resolve())
    if settings["kind"] == "vae":
        settings["frames"] = 1
    return Trainer(recipe(settings), device), settings, []


def recipe(settings: dict[str, Any]) -> Recipe:
    """The recipe of these settings; sizes that the codec does not take are refused."""
    config: VQConfig | SDConfig
    chosen = {name: settings[name] for name in ("width", "codes", "dim") if settings[name] is not None}
    if settings["kind"] == "vqvae":
        config = VQConfig(**asdict(VQConfig(width=32, inner=16, dim=16)) | chosen)
        step = config.temporal_factor
        if (settings["frames"] - 1) % step:
            raise UsageError(
                "training_options",
                f"--frames is {settings['frames']}; a VQ-VAE takes {step} k + 1, such as {2 * step + 1}.",
            )
    else:
        width, groups = chosen.get("width", 32), 4
        if width % groups:
            raise UsageError(
                "training_options", f"--width is {width}; a vae takes multiples of {groups}, such as 32."
            )
        config = SDConfig(block_out_channels=(width,) * 3, norm_num_groups=groups, scaling_factor=1.0)
    if settings["size"] % config.spatial_factor:
        raise UsageError(
            "training_options",
            f"--size is {settings['size']}; expected a multiple of {config.spatial_factor}.",
        )
    fixed = {
        name: settings[name]
        for name in ("kind", "rate", "seed", "codebook", "commitment", "divergence")
        if settings[name] is not None
    }
    return Recipe(model=asdict(config), **fixed)


def read_state(path: Path) -> dict[str, Any]:
    """What `save` wrote. Nothing in the file is run."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or not {"trainer", "settings", "losses"} <= set(state):
            raise ValueError("it holds something else")
    except FileNotFoundError:
        raise UsageError(
            "training_missing",
            f"{path} is not there, so there is no training to go on with; leave --resume out.",
        ) from None
    except Exception as error:  # torch raises whatever its unpickler does
        reason = " ".join(str(error).split())[:160]
        raise ConfigError(
            "training_state_invalid",
            f"{path} cannot be read ({type(error).__name__}: {reason}); expected the state of a training: "
            "begin anew in another folder.",
        ) from error
    return state


# ------------------------------------------------------------------ what is written


def save(out: Path, trainer: Trainer, settings: dict[str, Any], losses: list[Losses]) -> None:
    """The state to go on from, then the table of losses; each replaced whole."""
    state = {"trainer": trainer.state(), "settings": settings, "losses": losses}
    write(out / STATE, lambda path: torch.save(state, path))
    text = io.StringIO()
    if losses:
        table = csv.DictWriter(text, ["step", *losses[0]])
        table.writeheader()
        table.writerows({"step": step} | each for step, each in enumerate(losses, 1))
    write(out / TABLE, lambda path: path.write_text(text.getvalue()))


def write(path: Path, writer: Callable[[Path], Any]) -> None:
    """A file that is whole or not there."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        writer(partial)
        partial.replace(path)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError where a disk is full
        raise FileError(
            "output_unwritable", f"{path} cannot be written: {error}; make room there."
        ) from error


def plot(path: Path, losses: list[Losses]) -> list[Path]:
    """The losses over the steps; nothing where matplotlib is not installed."""
    if not losses:
        return []
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"no {path.name}: matplotlib is not installed", file=sys.stderr)
        return []
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name in losses[0]:
        if name != "codes":
            axes.plot(range(1, len(losses) + 1), [each[name] for each in losses], label=name, linewidth=1)
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    write(path, lambda partial: figure.savefig(partial, dpi=120, format="png"))
    return [path]


# ------------------------------------------------------------------ the command line


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UsageError("usage", f"{message}; see --help.")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options, each within its bounds."""
    text, _, rest = (__doc__ or "").partition("\n\n")
    parser = Parser(description=text, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--kind", choices=("vqvae", "vae"), help="vqvae unless given")
    parser.add_argument(
        "--data", type=Path, metavar="FOLDER", help="of videos; generated patterns unless given"
    )
    parser.add_argument("--steps", type=bounded(int, 1, 10**9), help="in all; 1000 unless given")
    parser.add_argument("--minutes", type=bounded(float, 0.001, 10**6), help="of this run")
    parser.add_argument("--resume", action="store_true", help="go on where OUT stopped")
    parser.add_argument("--every", type=bounded(int, 1, 10**9), default=200, help="steps between checkpoints")
    parser.add_argument("--device", default="cpu", help="cpu unless given; cuda, mps")
    parser.add_argument("--codebook", choices=("ema", "loss"), help="how it learns; ema unless given")
    for name, (kind, least, most) in CHOICES.items():
        default = f"; {DEFAULTS[name]} unless given" if name in DEFAULTS else ""
        parser.add_argument(
            f"--{name}", type=bounded(kind, least, most), help=f"{least:g} to {most:g}{default}"
        )
    options = parser.parse_args(arguments)
    try:
        torch.zeros(1, device=options.device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        said = str(error).splitlines()[0]
        raise UsageError("device_unavailable", f"--device is {options.device!r}: {said}; try cpu.") from None
    return options


def bounded(kind: type[int] | type[float], least: float, most: float) -> Callable[[str], float]:
    """A reader of numbers from `least` to `most`."""

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r}: expected {what} from {least:g} to {most:g}")
        return value

    return read


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
