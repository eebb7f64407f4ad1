"""Clips for the tests, made by the bundled ffmpeg."""

import subprocess
from pathlib import Path

from app.video import ffmpeg


def make(path: Path, *arguments: str) -> Path:
    """Run ffmpeg with `arguments`, writing `path`."""
    command = [ffmpeg.binary(), "-v", "error", "-nostdin", "-y", *arguments, f"file:{path}"]
    done = subprocess.run(command, capture_output=True, check=False, text=True)
    assert done.returncode == 0, done.stderr
    return path


def clip(
    path: Path,
    *arguments: str,
    size: str = "128x72",
    rate: str = "25",
    frames: int = 25,
    sound: bool = False,
) -> Path:
    """A moving test picture of exactly `frames` frames; `arguments` are ffmpeg's output options."""
    seconds = frames / eval_rate(rate)
    tone = ("-f", "lavfi", "-i", f"sine=440:sample_rate=48000:duration={seconds:.6f}") if sound else ()
    picture = ("-f", "lavfi", "-i", f"testsrc2=size={size}:rate={rate}")
    return make(path, *picture, *tone, "-frames:v", str(frames), *arguments)


def eval_rate(rate: str) -> float:
    """ "30000/1001" as a number."""
    numerator, _, denominator = rate.partition("/")
    return int(numerator) / int(denominator or 1)


def said(path: Path) -> str:
    """What ffmpeg says of a file."""
    command = [ffmpeg.binary(), "-hide_banner", "-nostdin", "-i", f"file:{path}"]
    return subprocess.run(command, capture_output=True, check=False, text=True).stderr
