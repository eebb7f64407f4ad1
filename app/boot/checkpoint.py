"""Loading a checkpoint file into a model: the one `load` that every model goes through.

The module is built on the meta device, so no memory is spent on values that are thrown away. Tensors
are read straight from their places in the file into their own memory by several threads in large
blocks (memory mapping crawls on network volumes), cast block by block, and assigned. Everything must
fit exactly. It knows nothing of which file a model should have, or of what its tensors mean.
"""

from __future__ import annotations

import ctypes
import gc
import math
import sys
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

import torch
from torch import Tensor, nn

from app.boot.tensorfile import TensorEntry, TensorIndex, compare_tensors, matches, read_index, rename_tensors
from app.boot.tensorread import DTYPES, Rows, read_tensors
from app.errors import ConfigError
from app.progress import Progress, Silent

if TYPE_CHECKING:
    from app.boot.manifest import Format

Model = TypeVar("Model", bound=nn.Module)

# How far a stored buffer may lie from the one the module computes, relative and absolute: the rounding of its
# dtype, and the smallest steps that it has.
_ROUNDING: Final = {
    "F64": (1e-5, 0.0),
    "F32": (1e-5, 0.0),
    "F16": (2**-10, 2**-24),
    "BF16": (2**-7, 0.0),
    "F8_E4M3": (2**-4, 2**-10),
    "F8_E5M2": (2**-3, 2**-17),
}


def load(
    build: Callable[[], Model],
    source: Path,
    format: Format,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    rename: Callable[[str], str | None] | None = None,
    section: str | None = None,
    optional: Collection[str] = (),
    dropped: Collection[str] = (),
    recompute: Collection[str] = (),
    readers: int = 8,
    progress: Progress | None = None,
) -> Model:
    """The module that `build` makes, with the tensors of the file `source`, ready for inference.

    Args:
        build: called on the meta device. Submodules that make buffers themselves define
            `reset_buffers()`, which sets them anew; those that make their `weight` of a file's rows define
            `receive_rows(device)`, which gives what takes them.
        dtype: of the floating-point tensors, cast while they are read; None keeps the file's, but for
            8 bits, in which nothing computes: they become bfloat16. Integers and booleans are never cast.
        rename: the model's name of a tensor in the file; None leaves the tensor out.
        section: the part of a file that holds several state dicts ("generator_ema").
        optional: names or shell patterns ("pose_proj.*"). Where the file has no tensor of a pattern,
            its parameters become None.
        dropped: names or shell patterns of tensors in the file that the model does not want.
        recompute: names or shell patterns of buffers whose value is the module's own. A stored value
            must agree within the rounding of its dtype.
        readers: threads that read the file.

    Raises:
        ConfigError: `checkpoint_tensors`, naming tensors that are missing, left over, of another shape
            or kind, beyond the range of `dtype`, or still on meta; and those of `read_index`.
        FileError: `file_unreadable` or `file_shrank`, with the offset.
    """
    index = read_index(source, format, section)
    renamed = rename_tensors(index, rename) if rename else index
    with torch.device("meta"):
        model = build()
    wanted = model.state_dict()
    computed = {name: buffer for name, buffer in model.named_buffers() if matches(name, recompute)}
    expected = {name: tensor for name, tensor in (wanted | computed).items() if name in renamed.tensors}
    absent = [name for name in wanted if name not in expected and name not in computed]
    shapes = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    shapes |= {name: tuple(wanted[name].shape) for name in absent}
    _refuse(index, compare_tensors(shapes, renamed, optional, dropped))
    _refuse(index, _kinds(expected, renamed))

    places = {name: renamed.tensors[name] for name in expected if name not in computed}
    by_rows = _by_rows(model, torch.device(device))
    tensors = {
        name: _empty(entry, torch.device(device), dtype)
        for name, entry in places.items()
        if name not in by_rows
    }
    targets = [(entry, by_rows.get(name) or tensors[name]) for name, entry in places.items()]
    read_tensors(index, targets, readers, progress or Silent())
    model.load_state_dict(tensors, strict=False, assign=True)
    _reset_buffers(model, torch.device(device))
    for name in absent:
        _forget(model, name)
    stored = {name: renamed.tensors[name] for name in computed if name in renamed.tensors}
    _refuse(index, _compare_computed(model, index, stored))
    _refuse(index, _still_on_meta(model))
    return model.requires_grad_(False).eval()


def load_tensor(path: Path, format: Format) -> Tensor:
    """The one tensor of a file such as a prompt embedding, on the CPU, in the file's dtype.

    Raises:
        ConfigError: `checkpoint_tensors` if the file holds several; and those of `read_index`.
        FileError: `file_unreadable` or `file_shrank`.
    """
    index = read_index(path, format)
    if len(index.tensors) != 1:
        count = len(index.tensors)
        raise ConfigError(
            "checkpoint_tensors",
            f"{path} holds {count} tensors, expected one (a prompt embedding): use the published file.",
        )
    (entry,) = index.tensors.values()
    tensor = _empty(entry, torch.device("cpu"), None)
    read_tensors(index, [(entry, tensor)], readers=1, progress=Silent())
    return tensor


def give_back() -> None:
    """Return freed memory to the system and the device, as between the loads of two models."""
    gc.collect()
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # not every libc has it
            ctypes.CDLL(None).malloc_trim(0)
    cuda_is_used: Callable[[], bool] = torch.cuda.is_initialized
    if cuda_is_used():
        torch.cuda.empty_cache()
        # Pinned memory, which is kept as well: blocks of a transformer that waited there are many gigabytes.
        torch._C._host_emptyCache()


def loaded_bytes(index: TensorIndex) -> int:
    """Memory of all tensors of a file where `load` is given no type."""
    return sum(math.prod(entry.shape) * _type(entry, None).itemsize for entry in index.tensors.values())


def _empty(entry: TensorEntry, device: torch.device, dtype: torch.dtype | None) -> Tensor:
    return torch.empty(entry.shape, dtype=_type(entry, dtype), device=device)


def _type(entry: TensorEntry, dtype: torch.dtype | None) -> torch.dtype:
    stored = DTYPES[entry.dtype]
    if not stored.is_floating_point:
        return stored
    return dtype or (stored if stored.itemsize > 1 else torch.bfloat16)


def _by_rows(model: nn.Module, device: torch.device) -> dict[str, Rows]:
    """What takes the rows of which tensors."""
    return {
        f"{path}.weight": module.receive_rows(device)
        for path, module in model.named_modules()
        if callable(getattr(module, "receive_rows", None))
    }


def _kinds(expected: Mapping[str, Tensor], index: TensorIndex) -> list[str]:
    """Tensors whose stored dtype cannot stand for the model's: only floating point is cast."""
    return [
        f"Tensor {name} is {index.tensors[name].dtype}, expected {str(tensor.dtype).removeprefix('torch.')}."
        for name, tensor in expected.items()
        if (stored := DTYPES[index.tensors[name].dtype]) != tensor.dtype
        and not (stored.is_floating_point and tensor.dtype.is_floating_point)
    ]


def _reset_buffers(model: nn.Module, device: torch.device) -> None:
    """Let modules compute their own buffers: on the CPU, so that every device has the same numbers."""
    for module in model.modules():
        reset = getattr(module, "reset_buffers", None)
        if callable(reset):
            with torch.device("cpu"):
                reset()
            for owner in module.modules():
                for name, buffer in owner.named_buffers(recurse=False):
                    setattr(owner, name, buffer if buffer.is_meta else buffer.to(device))


def _forget(model: nn.Module, name: str) -> None:
    """Set the parameter or buffer `name`, which the file leaves out as it may, to None."""
    path, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(path), attribute, None)


def _compare_computed(model: nn.Module, index: TensorIndex, stored: Mapping[str, TensorEntry]) -> list[str]:
    """Stored buffers that differ from those the model computed by more than rounding."""
    values = {name: _empty(entry, torch.device("cpu"), None) for name, entry in stored.items()}
    if values:
        read_tensors(index, [(stored[name], value) for name, value in values.items()], 1, Silent())
    buffers = dict(model.named_buffers())
    sentences = []
    for name, value in values.items():
        own = buffers[name].detach().to("cpu", torch.float64)
        relative, absolute = _ROUNDING.get(stored[name].dtype, (0.0, 0.0))
        close = torch.isclose(value.to(torch.float64), own, rtol=relative, atol=absolute)
        if not close.all():
            worst = (value.to(torch.float64) - own).abs().max().item()
            sentences.append(f"Tensor {name} differs from what the model computes by up to {worst:.3g}.")
    return sentences


def _still_on_meta(model: nn.Module) -> list[str]:
    names = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if not names:
        return []
    return [f"{len(names)} tensor{'s' * (len(names) > 1)} without a value: {', '.join(names[:3])}."]


def _refuse(index: TensorIndex, sentences: list[str]) -> None:
    if sentences:
        raise ConfigError(
            "checkpoint_tensors",
            f"{index.path} does not fit the model: {' '.join(sentences[:4])} "
            "Expected exactly the model's tensors: put the published file of this model there.",
        )
