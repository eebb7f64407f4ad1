from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

from app.errors import FileError, UnavailableError
from app.models.latents import analyze, extra
from app.models.latents.codec import Facts
from app.models.latents.patterns import Kind, pattern
from app.models.latents.pixels import from_bytes
from app.models.latents.quality import Meter
from app.models.latents.report import Report, Written, write
from app.models.latents.spool import Latents, held

HOSTILE = "<script>alert(1)</script><img src=//x.example/y onerror=z> \"'&"
FACTS = Facts("pool", channels=4, spatial=8, temporal=1, first=1, multiple=8, scale="as drawn")


def clip_and_report(
    kind: Kind = "circle", frames: int = 6, title: str = "clip.mp4"
) -> tuple[Report, Latents, Latents]:
    """A report of a codec that averages 8x8 pixels; its edit is noise."""
    drawn = list(pattern(kind, frames, 64, 96, 1))
    pixels = torch.cat([from_bytes(frame[None]) for frame in drawn])
    mean = torch.nn.functional.avg_pool2d(pixels, 8).transpose(0, 1)
    own = torch.cat([mean, mean[:1] - mean[2:]])
    edited = own + 0.2 * torch.randn(own.shape, generator=torch.Generator().manual_seed(0))
    meters = {"reconstructed": Meter(), "edited": Meter()}
    for n, frame in enumerate(drawn):
        meters["reconstructed"].add(frame, frame if frames == 1 else frame // 8 * 8)
        meters["edited"].add(frame, drawn[n - 1])
    clips = {"original": held(own), "edited": held(edited)}
    made = Report(
        title=title,
        model="nano-pool",
        codec=FACTS,
        width=96,
        height=64,
        frames=frames,
        rate="24",
        compression=analyze.compression(clips["original"], frames, 64, 96, FACTS),
        quality={name: meter.quality() for name, meter in meters.items()},
        channels={name: analyze.channel_statistics(clip) for name, clip in clips.items()},
        holds=analyze.channel_map([pixels], clips["original"], FACTS),
        tracks=analyze.principal_components(clips),
        edits=('{"kind": "noise", "strength": 0.2}', title),
        notes=(title,),
    )
    return made, clips["original"], clips["edited"]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Written]:
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("report")
    Image.new("RGB", (4000, 500), "orange").save(folder / "sheet.png")
    made, own, edited = clip_and_report(title=HOSTILE)
    return made, write(folder, made, own, edited, folder / "sheet.png")


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_figures_are_json_without_what_json_has_not(written: tuple[Report, Written]) -> None:
    made, files = written
    figures = json.loads(files.figures.read_text(), parse_constant=lambda word: pytest.fail(word))
    assert figures["title"] == HOSTILE
    assert figures["quality"]["reconstructed"]["psnr"] == made.quality["reconstructed"].psnr
    assert len(figures["channels"]["edited"]) == 4 and figures["compression"]["values"] == 48


def test_plots_are_pictures_that_show_something(written: tuple[Report, Written]) -> None:
    names = {path.stem for path in written[1].plots}
    assert names == {"quality", "components", "holds", "channels", "histograms", "images", "colours"}
    for path in written[1].plots:
        with Image.open(path) as picture:
            assert picture.format == "PNG" and 900 <= picture.width <= 1100
            assert len(picture.convert("RGB").getcolors(10**6) or []) > 20, path.name


def test_the_page_refers_to_nothing_and_escapes_what_comes_from_outside(
    written: tuple[Report, Written],
) -> None:
    page = _Page()
    page.feed(written[1].page.read_text())
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "iframe", "object", "video", "a", "base", "form"}
    assert page.text.count(HOSTILE) == 4  # title, heading, edit, note
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) == 8
    assert all(
        set(each) == {"alt", "src"} and str(each["src"]).startswith("data:image/png;base64,")
        for each in pictures
    )
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert not re.search(r"url\(|@import", written[1].page.read_text())


def test_nothing_else_is_left_in_the_folder(written: tuple[Report, Written]) -> None:
    expected = {"sheet.png", "report.json", "report.html", *(path.name for path in written[1].plots)}
    assert {path.name for path in written[1].page.parent.iterdir()} == expected


@pytest.mark.parametrize(("kind", "frames"), [("noise", 1), ("text", 2)])
def test_the_shortest_clips_have_a_report(kind: Kind, frames: int, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    made, own, _ = clip_and_report(kind, frames)
    files = write(tmp_path, made, own, None)
    assert ("identical" in files.page.read_text()) == (frames == 1)


def test_a_browser_shows_the_page(written: tuple[Report, Written], tmp_path: Path) -> None:
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("Chromium is not installed")
    picture = tmp_path / "page.png"
    subprocess.run(
        [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1100,4200", f"--screenshot={picture}",
            written[1].page.as_uri(),
        ],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    with Image.open(io.BytesIO(picture.read_bytes())) as shown:
        colours = {colour for _, colour in shown.convert("RGB").getcolors(10**7) or []}
    assert (255, 165, 0) in colours  # the sheet


@pytest.mark.parametrize("module", sorted(extra.PACKAGES))
def test_a_missing_package_is_named_before_any_work(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UnavailableError) as refused:
        extra.require()
    assert refused.value.code == "package_missing"
    assert refused.value.message.startswith(f"{extra.PACKAGES[module]} cannot be imported")


def test_a_folder_that_is_gone_is_an_error_with_its_name(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    made, own, edited = clip_and_report(frames=2)
    with pytest.raises(FileError) as refused:
        write(tmp_path / "gone", made, own, edited)
    assert refused.value.code == "output_failed" and str(tmp_path) not in refused.value.message


def test_importing_the_report_loads_neither_torch_nor_a_package_for_plots() -> None:
    code = (
        "import sys, app.models.latents.report; print({'torch', 'sklearn', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
