"""How figures get onto their page: `python -m benchmarks --write`."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks.machine import show
from tests.tools.test_page import TABLE, TEXT
from tools import page

PAGE = f"""{TEXT}
<!-- python tools/make_docs.py models: begin -->
a table of the code
<!-- end -->
"""


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A page, the only one."""
    path = tmp_path / "page.md"
    path.write_text(PAGE)
    monkeypatch.setattr(page, "pages", lambda: [path])
    return path


def test_what_commands_print_stands_under_them(there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "measured", lambda command: TABLE if "boot" in command else "plain text")
    assert command.main(["--write"]) == 0
    filled = there.read_text()
    assert filled.startswith(
        "# Figures\n\nProse.\n\n<!-- python -m benchmarks.boot --repeat 3: begin -->\n`python"
    )
    assert "old boot" not in filled and TABLE.strip() in filled
    assert "`OMP_NUM_THREADS=1 python -m benchmarks.models`\n\n```\nplain text\n```\n<!-- end -->" in filled
    assert "a table of the code" in filled


def test_what_fails_leaves_what_was_there(
    there: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(page, "measured", lambda command: TABLE if "models" in command else None)
    assert command.main(["--write"]) == 1
    assert "old boot" in there.read_text() and TABLE.strip() in there.read_text()
    assert "left as it was: python -m benchmarks.boot --repeat 3" in capsys.readouterr().err


def test_only_the_scripts_that_are_named_are_run(there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(page, "measured", lambda command: asked.append(command) or TABLE)
    assert command.main(["--write", "models"]) == 0
    assert asked == ["OMP_NUM_THREADS=1 python -m benchmarks.models"]
    assert "old boot" in there.read_text() and TABLE.strip() in there.read_text()


def test_a_page_that_was_edited_meanwhile_keeps_that(there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(command: str) -> str:
        there.write_text(there.read_text().replace("Prose.", "Better prose."))
        return TABLE

    monkeypatch.setattr(page, "measured", measured)
    assert command.main(["--write"]) == 0
    assert "Better prose." in there.read_text() and "old boot" not in there.read_text()


def test_figures_of_another_machine(there: Path, tmp_path: Path) -> None:
    taken = tmp_path / "boot.txt"
    taken.write_text(TABLE)
    assert command.main(["--write", "boot", "--from", str(taken)]) == 0
    assert TABLE.strip() in there.read_text()


@pytest.mark.parametrize(
    "arguments", [["nothing"], ["--write", "nothing"], ["--write", "make_docs"], ["--write", "--from", "F"],
                  ["--write", "boot", "models", "--from", "F"]],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(
    arguments: list[str], there: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        sys.exit(command.main(arguments))
    assert ended.value.code in (2, 64)
    assert capsys.readouterr().err


def test_a_script_is_run_by_its_name() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "benchmarks", "staging", "--help"], capture_output=True, text=True,
        cwd=command.FOLDER.parent,
    )  # fmt: skip
    assert ran.returncode == 0 and "--folder" in ran.stdout


def test_a_table_is_markdown_in_columns(capsys: pytest.CaptureFixture[str]) -> None:
    show("Title", ["what", "s"], [["a longer name", "1"], ["b", "12.5"]])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "**Title**"
    assert lines[3:7] == [
        "| what          |    s |",
        "| ------------- | ---: |",
        "| a longer name |    1 |",
        "| b             | 12.5 |",
    ]
    assert "torch" in lines[8] and "load " in lines[8]
