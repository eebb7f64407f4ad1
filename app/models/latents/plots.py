"""The plots of a report, as PNG. matplotlib draws them without a screen and without its global state."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from app.models.latents.quality import Curve
    from app.models.latents.report import Report
    from app.models.latents.spool import Latents

WIDE: Final = 10.0  # inches, at 100 points each
CLIPS: Final = {"original": "#2b6cb0", "reconstructed": "#2f855a", "edited": "#c05621"}
MOST = 64  # channels that are pictured
MOMENTS: Final = (0.0, 0.25, 0.5, 0.75, 1.0)


def draw(report: Report, own: Latents, edited: Latents | None) -> dict[str, bytes]:
    """Each plot by its name: quality, components, holds, channels, histograms, images, colours."""
    clips = {"original": own, **({"edited": edited} if edited is not None else {})}
    return {
        "quality": _quality(report),
        "components": _components(report),
        "holds": _holds(report),
        "channels": _channels(report),
        "histograms": _histograms(report),
        "images": _images(clips),
        "colours": _colours(clips),
    }


def _figure(height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDE, height), dpi=100, layout="constrained", facecolor="white")


def _png(figure: Any) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def _quality(report: Report) -> bytes:
    figure = _figure(2.8)
    left, right = figure.subplots(1, 2)
    for name, quality in report.quality.items():
        _curve(left, quality.psnr_curve, name)
        if quality.ssim_curve is not None:
            _curve(right, quality.ssim_curve, name)
    left.set(xlabel="frame", ylabel="dB", title="PSNR against the original")
    right.set(xlabel="frame", title="SSIM against the original")
    left.legend(frameon=False)
    if not right.lines:
        right.text(0.5, 0.5, "frames are smaller than 11 pixels", ha="center", transform=right.transAxes)
    return _png(figure)


def _curve(axes: Any, curve: Curve, name: str) -> None:
    frames = [i * curve.every for i in range(len(curve.values))]
    marker = "o" if len(frames) < 3 else ""
    axes.plot(frames, curve.values, color=CLIPS.get(name), label=name, linewidth=1.5, marker=marker)
    axes.grid(alpha=0.3)


def _components(report: Report) -> bytes:
    figure = _figure(3.2)
    left, right = figure.subplots(1, 2)
    tracks = report.tracks
    for name, points in tracks.points.items():
        columns = list(zip(*points, strict=True)) or [()]
        first, second = columns[0], columns[1] if len(columns) > 1 else (0.0,) * len(points)
        left.plot(first, second, "-", color=CLIPS.get(name), alpha=0.5, linewidth=1)
        left.scatter(first, second, color=CLIPS.get(name), s=10, label=name)
        left.scatter(first[:1], second[:1], color=CLIPS.get(name), s=60, marker="s")
        for values, style in zip(columns[:2], ("-", ":"), strict=False):
            right.plot(tracks.numbers[name], values, style, color=CLIPS.get(name), linewidth=1.5)
    shares = [f"{share:.0%}" for share in tracks.explained] + ["0%", "0%"]
    left.set(xlabel=f"1st component ({shares[0]})", ylabel=f"2nd ({shares[1]})")
    left.set_title("the clip's way (square: its start)")
    right.set(xlabel="latent", title="1st (line) and 2nd (dots) component over time")
    left.legend(frameon=False)
    return _png(figure)


def _holds(report: Report) -> bytes:
    features = list(report.holds[0]) if report.holds else []
    channels = len(report.holds)
    figure = _figure(1.1 + 0.32 * len(features))
    axes = figure.subplots()
    rows = [[held[feature] for held in report.holds] for feature in features]
    shown = axes.imshow(rows, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
    axes.set_yticks(range(len(features)), features)
    axes.set_xticks(range(0, channels, max(channels // 16, 1)))
    axes.set(xlabel="channel")
    if channels <= 16:
        for row, values in enumerate(rows):
            for column, value in enumerate(values):
                colour = "white" if abs(value) > 0.6 else "black"
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
    figure.colorbar(shown, ax=axes, label="correlation")
    return _png(figure)


def _channels(report: Report) -> bytes:
    figure = _figure(2.8)
    left, right = figure.subplots(1, 2)
    offset = 0.4 / max(len(report.channels), 1)
    for i, (name, channels) in enumerate(report.channels.items()):
        at = [c + (i - (len(report.channels) - 1) / 2) * offset for c in range(len(channels))]
        means, spreads = [c.mean for c in channels], [c.std for c in channels]
        left.errorbar(at, means, spreads, fmt="o", color=CLIPS.get(name), label=name, markersize=3, capsize=2)
        changes = [c.change or 0.0 for c in channels]
        right.bar(at, changes, width=offset, color=CLIPS.get(name))
    left.axhspan(-1, 1, color="black", alpha=0.05)
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True)
    left.set(xlabel="channel", title="mean and standard deviation (grey: -1 to 1)")
    right.set(xlabel="channel", title="mean change from a latent to the next")
    left.legend(frameon=False)
    return _png(figure)


def _histograms(report: Report) -> bytes:
    from app.models.latents.analyze import BINS, REACH

    names = list(report.channels)
    figure = _figure(2.6)
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        shares = [channel.histogram for channel in report.channels[name]]
        scale = max(sorted(share for row in shares for share in row)[-len(shares)], 2 / BINS)
        extent = (-REACH, REACH, len(shares) - 0.5, -0.5)
        axes.imshow(
            shares, cmap="magma", aspect="auto", extent=extent, vmin=0, vmax=scale, interpolation="nearest"
        )
        axes.set(xlabel="value", ylabel="channel", title=f"{name}: where values lie")
    return _png(figure)


def _images(clips: dict[str, Latents]) -> bytes:
    """Every channel of the latent in the middle, each clip a block of rows; blue below 0, red above."""
    channels, _, height, width = clips["original"].shape
    channels = min(channels, MOST)
    columns = min(channels, 8)
    rows = -(-channels // columns)
    cell = WIDE / columns
    figure = _figure((cell * min(height / width, 1.6) + 0.25) * rows * len(clips))
    grid = figure.subplots(rows * len(clips), columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    middle = clips["original"].shape[1] // 2
    reaches = clips["original"].read(middle, middle + 1).abs().amax((1, 2, 3)).clamp(min=1e-6).tolist()
    for block, (name, clip) in enumerate(clips.items()):
        latent = clip.read(middle, middle + 1)[:, 0]
        for channel in range(channels):
            axes = grid[block * rows + channel // columns][channel % columns]
            values, reach = latent[channel].numpy(), reaches[channel]
            axes.imshow(values, cmap="RdBu_r", vmin=-reach, vmax=reach, interpolation="nearest")
            axes.set_title(f"{name} {channel}" if not channel else str(channel), fontsize=8, pad=2)
    return _png(figure)


def _colours(clips: dict[str, Latents]) -> bytes:
    from app.models.latents.analyze import colours

    height, width = clips["original"].shape[2:]
    cell = WIDE / len(MOMENTS)
    figure = _figure((cell * min(height / width, 1.6) + 0.3) * len(clips))
    grid = figure.subplots(len(clips), len(MOMENTS), squeeze=False)
    for row, (name, clip) in zip(grid, clips.items(), strict=True):
        for axes, moment, picture in zip(
            row, MOMENTS, colours(clip, MOMENTS, clips["original"]), strict=True
        ):
            axes.imshow(picture.numpy(), interpolation="nearest")
            axes.set_title(f"{name}, {moment:.0%}", fontsize=8, pad=2)
            axes.axis("off")
    return _png(figure)
