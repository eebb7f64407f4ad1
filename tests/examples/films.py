"""Films for the tests of distribution, and a worker that restores nothing: it cuts out what its part says."""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Callable, Mapping
from fractions import Fraction
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from app.serve.reporter import Reporter
from app.video.probe import probe
from app.video.rates import exact_rate
from app.video.read import read_frames
from app.video.write import VideoWriter
from tests.video.clips import make

PICTURES = ("testsrc2", "mandelbrot", "smptebars")


def film(path: Path, *lengths: int, rate: str = "25", size: str = "48x32", sound: bool = True) -> Path:
    """Shots of these lengths with hard cuts between them, H.264 with a keyframe every 24 frames."""
    shots = "".join(
        f"{kind}=size={size}:rate={rate},trim=end_frame={length},setpts=PTS-STARTPTS[s{i}];"
        for i, (kind, length) in enumerate(zip(cycle(PICTURES), lengths, strict=False))
    )
    joined = "".join(f"[s{i}]" for i in range(len(lengths)))
    seconds = float(sum(lengths) / Fraction(rate))
    tone = ["-f", "lavfi", "-i", f"sine=frequency=440:duration={seconds:.6f}"] if sound else []
    return make(
        path, *tone, "-filter_complex", f"{shots}{joined}concat=n={len(lengths)}:v=1,format=yuv420p[v]",
        "-map", "[v]", *(["-map", "0:a"] if sound else []), "-c:v", "libx264", "-g", "24",
    )  # fmt: skip


def frames_of(path: Path, rate: Fraction | None = None) -> np.ndarray:
    """(frames, height, width, 3) uint8."""
    return np.stack(list(read_frames(path, probe(path), rate=rate)))


def copying(
    seconds: float = 0.0, before: Callable[[Mapping[str, Any]], None] = lambda payload: None
) -> Callable[[str, Mapping[str, Any], Reporter], Mapping[str, Any]]:
    """A job that takes `seconds` a frame, and gives the frames of its part as they are."""

    def run(job_id: str, payload: Mapping[str, Any], reporter: Reporter) -> Mapping[str, Any]:
        before(payload)
        part = payload["part"]
        with TemporaryDirectory() as folder:
            source, made = Path(folder, "source"), Path(folder, f"made.{payload['container']}")
            source.write_bytes(base64.b64decode(payload["source"]["base64"]))
            rate, info = exact_rate(payload["rate"]), probe(source)
            reporter.start("restore", part["stop"] - part["start"], "frames")
            with VideoWriter(
                made, info.width, info.height, rate, codec=payload.get("codec", "h264")
            ) as writer:
                for number, frame in enumerate(read_frames(source, info, rate=rate), part["source_start"]):
                    if part["start"] <= number < part["stop"]:
                        reporter.check()
                        time.sleep(seconds)
                        writer.write(frame[None])
                        reporter.advance(1)
            content = made.read_bytes()
        return {
            "frames": part["stop"] - part["start"],
            "rate": str(rate),
            "result": {
                "kind": "inline", "base64": base64.b64encode(content).decode(), "bytes": len(content),
                "sha256": hashlib.sha256(content).hexdigest(),
            },
        }  # fmt: skip

    return run
