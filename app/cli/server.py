"""The command `serve`."""

from __future__ import annotations

import argparse
import logging
import os
import sys

from app.settings import Settings

KEEP_SECONDS = 3600  # how long a finished job of the server is known


def serve(options: argparse.Namespace, settings: Settings) -> int:
    """Boot, then take jobs: RunPod's where it hands them out, else those of the local server."""
    from app.serve.stop import Stop

    stop = Stop()
    stop.install()  # before anything slow: as process 1, a signal without a handler is lost
    from app import logs
    from app.job.payload import PAYLOADS
    from app.progress import Lines
    from app.serve.boot import Boot, checks_of, jobs_of, scratch_folder
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
        run, able = jobs_of(boot), None
    else:
        environment = dict(os.environ)
        forget_secrets(environment)
        boot = Pool(settings, scratch, cards, lambda: Lines(logs.LogStream("app.boot")), environment)
        run, able = boot.run, boot.able
    boot.start()
    stop.then(lambda: give_up(boot))
    lifecycle = Lifecycle(
        run, timeout=settings.job_seconds, keep_seconds=KEEP_SECONDS,
        journal=scratch / "jobs.jsonl", work=scratch, slots=len(cards), able=able,
    )  # fmt: skip
    if isinstance(boot, Pool):
        boot.on_lost = lifecycle.lose
    if hosted:
        from app.serve.worker import serve_on_platform

        serve_on_platform(lifecycle, boot, stop, validate=checks_of(boot), grace=settings.grace_seconds)
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
        app = create_app(lifecycle, boot, validate=checks_of(boot), payloads=PAYLOADS, api_key=key)
        serve_on_desk(app, lifecycle, boot, stop, host=settings.host, port=settings.port,
                      grace=settings.grace_seconds)  # fmt: skip
    return 0
