"""What `verify` found, as a table with sentences for a person and as JSON for a machine.

Paths are printed whole: where the output is not a terminal the table is as wide as they need.
"""

from __future__ import annotations

from typing import Any, Final

from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from app.boot.verify import FileReport, Report, State

STATES: Final[dict[State, tuple[str, str]]] = {  # state -> (words, colour)
    "verified": ("verified", "green"),
    "present": ("present, hash not checked", "green"),
    "missing": ("missing", "red"),
    "wrong": ("wrong", "red"),
}
_WIDE: Final = 10_000  # columns; more than any path needs


def print_report(report: Report, console: Console) -> None:
    """The table (model, file, path, size, state), each problem in full, and a closing line."""
    wide = console if console.is_terminal else Console(file=console.file, width=_WIDE, color_system=None)
    if report.files:
        wide.print(_table(report))
    for model, lacking in report.incomplete.items():
        _print(console, f"{model} is not used: it lacks {', '.join(lacking)}.")
    for note in report.notes:
        _print(console, note)
    problems = report.problems
    for problem in problems:
        _print(console, f"\n[red]{problem.code}[/red] ({problem.model}) {escape(problem.message)}", True)
    models = ", ".join(dict.fromkeys(file.model for file in report.files))
    if problems:
        _print(console, f"\n{len(problems)} problem{'s' if len(problems) > 1 else ''} with {models}.")
    else:
        _print(console, f"Nothing wrong with {models}.")


def _print(console: Console, text: str, markup: bool = False) -> None:
    # soft_wrap: no line is broken but by the terminal itself, so a path can be copied
    console.print(text, markup=markup, highlight=False, soft_wrap=True)


def _table(report: Report) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("model", "file", "path", "size", "state"):
        table.add_column(name, overflow="fold", justify="right" if name == "size" else "left")
    previous = ""
    for file in report.files:
        table.add_row(
            "" if file.model == previous else escape(file.model),
            escape(file.file),
            escape(str(file.path)) if file.path else "-",
            decimal(file.size) if file.size is not None else "-",
            _state(file),
        )
        previous = file.model
    return table


def _state(file: FileReport) -> str:
    words, colour = STATES[file.state]
    codes = ", ".join(problem.code for problem in file.problems if file.state == "wrong")
    note = f" ({escape(file.note)})" if file.note else ""
    return f"[{colour}]{words}[/{colour}]{f': {codes}' if codes else ''}{note}"


def to_json(report: Report) -> dict[str, Any]:
    """The report for a machine; keys are only ever added.

    ok          whether nothing is wrong
    models      name -> "ok", "wrong" (a file is missing or wrong) or "incomplete" (files are missing and
                the model was not asked for, so it is not used)
    files       one for each part of each model used: model, part, file (the manifest's name), path
                (string or null), size (bytes or null), state (verified, present, missing, wrong), note
                (string or null), problems (list of codes)
    incomplete  name of a model that is not used -> the paths it lacks, relative to a root
    problems    each once: code, models (list), file, message
    notes       sentences that are no problems
    """
    models = dict.fromkeys(report.incomplete, "incomplete")
    for file in report.files:
        models[file.model] = "wrong" if file.problems or models.get(file.model) == "wrong" else "ok"
    return {
        "ok": report.ok,
        "models": models,
        "files": [_file_json(file) for file in report.files],
        "incomplete": {name: list(paths) for name, paths in report.incomplete.items()},
        "problems": [
            {"code": p.code, "models": p.model.split(", "), "file": p.file, "message": p.message}
            for p in report.problems
        ],
        "notes": list(report.notes),
    }


def _file_json(file: FileReport) -> dict[str, Any]:
    return {
        "model": file.model,
        "part": file.part,
        "file": file.file,
        "path": str(file.path) if file.path else None,
        "size": file.size,
        "state": file.state,
        "note": file.note,
        "problems": [problem.code for problem in file.problems],
    }
