"""Films on many workers, from the command line to the joined file: against local servers, through the
official client. Most workers here restore nothing, so that the result must be the film itself; the last test
is with the real server and nano, and its result must be that of one worker."""

from __future__ import annotations

import base64
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from app.job.payload import PAYLOADS
from app.job.payload import validate as validate_payload
from app.video.probe import probe
from examples.serve.distribute import __main__ as distribute
from tests.examples.films import copying, film, frames_of
from tests.serve.local_server import Served, lifecycle, serving
from tests.serve.test_server import server

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def serve() -> Iterator[Callable[..., Served]]:
    with ExitStack() as stack:

        def start(run: Any = None, **options: Any) -> Served:
            jobs = lifecycle(run or copying())
            return stack.enter_context(serving(jobs, validate=validate_payload, payloads=PAYLOADS, **options))

        yield start


class Ran:
    """A run of the command, in this process."""

    def __init__(self, *arguments: str | Path, capsys: pytest.CaptureFixture[str]) -> None:
        capsys.readouterr()
        self.status = distribute.main([str(argument) for argument in arguments])
        out, self.err = capsys.readouterr()
        self.result: dict[str, Any] = json.loads(out) if out else {}


def at(*places: Served) -> list[str]:
    return [word for place in places for word in ("--endpoint", place.url)]


@pytest.mark.parametrize(
    ("rate", "suffix", "codec"),
    [("30000/1001", ".mp4", "lossless"), ("25", ".mov", "h264")],
)
def test_the_whole_film_comes_back(
    rate: str, suffix: str, codec: str, serve: Callable[..., Served], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path, output = film(tmp_path / "film.mp4", 60, 430, 40, 15, rate=rate), tmp_path / f"out{suffix}"
    ran = Ran(path, output, "--part-seconds", "10", "--codec", codec, *at(serve(), serve()), capsys=capsys)
    assert ran.status == 0, ran.err
    made, source = probe(output), probe(path)
    assert (ran.result["frames"], ran.result["shots"], ran.result["sound"]) == (545, 4, True)
    assert ran.result["parts"] == 4
    assert 1.1 < ran.result["work"] < 1.7
    assert made.rate == source.rate == Fraction(rate)
    assert [track.codec for track in made.audio] == ["aac"]
    got, wanted = frames_of(output), frames_of(path)
    assert got.shape == wanted.shape
    assert codec != "lossless" or np.array_equal(got, wanted)
    assert np.abs(got.astype(int) - wanted).mean() < 6  # frame by frame the same, with what h264 loses
    assert sorted(path.name for path in tmp_path.iterdir()) == ["film.mp4", output.name]


def test_jobs_get_the_fields_that_were_asked_for(
    serve: Callable[..., Served], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Mapping[str, Any]] = []
    path = film(tmp_path / "film.mp4", 40, 30)
    fields = ["--model", "nano", "--height", "64", "--seed", "9", "--window", "7", "--cuts", "false"]
    ran = Ran(path, tmp_path / "out.mkv", *fields, *at(serve(copying(before=asked.append))), capsys=capsys)
    assert ran.status == 0, ran.err
    (payload,) = asked
    source, part = payload["source"], payload["part"]
    told = {name: value for name, value in payload.items() if name not in ("source", "part")}
    assert told == {
        "task": "restore", "model": "nano", "height": 64, "seed": 9, "window": 7, "rate": 25.0,
        "container": "mkv",
    }  # fmt: skip
    assert part == {"source_start": 0, "start": 0, "stop": 70, "shot": 0, "edges": [0, 70]}
    assert len(base64.b64decode(source["base64"])) < path.stat().st_size  # no sound in it
    assert ran.result["seed"] == 9


def test_another_rate(
    serve: Callable[..., Served], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = film(tmp_path / "film.mp4", 300)
    lossless = ["--rate", "29.97", "--codec", "lossless", "--part-seconds", "3"]
    ran = Ran(path, tmp_path / "out.mkv", *lossless, *at(serve()), capsys=capsys)
    assert ran.status == 0, ran.err
    assert ran.result["rate"] == "30000/1001"
    wanted = frames_of(path, Fraction(30000, 1001))
    assert np.array_equal(frames_of(tmp_path / "out.mkv"), wanted)
    assert probe(tmp_path / "out.mkv").rate == Fraction(30000, 1001)


def test_more_workers_take_less_time(
    serve: Callable[..., Served], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Jobs of a simulated length: 9 parts of 20 frames, at 30 ms a frame."""
    path = film(tmp_path / "film.mp4", *[20] * 9, sound=False)
    seconds = {}
    for count in (1, 2, 3):
        workers = [serve(copying(0.03)) for _ in range(count)]
        ran = Ran(path, tmp_path / "out.mkv", "--part-seconds", "1", *at(*workers), capsys=capsys)
        assert ran.status == 0, ran.err
        assert ran.result["parts"] == 9
        seconds[count] = ran.result["seconds"]["parts"]
    with capsys.disabled():
        print("\nsimulated jobs: " + ", ".join(
            f"{count} workers {value:.1f} s" for count, value in seconds.items()))  # fmt: skip
    assert seconds[1] > 180 * 0.03
    assert seconds[2] < 0.75 * seconds[1]
    assert seconds[3] < 0.55 * seconds[1]


def test_a_run_goes_on_where_the_last_one_ended(
    serve: Callable[..., Served], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, output = film(tmp_path / "film.mp4", 50, 40, 45, 30), tmp_path / "out.mkv"
    starts: list[int] = []

    def fails(payload: Mapping[str, Any]) -> None:
        starts.append(payload["part"]["start"])
        if payload["part"]["start"] == 135:
            raise RuntimeError("the worker broke")

    words = [path, output, "--part-seconds", "1", "--codec", "lossless"]
    ran = Ran(*words, *at(serve(copying(before=fails))), "--tries", "2", capsys=capsys)
    assert ran.status == 69
    assert "[part_failed]" in ran.err and not output.exists()
    assert sorted(set(starts)) == [0, 50, 90, 135] and starts.count(135) == 2
    folder = tmp_path / "out.mkv.parts"
    torn = next(folder.glob("part-00001-*"))
    torn.write_bytes(torn.read_bytes()[:-3000])  # as a full disk leaves it

    starts.clear()
    good = serve(copying(before=lambda payload: starts.append(payload["part"]["start"])))
    ran = Ran(*words, *at(good), capsys=capsys)
    assert ran.status == 0, ran.err
    assert sorted(starts) == [50, 135]
    assert "(2 of them done)" in ran.err
    assert np.array_equal(frames_of(output), frames_of(path))
    assert not folder.exists()

    starts.clear()  # another seed is another film's worth of work
    ran = Ran(*words, "--seed", "1", *at(good), capsys=capsys)
    assert sorted(starts) == [0, 50, 90, 135]


def test_ctrl_c_cancels_and_keeps(serve: Callable[..., Served], tmp_path: Path) -> None:
    path, output = film(tmp_path / "film.mp4", 20, 200), tmp_path / "out.mkv"
    worker = serve(copying(0.2))
    command = ["-m", "examples.serve.distribute", path, output, "--part-seconds", "1", *at(worker)]
    process = subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=REPOSITORY, stderr=subprocess.PIPE, text=True,
        # A shell starts what runs in the background with Ctrl-C ignored, and its children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    end = time.monotonic() + 60
    while not list(tmp_path.glob("out.mkv.parts/part-00000-*")) or not worker.jobs.counts()["IN_PROGRESS"]:
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    begun = time.monotonic()
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert time.monotonic() - begun < 5
    assert "what is done is kept" in err and "Traceback" not in err
    assert worker.jobs.counts()["CANCELLED"] == 1 and worker.jobs.counts()["COMPLETED"] == 1
    assert not output.exists() and len(list(tmp_path.glob("out.mkv.parts/part-*"))) == 1
    assert not list(tmp_path.glob("out.mkv.parts/piece-*"))


@pytest.mark.parametrize(
    ("words", "status", "code"),
    [
        (["gone.mp4", "out.mp4"], 65, "input_missing"),
        (["film.mp4", "out.webm"], 64, "output_suffix"),
        (["film.mp4", "out.mp4", "--codec", "png"], 64, "output_suffix"),
        (["film.mp4", "no/out.mp4"], 64, "output_folder_missing"),
        (["film.mp4", "film.mp4"], 64, "output_is_input"),
        (["film.mp4", "out.mp4", "--height", "3"], 64, "request_invalid"),
        (["film.mp4", "out.mp4", "--rate", "0"], 64, "request_invalid"),
        (["film.mp4", "out.mp4", "--input-folder", "no"], 64, "input_folder_missing"),
        (["http://127.0.0.1:9/film.mp4", "out.mp4"], 69, "film_unreachable"),
    ],
)
def test_bad_words(
    words: list[str], status: int, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    film(tmp_path / "film.mp4", 10)
    monkeypatch.chdir(tmp_path)
    ran = Ran(*words, "--endpoint", "http://127.0.0.1:9", capsys=capsys)
    assert ran.status == status
    assert f"[{code}]" in ran.err and "Traceback" not in ran.err
    assert not Path("out.mp4").exists()


def test_a_refusal_by_the_server_is_told_at_once(
    serve: Callable[..., Served], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    path = film(tmp_path / "film.mp4", 30)
    keyed = serve(api_key="5ec2e7")
    ran = Ran(path, tmp_path / "out.mkv", *at(keyed), capsys=capsys)
    assert ran.status == 69 and "401" in ran.err and "SEEDPOD_API_KEY" in ran.err
    monkeypatch.setenv("SEEDPOD_API_KEY", "5ec2e7")
    assert Ran(path, tmp_path / "out.mkv", *at(keyed), capsys=capsys).status == 0
    small = serve(api_key="5ec2e7", max_body_bytes=1000)
    ran = Ran(path, tmp_path / "two.mkv", *at(small), capsys=capsys)
    assert ran.status == 64 and "413" in ran.err and "[job_refused]" in ran.err


def test_runpods_key_goes_to_runpod_only(
    serve: Callable[..., Served], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from examples.serve.distribute.endpoint import Endpoint

    keys = {"RUNPOD_API_KEY": "rp-5ec2e7"}
    own = Endpoint("http://127.0.0.1:8000", keys)._endpoint
    assert own.rp_client.headers["Authorization"] == "Bearer none"
    assert own.rp_client.endpoint_url_base == "http://127.0.0.1:8000/v2" and own.endpoint_id == "local"
    named = Endpoint("https://pods.example/api/v2x/other", {"SEEDPOD_API_KEY": "own"})._endpoint
    assert named.rp_client.headers["Authorization"] == "Bearer own"
    hosted = Endpoint("abc123", keys)._endpoint
    assert hosted.rp_client.headers["Authorization"] == "Bearer rp-5ec2e7"
    assert hosted.endpoint_id == "abc123"
    monkeypatch.delenv("RUNPOD_API_KEY", raising=False)
    path = film(tmp_path / "film.mp4", 10)
    ran = Ran(path, tmp_path / "out.mp4", "--endpoint", "abc123", capsys=capsys)
    assert ran.status == 64 and "RUNPOD_API_KEY" in ran.err


def test_a_client_needs_no_torch(serve: Callable[..., Served], tmp_path: Path) -> None:
    """Nothing but what the example says: runpod (with what it brings), imageio-ffmpeg, numpy and pillow."""
    path, output = film(tmp_path / "film.mp4", 30), tmp_path / "out.mkv"
    code = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in ("torch", "einops", "safetensors", "huggingface_hub", "rich", "pydantic_settings",
                   "prometheus_client", "imageio", "transformers"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
from examples.serve.distribute.__main__ import main
sys.exit(main(sys.argv[1:]))
"""
    command = [sys.executable, "-c", code, str(path), str(output), *at(serve())]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["frames"] == 30


# ------------------------------------------------------------------ the real thing


@pytest.mark.slow
def test_three_servers_and_one_is_killed_half_way(
    nano_volume: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A film of a short shot, one that is split, and a short one; the result is bit for bit that of one
    worker."""
    path, output = film(tmp_path / "film.mp4", 30, 420, 26, size="32x32"), tmp_path / "out.mkv"
    fields = {"window": 9, "height": 16, "color": "wavelet", "codec": "lossless", "seed": 4}
    words = [word for name, value in fields.items() for word in (f"--{name}", str(value))]
    settings = {"SEEDPOD_ROOTS": nano_volume, "SEEDPOD_STAGE": "off"}
    with ExitStack() as stack:
        workers = []
        for name in "abc":
            (tmp_path / name).mkdir()
            workers.append(stack.enter_context(server(tmp_path / name, **settings)))
        for worker in workers:
            worker.until(200)

        def kill() -> None:
            while len(list(tmp_path.glob("out.mkv.parts/part-*"))) < 3:
                time.sleep(0.02)
            workers[1].process.kill()

        threading.Thread(target=kill, daemon=True).start()
        places = [word for worker in workers for word in ("--endpoint", worker.url)]
        ran = Ran(path, output, *words, *places, "--part-seconds", "3", "--patience", "1", capsys=capsys)
        assert ran.status == 0, ran.err
        assert workers[1].process.poll() == -signal.SIGKILL
        source = {"base64": base64.b64encode(path.read_bytes()).decode()}
        asked = {"task": "restore", "source": source, "container": "mkv", **fields}
        answer = httpx.post(
            f"{workers[0].url}/runsync?wait=300000", json={"input": asked}, timeout=300
        ).json()
        assert answer["status"] == "COMPLETED", answer
    single = tmp_path / "single.mkv"
    single.write_bytes(base64.b64decode(answer["output"]["result"]["base64"]))
    with capsys.disabled():
        print(f"\nthree workers, one killed: {ran.result}")
    assert ran.result["parts"] >= 5
    assert ran.result["retried"] >= 1 and "does not answer" in ran.err
    assert ran.result["frames"] == answer["output"]["frames"] == 476
    assert ran.result["shots"] == answer["output"]["shots"] == 3
    assert np.array_equal(frames_of(output), frames_of(single))
    assert probe(output).rate == probe(single).rate
    assert probe(output).duration == pytest.approx(probe(single).duration, abs=0.01)
    assert [track.codec for track in probe(output).audio] == [track.codec for track in probe(single).audio]
