"""Several clips: folders and lists, results of each, and one that is damaged among good ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from app.errors import FileError, InputError, JobStopped, SeedpodError, UsageError
from app.job import clips as module
from app.job.autoencode_request import AutoencodeRequest, weights_of
from app.job.clips import Made, Refused, plan_clips, run_clips
from app.job.request import parse
from app.job.result import Limits
from app.progress import Silent
from tests.models.latents.small import codec

LIMITS = Limits(1 << 20, 1000)
PLAIN = AutoencodeRequest(report=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two pictures, a damaged clip, one that is no clip, notes, and what a file manager leaves."""
    made = tmp_path / "in"
    (made / "below").mkdir(parents=True)
    for number, name in enumerate(("b.png", "A.PNG", "below/c.png")):
        Image.new("RGB", (16, 16), (200, 90 * number, 50)).save(made / name)
    (made / "text.mp4").write_text("no clip\n" * 50)
    (made / "empty.mov").write_bytes(b"")
    (made / "notes.txt").write_text("notes")
    (made / "._b.png").write_bytes(b"\0\5\26\7")
    return made


def test_every_clip_of_a_folder(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    plan = plan_clips(PLAIN, [folder], {}, out, LIMITS)
    assert not out.exists()
    listed = run_clips(codec("vqvae"), "nano", plan, out, Silent())
    assert [(each.name, type(each)) for each in listed] == [
        ("A.PNG", Made), ("b.png", Made), ("empty.mov", Refused), ("text.mp4", Refused)
    ]  # fmt: skip
    assert sorted(path.name for path in out.iterdir()) == ["A.PNG", "b.png", "results.json"]
    told = json.loads((out / "results.json").read_text())
    assert told == json.loads(json.dumps([each.to_dict() for each in listed]))
    assert told[1]["result"]["path"] == "b.png" and (out / "b.png/original.mp4").is_file()
    assert told[2]["error"]["code"] == "input_empty"
    assert str(tmp_path) not in json.dumps(told)


def test_lists_of_files_and_folders(folder: Path, tmp_path: Path) -> None:
    plan = plan_clips(PLAIN, [folder / "below", folder / "b.png"], {}, tmp_path / "out", LIMITS)
    assert [job.info.path.name for job in plan.jobs] == ["b.png", "c.png"]
    with pytest.raises(UsageError) as error:
        plan_clips(PLAIN, [folder, folder / "b.png"], {}, tmp_path / "out", LIMITS)
    assert error.value.code == "clips_same_name" and "b.png" in error.value.message


def test_folders_without_clips(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    with pytest.raises(InputError) as error:
        plan_clips(PLAIN, [tmp_path / "bare"], {}, tmp_path / "out", LIMITS)
    assert error.value.code == "folder_empty"
    with pytest.raises(InputError) as error:
        plan_clips(PLAIN, [folder / "text.mp4", folder / "empty.mov"], {}, tmp_path / "out", LIMITS)
    assert error.value.code == "clips_unusable" and "empty.mov" in error.value.message


def test_outputs_that_cannot_be(folder: Path, tmp_path: Path) -> None:
    for output in (folder, tmp_path / "no/where", folder / "notes.txt"):
        with pytest.raises(FileError):
            plan_clips(PLAIN, [folder], {}, output, LIMITS)


def test_what_fits_one_clip_and_not_another(folder: Path, tmp_path: Path) -> None:
    """A grid needs as many latents as cells: of a picture there is one."""
    request = parse(AutoencodeRequest, {
        "report": False, "edits": [{"kind": "grid", "corners": ["a", "a", "a", "a"]}]})  # fmt: skip
    plan = plan_clips(request, [folder / "b.png", folder / "A.PNG"], {}, tmp_path / "out", LIMITS)
    listed = run_clips(codec("vqvae"), "nano", plan, tmp_path / "out", Silent())
    assert [each.error.code for each in listed if isinstance(each, Refused)] == ["grid_too_fine"] * 2
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["results.json"]


@pytest.mark.parametrize("error", [JobStopped("job_cancelled", "stop"), FileError("output_no_space", "full")])
def test_what_ends_the_work_leaves_what_is_done(
    error: SeedpodError, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = module.run_autoencode
    calls: list[object] = []

    def second_fails(*arguments: object) -> object:
        calls.append(arguments)
        if len(calls) == 2:
            raise error
        return done(*arguments)

    monkeypatch.setattr(module, "run_autoencode", second_fails)
    plan = plan_clips(PLAIN, [folder], {}, tmp_path / "out", LIMITS)
    with pytest.raises(type(error)):
        run_clips(codec("vqvae"), "nano", plan, tmp_path / "out", Silent())
    told = json.loads((tmp_path / "out/results.json").read_text())
    assert [each["clip"] for each in told if "result" in each] == ["A.PNG"]


def test_models_that_weights_come_from() -> None:
    changes = [{"kind": "interpolate", "amount": 0.5, "other": other} for other in ("x", "y", "x")]
    assert weights_of(parse(AutoencodeRequest, {"weights": changes})) == ["x", "y"]
