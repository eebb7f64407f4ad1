"""A pass that several processes share is the pass of one, bit for bit."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import imageio_ffmpeg
import pytest
import torch

from app.models.seedvr2 import windows
from app.models.seedvr2.parallel import SharedDiT, share
from app.nn.ranks import Ranks
from tests.models.sharing import SMALL, hold, made

CASES = [("3b", torch.float32), ("7b", torch.float32), ("3b", torch.bfloat16), ("7b", torch.bfloat16)]


@pytest.fixture(params=[2, 3])
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the bits of a product may depend on it
    group = Ranks(request.param, torch.device("cpu"), patience=60)
    yield group
    group.close()
    torch.set_num_threads(threads)


def test_a_shared_pass_equals_that_of_one_bit_for_bit(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "RUN_TOKENS", 500)
    for kind, dtype in CASES:
        model = made(SMALL[kind], dtype, 500)
        with ranks.work(hold, kind, dtype, 500):
            shared = SharedDiT(model, f"{kind} {dtype}", ranks)
        # A clip of several runs a layer; one of a single run, which leaves a rank without work.
        for size, length in (((3, 40, 60), 6), ((1, 4, 6), 5)):
            vid, txt = torch.randn(*size, 33).to(dtype), torch.randn(length, 16).to(dtype)
            alone, together = model.plan(*size, length), shared.plan(*size, length)
            with torch.inference_mode():
                for timestep in (1000.0, 250.0):
                    expected = model(vid, txt, timestep, alone)
                    assert torch.equal(shared(vid, txt, timestep, together), expected)


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("kind", SMALL)
def test_every_window_is_somebodys_and_none_is_split(
    kind: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windows, "RUN_TOKENS", 300)
    model = made(SMALL[kind], torch.float32, 300)
    whole = model.plan(5, 40, 60, 6)
    parts = [share(whole, (5, 40, 60, 6), model.config.inner_dim, rank, count) for rank in range(count)]
    for layer, all_windows in enumerate(whole.partitions):
        held = [part.partitions[layer] for part in parts]
        assert torch.equal(torch.cat([each.order for each in held]), all_windows.order)
        assert [len(run) for each in held for run in each.runs] == [len(run) for run in all_windows.runs]
        for each in held:
            assert all(run[0].start == 0 for run in each.runs[:1])
            assert sum(group.tokens for group in each.groups) == len(each.order)
        most = max(len(each.order) for each in held)
        longest = max(run[-1].stop - run[0].start for run in all_windows.runs)
        assert most <= len(all_windows.order) / count + longest


def test_a_clip_that_two_processes_restore_is_the_one_that_one_does(
    nano_volume: Path, seedpod: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    """From the command line to the file, byte for byte; windows in time, guidance, a VAE on one rank."""
    source = tmp_path / "in.mp4"
    make = ["-f", "lavfi", "-i", "testsrc2=size=80x64:rate=8", "-frames:v", "34", str(source)]
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *make], check=True)
    made = []
    for number, extra in enumerate(([], ["--sp-size", "2"])):
        output = tmp_path / f"{number}.mp4"
        asked = ["--window", "6", "--guidance", "2", "--short-side", "128", "--codec", "lossless"]
        status, out, err = seedpod(
            "run", "restore", source, "-o", output, *asked, *extra, SEEDPOD_ROOTS=nano_volume
        )
        assert status == 0, err
        assert json.loads(out)["frames"] == 34
        made.append(output.read_bytes())
    assert made[0] == made[1]
