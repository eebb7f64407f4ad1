"""What can be said of a result's size before it is made: never more than the emptiest picture there is."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from app.errors import InputError, JobStopped
from app.job.archive import pack
from app.job.deliver import DeliverySettings
from app.job.fits import least_bytes, stopped_by_growth
from app.video.encoders import Codec
from app.video.write import VideoWriter


@pytest.mark.parametrize(("height", "width"), [(16, 16), (1, 1), (270, 480), (1080, 1920)])
def test_no_picture_is_smaller_than_the_least(height: int, width: int, tmp_path: Path) -> None:
    path = tmp_path / "black.png"
    Image.new("RGB", (width, height)).save(path, compress_level=9)
    least = least_bytes(".png", 1, height, width)
    assert 0.4 * path.stat().st_size < least <= path.stat().st_size


@pytest.mark.parametrize(
    ("suffix", "codec"),
    [
        ("", "png"),
        (".mp4", "h264"),
        (".mkv", "h264"),
        (".mp4", "hevc10"),
        (".mp4", "lossless"),
        (".mkv", "lossless"),
    ],
)
def test_no_clip_is_smaller_than_the_least(suffix: str, codec: Codec, tmp_path: Path) -> None:
    """A black one, which costs an encoder next to nothing."""
    path, count = tmp_path / f"result{suffix}", 60
    with VideoWriter(path, 64, 48, Fraction(30), codec=codec) as writer:
        for _ in range(count):
            writer.write(np.zeros((1, 48, 64, 3), np.uint8))
    made = pack(path) if path.is_dir() else path
    assert 0 < least_bytes(suffix, count, 48, 64) <= made.stat().st_size


def test_a_minute_of_frames_is_known_to_be_too_large() -> None:
    """What can be refused before it is made: 60 s of 1080p as PNG do not fit 7 MB, whatever they show."""
    assert least_bytes("", 60 * 30, 1080, 1920) > DeliverySettings().inline_bytes


def test_what_grows_too_large_is_stopped_and_what_was_there_does_not_count(tmp_path: Path) -> None:
    now = [0.0]
    (tmp_path / "source-1.mp4").write_bytes(bytes(5000))
    how = DeliverySettings(inline_bytes=1000)
    step = stopped_by_growth(tmp_path, how, lambda: None, lambda: now[0])
    frames = tmp_path / ".x.partial"
    frames.mkdir()
    for number in range(2):
        (frames / f"{number}.png").write_bytes(bytes(500))
        now[0] += 1
        step()
    (tmp_path / ".y.partial").write_bytes(b"1")
    step()  # it looks only twice a second
    now[0] += 1
    with pytest.raises(InputError) as caught:
        step()
    assert caught.value.code == "deliver_too_large"
    assert "1,001" in caught.value.message


def test_a_result_of_any_size_goes_to_a_folder_and_a_stop_is_passed_on(tmp_path: Path) -> None:
    def stop() -> None:
        raise JobStopped("job_cancelled", "The job was cancelled by its caller.")

    (tmp_path / "out").mkdir()
    step = stopped_by_growth(tmp_path, DeliverySettings(output_root=tmp_path / "out"), lambda: None)
    (tmp_path / "large").write_bytes(bytes(8_000_000))
    step()
    with pytest.raises(JobStopped):
        stopped_by_growth(tmp_path, DeliverySettings(), stop)()
