#!/usr/bin/env python3
"""Write the parts of docs/ and the README that come from the code: settings, requests' fields, error codes,
models and their files, memory.

python tools/make_docs.py            write them
python tools/make_docs.py --check    exit 1 if a file is not what would be written
python tools/make_docs.py PART       print one, as the mark of its place names it: see tools/page.py
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from app import errors
from app.boot.manifest import Manifest, read_manifest
from app.job.autoencode_request import AutoencodeRequest
from app.job.generate_request import GenerateRequest
from app.job.payload import PAYLOADS
from app.job.request import RestoreRequest
from app.models.latents.edit_request import Described
from app.models.latents.weights_request import Change
from app.progress import amount_text
from app.settings import Settings, variable
from tools import generate_memory, page

COMMAND = "python tools/make_docs.py "


def settings_table() -> str:
    """The settings, from their class."""
    rows = ["| variable | default | meaning |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        rows.append(f"| `{variable(name)}` | {_default(field)} | {_cell(field.description)} |")
    return "\n".join(rows)


def request_table(fields: Mapping[str, FieldInfo], prefix: str = "", without: Collection[str] = ()) -> str:
    """The fields of a request: name (`prefix` "--": option of `run`), type and bounds, default, meaning."""
    rows = [f"| {'option' if prefix else 'field'} | value | default | meaning |", "|---|---|---|---|"]
    for name, field in fields.items():
        if name in without:
            continue
        shown = prefix + name.replace("_", "-") if prefix else name
        rows.append(f"| `{shown}` | {_values(field)} | {_default(field)} | {_cell(field.description)} |")
    return "\n".join(rows)


def kinds_table(union: Any) -> str:
    """Objects that a list may hold, told apart by their `kind`: what each does, and its fields."""
    rows = ["| kind | what it does | fields |", "|---|---|---|"]
    for model in _flat(union):
        fields = "<br>".join(
            f"`{name}`: {_values(field)}{_or_default(field)}. {_cell(field.description)}"
            for name, field in model.model_fields.items()
            if name != "kind"
        )
        kind = typing.get_args(model.model_fields["kind"].annotation)[0]
        rows.append(f"| `{kind}` | {_cell(_paragraphs(model))} | {fields} |")
    return "\n".join(rows)


def _or_default(field: FieldInfo) -> str:
    default = _default(field)
    return f", {default}" if default else ""


def payload_tables() -> str:
    """The fields of each task's job, those of objects within it, and what a source may be."""
    parts = []
    sources: dict[str, FieldInfo] = {}
    for task, payload in PAYLOADS.items():
        parts.append(f"## {task}\n\n{_paragraphs(payload)}\n\n{request_table(payload.model_fields)}")
        for name, field in payload.model_fields.items():
            models = [kind for kind in _flat(field.annotation) if _is_model(kind)]
            if len(models) == 1:
                head = f"### `{name}` of {task}\n\n{_paragraphs(models[0])}"
                parts.append(f"{head}\n\n{request_table(models[0].model_fields)}")
            if len(models) > 1 and "kind" in models[0].model_fields:
                parts.append(f"### `{name}` of {task}\n\n{kinds_table(field.annotation)}")
            elif len(models) > 1:
                for model in models:
                    sources |= model.model_fields
    kinds = [f"- `{name}`: {field.description}" for name, field in sources.items()]
    return "\n\n".join([*parts, "## Sources\n\nA source is an object with one of these:", "\n".join(kinds)])


def _paragraphs(model: type[BaseModel]) -> str:
    """A model's docstring, each paragraph one line."""
    return "\n\n".join(" ".join(part.split()) for part in (model.__doc__ or "").split("\n\n"))


def models_table() -> str:
    """The models of the manifest: their task, and their files with sizes."""
    manifest = read_manifest()
    rows = ["| model | task | files | for some jobs |", "|---|---|---|---|"]
    for name, model in manifest.models.items():
        files, optional = (_files(manifest, parts) for parts in (model.parts, model.optional))
        rows.append(f"| `{name}` | {model.task} | {files} | {optional} |")
    return "\n".join(rows)


def _files(manifest: Manifest, parts: Mapping[str, str]) -> str:
    sizes = ((part, manifest.files[file]) for part, file in parts.items())
    return "<br>".join(
        f"{part}: `{entry.path.name}`" + (f" {amount_text(entry.size, 'B')}" if entry.size else "")
        for part, entry in sizes
    )


def error_table() -> str:
    """Every code that the code raises or documents, with its exit status and the modules that know of it."""
    modules: dict[tuple[str, int], list[str]] = {}
    for path in sorted((REPOSITORY / "app").rglob("*.py")):
        for code, kind in sorted(set(_codes(path.read_text())), key=lambda found: found[0]):
            modules.setdefault((code, kind.exit_status), []).append(f"`{path.relative_to(REPOSITORY)}`")
    rows = ["| code | exit status | from |", "|---|---|---|"]
    rows += [
        f"| `{code}` | {status} | {', '.join(modules[code, status])} |" for code, status in sorted(modules)
    ]
    return "\n".join(rows)


def _codes(text: str) -> Iterator[tuple[str, type[errors.SeedpodError]]]:
    """Codes given to an error where it is raised, and those that docstrings name after an error."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
            kind = errors.ConfigError if node.func.id == "Fault" else _error(node.func.id)
            first = node.args[0]
            if kind:
                yield from ((part.value, kind) for part in _branches(first) if isinstance(part.value, str))
    parts = re.split(r"(\w+Error)[:s]? ", text)  # what follows the name of an error, up to the next one
    for name, told in zip(parts[1::2], parts[2::2], strict=True):
        if kind := _error(name):
            codes = told.split(".")[0]
            yield from ((code, kind) for code in re.findall(r"`([a-z0-9]+(?:_[a-z0-9]+)+)`", codes))


def _branches(node: ast.expr) -> list[ast.Constant]:
    """The constants that an argument can be."""
    parts = [node.body, node.orelse] if isinstance(node, ast.IfExp) else [node]
    return [part for part in parts if isinstance(part, ast.Constant)]


def _error(name: str) -> type[errors.SeedpodError] | None:
    kind = getattr(errors, name, None)
    return kind if isinstance(kind, type) and issubclass(kind, errors.SeedpodError) else None


def _default(field: FieldInfo) -> str:
    value = field.default
    if field.is_required():
        return "required"
    if value is None or value in ((), []):
        return ""
    if isinstance(value, tuple):
        value = ("," if isinstance(value[0], int) else ":").join(map(str, value))
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _values(field: FieldInfo) -> str:
    kinds = list(_flat(field.annotation))
    if typing.get_origin(kinds[0]) is typing.Literal:
        return ", ".join(f"`{value}`" for value in typing.get_args(kinds[0]))
    names = {int: "integer", float: "number", bool: "`true` or `false`", str: "text"}
    one = names.get(kinds[0], "object")
    if len(kinds) > 1 and all(map(_is_model, kinds)):
        one = "object with " + " or ".join(f"`{name}`" for kind in kinds for name in kind.model_fields)
    name = f"list of {one}s" if typing.get_origin(field.annotation) is list else one
    return " ".join([name, *filter(None, map(_bound, field.metadata))])


def _flat(annotation: Any) -> Iterator[Any]:
    """The types that a value of a field, or of the list that it is, may have; None is left out."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        yield from _flat(typing.get_args(annotation)[0])
    elif origin in (typing.Union, types.UnionType, list):
        for member in typing.get_args(annotation):
            yield from _flat(member)
    elif annotation is not type(None):
        yield annotation


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _bound(part: Any) -> str:
    for attribute, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<")):
        if hasattr(part, attribute):
            return f"{sign} {getattr(part, attribute)}"
    if hasattr(part, "max_length"):
        return f"(at most {part.max_length:,})"
    return ""


def _cell(text: str | None) -> str:
    return (text or "").replace("|", "\\|")


PARTS: Mapping[str, Callable[[], str]] = {
    "models": models_table,
    "settings": settings_table,
    "restore": partial(request_table, RestoreRequest.model_fields, "--"),
    "generate": partial(request_table, GenerateRequest.model_fields, "--", without=("prompt",)),
    "generate-weights": generate_memory.parts_table,
    "generate-lengths": partial(generate_memory.lengths_table, 480, 832),
    "autoencode": partial(request_table, AutoencodeRequest.model_fields, "--"),
    "edits": partial(kinds_table, Described),
    "weights": partial(kinds_table, Change),
    "jobs": payload_tables,
    "errors": error_table,
}


def documents() -> dict[Path, str]:
    """Each document with generated parts, as it should be."""
    texts = {path: path.read_text() for path in page.pages()}
    return {path: page.fill(text, part) for path, text in texts.items() if COMMAND in text}


def part(command: str) -> str | None:
    """What stands behind a mark; None where another command prints it."""
    return PARTS[command.removeprefix(COMMAND)]() if command.startswith(COMMAND) else None


def main() -> int:
    """Write, check or print; returns the exit status."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    arguments.add_argument("part", nargs="?", choices=PARTS, help="print this part")
    arguments.add_argument("--check", action="store_true")
    options = arguments.parse_args()
    if options.part:
        print(PARTS[options.part]())
        return 0
    stale = {path: text for path, text in documents().items() if path.read_text() != text}
    for path, text in stale.items():
        name = path.relative_to(REPOSITORY)
        print(f"{name} is not what the code says" if options.check else f"wrote {name}")
        if not options.check:
            path.write_text(text)
    return int(options.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
