import pytest

from app.video.pixels import Color, bit_depth, color_of, has_alpha, whole_chroma


@pytest.mark.parametrize(
    ("pixel_format", "depth"),
    [
        ("yuv420p", 8),
        ("nv12", 8),
        ("yuv420p10le", 10),
        ("p010le", 10),
        ("gbrp12le", 12),
        ("gray16be", 16),
        ("rgb48be", 16),
        ("rgba64le", 16),
        ("yuva444p12le", 12),
        ("bgra", 8),
        ("pal8", 8),
        ("ya16le", 16),
    ],
)
def test_bit_depth(pixel_format: str, depth: int) -> None:
    assert bit_depth(pixel_format) == depth


@pytest.mark.parametrize(
    ("pixel_format", "whole"),
    [
        ("yuv420p", (True, False, False)),
        ("nv12", (True, False, False)),
        ("p010le", (True, False, False)),
        ("yuvj422p", (True, False, True)),
        ("yuva440p", (True, True, False)),
        ("yuv444p10le", (True, True, True)),
        ("gbrp", (True, True, True)),
    ],
)
def test_whole_chroma(pixel_format: str, whole: tuple[bool, bool, bool]) -> None:
    """Of 8x8, of an odd width, of an odd height."""
    sizes = [(8, 8), (7, 8), (8, 7)]
    assert tuple(whole_chroma(pixel_format, *size) for size in sizes) == whole


@pytest.mark.parametrize(("pixel_format", "alpha"), [("yuva420p", True), ("rgba", True), ("yuv420p", False)])
def test_alpha(pixel_format: str, alpha: bool) -> None:
    assert has_alpha(pixel_format) == alpha


def test_a_matrix_that_is_not_known_is_decided() -> None:
    tags = ("tv", "drawtext=x", "bt709", "bt709")
    assert color_of("yuv420p", 640, 480, tags) == Color("smpte170m", False, "bt709", "bt709")
