"""`docker compose up` on a laptop: nano, no GPU, no weights."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.image.conftest import IMAGE, STRANGER, TARGET, Built, give, wait_for_health
from tests.image.engine import Engine, search_path
from tests.image.test_serve import call, wait_for

PORT = 18437


def composers(engine: Engine) -> list[list[str]]:
    """The composes there are: version 2 as Docker's plug-in, version 1 as a program of its own."""
    found = []
    if engine.run("compose", "version", check=False).returncode == 0:
        found.append(["docker", "compose"])
    if shutil.which("docker-compose", path=search_path()):
        found.append(["docker-compose"])
    return found


class Project:
    """The checkout's compose file, in a copy of the checkout, as STRANGER's."""

    def __init__(self, engine: Engine, folder: Path, command: list[str]) -> None:
        self.engine, self.folder, self.command = engine, folder, command
        self.environment = engine.environment() | {
            "HOST_UID": str(STRANGER), "HOST_GID": str(STRANGER), "PORT": str(PORT),
            "COMPOSE_PROJECT_NAME": "seedpod-test", "CPU_IMAGE": IMAGE,
        }  # fmt: skip

    def run(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [*self.command, *words],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    def container(self) -> str:
        return self.run("ps", "-q", "nano").stdout.strip()


@pytest.fixture
def project(engine: Engine, image: Built, tmp_path: Path) -> Iterator[Project]:
    found = composers(engine)
    if not found:
        pytest.skip("no docker compose is installed")
    folder = tmp_path / "checkout"
    shutil.copytree(image.context, folder)
    (folder / ".env").unlink(missing_ok=True)
    give(folder)
    made = Project(engine, folder, found[0])
    yield made
    made.run("down", "-v", "-t", "5", check=False)


def test_up_a_job_restart_down(project: Project, engine: Engine) -> None:
    project.run("up", "-d", "--no-build")
    name = project.container()
    wait_for_health(engine, name, "healthy")
    facts = json.loads(engine.run("inspect", name).stdout)[0]
    host = facts["HostConfig"]
    assert host["ReadonlyRootfs"]
    assert host["CapDrop"] == ["ALL"]
    assert "no-new-privileges:true" in host["SecurityOpt"]
    assert host["PortBindings"]["8000/tcp"] == [{"HostIp": "127.0.0.1", "HostPort": str(PORT)}]
    assert len(project.run("ps", "-q").stdout.split()) == 1  # nothing of the gpu profile

    url = f"http://127.0.0.1:{PORT}"
    # One of each task, none of which names a model: nano's, of those that a worker boots, is the only one.
    jobs = [
        {"task": "restore", "source": {"path": "clip.mp4"}, "short_side": 32},
        {"task": "generate", "prompt": "A lamp.", "height": 16, "width": 16, "frames": 9},
        {"task": "autoencode", "source": {"path": "clip.mp4"}, "short_side": 32, "frames": 9},
    ]
    script = (
        "import json, runpod, sys\n"
        "endpoint = runpod.Endpoint('local', api_key='none')\n"
        "started = [endpoint.run({'input': job}) for job in json.load(sys.stdin)]\n"
        "print(json.dumps([[job.job_id, job.output(timeout=100)] for job in started]))"
    )
    client = subprocess.run(
        [sys.executable, "-c", script], input=json.dumps(jobs), capture_output=True, text=True, timeout=150,
        env=os.environ | {"RUNPOD_ENDPOINT_BASE_URL": f"{url}/v2"},
    )  # fmt: skip
    assert client.returncode == 0, client.stderr
    done = json.loads(client.stdout.splitlines()[-1])
    assert [output["model"] for _, output in done] == ["nano", "nano-wan", "nano-vqvae"]
    for _, output in done:
        assert output["result"]["kind"] == "path"
        made = project.folder / "out" / output["result"]["path"]
        assert made.stat().st_uid == STRANGER
        assert made.stat().st_size > 1000
    job, output = done[0]

    project.run("restart", "-t", "30")
    wait_for_health(engine, name, "healthy")
    assert wait_for(url, job, "COMPLETED")["output"]["result"]["path"] == output["result"]["path"]

    project.run("down", "-t", "30")
    assert engine.run("ps", "-aq").stdout == ""
    with pytest.raises(OSError):
        call(f"{url}/ping")
    assert "seedpod-test_cache" in engine.run("volume", "ls").stdout  # what was remembered is kept


def test_every_compose_reads_the_file(engine: Engine, project: Project) -> None:
    for command in composers(engine):
        project.command = command
        shutil.copy(project.folder / ".env.example", project.folder / ".env")
        services = set(project.run("--profile", "gpu", "config", "--services").stdout.split())
        assert services == {"nano", "gpu"}
        assert project.run("config", "--services").stdout.split() != []
        text = project.run("--profile", "gpu", "config").stdout
        assert "24gb" in text or str(24 << 30) in text
        assert "nvidia" in text
        print(command, project.run("version", "--short", check=False).stdout.strip())


@pytest.mark.skipif(TARGET != "cpu", reason="the service that is built is the one without CUDA")
def test_builds_by_itself(engine: Engine, project: Project) -> None:
    """`docker compose build`, with the base image that would come from a registry."""
    engine.run("tag", "base:build", "python:3.11-slim-bookworm")
    project.environment["CPU_IMAGE"] = "seedpod:composed"
    project.environment["COMPOSE_DOCKER_CLI_BUILD"] = "1"
    project.run("build", "--build-arg", "TORCH_INDEX=", "nano")
    assert engine.run("run", "--rm", "seedpod:composed", "--version").stdout
