"""The report of an autoencoder and a clip: figures as JSON, plots as PNG, and one page that a person reads.

    extra.require()                               # before any work: are the packages for plots there?
    report = Report(title="holiday.mp4", codec=facts, ..., quality={"reconstructed": meter.quality()})
    written = write(folder, report, own, edited, sheet=folder / "sheet.png")

`plots.py` draws, `page.py` lays out; this file holds what they show. Importing it needs no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.models.latents import page, plots
from app.models.latents.codec import Facts
from app.models.latents.extra import require
from app.video.place import failures_of, temporary

if TYPE_CHECKING:
    from app.models.latents.analyze import Channel, Compression, Tracks
    from app.models.latents.quality import Quality
    from app.models.latents.spool import Latents


@dataclass(frozen=True)
class Report:
    """What is told of a clip in a codec.

    title: name of the clip. model: of the codec, as the manifest names it. width, height, frames, rate: of
    the clip. quality: of "reconstructed" and, where there are edits, "edited", each against the original.
    channels: statistics of the "original" latents and of the "edited" ones. holds: see
    `analyze.channel_map`. edits, weights: what was done to latents and to weights, one line each.
    notes: what a person should know.
    """

    title: str
    model: str
    codec: Facts
    width: int
    height: int
    frames: int
    rate: str
    compression: Compression
    quality: Mapping[str, Quality]
    channels: Mapping[str, tuple[Channel, ...]]
    holds: tuple[dict[str, float], ...]
    tracks: Tracks
    edits: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """For JSON: every number is finite."""
        return asdict(self)


@dataclass(frozen=True)
class Written:
    """The files of a report."""

    figures: Path
    page: Path
    plots: tuple[Path, ...]


def write(
    folder: Path, report: Report, own: Latents, edited: Latents | None, sheet: Path | None = None
) -> Written:
    """Write report.json, report.html and the plots (NAME.png) into an existing folder.

    own, edited: the latents, for pictures of their channels. sheet: a picture of moments of the clips, shown
    on the page, which refers to no other file.

    Raises:
        UnavailableError: `package_missing`. FileError: `output_no_space`, `output_failed`.
    """
    require()
    drawn = plots.draw(report, own, edited)
    shown = dict(drawn)
    if sheet is not None:
        with failures_of(sheet):
            shown = {"sheet": sheet.read_bytes(), **shown}
    figures = json.dumps(report.to_dict(), indent=1, allow_nan=False)
    paths = {name: folder / f"{name}.png" for name in drawn}
    for name, path in paths.items():
        _put(path, drawn[name])
    _put(folder / "report.json", figures.encode())
    _put(folder / "report.html", page.render(report, shown).encode())
    return Written(folder / "report.json", folder / "report.html", tuple(paths.values()))


def _put(path: Path, content: bytes) -> None:
    hidden = temporary(path)
    try:
        with failures_of(path):
            hidden.write_bytes(content)
            hidden.replace(path)
    finally:
        hidden.unlink(missing_ok=True)
