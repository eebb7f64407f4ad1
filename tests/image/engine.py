"""A Docker engine of the tests' own, and a Debian base image that needs no registry.

The engine has its own data, socket and process id, so that it meets no other engine of the machine, and is
stopped by that id. It knows nothing of Seedpod.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

# Tried in this order: as it is; where the kernel's packet filter is not ours; where overlays are not, either.
OPTIONS = ((), ("--iptables=false",), ("--iptables=false", "--storage-driver=vfs"))


class NoEngineError(Exception):
    """No engine can run here; says why."""


class Engine:
    """A running dockerd. Use as a context manager."""

    def __init__(self) -> None:
        for tool in ("dockerd", "debootstrap"):
            if shutil.which(tool, path=search_path()) is None:
                raise NoEngineError(f"{tool} is not installed: apt-get install docker.io debootstrap")
        if os.geteuid():
            raise NoEngineError("the tests are not run as root")
        self._docker = client()
        self.folder = Path(tempfile.mkdtemp(prefix="seedpod-image-", dir="/var/tmp"))
        self.host = f"unix://{self.folder}/docker.sock"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        for options in OPTIONS:
            if self._start(options):
                return self
        log = (self.folder / "log").read_text(errors="replace").splitlines()[-5:]
        self.__exit__()
        raise NoEngineError("dockerd does not start: " + " | ".join(log))

    def __exit__(self, *_: object) -> None:
        self._stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self, options: Sequence[str]) -> bool:
        folder = self.folder
        with (folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    "dockerd", "--data-root", folder / "data", "--exec-root", folder / "exec",
                    "--pidfile", folder / "pid", "--host", self.host, *options,
                ],
                stdout=log, stderr=log, start_new_session=True, env=os.environ | {"PATH": search_path()},
            )  # fmt: skip
        until = time.monotonic() + 30
        while time.monotonic() < until and self._process.poll() is None:
            if self.run("info", check=False).returncode == 0:
                return True
            time.sleep(0.5)
        self._stop()
        return False

    def _stop(self) -> None:
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        for line in reversed(Path("/proc/self/mounts").read_text().splitlines()):
            if (mounted := line.split()[1]).startswith(f"{self.folder}/"):
                subprocess.run(["umount", "-l", mounted])

    def environment(self) -> dict[str, str]:
        """What a command needs to speak to this engine."""
        path = f"{Path(self._docker).parent}:{search_path()}"
        return os.environ | {"DOCKER_HOST": self.host, "DOCKER_BUILDKIT": "1", "PATH": path}

    def run(
        self, *words: str | Path, check: bool = True, timeout: float = 120, **more: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run `docker WORDS`; with `check`, a failure shows what it said."""
        done = subprocess.run(
            [self._docker, *map(str, words)], capture_output=True, text=True, timeout=timeout,
            env=self.environment(), **more,
        )  # fmt: skip
        if check and done.returncode:
            raise AssertionError(
                f"docker {words}: {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
            )
        return done

    def popen(self, *words: str | Path, **more: Any) -> subprocess.Popen[bytes]:
        """Start `docker WORDS`."""
        return subprocess.Popen([self._docker, *map(str, words)], env=self.environment(), **more)


def search_path() -> str:
    """PATH, with the folders of the system's own tools."""
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/bin:/sbin:/bin"


def client() -> str:
    """A docker that can build with BuildKit: before version 23 it is built in, since then it is a plug-in."""
    for folder in search_path().split(":"):
        tool = Path(folder) / "docker"
        if not os.access(tool, os.X_OK):
            continue
        told = subprocess.run([tool, "--version"], capture_output=True, text=True).stdout
        major = int(
            "0" + "".join(c for c in told.removeprefix("Docker version ").split(".")[0] if c.isdigit())
        )
        plugin = subprocess.run([tool, "buildx", "version"], capture_output=True).returncode == 0
        if major < 23 or plugin:
            return str(tool)
    raise NoEngineError("no docker here can build with BuildKit")


# ------------------------------------------------------------------ the base image

PACKAGES = "python3,python3-venv,ca-certificates"
CA_BUNDLE = Path("/etc/ssl/certs/ca-certificates.crt")


def debian_base(cache: Path) -> Path:
    """A tar of a minimal Debian with Python: what a base image from a registry would be. Made once, and
    kept in `cache`."""
    made = cache / "base.tar"
    if not made.exists():
        release = dict(
            line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line
        )
        mirror = subprocess.run(
            ["apt-get", "indextargets", "--format", "$(SITE)", "Created-By: Packages", "Component: main"],
            capture_output=True, text=True, check=True,
        ).stdout.split()[0]  # fmt: skip
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
            root = Path(folder) / "root"
            subprocess.run(
                [
                    "debootstrap", "--variant=minbase", f"--include={PACKAGES}",
                    release["VERSION_CODENAME"].strip('"'), root, mirror,
                ],
                check=True, stdout=subprocess.DEVNULL, env=os.environ | {"PATH": search_path()},
            )  # fmt: skip
            for waste in (root / "var/cache/apt/archives", root / "var/lib/apt/lists"):
                shutil.rmtree(waste)
                waste.mkdir()
            partial = made.with_suffix(".partial")
            subprocess.run(["tar", "-C", root, "-cf", partial, "."], check=True)
            partial.rename(made)
    return made


def pip_files(folder: Path, pip: Sequence[str], *, wheels: bool) -> str:
    """Put this machine's pip settings, certificates and, with `wheels`, its torch into `folder`; returns the
    lines of a Dockerfile that copy them. They are for the stage that runs pip, and do not reach the image."""
    lines = []
    settings: dict[str, list[str]] = {}
    for line in subprocess.run(
        [*pip, "config", "list"], capture_output=True, text=True, check=True
    ).stdout.splitlines():
        key, _, value = line.partition("=")
        settings.setdefault(key.split(".", 1)[-1].strip("."), []).extend(value.strip("'\"").split())
    copied = folder / "wheels"
    copied.mkdir(parents=True)
    for place in dict.fromkeys(settings.get("find-links", []) if wheels else []):
        for wheel in Path(place.removeprefix("file://")).glob("torch-*.whl"):
            shutil.copy(wheel, copied)
    conf = ["[global]", "find-links = /opt/wheels"]
    for key in ("index-url", "extra-index-url", "trusted-host", "timeout", "default-timeout"):
        values = [value for value in dict.fromkeys(settings.get(key, [])) if not value.startswith("file:")]
        if values:
            conf.append(f"{key.removeprefix('default-')} = {' '.join(values)}")
    if CA_BUNDLE.exists():
        shutil.copy(CA_BUNDLE, folder / "ca.crt")
        conf.append(f"cert = {CA_BUNDLE}")
        lines.append(f"COPY ca.crt {CA_BUNDLE}")
    (folder / "pip.conf").write_text("\n".join(conf) + "\n")
    return "\n".join([*lines, "COPY wheels /opt/wheels", "COPY pip.conf /etc/pip.conf", ""])
