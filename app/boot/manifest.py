"""The manifest: which checkpoint files there are, and which of them make a model.

`read_manifest` takes `models.toml` and the user's own manifests and returns one checked value. It
knows nothing of roots, of what is on a disk, or of what is inside a file.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from app.errors import ConfigError

Format = Literal["torch", "safetensors", "data"]  # data: tokenizer files, JSON
Task = Literal["restore", "generate", "autoencode"]

BUILTIN = Path(__file__).resolve().parents[2] / "models.toml"


@dataclass(frozen=True)
class Origin:
    """Where a file is on the hub; `revision` is a full commit, None where none was published."""

    repo: str
    revision: str | None
    filename: str


@dataclass(frozen=True)
class FileEntry:
    """One checkpoint file. `path` is relative to a root; `size` is in bytes; None means not known."""

    name: str
    path: PurePosixPath
    format: Format
    size: int | None = None
    sha256: str | None = None
    origin: Origin | None = None
    stage: bool = False
    alternatives: tuple[str, ...] = ()
    superseded: Mapping[str, str] = field(default_factory=dict)  # sha256 of a wrong file -> what it is
    note: str | None = None


@dataclass(frozen=True)
class ModelEntry:
    """A set of files that does one task; `parts` maps a part (dit, vae, ...) to a file's name.

    `optional` maps parts that the model does without, for all but some of its jobs. `by_name`: a worker
    boots it only where it is named, as its files are there for another model's sake.
    """

    name: str
    task: Task
    family: str
    variant: str | None
    parts: Mapping[str, str]
    optional: Mapping[str, str] = field(default_factory=dict)
    by_name: bool = False


@dataclass(frozen=True)
class Manifest:
    """Files and models by name. Every name that an entry refers to is here."""

    files: Mapping[str, FileEntry]
    models: Mapping[str, ModelEntry]


def read_manifest(extra: Sequence[Path] = (), builtin: Path = BUILTIN) -> Manifest:
    """The built-in manifest, then each of `extra` in turn: an entry of a name that is already there
    replaces it whole, and a manifest with `replace = true` at its top drops everything before it.

    Raises:
        ConfigError: `manifest_unreadable`, `manifest_toml`, `manifest_key`, `manifest_value`,
            `manifest_path`, `manifest_same_path`, `manifest_unknown_file` or `manifest_cycle`, naming
            the manifest, the line, the table and the key; every problem of one kind of check at once.
    """
    files: dict[str, tuple[_Source, _FileTable]] = {}
    models: dict[str, tuple[_Source, _ModelTable]] = {}
    for path in (builtin, *extra):
        source = _Source(path, _read_text(path))
        top = _parse(source)
        if top.replace:
            files.clear()
            models.clear()
        files |= {name: (source, table) for name, table in top.file.items()}
        models |= {name: (source, table) for name, table in top.model.items()}
    _raise_all(_same_paths(files))
    _raise_all(_unknown_files(files, models))
    _raise_all(_cycles(files))
    return Manifest(
        {name: _file_entry(name, table) for name, (_, table) in files.items()},
        {name: _model_entry(name, table) for name, (_, table) in models.items()},
    )


# ------------------------------------------------------------------ the tables, as they are written


def _relative(value: str) -> str:
    """`value` if it is a plain relative path with forward slashes, which cannot leave a root."""
    segments = value.split("/")
    if value.startswith("/") or re.match(r"[A-Za-z]:", value):
        reason = "is an absolute path"
    elif "\\" in value:
        reason = "holds a backslash"
    elif any(ord(char) < 32 for char in value):
        reason = "holds a control character"
    elif ".." in segments:
        reason = "holds '..'"
    elif "" in segments or "." in segments:
        reason = "holds an empty segment or '.'"
    else:
        return value
    raise PydanticCustomError(
        "manifest_path", "{why}; expected a path under a root, such as checkpoints/x.pth", {"why": reason}
    )


_Path = Annotated[str, AfterValidator(_relative)]
_Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_ModelName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
_Repo = Annotated[str, Field(pattern=r"^[\w][\w.-]*/[\w][\w.-]*$")]
_Commit = Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]

_EXPECTED = {
    "sha256": "expected 64 lower-case hexadecimal digits, as sha256sum prints them",
    "superseded": "expected 64 lower-case hexadecimal digits = what the file with that hash is",
    "revision": "expected a full commit of 40 lower-case hexadecimal digits",
    "repo": "expected owner/name, as the hub writes it",
    "size": "expected the file's size in bytes, 1 or more; leave it out if it is not known",
    "model": "expected a name of letters, digits, '.', '_' and '-'",
    "parts": "expected at least one part = the name of a file",
}


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _FileTable(_Table):
    path: _Path
    format: Format
    size: Annotated[int, Field(ge=1, lt=1 << 63)] | None = None
    sha256: _Sha256 | None = None
    repo: _Repo | None = None
    revision: _Commit | None = None
    filename: _Path | None = None
    stage: bool = False
    alternatives: list[str] = []
    superseded: dict[_Sha256, str] = {}
    note: str | None = None

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if (self.repo is None) != (self.filename is None):
            raise PydanticCustomError("half", "has only one of repo and filename; expected both or neither")
        if self.revision and not self.repo:
            raise PydanticCustomError("half", "has a revision and no repo; expected both or neither")
        if self.sha256 in self.superseded:
            raise PydanticCustomError("half", "lists its own sha256 as superseded; expected another file's")
        return self


class _ModelTable(_Table):
    task: Task
    family: str
    variant: str | None = None
    parts: Annotated[dict[str, str], Field(min_length=1)]
    optional: dict[str, str] = {}
    by_name: bool = False

    @model_validator(mode="after")
    def _once(self) -> Self:
        if both := self.parts.keys() & self.optional.keys():
            raise PydanticCustomError(
                "half", "names {part} among its parts and as optional; expected it once", {"part": min(both)}
            )
        return self


class _Top(_Table):
    replace: bool = False
    file: dict[_Path, _FileTable] = {}  # names are shown, compared and made into names of files
    model: dict[_ModelName, _ModelTable] = {}


def _file_entry(name: str, table: _FileTable) -> FileEntry:
    origin = Origin(table.repo, table.revision, table.filename) if table.repo and table.filename else None
    return FileEntry(
        name=name,
        path=PurePosixPath(table.path),
        format=table.format,
        size=table.size,
        sha256=table.sha256,
        origin=origin,
        stage=table.stage,
        alternatives=tuple(table.alternatives),
        superseded=table.superseded,
        note=table.note,
    )


def _model_entry(name: str, table: _ModelTable) -> ModelEntry:
    return ModelEntry(
        name, table.task, table.family, table.variant, table.parts, table.optional, table.by_name
    )


# ------------------------------------------------------------------ reading, and where things stand

_KEY = re.compile(r"""\s*("[^"]*"|'[^']*'|[\w-]+)\s*=""")


@dataclass(frozen=True)
class _Source:
    path: Path
    text: str

    def at(self, *keys: str) -> str:
        """Where `keys` stands, as a person looks for it: manifest, line, table and key."""
        known = next((keys[:n] for n in range(len(keys), 0, -1) if keys[:n] in self._lines), None)
        line = f", line {self._lines[known]}" if known else ""
        if keys[:1] in (("file",), ("model",)) and len(keys) > 1:
            table = f'[{keys[0]}."{keys[1]}"]' if keys[0] == "file" else f"[model.{keys[1]}]"
            return f"{self.path}{line}: {' '.join([table, '.'.join(keys[2:])]).strip()}"
        return f"{self.path}{line}: {'.'.join(keys)}"

    @cached_property
    def _lines(self) -> dict[tuple[str, ...], int]:
        # tomllib gives no positions. Headers and keys are read line by line, which is right for the
        # way manifests are written and only ever decides which line a message names.
        lines: dict[tuple[str, ...], int] = {}
        table: tuple[str, ...] = ()
        for number, line in enumerate(self.text.splitlines(), 1):
            if line.lstrip().startswith("["):
                table = _header(line) or table
                for depth in range(1, len(table) + 1):  # [a.b] is also where `a` begins
                    lines.setdefault(table[:depth], number)
            elif match := _KEY.match(line):
                lines.setdefault((*table, match[1].strip("\"'")), number)
        return lines


def _header(line: str) -> tuple[str, ...]:
    """The keys of a table's header line, or nothing if it is not one."""
    keys: list[str] = []
    try:
        level: Any = tomllib.loads(line)
    except (ValueError, RecursionError):
        return ()
    while isinstance(level, dict) and len(level) == 1:
        key, level = next(iter(level.items()))
        keys.append(key)
    return tuple(keys)


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except OSError as error:
        raise ConfigError(
            "manifest_unreadable",
            f"The manifest {path} cannot be read: {error.strerror}; expected a TOML file. "
            "Check the path in SEEDPOD_MANIFEST.",
        ) from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError(
            "manifest_toml", f"{path}, line {line}: not UTF-8 text; expected a TOML file, saved as UTF-8."
        ) from None


def _parse(source: _Source) -> _Top:
    try:
        tables = tomllib.loads(source.text)
    except (ValueError, RecursionError) as error:  # also numbers too long and tables too deep to read
        raise ConfigError(
            "manifest_toml",
            f"{source.path} is not valid TOML: {str(error).rstrip('.')}; expected a manifest as models.toml.",
        ) from None
    try:
        return _Top.model_validate(tables)
    except ValidationError as error:
        problems = error.errors(include_url=False)
    _raise_all(_sentence(source, problem) for problem in problems)
    raise AssertionError("a validation error without a problem")


def _raise_all(problems: Iterable[tuple[str, str]]) -> None:
    """Raise one error of all `problems` (code, sentence), under the first one's code."""
    listed = list(problems)
    if listed:
        raise ConfigError(listed[0][0], "\n".join(sentence for _, sentence in listed))


def _sentence(source: _Source, problem: ErrorDetails) -> tuple[str, str]:
    loc = tuple(str(key) for key in problem["loc"])
    # pydantic puts "[key]" after a key that is wrong; a table or a key may bear that name too
    wrong_key = loc[-1] == "[key]" and len(loc) % 2 == 1 and problem["type"] != "extra_forbidden"
    keys = loc[:-1] if wrong_key else loc
    where, value = source.at(*keys), _shown(problem["input"])
    reason = problem["msg"][:1].lower() + problem["msg"][1:]
    if problem["type"] == "extra_forbidden":
        table = {1: _Top, 3: _FileTable if keys[0] == "file" else _ModelTable}[len(keys)]
        near = get_close_matches(keys[-1], table.model_fields, n=1)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(table.model_fields)}."
        return "manifest_key", f"{where} is not a key of a manifest; {hint}"
    if problem["type"] == "missing":
        return "manifest_key", f"{source.at(*keys[:-1])} lacks {keys[-1]}; every such table needs it."
    if problem["type"] == "manifest_path":
        return "manifest_path", f"{where} is {value}, which {reason}."
    if problem["type"] == "half":
        return "manifest_value", f"{where} {reason}."
    expected = next((_EXPECTED[key] for key in reversed(keys) if key in _EXPECTED), reason)
    if wrong_key:
        return "manifest_value", f"{where} has a key that means nothing here; {expected}."
    return "manifest_value", f"{where} is {value}; {expected}."


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits, tables in tables in tables
        return "too long to print"
    return text if len(text) <= 100 else f"{text[:100]}..."


# ------------------------------------------------------------------ what only the whole can show


def _same_paths(files: Mapping[str, tuple[_Source, _FileTable]]) -> Iterator[tuple[str, str]]:
    first: dict[str, str] = {}
    for name, (source, table) in files.items():
        other = first.setdefault(table.path, name)
        if other != name:
            yield (
                "manifest_same_path",
                f"{source.at('file', name, 'path')} is {table.path!r}, which is also the path of "
                f"{files[other][0].at('file', other)}; expected one entry per file. Drop or rename one.",
            )


def _unknown_files(
    files: Mapping[str, tuple[_Source, _FileTable]], models: Mapping[str, tuple[_Source, _ModelTable]]
) -> Iterator[tuple[str, str]]:
    named = [
        (source.at("file", name, "alternatives"), other)
        for name, (source, table) in files.items()
        for other in table.alternatives
    ] + [
        (source.at("model", name, kind, part), other)
        for name, (source, model) in models.items()
        for kind, parts in (("parts", model.parts), ("optional", model.optional))
        for part, other in parts.items()
    ]
    for where, name in named:
        if name not in files:
            near = get_close_matches(name, files, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f'add a table [file."{name}"].'
            yield "manifest_unknown_file", f"{where} names {name!r}, which no manifest lists; {hint}"


def _cycles(files: Mapping[str, tuple[_Source, _FileTable]]) -> Iterator[tuple[str, str]]:
    for name, (source, _) in files.items():
        trail, queue = {name}, [name]
        while queue:
            for other in files[queue.pop()][1].alternatives:
                if other == name:
                    yield (
                        "manifest_cycle",
                        f"{source.at('file', name, 'alternatives')} leads back to {name!r} itself; "
                        "expected a master that lists its smaller files, and not the other way round.",
                    )
                    queue.clear()
                    break
                if other not in trail:
                    trail.add(other)
                    queue.append(other)
