"""The bundled ffmpeg as a child process: its pipes, its last words, and its sure end.

imageio-ffmpeg brings the binary; its own reader and writer cannot give exact rational rates, 10 bits
from floats, copied sound or a protocol whitelist, so the binary is run here. A child opens local files
of known containers only, sees none of our environment, and never outlives the object that started it.
Knows nothing of clips, frames or colours.
"""

from __future__ import annotations

import io
import re
import subprocess
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self, cast

from app.errors import ConfigError

# Containers of real clips. Not here on purpose: playlists (hls, concat), which name other files, and
# text (tty, srt) and number-patterned images, which ffmpeg would otherwise take for video.
CONTAINERS = (
    "mov,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,mxf,dv,ivf,h264,hevc,m4v,obu,yuv4mpegpipe,nut"
)
# What ffmpeg says when the data is broken, as opposed to merely odd: decoders also complain, at the
# level of errors, about things that harm no picture (stray headers, unused references).
DAMAGE = re.compile(
    r"corrupt decoded frame|corrupt input packet|Error submitting packet|Decoding error"
    r"|Error while decoding stream|Error during demuxing|EBML number",
    re.IGNORECASE,
)
# What it says when the file ends too early, or the rest of it cannot be followed. It may say so while
# it only looks ahead, so that the place of the damage is not known.
CUT_SHORT = re.compile(
    r"partial file|ended prematurely|packet corrupt"
    r"|^\[(?:in#\d|[\w,]*(?:mov|matroska|avi|mpeg|flv|asf|ogg|mxf))[^\]]* @ \w+\] \[error\]",
    re.IGNORECASE,
)
_LINES_KEPT = 200
_ALWAYS = ("-hide_banner", "-nostdin", "-nostats")
_ENVIRONMENT = {"LC_ALL": "C"}  # none of ours: it holds secrets
_PIPE_BYTES = 1 << 20


def binary() -> str:
    """Path of the ffmpeg that imageio-ffmpeg brings."""
    import imageio_ffmpeg

    try:
        return str(imageio_ffmpeg.get_ffmpeg_exe())
    except RuntimeError as error:
        raise ConfigError(
            "ffmpeg_missing",
            "No ffmpeg was found; it comes with the package imageio-ffmpeg: install that for this platform.",
        ) from error


def input_options(path: Path) -> list[str]:
    """Options that open `path` as a local file, whatever its name holds ('-', ':', '%')."""
    return ["-protocol_whitelist", "file,pipe", "-format_whitelist", CONTAINERS, "-i", f"file:{path}"]


def clean(line: str, *paths: Path) -> str:
    """A line of ffmpeg's without addresses and folders, fit for a message."""
    for path in paths:
        line = line.replace(f"file:{path}", path.name).replace(str(path), path.name)
        line = line.replace(str(path.parent) + "/", "")
    return re.sub(r"\[[^\]]* @ 0x[0-9a-f]+\] |\[(warning|error|fatal)\] ", "", line).strip()


class Ended(NamedTuple):
    """An ffmpeg that has ended: exit status, what it wrote to standard output, the lines it said."""

    status: int
    output: bytes
    lines: list[str]


def run(arguments: Sequence[str], timeout: float | None = None) -> Ended:
    """Run ffmpeg to its end. Raises subprocess.TimeoutExpired."""
    done = subprocess.run(
        [binary(), *_ALWAYS, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env=_ENVIRONMENT,
        timeout=timeout,
        check=False,
    )
    return Ended(done.returncode, done.stdout, done.stderr.decode("utf-8", "replace").split("\n"))


class Ffmpeg:
    """A running ffmpeg. Use as a context manager: leaving it ends the child, whatever happened."""

    def __init__(self, arguments: Sequence[str], *, writable: bool = False) -> None:
        """Start with `arguments`; `writable` opens its standard input, else that is empty."""
        self._process = subprocess.Popen(
            [binary(), *_ALWAYS, *arguments],
            stdin=subprocess.PIPE if writable else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=_ENVIRONMENT,
            start_new_session=True,  # an interrupt of the terminal reaches us, and we end the child
            bufsize=0,
            pipesize=_PIPE_BYTES,
        )
        self.damage: list[str] = []
        self._lines: deque[str] = deque(maxlen=_LINES_KEPT)
        self._drain = threading.Thread(target=self._listen, daemon=True)
        self._drain.start()

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._process.pid

    @property
    def last_lines(self) -> list[str]:
        """What ffmpeg said last, up to 200 lines; complete after `finish`."""
        return list(self._lines)

    def read_into(self, view: memoryview) -> int:
        """Fill `view` (bytes) from standard output; gives fewer bytes than it holds only at the end."""
        stdout = cast(io.FileIO, self._process.stdout)
        done = 0
        while done < len(view):
            count = stdout.readinto(view[done:])
            if not count:
                break
            done += count
        return done

    def read_some(self, most: int) -> bytes:
        """What standard output has, as soon as it has anything, up to `most` bytes; b"" at the end."""
        stdout = cast(io.FileIO, self._process.stdout)
        return stdout.read(most) or b""

    def kill(self) -> None:
        """End the child at once; a write to it fails from then on."""
        self._process.kill()

    def write(self, view: memoryview) -> None:
        """Send all of `view` (bytes) to standard input; BrokenPipeError when ffmpeg has gone."""
        stdin = cast(io.FileIO, self._process.stdin)
        while view:
            view = view[stdin.write(view) or 0 :]

    def finish(self) -> int:
        """Close the input, wait for the end, and give the exit status."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        status = self._process.wait()
        self._drain.join()
        return status

    def close(self) -> None:
        """End the child now, if it still runs."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._drain.join()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            if pipe is not None:
                pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _listen(self) -> None:
        # read at all times and to the end: a full pipe of messages would stop ffmpeg for good
        assert self._process.stderr is not None
        rest = b""
        while chunk := self._process.stderr.read(1 << 16):
            *lines, rest = (rest + chunk).split(b"\n")
            rest = rest[-(1 << 16) :]
            for line in lines:
                self._keep(line)
        self._keep(rest)

    def _keep(self, line: bytes) -> None:
        text = line.decode("utf-8", "replace").strip()
        if not text:
            return
        self._lines.append(text)
        if len(self.damage) < _LINES_KEPT and (DAMAGE.search(text) or CUT_SHORT.search(text)):
            self.damage.append(text)
