"""How figures get onto their page: `python -m benchmarks --write`."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks import page
from benchmarks.machine import show

TEXT = """# Figures

Prose.

<!-- python -m benchmarks.boot --repeat 3: begin -->
old boot
<!-- end -->

<!-- OMP_NUM_THREADS=1 python -m benchmarks.models: begin -->
<!-- end -->
"""
TABLE = "\n**Title**\n\n| what | s |\n| ---- | -: |\n| a | 1 |\n\nmachine; load 0.1\n"


def test_what_a_command_prints_stands_under_it() -> None:
    filled, failed = page.fill(TEXT, [], lambda command: TABLE if "boot" in command else "plain text")
    assert failed == []
    assert filled.startswith(
        "# Figures\n\nProse.\n\n<!-- python -m benchmarks.boot --repeat 3: begin -->\n`python"
    )
    assert "old boot" not in filled and TABLE.strip() in filled
    assert "`OMP_NUM_THREADS=1 python -m benchmarks.models`\n\n```\nplain text\n```\n<!-- end -->" in filled
    again, _ = page.fill(filled, [], lambda command: TABLE if "boot" in command else "plain text")
    assert again == filled


def test_what_fails_leaves_what_was_there() -> None:
    filled, failed = page.fill(TEXT, [], lambda command: None)
    assert filled == TEXT
    assert failed == ["python -m benchmarks.boot --repeat 3", "OMP_NUM_THREADS=1 python -m benchmarks.models"]


def test_only_the_scripts_that_are_named_are_run() -> None:
    asked: list[str] = []
    filled, _ = page.fill(TEXT, ["models"], lambda command: asked.append(command) or TABLE)
    assert asked == ["OMP_NUM_THREADS=1 python -m benchmarks.models"]
    assert "old boot" in filled and TABLE.strip() in filled


@pytest.mark.parametrize(
    ("code", "printed"), [("print('told')", "told\n"), ("raise SystemExit(69)", None), ("1 / 0", None)]
)
def test_a_command_is_run_with_its_environment(code: str, printed: str | None, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(f"import os\nassert os.environ['THERE'] == 'a b'\n{code}\n")
    assert page.measured(f"THERE='a b' python {script}") == printed


def test_figures_of_another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there, taken = tmp_path / "page.md", tmp_path / "boot.txt"
    there.write_text(TEXT)
    taken.write_text(TABLE)
    monkeypatch.setattr(command, "PAGE", there)
    assert command.main(["--write", "boot", "--from", str(taken)]) == 0
    assert TABLE.strip() in there.read_text()


@pytest.mark.parametrize(
    "arguments", [["nothing"], ["--write", "nothing"], ["--write", "--from", "F"],
                  ["--write", "boot", "models", "--from", "F"]],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
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
