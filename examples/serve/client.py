#!/usr/bin/env python3
"""Restore a clip with the official client, on RunPod or on your own server. Needs `pip install runpod`.

export RUNPOD_ENDPOINT_BASE_URL=http://127.0.0.1:8000/v2  # your own server; unset: RunPod
export RUNPOD_API_KEY=...  # SEEDPOD_API_KEY of your own server, if it has one
python client.py clip.mp4 restored.mp4 --height 1080  # --endpoint ID on RunPod
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import runpod

FINAL = ("COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT")


def main() -> int:
    options = arguments()
    endpoint = runpod.Endpoint(options.endpoint, api_key=os.environ.get("RUNPOD_API_KEY", "none"))
    asked = {"task": "restore", "source": source(options.clip), "height": options.height}
    job = endpoint.run({"input": asked})
    try:
        answer = follow(endpoint, job.job_id)
    except KeyboardInterrupt:
        job.cancel()
        return 130
    if answer["status"] != "COMPLETED":
        print(answer["status"], reason(answer), file=sys.stderr)
        return 1
    save(answer["output"]["result"], options.output)
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Restore a clip or an image.")
    parser.add_argument("clip", help="a link, or a file of at most 7 MB")
    parser.add_argument("output", type=Path)
    parser.add_argument("--height", type=int, default=1080)
    parser.add_argument("--endpoint", default="local", help="id of the endpoint (default: %(default)s)")
    return parser.parse_args()


def source(clip: str) -> dict[str, str]:
    """A link as it is; a file in the request itself."""
    if clip.startswith(("http://", "https://")):
        return {"url": clip}
    return {"base64": base64.b64encode(Path(clip).read_bytes()).decode()}


def follow(endpoint: runpod.Endpoint, job_id: str) -> dict[str, Any]:
    """Show progress until the job has ended; returns its whole status. `job.output()` would give the output
    only, and nothing for a job that failed."""
    while True:
        answer: dict[str, Any] = endpoint.rp_client.get(f"{endpoint.endpoint_id}/status/{job_id}")
        if answer["status"] in FINAL:
            return answer
        progress = answer.get("output") or {}
        print(answer["status"], f"{progress.get('percent', 0)} %", progress.get("step", ""), file=sys.stderr)
        time.sleep(1)


def reason(answer: dict[str, Any]) -> str:
    """Why a job failed. Jobs of Seedpod tell it as JSON text; the platform itself as plain text."""
    try:
        error = json.loads(answer["error"])
        return f"{error['message']} [{error['code']}]"
    except (KeyError, TypeError, ValueError):
        return str(answer.get("error", "no reason is told"))


def save(result: dict[str, Any], output: Path) -> None:
    """Fetch the result from where it is."""
    match result["kind"]:
        case "inline":
            output.write_bytes(base64.b64decode(result["base64"]))
        case "bucket":
            urllib.request.urlretrieve(result["url"], output)
        case "path":
            print("in the server's output folder:", result["path"])


if __name__ == "__main__":
    sys.exit(main())
