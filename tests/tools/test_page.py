"""How what commands print gets onto the pages."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import page

TEXT = """# Figures

Prose.

<!-- python -m benchmarks.boot --repeat 3: begin -->
old boot
<!-- end -->

<!-- OMP_NUM_THREADS=1 python -m benchmarks.models: begin -->
<!-- end -->
"""
BOOT, MODELS = "python -m benchmarks.boot --repeat 3", "OMP_NUM_THREADS=1 python -m benchmarks.models"
TABLE = "\n**Title**\n\n| what | s |\n| ---- | -: |\n| a | 1 |\n\nmachine; load 0.1\n"


def test_a_part_takes_the_place_of_the_one_before() -> None:
    assert page.commands(TEXT) == [BOOT, MODELS]
    filled = page.fill(TEXT, {BOOT: "new boot", MODELS: "a\nb"}.get)
    assert filled == TEXT.replace("old boot", "new boot").replace(
        "models: begin -->\n", "models: begin -->\na\nb\n"
    )
    assert page.fill(filled, {BOOT: "new boot", MODELS: "a\nb"}.get) == filled


def test_a_part_that_is_not_given_stays() -> None:
    assert page.fill(TEXT, lambda command: None) == TEXT
    assert page.fill(TEXT, {MODELS: "m"}.get) == TEXT.replace("models: begin -->\n", "models: begin -->\nm\n")


def test_a_part_is_taken_to_the_letter() -> None:
    assert r"\1 \g<0> \n" in page.fill(TEXT, {BOOT: r"\1 \g<0> \n"}.get)


@pytest.mark.parametrize(
    ("lost", "left"),
    [("old boot\n<!-- end -->\n", "1 end"), (f"<!-- {BOOT}: begin -->\n", "1 begin")],
)
def test_a_mark_without_its_other_loses_nothing(lost: str, left: str) -> None:
    assert lost in TEXT
    with pytest.raises(ValueError, match=left):
        page.fill(TEXT.replace(lost, ""), lambda command: "all between")


def test_marks_that_stand_the_wrong_way_round_are_refused() -> None:
    with pytest.raises(ValueError, match="without its other"):
        page.commands(f"<!-- end -->\n<!-- {BOOT}: begin -->\n")


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (BOOT, "boot"),
        (MODELS, "models"),
        ("python tools/measure_nano.py --pictures docs/img", "measure_nano"),
        ("A=1 B='python x' python tools/page.py", "page"),
    ],
)
def test_the_script_of_a_command(command: str, name: str) -> None:
    assert page.script(command) == name


def test_a_section_names_its_command() -> None:
    assert page.section(BOOT, TABLE) == f"`{BOOT}`\n\n{TABLE.strip()}"
    assert page.section(BOOT, "plain text\n") == f"`{BOOT}`\n\n```\nplain text\n```"


@pytest.mark.parametrize(
    ("code", "printed"), [("print('told')", "told\n"), ("raise SystemExit(69)", None), ("1 / 0", None)]
)
def test_a_command_is_run_with_its_environment(code: str, printed: str | None, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(f"import os\nassert os.environ['THERE'] == 'a b'\n{code}\n")
    assert page.measured(f"THERE='a b' python {script}") == printed


def test_every_mark_of_the_pages_is_whole() -> None:
    held = [page.script(command) for path in page.pages() for command in page.commands(path.read_text())]
    assert {"boot", "make_docs", "measure_nano"} <= set(held)
