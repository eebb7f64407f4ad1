"""What the command line understands: which commands there are, and their options."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from app import __version__
from app.cli.checkpoints import check, convert, fetch, stage
from app.cli.server import serve
from app.cli.tasks import PICTURES, autoencode, bench_autoencode, generate, restore
from app.errors import UsageError

if TYPE_CHECKING:
    from pydantic import BaseModel

ABOUT = "Seedpod's command line, and process 1 of its container."


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
    top = Parser(prog="entrypoint.py", description=ABOUT)
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
