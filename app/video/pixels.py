"""What ffmpeg's names of pixel formats and of colours mean. Knows nothing of files."""

from __future__ import annotations

import re
from dataclasses import dataclass

# The names of matrices that zscale takes; what a file says is never handed on otherwise.
MATRICES = (
    *("gbr", "bt709", "fcc", "bt470bg", "smpte170m", "smpte240m", "ycgco", "bt2020nc", "bt2020c"),
    *("chroma-derived-nc", "chroma-derived-c", "ictcp"),
)
HDR = {"smpte2084": "HDR (PQ)", "arib-std-b67": "HDR (HLG)"}  # transfers
_ALPHA = re.compile(r"^(yuva|gbrap|rgba|bgra|argb|abgr|ya\d|ayuv)")
_RGB = re.compile(r"^(gbr|rgb|bgr|argb|abgr|0rgb|0bgr|x2rgb|x2bgr|pal8|mono)")
_SUBSAMPLING = {"420": (2, 2), "422": (2, 1), "440": (1, 2), "411": (4, 1), "410": (4, 4)}


@dataclass(frozen=True)
class Color:
    """How stored values become RGB: names are ffmpeg's; what the file does not say is decided here."""

    matrix: str  # "bt709", "smpte170m", ...; "gbr" where RGB is stored
    full_range: bool
    primaries: str
    transfer: str


def color_of(pixel_format: str, width: int, height: int, tags: tuple[str, ...]) -> Color:
    """Tags as the file gives them; without, what players assume: BT.709 above television's 576 rows.

    A side of 1280 counts as well: a wide film cut from 1280x720 has fewer rows and the same colours.
    """
    stored_range, matrix, primaries, transfer = tags
    if _RGB.match(pixel_format):
        return Color("gbr", True, primaries, transfer)
    if matrix == "gbr" or matrix not in MATRICES:
        large = max(width, height) >= 1280 or min(width, height) > 576
        matrix = "bt709" if large else "smpte170m"
    if stored_range in ("tv", "pc"):
        full = stored_range == "pc"
    else:
        full = pixel_format.startswith(("yuvj", "gray", "ya"))
    return Color(matrix, full, primaries, transfer)


def bit_depth(pixel_format: str) -> int:
    """Bits of a channel: "yuv420p10le" -> 10, "rgb48be" -> 16, "nv12" -> 8."""
    if re.match(r"(rgb|bgr)48|(rgba|bgra)64", pixel_format):
        return 16
    found = re.search(r"(?:p|gray|ya|p0|x2rgb|x2bgr|y2|xv)(9|10|12|14|16)(?:msb)?(?:le|be)?$", pixel_format)
    return int(found[1]) if found else 8


def whole_chroma(pixel_format: str, width: int, height: int) -> bool:
    """Whether sides of the stored size are multiples of the chroma's subsampling."""
    found = re.search(r"yuv[aj]?(4\d\d)|(?:nv12|nv21|p01\d)", pixel_format)
    across, down = _SUBSAMPLING.get(found[1] or "420", (1, 1)) if found else (1, 1)
    return width % across == 0 and height % down == 0


def has_alpha(pixel_format: str) -> bool:
    return bool(_ALPHA.match(pixel_format))
