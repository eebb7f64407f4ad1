"""Pieces of films of many kinds: however one is made, a worker reads the film's own frames from it."""

from pathlib import Path

import numpy as np
import pytest

from app.errors import InputError
from app.job.request import RestoreRequest
from app.models.seedvr2.segment import Span
from app.video.probe import probe
from app.video.read import read_frames
from examples.serve.distribute.film import Film, read_film
from examples.serve.distribute.piece import Cutter
from tests.examples.films import film
from tests.video.clips import make

X264 = ["-c:v", "libx264", "-pix_fmt", "yuv420p"]
OPEN = "open-gop=1:scenecut=0:keyint=30"
KINDS = {
    "closed.mp4": [*X264, "-g", "30"],
    "open.mp4": [*X264, "-x264-params", OPEN],
    "open.ts": [*X264, "-x264-params", OPEN],
    "hevc.mp4": ["-c:v", "libx265", "-pix_fmt", "yuv420p10le", "-x265-params", f"log-level=error:{OPEN}"],
    "mpeg2.mpg": ["-c:v", "mpeg2video", "-g", "15", "-bf", "2", "-pix_fmt", "yuv420p", "-f", "vob"],
    "mpeg4.avi": ["-c:v", "mpeg4", "-bf", "2", "-g", "40", "-pix_fmt", "yuv420p"],
    "vp9.webm": ["-c:v", "libvpx-vp9", "-deadline", "realtime", "-cpu-used", "8", "-g", "60"],
    "prores.mov": ["-c:v", "prores_ks", "-pix_fmt", "yuv422p10le"],
    "variable.mp4": ["-vf", "select='mod(n\\,7)'", "-fps_mode", "vfr", *X264, "-g", "30"],
    "late.mkv": ["-vf", "setpts=PTS+1.5/TB", *X264, "-g", "30"],
}


def read(path: Path, folder: Path, **fields: object) -> Film:
    return read_film(path, RestoreRequest(**fields), folder / "film.json", lambda *told: None)


def pieces(film: Film, folder: Path) -> list[str]:
    """Cut pieces out of a film, and look at the frames; returns how they were made."""
    deep = "rgb48le" if film.info.bit_depth > 8 else "rgb24"
    whole = np.stack(list(read_frames(film.path, film.info, rate=film.rate, pixel_format=deep)))
    cutter, ways = Cutter(film, folder), []
    for start, stop in ((0, 20), (27, 50), (45, len(film) - 3), (len(film) - 10, len(film))):
        piece = cutter.cut(Span(start, stop), "piece")
        skip = start - piece.source_start
        frames = list(read_frames(piece.path, probe(piece.path), rate=film.job_rate, pixel_format=deep))
        assert np.array_equal(np.stack(frames[skip : skip + stop - start]), whole[start:stop])
        assert not probe(piece.path).has_audio
        ways.append("encoded" if probe(piece.path).codec == "ffv1" else "copied")
        piece.path.unlink()
    assert [path.name for path in folder.iterdir()] == ["film.json"]
    return ways


@pytest.mark.parametrize("name", KINDS)
def test_a_piece_has_the_films_frames(name: str, tmp_path: Path) -> None:
    picture = ["-f", "lavfi", "-i", "testsrc2=size=64x48:rate=25", "-t", "6", "-an"]
    path, folder = make(tmp_path / name, *picture, *KINDS[name]), tmp_path / "parts"
    folder.mkdir()
    ways = pieces(read(path, folder), folder)
    if name not in ("variable.mp4", "mpeg4.avi", "mpeg2.mpg"):
        assert set(ways) == {"copied"}


def test_a_film_that_is_turned(tmp_path: Path) -> None:
    flat = film(tmp_path / "flat.mp4", 130)
    path = make(tmp_path / "turned.mp4", "-display_rotation", "90", "-i", str(flat), "-c", "copy")
    (tmp_path / "parts").mkdir()
    made = read(path, tmp_path / "parts")
    assert (made.info.width, made.info.height) == (32, 48)
    pieces(made, tmp_path / "parts")


def test_another_rate_is_encoded(tmp_path: Path) -> None:
    path = film(tmp_path / "film.mp4", 600)
    (tmp_path / "parts").mkdir()
    made = read(path, tmp_path / "parts", rate=10)
    assert len(made) == 240
    assert "encoded" in pieces(made, tmp_path / "parts")


def test_what_cannot_be_cut_out_unchanged_is_refused(tmp_path: Path) -> None:
    path = film(tmp_path / "film.mp4", 60)
    made = read(path, tmp_path)
    made.checks[30] ^= 1
    with pytest.raises(InputError, match=r"Frames 20 to 39 of film\.mp4 cannot be cut out"):
        Cutter(made, tmp_path).cut(Span(20, 40), "piece")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["film.json", "film.mp4"]


def test_a_film_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = film(tmp_path / "film.mp4", 40, 30)
    first = read(path, tmp_path)
    assert [len(shot) for shot in first.shots] == [40, 30]
    with monkeypatch.context() as patch:
        patch.setattr("examples.serve.distribute.film.checked", None)
        assert read(path, tmp_path) == first
    assert [len(shot) for shot in read(path, tmp_path, cuts=False).shots] == [70]
    (tmp_path / "film.json").write_text("torn")
    assert read(path, tmp_path) == first


@pytest.mark.parametrize("name", ["still.png", "moving.gif"])
def test_an_image_is_no_film(name: str, tmp_path: Path) -> None:
    frames = "1" if name == "still.png" else "5"
    path = make(tmp_path / name, "-f", "lavfi", "-i", "testsrc2=size=48x32:rate=10", "-frames:v", frames)
    with pytest.raises(InputError, match="image"):
        read(path, tmp_path)
