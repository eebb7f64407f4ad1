#!/usr/bin/env python3
"""Seedpod's command line, and process 1 of its container.

    check      verify the checkpoints            stage    copy them to fast local storage
    fetch      download what is missing          convert  make 16-bit files of them
    run        do one job on this machine    serve    boot, then take jobs (the default)
    bench      measure a task

Every command reads like the flow it is; each imports what it needs, so that `check` never loads torch.
Exit status: 0 done, 64 wrong use, 65 bad input, 69 unavailable, 70 our fault, 74 input or output
failed, 78 configuration or checkpoints wrong.
"""

from __future__ import annotations

import argparse
import errno
import json
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if __name__ == "__main__":  # process 1 gets no signal without a handler, and the imports take a second
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(128 + number))
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where Ctrl-C is ignored
        signal.signal(signal.SIGINT, lambda number, frame: os._exit(128 + number))
sys.path.insert(0, str(Path(__file__).resolve().parent))  # runs from any folder

from app import __version__
from app.errors import SeedpodError, UsageError
from app.settings import Settings, load_settings

if TYPE_CHECKING:
    from pydantic import BaseModel

    from app.progress import Progress

PICTURES = {  # options of `run generate` that name a file
    "start": "an image to begin with, or a clip to go on from",
    "pose": "a clip of rendered poses, one for each frame",
    "reference": "the rendered pose of the image",
}
TRANSFORMERS = ("dit", "transformer")  # what families call the part that `convert` takes unless told
KEEP_SECONDS = 3600  # how long a finished job of the server is known


def main(arguments: Sequence[str], environ: Mapping[str, str] = os.environ) -> int:
    """Run one command; returns the exit status."""
    try:
        options = parsed(arguments or ["serve"])
        with ended_by_signals():
            return int(options.command(options, load_settings(environ)))
    except SeedpodError as error:
        print(f"seedpod: {error.message} [{error.code}]", file=sys.stderr)
        return error.exit_status
    except (KeyboardInterrupt, Ended) as error:
        number = error.number if isinstance(error, Ended) else signal.SIGINT
        print(f"seedpod: interrupted ({number.name}); nothing partial was left.", file=sys.stderr)
        return 128 + number
    except BrokenPipeError:
        # Whoever read our results has gone; Python would complain once more while it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            print("seedpod: there is no room left for what was to be written. [no_space]", file=sys.stderr)
            return 74
        traceback.print_exc()
        print(f"seedpod: a fault of ours ({type(error).__name__}), told above; please report it. [internal]",
              file=sys.stderr)  # fmt: skip
        return 70


class Ended(KeyboardInterrupt):
    """A signal that ends a command, as Ctrl-C does: what it began is cleaned up on the way out."""

    def __init__(self, number: signal.Signals) -> None:
        self.number = number


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end what runs inside as Ctrl-C does. The server has handlers of its own."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may say what a signal does
        return

    def end(number: int, frame: object) -> NoReturn:
        raise Ended(signal.Signals(number))

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------ commands


def check(options: argparse.Namespace, settings: Settings) -> int:
    """Verify models, print what was found; 0 or 78."""
    from rich.console import Console

    from app import chain
    from app.boot.faults import where
    from app.boot.manifest import read_manifest
    from app.boot.report import print_report, to_json
    from app.boot.verify import select_models

    if options.full:
        settings = settings.model_copy(update={"verify": "full"})
    manifest = read_manifest(settings.manifest)
    names = options.models or settings.models
    selection = select_models(manifest, names, settings.roots, all_if_none=True)
    with shown_progress() as progress:
        report = chain.check(settings, manifest, selection, chain.hash_record(settings), progress)
    if options.json:
        print(json.dumps(to_json(report), indent=2))
    else:
        print_report(report, Console())
        if report.files and all(file.state == "missing" for file in report.files):
            print(f"None of these files is under {where(settings.roots)}; is SEEDPOD_ROOTS right?")
    return 0 if report.ok else 78


def fetch(options: argparse.Namespace, settings: Settings) -> int:
    """Download what models lack."""
    from app import chain
    from app.boot.manifest import read_manifest
    from app.boot.verify import select_models

    manifest = read_manifest(settings.manifest)
    select_models(manifest, options.models, settings.roots)
    with shown_progress() as progress:
        fetched = chain.fetch_missing(settings, manifest, options.models, progress, optional=options.optional)
    for path in fetched:
        print(path)
    if not fetched:
        print("Nothing is missing.")
    return 0


def stage(options: argparse.Namespace, settings: Settings) -> int:
    """Verify and stage models; prints where each staged file is."""
    from app import chain
    from app.boot.manifest import read_manifest
    from app.boot.verify import select_models

    manifest = read_manifest(settings.manifest)
    selection = select_models(manifest, options.models or settings.models, settings.roots)
    with shown_progress() as progress:
        hashes = chain.hash_record(settings)
        chain.check(settings, manifest, selection, hashes, progress).require_ok()
        staged = chain.stage_files(settings, manifest, selection, hashes, progress)
    for source, copy in staged.items():
        print(f"{source} -> {copy.path} ({copy.reason})")
    return 0


def convert(options: argparse.Namespace, settings: Settings) -> int:
    """Write a 16-bit file of the transformer, which is nearly all of a model, beside its master."""
    from app import chain
    from app.boot.convert import convert as convert_file
    from app.boot.locate import Found, locate_file
    from app.boot.manifest import read_manifest
    from app.boot.verify import select_models

    manifest = read_manifest(settings.manifest)
    select_models(manifest, [options.model], settings.roots)
    model = manifest.models[options.model]
    hashes = chain.hash_record(settings)
    with shown_progress() as progress:
        for part in options.part or [name for name in TRANSFORMERS if name in model.parts] or TRANSFORMERS:
            if part not in model.parts:
                raise UsageError("part_unknown", f"model {model.name} has no part {part}; name one with "
                                 f"--part: {', '.join(model.parts)}.")  # fmt: skip
            place = locate_file(manifest.files[model.parts[part]], settings.roots)
            if not isinstance(place, Found):
                selection = select_models(manifest, [model.name], settings.roots)
                chain.check(settings, manifest, selection, hashes, progress).require_ok()
                raise UsageError("master_missing", f"{place.entry.path} is not there; only a 16-bit file is.")
            known = hashes.lookup(place.path)
            made = convert_file(
                place.path, place.entry.format,
                dtype=options.dtype, source_sha256=place.entry.sha256 or known, progress=progress,
            )  # fmt: skip
            print(made)
    return 0


def restore(options: argparse.Namespace, settings: Settings) -> int:
    """Restore one clip or image; prints the result as JSON."""
    from app.job.request import RestoreRequest, parse

    request = parse(RestoreRequest, given(options, RestoreRequest.model_fields))
    if options.sp_size:
        settings = settings.model_copy(update={"sp_size": options.sp_size})
    if options.sheet:
        if request.codec == "png":
            raise UsageError("sheet_refused", "A sheet shows clips and images; --codec png makes neither.")
        from app.video.sheet import check_sheet

        check_sheet(options.sheet, [options.input, options.output])
    with shown_progress() as progress:
        from app.once import restore_once

        result = restore_once(settings, request, options.input, options.output, progress)
        if options.sheet:
            from app.video.sheet import write_sheet

            write_sheet(options.sheet, [("before", options.input), ("after", options.output)])
    print(json.dumps(result.to_dict(), indent=2))
    return 0


def generate(options: argparse.Namespace, settings: Settings) -> int:
    """Make one video from a prompt; prints the result as JSON."""
    from app.job.generate_request import GenerateRequest
    from app.job.request import parse

    request = parse(GenerateRequest, given(options, GenerateRequest.model_fields))
    pictures = {name: getattr(options, name) for name in PICTURES}
    with shown_progress() as progress:
        from app.once import generate_once

        result = generate_once(settings, request, pictures, options.output, progress)
    print(json.dumps(result.to_dict(), indent=2))
    return 0 if result.whole else 128 + signal.SIGINT


def autoencode(options: argparse.Namespace, settings: Settings) -> int:
    """Take a clip, or several, through a video autoencoder; prints the results as JSON."""
    from app.errors import InputError
    from app.job.autoencode_request import OTHERS, AutoencodeRequest
    from app.job.request import parse

    request = parse(AutoencodeRequest, given(options, AutoencodeRequest.model_fields))
    others = {name: path for name in OTHERS if (path := getattr(options, name)) is not None}
    sources = options.input
    with shown_progress() as progress:
        from app.job.clips import Refused
        from app.once import autoencode_all, autoencode_once

        if len(sources) == 1 and not sources[0].is_dir():
            result = autoencode_once(settings, request, sources[0], others, options.output, progress)
            print(json.dumps(result.to_dict(), indent=2))
            return 0
        listed = autoencode_all(settings, request, sources, others, options.output, progress)
    print(json.dumps([each.to_dict() for each in listed], indent=2))
    refused = [each for each in listed if isinstance(each, Refused)]
    for each in refused:
        print(f"seedpod: {each.name}: {each.error.message} [{each.error.code}]", file=sys.stderr)
    return InputError.exit_status if refused else 0


def bench_autoencode(options: argparse.Namespace, settings: Settings) -> int:
    """Measure a video autoencoder on the devices of this machine, in each type and batch size."""
    with shown_progress() as progress:
        from app.machine import about
        from app.models.latents.bench import measure_all, show
        from app.once import open_codec

        loading = settings.model_copy(update={"device": "cpu", "dtype": "float32"})
        name, codec = open_codec(loading, options.model, progress)
        title = f"{name}: {options.frames} frames of {options.size}x{options.size}"
        only = [] if settings.device == "auto" else [settings.device.partition(":")[0]]
        speeds = measure_all(codec, options.size, options.frames, options.repeats, only)
        show(title, speeds, about())
    return 0


def serve(options: argparse.Namespace, settings: Settings) -> int:
    """Boot, then take jobs: RunPod's where it hands them out, else those of the local server."""
    from app.serve.stop import Stop

    stop = Stop()
    stop.install()  # before anything slow: as process 1, a signal without a handler is lost
    from app import logs
    from app.job.payload import PAYLOADS, validate
    from app.progress import Lines
    from app.serve.boot import Boot, jobs_of, scratch_folder
    from app.serve.cards import share_out
    from app.serve.lifecycle import Lifecycle
    from app.serve.pool import Pool
    from app.serve.worker import forget_secrets, give_up

    hosted = settings.runpod_jobs is not None
    logs.setup(settings.log_format, sys.stderr, hosted=hosted, secrets=settings.secrets())
    scratch = scratch_folder(settings)
    cards = share_out(settings)
    boot: Boot | Pool
    if len(cards) == settings.sp_size == 1:
        boot = Boot(settings, scratch, lambda: Lines(logs.LogStream("app.boot")))
        run = jobs_of(boot)
    else:
        environment = dict(os.environ)
        forget_secrets(environment)
        boot = Pool(settings, scratch, cards, lambda: Lines(logs.LogStream("app.boot")), environment)
        run = boot.run
    boot.start()
    stop.then(lambda: give_up(boot))
    lifecycle = Lifecycle(
        run, timeout=settings.job_seconds, keep_seconds=KEEP_SECONDS,
        journal=scratch / "jobs.jsonl", work=scratch, slots=len(cards),
    )  # fmt: skip
    if hosted:
        from app.serve.worker import serve_on_platform

        serve_on_platform(lifecycle, boot, stop, validate=validate, grace=settings.grace_seconds)
    else:
        from app.serve.desk import serve_on_desk
        from app.serve.local import create_app

        forget_secrets(os.environ)  # they were read; no child needs them

        key = settings.api_key.get_secret_value() if settings.api_key else None
        if key is None and settings.host not in ("127.0.0.1", "::1", "localhost"):
            logging.getLogger("app.serve").warning(
                "SEEDPOD_HOST is %s and SEEDPOD_API_KEY is not set: whoever reaches this port can run jobs.",
                settings.host,
            )
        app = create_app(lifecycle, boot, validate=validate, payloads=PAYLOADS, api_key=key)
        serve_on_desk(app, lifecycle, boot, stop, host=settings.host, port=settings.port,
                      grace=settings.grace_seconds)  # fmt: skip
    return 0


# ------------------------------------------------------------------ the command line


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are errors like all others. `fill` adds its options when it is used: those of
    a task are its request's, whose modules other commands do not need."""

    def __init__(self, *arguments: Any, fill: Callable[[Parser], None] | None = None, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._fill = fill
        self.set_defaults(parser=self)  # the command's own wins, as it is read last

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self._fill is not None:
            self._fill(self)
            self._fill = None
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        end = " See" if message.endswith("?") else "; see"
        raise UsageError("usage", f"{message}{end} {self.prog} --help.")

    def options(self) -> list[str]:
        """Every option that there is."""
        return list(self._option_string_actions)


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of a command.

    Raises:
        UsageError: `usage`; for words that the command does not know, with the option that is likely meant.
    """
    options, unknown = parser().parse_known_args(arguments)
    if unknown:
        message = f"unrecognized arguments: {' '.join(unknown)}"
        if near := get_close_matches(unknown[0].partition("=")[0], options.parser.options(), n=1):
            message += f"; did you mean {near[0]}?"
        elif not unknown[0].startswith("-"):
            message += "; a text or a path with spaces needs quotes around it"
        options.parser.error(message)
    return options


def parser() -> argparse.ArgumentParser:
    """The command line. The options of `run` are the request's own fields."""
    top = Parser(prog="entrypoint.py", description=(__doc__ or "").split("\n\n")[0])
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)

    sub = commands.add_parser("serve", help="boot, then take jobs (the default)", description=serve.__doc__)
    sub.set_defaults(command=serve)

    sub = commands.add_parser("check", help="verify the checkpoints of models", description=check.__doc__)
    sub.add_argument(
        "models", nargs="*", metavar="MODEL", help="default: SEEDPOD_MODELS, or all complete ones"
    )
    sub.add_argument("--json", action="store_true", help="print JSON for machines")
    sub.add_argument("--full", action="store_true", help="hash every file, once (as SEEDPOD_VERIFY=full)")
    sub.set_defaults(command=check)

    sub = commands.add_parser("fetch", help="download what models lack", description=fetch.__doc__)
    sub.add_argument("models", nargs="+", metavar="MODEL")
    sub.add_argument("--optional", action="store_true", help="also parts that the models can do without")
    sub.set_defaults(command=fetch)

    sub = commands.add_parser(
        "stage", help="copy checkpoints to fast local storage", description=stage.__doc__
    )
    sub.add_argument(
        "models", nargs="*", metavar="MODEL", help="default: SEEDPOD_MODELS, or all complete ones"
    )
    sub.set_defaults(command=stage)

    sub = commands.add_parser("convert", help="write 16-bit files of a model", description=convert.__doc__)
    sub.add_argument("model", metavar="MODEL")
    sub.add_argument("--dtype", choices=("bf16", "fp16"), default="bf16", help="default: %(default)s")
    sub.add_argument("--part", action="append", help="this part instead of the transformer; may be repeated")
    sub.set_defaults(command=convert)

    run = commands.add_parser("run", help="do one job on this machine")
    tasks = run.add_subparsers(required=True, metavar="TASK", parser_class=Parser)
    tasks.add_parser("restore", help="sharpen, clean and upscale a clip or an image",
                     description=restore.__doc__, fill=_restore_parser)  # fmt: skip
    tasks.add_parser("generate", help="make a video from a prompt",
                     description=generate.__doc__, fill=_generate_parser)  # fmt: skip
    tasks.add_parser("autoencode", help="encode, edit latents, decode, compare",
                     description=autoencode.__doc__, fill=_autoencode_parser)  # fmt: skip
    bench = commands.add_parser("bench", help="measure a task on this machine")
    tasks = bench.add_subparsers(required=True, metavar="TASK", parser_class=Parser)
    sub = tasks.add_parser("autoencode", help="devices, types and batch sizes of a video autoencoder",
                           description=bench_autoencode.__doc__)  # fmt: skip
    sub.add_argument("--model", metavar="MODEL", help="default: the only autoencode model there is")
    sub.add_argument("--size", type=_count(16, 4096), default=256, help="side of the frames in pixels "
                     "(default: %(default)s)")  # fmt: skip
    sub.add_argument("--frames", type=_count(1, 10_000), default=17, help="default: %(default)s")
    sub.add_argument("--repeats", type=_count(1, 100), default=3, help="default: %(default)s")
    sub.set_defaults(command=bench_autoencode)
    return top


def _count(least: int, most: int) -> Callable[[str], int]:
    """A whole number from `least` to `most`, as an option's type."""

    def read(text: str) -> int:
        value = int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else least - 1
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least} to {most}")
        return value

    return read


def _restore_parser(sub: argparse.ArgumentParser) -> None:
    from app.job.request import RestoreRequest

    sub.add_argument("input", type=Path, metavar="INPUT", help="a clip or an image")
    sub.add_argument("-o", "--output", type=Path, required=True, help="a file, or a folder for --codec png")
    sub.add_argument("--sheet", type=Path, help="also write a before/after sheet, as PNG")
    sub.add_argument("--sp-size", type=_count(1, 64), metavar="N",
                     help="cards that work on it together (default: SEEDPOD_SP_SIZE)")  # fmt: skip
    _fields(sub, RestoreRequest)
    sub.set_defaults(command=restore)


def _generate_parser(sub: argparse.ArgumentParser) -> None:
    from app.job.generate_request import GenerateRequest

    sub.add_argument("prompt", metavar="PROMPT", help="what the video shows")
    sub.add_argument("-o", "--output", type=Path, required=True, help="a .mp4, .mov or .mkv file")
    for name, meaning in PICTURES.items():
        sub.add_argument(f"--{name}", type=Path, metavar="FILE", help=meaning)
    _fields(sub, GenerateRequest, without=("prompt",))
    sub.set_defaults(command=generate)


def _autoencode_parser(sub: argparse.ArgumentParser) -> None:
    from app.job.autoencode_request import OTHERS, AutoencodeRequest

    sub.add_argument(
        "input", type=Path, nargs="+", metavar="INPUT", help="a clip, an image, or a folder of them"
    )
    sub.add_argument("-o", "--output", type=Path, required=True, help="a folder, empty or yet to be made")
    for name in OTHERS:
        sub.add_argument(f"--{name}", type=Path, metavar="FILE", help=f'the clip that edits call "{name}"')
    _fields(sub, AutoencodeRequest)
    sub.set_defaults(command=autoencode)


def _fields(sub: argparse.ArgumentParser, request: type[BaseModel], without: Collection[str] = ()) -> None:
    """An option for each field of a request; one that holds a list may be repeated."""
    for name, field in request.model_fields.items():
        if name in without:
            continue
        several = isinstance(field.default, list)
        default = "" if field.default is None or several else f" (default: {field.default})"
        sub.add_argument(
            f"--{name.replace('_', '-')}",
            default=argparse.SUPPRESS,
            action="append" if several else "store",
            metavar=name.upper(),
            help=f"{field.description}{default}".replace("%", "%%"),
        )


def given(options: argparse.Namespace, fields: Collection[str]) -> dict[str, object]:
    """The fields of a request that were given on the command line, as text."""
    return {name: value for name, value in vars(options).items() if name in fields}


@contextmanager
def shown_progress() -> Iterator[Progress]:
    """Bars on a terminal, lines elsewhere; on stderr, as stdout is for results."""
    from rich.console import Console

    from app.progress import Lines, Silent, Terminal

    if sys.stderr is None:
        yield Silent()
    elif sys.stderr.isatty():
        with Terminal(Console(stderr=True)) as bars:
            yield bars
    else:
        yield Lines()


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # from here on there is something to clean up
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main(sys.argv[1:]))
