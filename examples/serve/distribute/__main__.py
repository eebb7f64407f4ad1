"""Restore a film on many workers: cut into parts, sent, and put together again with its sound.

    python -m examples.serve.distribute film.mp4 restored.mp4 --endpoint ID --short-side 1080

Run it in a checkout of Seedpod, after `pip install runpod imageio-ffmpeg numpy pillow`; it needs no GPU and
no torch. The result has the frames that one worker would make. See examples/README.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from app.errors import SeedpodError, UsageError
from app.job.request import RestoreRequest, parse
from app.video.write import VIDEO_SUFFIXES
from examples.serve.distribute.carry import carrier
from examples.serve.distribute.crew import Crew, Patience
from examples.serve.distribute.endpoint import Endpoint
from examples.serve.distribute.film import Film, fetched, read_film
from examples.serve.distribute.join import join
from examples.serve.distribute.piece import Cutter
from examples.serve.distribute.plan import overhead, plan
from examples.serve.distribute.show import Show
from examples.serve.distribute.task import Desk, PartTask

AT_ONCE_HOSTED = 10  # jobs that an endpoint on RunPod gets at once; a server of one's own does one at a time


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; returns the exit status."""
    options = parser().parse_args(arguments)
    show = Show()
    try:
        print(json.dumps(distribute(options, show), indent=2))
        return 0
    except KeyboardInterrupt:
        show.line("stopped; what runs was cancelled, what is done is kept: the same command goes on with it")
        return 130
    except SeedpodError as error:
        show.line(f"error: {error.message} [{error.code}]")
        return error.exit_status


def distribute(options: argparse.Namespace, show: Show) -> dict[str, Any]:
    """Do it all; returns what was made."""
    begun = time.monotonic()
    request = parse(RestoreRequest, _given(options))
    output: Path = options.output
    _check_output(output, request)
    places = [Endpoint(where) for where in options.endpoint]
    sends = carrier(options.input_folder)
    folder = output.with_name(output.name + ".parts")
    folder.mkdir(exist_ok=True)

    film = _film(options.film, request, folder, show)
    if output.exists() and output.samefile(film.path):
        raise UsageError("output_is_input", f"{output.name} is the film itself; name another output.")
    parts = plan(film.shots, max(1, round(options.part_seconds * film.rate)), request.window)
    desk = Desk(
        film, request, folder, output.suffix.lower(), Cutter(film, folder), sends, options.output_folder
    )
    tasks = [PartTask(part, desk) for part in parts]
    missing = [task for task in tasks if not task.done()]
    more = overhead(parts, film.shots, request.window)
    for note in film.info.notes:
        show.line(f"note: {note}")
    show.line(
        f"{len(film)} frames, {len(film.shots)} shots, {len(parts)} parts ({len(parts) - len(missing)} of "
        f"them done), {more:.2f} times the work of one worker"
    )

    seconds = {"film": time.monotonic() - begun}
    begun = time.monotonic()
    crew = Crew(
        [(place, options.at_once or (1 if place.own else AT_ONCE_HOSTED)) for place in places],
        _told(show, sum(task.frames for task in missing), begun),
        show.line,
        Patience(options.tries, options.patience, 20 * options.patience),
    )
    crew.run(missing)
    seconds["parts"] = time.monotonic() - begun
    show.line("all parts are here; joining them")

    begun = time.monotonic()
    join(
        [task.path for task in tasks],
        [task.content for task in tasks],
        output,
        rate=film.rate,
        part_rate=film.job_rate,
        codec=request.codec,
        sound_from=film.path if film.info.has_audio else None,
    )
    seconds["join"] = time.monotonic() - begun
    _tidy(folder)
    return {
        "path": str(output),
        "frames": len(film),
        "rate": str(film.rate),
        "shots": len(film.shots),
        "parts": len(parts),
        "retried": crew.retried,
        "work": round(more, 3),
        "sound": film.info.has_audio,
        "seed": request.seed,
        "seconds": {step: round(value, 1) for step, value in seconds.items()},
    }


# ------------------------------------------------------------------ the steps


def _film(source: str, request: RestoreRequest, folder: Path, show: Show) -> Film:
    begun: dict[str, float] = {}

    def told(step: str, done: int, total: int) -> None:
        show.step(step, done, total, begun.setdefault(step, time.monotonic()))

    path = fetched(source, folder, lambda done, total: told("downloading", done, total or 0))
    return read_film(path, request, folder / "film.json", told)


def _told(show: Show, total: int, begun: float) -> Callable[[float, int], None]:
    def told(done: float, running: int) -> None:
        show.step("restoring", done, total, begun, f", {running} running, {done:.0f} of {total} frames")

    return told


def _check_output(output: Path, request: RestoreRequest) -> None:
    if request.codec == "png" or output.suffix.lower() not in VIDEO_SUFFIXES:
        raise UsageError(
            "output_suffix",
            f"{output.name} with codec {request.codec} is no video file; expected "
            f"{', '.join(VIDEO_SUFFIXES)} and another codec than png (lossless keeps every value, too).",
        )
    if not output.parent.is_dir():
        raise UsageError("output_folder_missing", f"The folder {output.parent} does not exist: make it.")


def _tidy(folder: Path) -> None:
    """Remove what was made on the way, and nothing else that lies there."""
    for path in folder.iterdir():
        if path.name.lstrip(".").startswith(("part-", "piece-", "film")):
            path.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()


# ------------------------------------------------------------------ the command line


def parser() -> argparse.ArgumentParser:
    """The command line: where to, and the fields of a restore request."""
    made = argparse.ArgumentParser(
        prog="python -m examples.serve.distribute", description=(__doc__ or "").split("\n\n")[0]
    )
    made.add_argument("film", help="a file, or a link, which is downloaded once")
    made.add_argument(
        "output", type=Path, help="an .mp4, .mov or .mkv; parts are kept beside it until it is done"
    )
    made.add_argument(
        "--endpoint", action="append", required=True, metavar="ID|URL",
        help="id of an endpoint on RunPod, or http://host:8000 of a server of your own; may be repeated",
    )  # fmt: skip
    made.add_argument(
        "--at-once", type=int, metavar="N", help="jobs that each endpoint gets at once (default: "
        f"{AT_ONCE_HOSTED} on RunPod, one for a server); not less than its workers",
    )  # fmt: skip
    made.add_argument(
        "--part-seconds", type=float, default=20.0, metavar="S",
        help="length of a part, at most about (default: %(default)s)",
    )  # fmt: skip
    made.add_argument(
        "--tries", type=int, default=3, metavar="N", help="tries of a part (default: %(default)s)"
    )
    made.add_argument(
        "--patience", type=float, default=30.0, metavar="S",
        help="seconds without an answer until a part is given to another (default: %(default)s)",
    )  # fmt: skip
    made.add_argument("--input-folder", type=Path, help="the workers' SEEDPOD_INPUT, as it is seen here")
    made.add_argument("--output-folder", type=Path, help="the workers' SEEDPOD_OUTPUT, as it is seen here")
    for name, field in RestoreRequest.model_fields.items():
        default = "" if field.default is None else f" (default: {field.default})"
        made.add_argument(
            f"--{name.replace('_', '-')}", default=argparse.SUPPRESS, metavar=name.upper(),
            help=f"{field.description}{default}".replace("%", "%%"),
        )  # fmt: skip
    return made


def _given(options: argparse.Namespace) -> dict[str, str]:
    return {name: value for name, value in vars(options).items() if name in RestoreRequest.model_fields}


if __name__ == "__main__":
    sys.exit(main())
