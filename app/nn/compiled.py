"""torch.compile for the element-wise steps between a transformer's matrices.

A step is a function of tensors: weights and modulations come in as arguments, so that one compiled step
serves all layers. It is compiled before the first job, from an example; the dimensions that this leaves open
may be of any size, so that no size, length or cache of a later clip compiles it again. Matrix products and
attention are no steps: torch's own are hard to beat. Knows no model.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from app.errors import ConfigError
from app.progress import duration_text

log = logging.getLogger(__name__)

Step = Callable[..., Any]
Compiling = tuple[Step, Sequence[object]]  # a step and arguments as it will be called with


@dataclass(frozen=True)
class Compiler:
    """`folder`: where compiled code is kept for the next start; `None`: where torch keeps it."""

    folder: Path | None = None

    def compiled(self, device: torch.device, steps: Sequence[Compiling]) -> list[Step]:
        """Each step, compiled for tensors on `device` like those beside it, which `example` marks; for use
        in inference mode.

        Raises:
            ConfigError: `compiler_unusable`: there is no C++ compiler or no triton, or it fails.
        """
        from torch._inductor import config

        if self.folder is not None:  # torch has no other way to be told
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(self.folder)
        begin = time.perf_counter()
        try:
            # In this process: the steps are few, and helpers would stay beside it.
            with torch.inference_mode(), config.patch(compile_threads=1):
                made = [_compiled(*each) for each in steps]
        except Exception as error:
            raise ConfigError("compiler_unusable", _sentence(device, error)) from error
        log.info("compiled %d steps in %s", len(made), duration_text(time.perf_counter() - begin))
        return made


def example(x: Tensor, *dims: int) -> Tensor:
    """x as an example of arguments whose dimensions `dims` may be of any size."""
    from torch._dynamo.decorators import mark_unbacked

    for dim in dims:
        mark_unbacked(x, dim)
    return x


def _compiled(step: Step, arguments: Sequence[object]) -> Step:
    # Not dynamic: else a second model of another width would get code for all widths, and the first one, too.
    made: Step = torch.compile(step, fullgraph=True, dynamic=False)
    made(*arguments)
    return made


def _sentence(device: torch.device, error: Exception) -> str:
    reason = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
    needs = "triton and a C compiler, gcc" if device.type == "cuda" else "a C++ compiler, g++"
    return (
        f"SEEDPOD_COMPILE is on, and torch.compile, which needs {needs}, failed on {device}: {reason}. "
        "Install what is missing (docs/speed.md), or set SEEDPOD_COMPILE=off."
    )
