"""A part on its way: the job that it is, and what came of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from app.errors import SeedpodError
from app.job.request import RestoreRequest
from examples.serve.distribute.carry import Carrier, fetch_result
from examples.serve.distribute.endpoint import JobFailedError
from examples.serve.distribute.film import Film
from examples.serve.distribute.join import Decoded, decoded
from examples.serve.distribute.piece import Cutter
from examples.serve.distribute.plan import Part


@dataclass(frozen=True)
class Desk:
    """What all parts share."""

    film: Film
    request: RestoreRequest
    folder: Path
    suffix: str
    cutter: Cutter
    carrier: Carrier
    output_folder: Path | None

    def fields(self) -> dict[str, Any]:
        """The fields of every job: those that were given, and the rate and container of the whole."""
        given = self.request.model_dump(exclude_unset=True, exclude={"cuts", "rate"})
        rate = float(self.film.job_rate)
        return {**given, "task": "restore", "rate": rate, "container": self.suffix.removeprefix(".")}


class PartTask:
    """A part: a job for a worker, and a file in the folder when that is done."""

    def __init__(self, part: Part, desk: Desk) -> None:
        self.part, self.desk = part, desk
        self.name = f"part {part.number + 1} (frames {part.start} to {part.stop - 1})"
        self.frames = len(part)
        self.content = Decoded((), 0)  # of its result, once that is there

    @cached_property
    def path(self) -> Path:
        """Where its result is: a name that only the same film, part and fields have."""
        film, part = self.desk.film, self.part
        whole = [hashlib.sha256(film.checks.tobytes()).hexdigest(), self.desk.fields(), part.fields(0)]
        key = hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:16]
        return self.desk.folder / f"part-{part.number:05}-{key}{self.desk.suffix}"

    def done(self) -> bool:
        """Whether a run before left the result here, whole."""
        try:
            self._check()
        except (SeedpodError, JobFailedError):
            self.path.unlink(missing_ok=True)
            return False
        return True

    @contextmanager
    def payload(self) -> Iterator[Mapping[str, Any]]:
        desk = self.desk
        piece = desk.cutter.cut(self.part.read, f"piece-{self.part.number:05}")
        try:
            with desk.carrier.sent(piece.path) as source:
                yield {**desk.fields(), "source": source, "part": self.part.fields(piece.source_start)}
        finally:
            piece.path.unlink(missing_ok=True)

    def keep(self, output: Mapping[str, Any]) -> None:
        fetch_result(output["result"], self.path, self.desk.output_folder)
        if output["rate"] != str(self.desk.film.job_rate):
            self.path.unlink()
            raise JobFailedError(f"the result has {output['rate']} frames per second")
        self._check()

    def _check(self) -> None:
        if not self.path.exists():
            raise JobFailedError("there is no result")
        content = decoded(self.path)
        if len(content.frames) != self.frames:
            self.path.unlink()
            raise JobFailedError(f"the result has {len(content.frames)} frames of {self.frames}")
        self.content = content
