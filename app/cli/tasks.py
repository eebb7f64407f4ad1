"""Commands that do one job on this machine: `run` with a task, and `bench`."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Collection

from app.errors import InputError, UsageError
from app.settings import Settings

PICTURES = {  # options of `run generate` that name a file
    "start": "an image to begin with, or a clip to go on from",
    "pose": "a clip of rendered poses, one for each frame",
    "reference": "the rendered pose of the image",
}


def restore(options: argparse.Namespace, settings: Settings) -> int:
    """Restore one clip or image; prints the result as JSON."""
    from app.job.request import RestoreRequest, parse
    from app.progress import shown_progress

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
    from app.progress import shown_progress

    request = parse(GenerateRequest, given(options, GenerateRequest.model_fields))
    pictures = {name: getattr(options, name) for name in PICTURES}
    with shown_progress() as progress:
        from app.once import generate_once

        result = generate_once(settings, request, pictures, options.output, progress)
    print(json.dumps(result.to_dict(), indent=2))
    return 0 if result.whole else 128 + signal.SIGINT


def autoencode(options: argparse.Namespace, settings: Settings) -> int:
    """Take a clip, or several, through a video autoencoder; prints the results as JSON."""
    from app.job.autoencode_request import OTHERS, AutoencodeRequest
    from app.job.request import parse
    from app.progress import shown_progress

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
    from app.progress import shown_progress

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


def given(options: argparse.Namespace, fields: Collection[str]) -> dict[str, object]:
    """The fields of a request that were given on the command line, as text."""
    return {name: value for name, value in vars(options).items() if name in fields}
