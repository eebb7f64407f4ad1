"""Training of small codecs: a VQ-VAE, or an AutoencoderKL of images, from batches of pixels.

    trainer = Trainer(Recipe(kind="vqvae", model=asdict(VQConfig.nano())), "cpu")
    loss = trainer.step(batch)               # {"loss": ..., "reconstruction": ..., ...}
    torch.save(trainer.state(), path)        # and Trainer.of(state, device) goes on with the same numbers

What a step draws depends on the seed and its number alone. Where the batches come from, files, plots and the
command line are `tools/train_latents.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from app.errors import ConfigError, InputError
from app.models.latents.load import build_autoencoder_kl
from app.models.latents.sd_config import SDConfig
from app.models.latents.vqvae import VQVAE
from app.models.latents.vqvae_config import VQConfig

Losses = dict[str, float]
VERSION = 1  # of the state


@dataclass(frozen=True)
class Recipe:
    """How a codec is trained.

    model: fields of `VQConfig` (kind vqvae) or `SDConfig` (kind vae).
    codebook: how it learns: "ema" by moving averages of what is nearest to each code (van den Oord 2017,
        appendix A.1), "loss" by the gradient of its own loss.
    commitment: weight of that loss (the paper's beta). decay: of the moving averages.
    dead: a code that fewer vectors than this choose, in the moving average of a step, begins anew at a vector
        of the batch; 0 for never.
    divergence: weight of the Kullback-Leibler divergence of the posterior from a unit Gaussian (kind vae).
    """

    kind: Literal["vqvae", "vae"] = "vqvae"
    model: Mapping[str, Any] = field(default_factory=lambda: asdict(VQConfig.nano()))
    rate: float = 1e-3
    seed: int = 0
    codebook: Literal["ema", "loss"] = "ema"
    commitment: float = 0.25
    decay: float = 0.99
    dead: float = 0.03
    divergence: float = 1e-6

    def config(self) -> VQConfig | SDConfig:
        """Of the network."""
        values: dict[str, Any] = {
            key: tuple(x) if isinstance(x, list) else x for key, x in self.model.items()
        }
        return VQConfig(**values) if self.kind == "vqvae" else SDConfig(**values)


class Trainer:
    """A network, its optimiser (Adam) and all else that changes from step to step."""

    def __init__(self, recipe: Recipe, device: torch.device | str = "cpu") -> None:
        self.recipe = recipe
        self.steps = 0
        torch.manual_seed(recipe.seed)  # modules draw their first weights from torch's own generator
        config = recipe.config()
        self.module: nn.Module = (
            VQVAE(config) if isinstance(config, VQConfig) else build_autoencoder_kl(config)
        )
        self.module.to(device).train()
        learned = dict(self.module.named_parameters())
        self.average: CodebookAverage | None = None
        if isinstance(self.module, VQVAE):
            self.average = CodebookAverage(self.module.codebook, recipe)
            if recipe.codebook == "ema":
                del learned["codebook"]
        self.optimiser = torch.optim.Adam(learned.values(), lr=recipe.rate)

    def step(self, batch: Tensor) -> Losses:
        """One step on pixels in [-1, 1]: (batch, 3, frames, height, width) for a VQ-VAE, whose frames and
        sides must be what it takes, and (batch, 3, height, width) for a VAE.

        Raises:
            InputError: `training_diverged`: the loss is no number.
        """
        generator = torch.Generator().manual_seed((self.recipe.seed * 1_000_003 + self.steps) % 2**32)
        losses = self._vqvae(batch) if isinstance(self.module, VQVAE) else self._vae(batch, generator)
        if not torch.isfinite(losses["loss"]):
            raise InputError(
                "training_diverged",
                f"The loss of step {self.steps + 1} is {losses['loss'].item()}; expected a number: take a "
                f"smaller rate than {self.recipe.rate}, and go on from the last checkpoint or begin anew.",
            )
        self.optimiser.zero_grad(set_to_none=True)
        losses["loss"].backward()  # type: ignore[no-untyped-call]
        self.optimiser.step()
        if self.average is not None:
            losses["codes"] = self.average.update(*self._chosen, generator)
        self.steps += 1
        return {name: value.item() for name, value in losses.items()}

    def _vqvae(self, batch: Tensor) -> dict[str, Tensor]:
        out = self.module(batch)
        self._chosen = out.encoded.detach().movedim(1, -1).flatten(0, -2), out.indices.flatten()
        reconstruction = F.mse_loss(out.frames, batch)
        loss = reconstruction + self.recipe.commitment * out.commitment
        if self.recipe.codebook == "loss":
            loss = loss + out.codebook
        return {"loss": loss, "reconstruction": reconstruction, "commitment": out.commitment}

    def _vae(self, batch: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        module: Any = self.module
        posterior = module.encode(batch).latent_dist
        # Drawn on the CPU: the same numbers on every device.
        noise = torch.randn(posterior.mean.shape, generator=generator).to(batch)
        frames = module.decode(posterior.mean + posterior.std * noise).sample
        reconstruction, divergence = F.mse_loss(frames, batch), posterior.kl().mean()
        loss = reconstruction + self.recipe.divergence * divergence
        return {"loss": loss, "reconstruction": reconstruction, "divergence": divergence}

    def state(self) -> dict[str, Any]:
        """All that a later process needs to go on, for `torch.save`: tensors and plain values."""
        return {
            "version": VERSION,
            "recipe": json.dumps(asdict(self.recipe)),
            "steps": self.steps,
            "module": self.module.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "average": None if self.average is None else self.average.state(),
        }

    @classmethod
    def of(cls, state: Mapping[str, Any], device: torch.device | str = "cpu") -> Trainer:
        """The trainer whose `state` this is.

        Raises:
            ConfigError: `training_state_invalid`: it is that of no trainer of this version.
        """
        try:
            if state["version"] != VERSION:
                raise ValueError(f"version {state['version']!r}")
            trainer = cls(Recipe(**json.loads(state["recipe"])), device)
            trainer.module.load_state_dict(state["module"])
            trainer.optimiser.load_state_dict(state["optimiser"])
            if trainer.average is not None:
                trainer.average.load(state["average"])
            trainer.steps = int(state["steps"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(
                "training_state_invalid",
                f"The checkpoint of the training cannot be gone on with ({type(error).__name__}: {reason}); "
                "expected one that this version wrote: begin anew in another folder.",
            ) from error
        return trainer

    def export(self, folder: Path) -> list[Path]:
        """Write the codec's checkpoint as its family reads it; gives their paths. Each is replaced whole.

        `vqvae.safetensors`, or `config.json` and `diffusion_pytorch_model.safetensors`.
        """
        config = self.recipe.config()
        tensors = {name: x.detach().to("cpu").contiguous() for name, x in self.module.state_dict().items()}
        if isinstance(config, VQConfig):
            # Not save_file, whose files nobody else may read.
            weights = folder / "vqvae.safetensors"
            about = {"format": "pt", "steps": str(self.steps), "config": json.dumps(asdict(config))}
            _replace(weights, lambda path: path.write_bytes(save(tensors, about)))
            return [weights]
        weights, described = folder / "diffusion_pytorch_model.safetensors", folder / "config.json"
        text = json.dumps(config.to_dict(), indent=2) + "\n"
        _replace(described, lambda path: path.write_text(text))
        _replace(weights, lambda path: path.write_bytes(save(tensors, {"format": "pt"})))
        return [described, weights]


def _replace(path: Path, write: Any) -> None:
    """`write` a file and put it in the place of `path` at once."""
    partial = path.with_name(f".{path.name}.partial")
    write(partial)
    partial.replace(path)


class CodebookAverage:
    """How often each code is chosen and by which vectors, in moving averages; and what follows from it.

    Where the codebook learns by averages it is set to their quotient (appendix A.1, with the counts smoothed
    as there); codes that hardly anything chooses begin anew either way.
    """

    EPSILON = 1e-5

    def __init__(self, codebook: Tensor, recipe: Recipe) -> None:
        self.codebook = codebook
        self.recipe = recipe
        # Zero: what the first batch does not choose begins anew at once, at the encoder's own vectors.
        self.counts = torch.zeros(len(codebook), device=codebook.device)
        self.sums = torch.zeros_like(codebook, requires_grad=False)

    @torch.no_grad()
    def update(self, vectors: Tensor, indices: Tensor, generator: torch.Generator) -> Tensor:
        """Take in the vectors (n, dim) of a batch and the codes (n,) that they chose. Gives how many
        different codes those were."""
        decay, codes = self.recipe.decay, len(self.codebook)
        chosen = torch.bincount(indices, minlength=codes).to(self.counts)
        sums = torch.zeros_like(self.sums).index_add_(0, indices, vectors)
        self.counts.mul_(decay).add_(chosen, alpha=1 - decay)
        self.sums.mul_(decay).add_(sums, alpha=1 - decay)
        if self.recipe.codebook == "ema":
            total = self.counts.sum()
            smoothed = (self.counts + self.EPSILON) / (total + codes * self.EPSILON) * total
            self.codebook.copy_(self.sums / smoothed[:, None])
        dead = (self.counts < self.recipe.dead).nonzero().flatten()
        if len(dead):
            drawn = torch.randint(len(vectors), (len(dead),), generator=generator).to(vectors.device)
            self.codebook[dead] = vectors[drawn]
            self.sums[dead] = vectors[drawn]
            self.counts[dead] = 1.0
        return (chosen > 0).sum()

    def state(self) -> dict[str, Tensor]:
        """The averages."""
        return {"counts": self.counts, "sums": self.sums}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Averages from `state`."""
        self.counts.copy_(state["counts"])
        self.sums.copy_(state["sums"])
