"""Commands on checkpoints: check, fetch, stage, convert. None of them but `convert` loads torch."""

from __future__ import annotations

import argparse
import json

from app.errors import UsageError
from app.settings import Settings

TRANSFORMERS = ("dit", "transformer")  # what families call the part that `convert` takes unless told


def check(options: argparse.Namespace, settings: Settings) -> int:
    """Verify models, print what was found; 0 or 78."""
    from rich.console import Console

    from app import chain
    from app.boot.faults import where
    from app.boot.manifest import read_manifest
    from app.boot.report import print_report, to_json
    from app.boot.verify import select_models
    from app.progress import shown_progress

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
    from app.progress import shown_progress

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
    from app.progress import shown_progress

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
    from app.progress import shown_progress

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
