"""A report as one page of HTML: it refers to no other file and loads nothing, so it can be mailed.

Every text that comes from outside (names of clips and models, edits, notes) is escaped. Pictures wider than
`WIDEST` pixels are made smaller.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping
from html import escape
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from app.models.latents.report import Report

WIDEST: Final = 1800
PLOTS: Final = {
    "sheet": ("The clips", "The same moments of each clip. Look at edges, faces, text and thin lines first."),
    "quality": (
        "How near they come",
        "Higher is nearer. A reconstruction above 30 dB and 0.9 is hard to tell from its source.",
    ),
    "colours": (
        "Latents as colours",
        "The three directions in which the latents vary most, as red, green and blue. What keeps its colour "
        "is the same to the codec; edits are shown in the original's colours.",
    ),
    "images": (
        "Every channel",
        "The latent in the middle of the clip: blue is below 0, red above, as strong as in the original.",
    ),
    "holds": (
        "What each channel holds",
        "Correlation with brightness, blue and red tint, edges and motion of the pixels that a latent "
        "covers.",
    ),
    "channels": ("Channels", "A healthy codec's channels lie around 0 with a standard deviation near 1."),
    "histograms": ("Where values lie", "Bright where a channel has many of its values."),
    "components": (
        "How the clip moves among its latents",
        "Each dot is a latent, along the directions of the largest variance. Jumps are cuts, loops repeat.",
    ),
}
STYLE: Final = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a202c; background: #f7f8fa; margin: 0 }
main { max-width: 1060px; margin: 0 auto; padding: 24px 20px 60px }
h1 { font-size: 26px; margin: 8px 0 0; overflow-wrap: anywhere } h2 { font-size: 19px; margin: 36px 0 4px }
p { margin: 4px 0 10px; color: #4a5568 } img { max-width: 100%; height: auto; display: block }
figure { margin: 0; background: white; border: 1px solid #e2e8f0; border-radius: 8px; padding: 12px }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(180px, 1fr)); gap: 12px;
  margin: 20px 0 }
.card { background: white; border: 1px solid #e2e8f0; border-radius: 8px; padding: 12px 16px }
.card b { display: block; font-size: 26px; line-height: 1.3 } .card span { color: #4a5568; font-size: 14px }
table { border-collapse: collapse; background: white; width: 100% }
th, td { text-align: right; padding: 5px 12px; border: 1px solid #e2e8f0; white-space: nowrap }
th:first-child, td:first-child { text-align: left } code { font-size: 14px; overflow-wrap: anywhere }
.scroll { overflow-x: auto }
"""


def render(report: Report, pictures: Mapping[str, bytes]) -> str:
    """The page. pictures: PNG files by name; those that `PLOTS` names are shown, in its order."""
    title = escape(report.title)
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        # Whatever a name might smuggle in could not load or run anything.
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">",
        f"<title>{title}: latents</title><style>{STYLE}</style></head><body><main>",
        f"<h1>{title}</h1>",
        f"<p>{escape(_facts(report))}</p>",
        _cards(report),
        _list("Edits, in order", report.edits),
        _list("Changes of weights", report.weights),
        _list("Notes", report.notes),
    ]
    for name, (heading, hint) in PLOTS.items():
        if name in pictures:
            source = base64.b64encode(_small(pictures[name])).decode()
            picture = f'<img alt="{heading}" src="data:image/png;base64,{source}">'
            parts.append(f"<h2>{heading}</h2><p>{hint}</p><figure>{picture}</figure>")
            if name == "quality":
                parts.append(_qualities(report))
    parts.append(_statistics(report))
    parts.append("</main></body></html>")
    return "\n".join(part for part in parts if part)


def _facts(report: Report) -> str:
    codec = report.codec
    covers = f"{codec.spatial}x{codec.spatial} pixels"
    if codec.temporal > 1:
        covers += f" of {codec.temporal} frames (the first: of {codec.first})"
    return (
        f"{report.width}x{report.height}, {report.frames:,} frames at {report.rate} a second, through "
        f"{report.model} ({codec.name}). {report.compression.latents:,} latents of {codec.channels} "
        f"channels; each place covers {covers}. Scale: {codec.scale}."
    )


def _cards(report: Report) -> str:
    cards = [
        (f"{report.compression.bytes_16:.1f} : 1", "smaller than the frames, at 16 bits a number"),
    ]
    if report.compression.codebook is not None:
        cards.append((f"{report.compression.codebook:.1f} : 1", "smaller, as numbers of the codebook"))
    for name, quality in report.quality.items():
        cards.append((_figure(quality.psnr, "dB", "identical"), f"PSNR, {escape(name)}"))
        if quality.ssim is not None:
            cards.append((f"{quality.ssim:.4f}", f"SSIM, {escape(name)}"))
    shown = (f'<div class="card"><b>{value}</b><span>{label}</span></div>' for value, label in cards)
    return f'<div class="cards">{"".join(shown)}</div>'


def _qualities(report: Report) -> str:
    head = ("clip", "PSNR", "worst", "SSIM", "worst", "change", "original's", "error of change")
    rows = (
        (
            name,
            _figure(quality.psnr, "dB", "identical"),
            _figure(quality.psnr_worst, "dB", "identical"),
            _figure(quality.ssim, digits=4),
            _figure(quality.ssim_worst, digits=4),
            _figure(quality.temporal_other),
            _figure(quality.temporal),
            _figure(quality.temporal_error),
        )
        for name, quality in report.quality.items()
    )
    hint = (
        "Against the original. Worst: of one frame. Change: mean from a frame to the next, in steps of a "
        "byte; one higher than the original's flickers."
    )
    return f"{_table(head, rows)}<p>{hint}</p>"


def _statistics(report: Report) -> str:
    head = ("channel", "mean", "standard deviation", "least", "most", "change")
    tables = []
    for name, channels in report.channels.items():
        rows = (
            (str(number), *(_figure(v, digits=3) for v in (c.mean, c.std, c.least, c.most, c.change)))
            for number, c in enumerate(channels)
        )
        tables.append(f"<h2>Statistics of each channel: {escape(name)}</h2>{_table(head, rows)}")
    return "".join(tables)


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{top}</tr>{body}</table></div>'


def _list(heading: str, lines: Iterable[str]) -> str:
    items = "".join(f"<li><code>{escape(line)}</code></li>" for line in lines)
    return f"<h2>{heading}</h2><ol>{items}</ol>" if items else ""


def _figure(value: float | None, unit: str = "", without: str = "-", digits: int = 2) -> str:
    return without if value is None else f"{value:.{digits}f} {unit}".strip()


def _small(picture: bytes) -> bytes:
    from PIL import Image

    with Image.open(io.BytesIO(picture)) as image:
        if image.width <= WIDEST:
            return picture
        file = io.BytesIO()
        size = WIDEST, max(round(image.height * WIDEST / image.width), 1)
        image.convert("RGB").resize(size, Image.Resampling.LANCZOS).save(file, "PNG")
    return file.getvalue()
