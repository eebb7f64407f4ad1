#!/usr/bin/env python3
"""Make a video from a prompt with the official client and watch it while it is made, on RunPod or on your own
server. Needs `pip install runpod`.

export RUNPOD_ENDPOINT_BASE_URL=http://127.0.0.1:8000/v2  # your own server; unset: RunPod
export RUNPOD_API_KEY=...  # SEEDPOD_API_KEY of your own server, if it has one
python stream.py "A red fox runs through deep snow" fox.mp4 --seconds 5  # --endpoint ID on RunPod
python stream.py "A red fox runs through deep snow" - | ffplay -  # plays as it arrives
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import runpod


def main() -> int:
    options = arguments()
    endpoint = runpod.Endpoint(options.endpoint, api_key=os.environ.get("RUNPOD_API_KEY", "none"))
    size = {"height": options.height, "width": options.width}
    asked = {"task": "generate", "prompt": options.prompt, "seconds": options.seconds, "stream": True, **size}
    if options.model:
        asked["model"] = options.model
    job = endpoint.run({"input": asked})
    try:
        with sys.stdout.buffer if options.output == "-" else Path(options.output).open("wb") as video:
            for piece in pieces(job):
                video.write(base64.b64decode(piece["base64"]))
                video.flush()
                print(f"{piece['frames']} frames", file=sys.stderr)
    except (KeyboardInterrupt, BrokenPipeError):  # the player was closed
        job.cancel()
        return 130
    answer: dict[str, Any] = endpoint.rp_client.get(f"{endpoint.endpoint_id}/status/{job.job_id}")
    if answer["status"] != "COMPLETED":
        print(answer["status"], reason(answer), file=sys.stderr)
        return 1
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Make a video from a prompt, and take it while it is made.")
    parser.add_argument("prompt")
    parser.add_argument("output", help="a file, or - to hand the video to a player")
    parser.add_argument("--seconds", type=float, default=5, help="default: %(default)s")
    parser.add_argument("--height", type=int, default=480, help="default: %(default)s")
    parser.add_argument("--width", type=int, default=832, help="default: %(default)s")
    parser.add_argument("--model", help="where the worker serves several that generate")
    parser.add_argument("--endpoint", default="local", help="id of the endpoint (default: %(default)s)")
    return parser.parse_args()


def pieces(job: runpod.endpoint.Job) -> Iterator[dict[str, Any]]:
    """The pieces of the video in their order. One may come twice, after a fault of the network; where one is
    missing, what follows would not play."""
    wanted = 0
    for piece in job.stream():
        if piece["number"] > wanted:
            raise SystemExit(f"piece {wanted} is gone, as nobody fetched it in time: take the result instead")
        if piece["number"] == wanted:
            wanted += 1
            yield piece


def reason(answer: dict[str, Any]) -> str:
    """Why a job failed. Jobs of Seedpod tell it as JSON text; the platform itself as plain text."""
    try:
        error = json.loads(answer["error"])
        return f"{error['message']} [{error['code']}]"
    except (KeyError, TypeError, ValueError):
        return str(answer.get("error", "no reason is told"))


if __name__ == "__main__":
    sys.exit(main())
