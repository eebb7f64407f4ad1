"""Edits of latents, applied in order.

    edited = apply(edits, {"a": clip, "b": other}, folder)
    frames = codec.decode(chunks(edited))

An edit is a view of the clip before it: nothing is computed before it is read, and what is read is the same
however it is cut into chunks, because each latent's value depends on its number alone. Edits that look far in
time (smooth, sharpen, shuffle, motion) would compute the edits before them many times over, so those are put
into a file first, and so is the result; memory does not grow with the clip. What each edit is stands in
`edit_value.py`, `edit_time.py` and `edit_mix.py`, what may be asked for in `edit_request.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from app.errors import UsageError
from app.models.latents import edit_mix, edit_time, edit_value
from app.models.latents.edit_request import OWN, Described
from app.models.latents.spool import Latents, Spool, View, chunks, spool

Clips = Mapping[str, Latents]
_Make = Callable[[Any, Latents, Clips], Latents]  # an edit, the clip so far, the clips by name

_EDITS: Mapping[str, _Make] = {
    "noise": edit_value.noise,
    "scale": edit_value.scale,
    "quantise": edit_value.quantise,
    "mask": edit_value.mask,
    "smooth": edit_time.smooth,
    "sharpen": edit_time.sharpen,
    "shuffle": edit_time.shuffle,
    "motion": edit_time.motion,
    "interpolate": edit_mix.interpolate,
    "path": edit_mix.path,
    "grid": edit_mix.grid,
    "arithmetic": edit_mix.arithmetic,
}
_FAR = {"smooth", "sharpen", "shuffle", "motion"}


def apply(
    edits: Sequence[Described],
    clips: Clips,
    folder: Path,
    on_step: Callable[[], None] = lambda: None,
) -> Latents:
    """The clip "a" of `clips` after all edits, of the same shape; `clips` stay as they are.

    folder: an existing one, for the file of latents that the result reads from, `edited-N`; while it is
        made there may be one more.
    on_step: called now and then while latents are put into a file; may raise to stop.

    Raises:
        UsageError: `clip_unknown`, `channel_unknown`, `grid_too_fine`, `clip_mismatch`, before any work.
        InputError: `latents_not_finite`.
    """
    check(edits, {name: clip.shape for name, clip in clips.items()})
    if not edits:
        return clips[OWN]
    edited, lazy = clips[OWN], False
    made: Spool | None = None  # the file that `edited` is computed from, if it is not the clip itself
    for number, edit in enumerate(edits):
        if edit.kind in _FAR and lazy:
            edited = made = _replace(made, edited, folder / f"edited-{number}", on_step)
        changed = _EDITS[edit.kind](edit, edited, clips)
        edited, lazy = _in_channels(edited, changed, getattr(edit, "channels", None), edit.kind), True
    return _replace(made, edited, folder / f"edited-{len(edits)}", on_step)


def check(edits: Sequence[Described], shapes: Mapping[str, tuple[int, int, int, int]]) -> None:
    """Whether edits can be applied to clips of these shapes, (channels, latents, height, width).

    Raises:
        UsageError: `clip_unknown`, `channel_unknown`, `grid_too_fine`, `clip_mismatch`.
    """
    channels, count, height, width = shapes[OWN]
    for number, edit in enumerate(edits, 1):
        where = f"Edit {number} ({edit.kind})"
        for name in sorted(edit.clips()):
            if name not in shapes:
                raise UsageError(
                    "clip_unknown",
                    f"{where} needs the clip {name!r}, which is not among those given ({', '.join(shapes)}): "
                    "give it, or name another.",
                )
            other = shapes[name]
            if (other[0], *other[2:]) != (channels, height, width):
                raise UsageError(
                    "clip_mismatch",
                    f"{where} needs the clip {name!r}, whose latents have {other[0]} channels and are "
                    f"{other[2]}x{other[3]}; expected {channels} channels and {height}x{width}, as the "
                    "edited clip has: give clips of one size.",
                )
        wrong = [channel for channel in getattr(edit, "channels", None) or () if channel >= channels]
        if wrong:
            raise UsageError(
                "channel_unknown",
                f"{where} names channel {wrong[0]}; expected 0 to {channels - 1}, which there are.",
            )
        if edit.kind == "grid" and edit.rows * edit.columns > count:
            raise UsageError(
                "grid_too_fine",
                f"{where} has {edit.rows} x {edit.columns} cells for a clip of {count} latents; expected a "
                "latent for each: give a coarser grid or a longer clip.",
            )


def _replace(old: Spool | None, latents: Latents, path: Path, on_step: Callable[[], None]) -> Spool:
    """`latents` in a file, and the file `old` that they were computed from removed."""

    def watched() -> Iterator[Tensor]:
        for chunk in chunks(latents):
            on_step()
            yield chunk

    new = spool(path, watched())
    if old is not None:
        old.path.unlink()
    return new


def _in_channels(before: Latents, after: Latents, channels: Sequence[int] | None, kind: str) -> Latents:
    """`after` in these channels, `before` in all others; a mask looks after its own."""
    if channels is None or kind == "mask":
        return after
    chosen = torch.zeros(before.shape[0], 1, 1, 1, dtype=torch.bool)
    chosen[list(channels)] = True

    def read(start: int, stop: int) -> Tensor:
        return torch.where(chosen, after.read(start, stop), before.read(start, stop))

    return View(before.shape, read)
