"""The generate pipeline with nano: what comes out, when, of what, and what is loaded for it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from app.boot import checkpoint
from app.errors import ConfigError
from app.models.wan import condition, load
from app.models.wan import generate as module
from app.models.wan.generate import Generator, Guide
from app.models.wan.length import usable
from app.timing import Stopwatch
from tests import seeded
from tests.models.wan import nano
from tests.models.wan.nano import SIZE, Told, at_once, clip, options


@pytest.fixture(scope="module")
def generator(wan_volume: Path) -> Generator:
    return nano.load(wan_volume)


def moving(frames: int) -> Tensor:
    """(frames, 3, height, width) in [-1, 1]."""
    return seeded.randn("generate/start", frames, 3, *SIZE).clamp(-2, 2) / 2


def rendered(frames: int) -> Tensor:
    return ((seeded.randn("generate/pose", frames, 3, *SIZE) + 2) * 60).clamp(0, 255).to(torch.uint8)


# ------------------------------------------------------------------ lengths, seeds, order


@pytest.mark.parametrize("frames", [9, 21, 93])
def test_frames_are_exactly_as_many_as_asked_for(generator: Generator, frames: int) -> None:
    made = clip(generator, options(frames))
    assert made.shape == (frames, 3, *SIZE)
    assert made.isfinite().all()


def test_the_same_seed_makes_the_same_clip_and_another_makes_another(generator: Generator) -> None:
    first, second, other = (clip(generator, options(seed=seed)) for seed in (7, 7, 8))
    assert torch.equal(first, second)
    assert (first - other).abs().max() > 0.01


def test_a_longer_clip_begins_with_the_shorter(generator: Generator) -> None:
    assert torch.equal(clip(generator, options(33))[:21], clip(generator, options(21)))


def test_a_block_leaves_before_the_next_one_is_begun(generator: Generator) -> None:
    passes: list[int] = []
    clock = Stopwatch()
    blocks = generator.generate(options(33), on_step=lambda: passes.append(1), clock=clock)
    seen = [(len(block), len(passes)) for block in blocks]
    assert seen == [(9, 4), (12, 8), (12, 12)]
    assert {"text", "transformer", "decode"} <= set(clock.seconds)


def test_it_stops_where_it_is_told_to(generator: Generator) -> None:
    passes: list[int] = []

    def on_step() -> None:
        passes.append(1)
        if len(passes) == 6:
            raise InterruptedError

    blocks = generator.generate(options(33), on_step=on_step)
    assert len(next(blocks)) == 9
    with pytest.raises(InterruptedError):
        next(blocks)
    assert torch.equal(clip(generator, options(9)), clip(generator, options(21))[:9])  # and is as before


def test_streaming_decodes_what_decoding_whole_does(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents = recorded(monkeypatch)
    frames = clip(generator, options(33))
    whole = generator._vae.decode(torch.cat(latents, 2))[0].transpose(0, 1)
    assert (frames - whole).abs().max() < 1e-4


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The latents of the blocks that are made from now on."""
    latents: list[Tensor] = []
    real = module.generate_blocks

    def blocks(*arguments: Any) -> Any:
        for block in real(*arguments):
            latents.append(block.latents)
            yield block

    monkeypatch.setattr(module, "generate_blocks", blocks)
    return latents


# ------------------------------------------------------------------ prompts


@pytest.mark.parametrize(("frame", "same"), [(1, 9), (9, 9), (12, 9), (13, 21), (21, 21)])
def test_a_change_of_prompt_holds_from_the_next_block_and_before_it_nothing_changes(
    generator: Generator, frame: int, same: int
) -> None:
    plain = clip(generator, options(33))
    changed = clip(generator, options(33, prompts={0: "a cat in the snow", frame: "a train at night"}))
    assert torch.equal(plain[:same], changed[:same])
    for block in range(same, 33, 12):
        assert (plain[block : block + 12] - changed[block : block + 12]).abs().max() > 1e-3


def test_a_change_counts_from_the_result_not_from_the_clip_that_is_gone_on_from(generator: Generator) -> None:
    start = Guide(start=moving(21))
    asked = options(24, "clip", given=6)
    plain = clip(generator, asked, start)
    changed = clip(generator, replace(asked, prompts={0: "a cat in the snow", 12: "a train"}), start)
    assert torch.equal(plain[:12], changed[:12])
    assert (plain[12:] - changed[12:]).abs().max() > 1e-3


def test_guidance_uses_the_negative_prompt_and_without_it_that_is_not_encoded(generator: Generator) -> None:
    plain = clip(generator, options(9))
    assert torch.equal(plain, clip(generator, options(9, negative="anything")))
    guided = [clip(generator, options(9, guidance=4.0, negative=text)) for text in ("blurred", "a dog")]
    assert (guided[0] - guided[1]).abs().max() > 1e-3
    assert (guided[0] - plain).abs().max() > 1e-3


# ------------------------------------------------------------------ images and clips to begin with


def test_an_image_is_the_first_frame_through_the_vae(generator: Generator) -> None:
    image = moving(1)
    blocks = list(generator.generate(options(13, "image"), Guide(start=image)))
    assert [len(block) for block in blocks] == [1, 12]
    vae = generator._vae
    latent = torch.cat(list(vae.encode_stream([image.transpose(0, 1)[None]])), 2)
    there_and_back = vae.decode(latent)[0].transpose(0, 1)
    assert torch.equal(blocks[0], there_and_back)
    other = list(generator.generate(options(13, "image"), Guide(start=-image)))
    assert (blocks[1] - other[1]).abs().max() > 1e-3


def test_of_a_clip_to_begin_with_only_what_follows_is_made(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents = recorded(monkeypatch)
    start = moving(usable(24))
    frames = clip(generator, options(24, "clip", given=6), Guide(start=start))
    assert frames.shape[0] == 24
    vae = generator._vae
    given = torch.cat(list(vae.encode_stream([start.transpose(0, 1)[None]])), 2)
    assert given.shape[2] == 6
    whole = vae.decode(torch.cat([given, *latents], 2))[0].transpose(0, 1)
    assert whole.shape[0] == 21 + 24
    assert (whole[21:] - frames).abs().max() < 1e-4


# ------------------------------------------------------------------ windows and memory


def test_a_window_that_holds_all_changes_nothing_and_a_shorter_one_does(generator: Generator) -> None:
    full = clip(generator, options(45))
    assert torch.equal(full, clip(generator, options(45, window=12)))
    short = clip(generator, options(45, window=6))
    assert torch.equal(full[:21], short[:21])  # two blocks fit it
    assert (full[21:] - short[21:]).abs().max() > 1e-4
    sunk = clip(generator, options(45, window=6, sink=3))
    assert torch.equal(short[:21], sunk[:21])  # the third sees the second, or the first where that stays
    assert (short[21:] - sunk[21:]).abs().max() > 1e-4


def test_the_window_rolls_past_what_was_trained(generator: Generator) -> None:
    asked = options(105)  # 27 latents
    long = clip(generator, asked)
    assert long.shape[0] == 105
    assert torch.equal(long[:81], clip(generator, options(81)))
    assert torch.equal(long, clip(generator, replace(asked, window=21)))
    assert (long - clip(generator, replace(asked, window=27))).abs().max() > 1e-5


def test_memory_does_not_grow_with_length(generator: Generator) -> None:
    asked = replace(options(12 * 60 - 3, window=6), height=16, width=16)
    held = []
    for number, block in enumerate(generator.generate(asked)):
        assert block.isfinite().all()
        if number in (5, 59):
            del block
            gc.collect()
            held.append(nano.bytes_alive(gc.get_objects()))
    early, late = held
    assert late <= early, f"{late - early:,} bytes more after 60 blocks than after 6"


# ------------------------------------------------------------------ weights


def test_averaged_weights_are_the_default_and_the_others_are_a_choice(wan_volume: Path) -> None:
    told = Told()
    made = nano.load(wan_volume, told=told)
    ema = clip(made, options(9))
    assert told.loaded.count("self_forcing_nano.pt") == 1
    assert torch.equal(ema, clip(made, options(9, section="generator_ema")))
    assert told.loaded.count("self_forcing_nano.pt") == 1  # they are there
    assert (ema - clip(made, options(9, section="generator"))).abs().max() > 1e-3
    assert torch.equal(ema, clip(made, options(9)))  # a choice is for one job
    assert told.loaded.count("self_forcing_nano.pt") == 3


def test_after_weights_that_could_not_be_loaded_the_next_job_works(
    wan_volume: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = nano.load(wan_volume)
    ema = clip(made, options(9))
    real = made._load_transformer

    def broken(section: str | None) -> Any:
        raise ConfigError("checkpoint_truncated", "it is cut off")

    monkeypatch.setattr(made, "_load_transformer", broken)
    for _ in range(2):
        with pytest.raises(ConfigError):
            clip(made, options(9, section="generator"))
    monkeypatch.setattr(made, "_load_transformer", real)
    assert torch.equal(ema, clip(made, options(9)))


def test_the_parts_load_one_at_a_time_and_each_says_so(
    wan_volume: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Told()
    at_work: list[str] = []
    between: list[str] = []
    real, real_back = load.load, load.give_back

    def loading(*arguments: Any, **options: Any) -> Any:
        assert not at_work, "two models load at once"
        at_work.append(str(arguments[1]))
        try:
            return real(*arguments, **options)
        finally:
            at_work.clear()

    monkeypatch.setattr(load, "load", loading)
    monkeypatch.setattr(load, "give_back", lambda: (between.append(told.loaded[-1]), real_back()))
    nano.load(wan_volume, told=told, eager=True)
    assert told.loaded == ["models_t5_nano.pth", "self_forcing_nano.pt", "Wan_VAE.pth"]
    assert between == told.loaded
    assert checkpoint.load is real


# ------------------------------------------------------------------ the text encoder


def poisoned(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generator.text, "_load_model", lambda: pytest.fail("T5 was read"))


def test_t5_loads_with_the_first_prompt_and_a_repeated_one_never_touches_it(
    wan_volume: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {name: replace(source, sha256="ab" * 32) for name, source in nano.sources(wan_volume).items()}
    told = Told()
    made = nano.load(files, told=told, cache=tmp_path)
    assert "models_t5_nano.pth" not in told.loaded
    frames = clip(made, options(9))
    assert told.loaded.count("models_t5_nano.pth") == 1
    made.text.release()
    poisoned(made, monkeypatch)
    assert torch.equal(clip(made, options(9)), frames)  # out of memory

    again = nano.load(files, cache=tmp_path)
    poisoned(again, monkeypatch)
    assert torch.equal(clip(again, options(9)), frames)  # out of the folder
    with pytest.raises(pytest.fail.Exception, match="T5 was read"):
        clip(again, options(9, prompts={0: "a new one"}))


def test_eager_loading_has_t5_ready(wan_volume: Path) -> None:
    told = Told()
    made = nano.load(wan_volume, told=told, eager=True)
    assert made.text.loaded
    clip(made, options(9))
    assert told.loaded.count("models_t5_nano.pth") == 1


@pytest.mark.parametrize(
    ("stays", "eager", "kept", "read_again"),
    [
        ("auto", False, True, False),
        ("auto", True, True, False),
        ("host", True, True, False),
        ("release", False, False, True),
        ("release", True, False, True),
    ],
)
def test_where_t5_stays_and_when_its_copy_is_given_back(
    wan_volume: Path, stays: str, eager: bool, kept: bool, read_again: bool
) -> None:
    given_back: list[str] = []
    files = nano.sources(wan_volume)
    files["t5"] = replace(files["t5"], done=lambda: given_back.append("t5"))
    told = Told()
    made = nano.load(files, told=told, eager=eager, text_encoder=stays)
    assert bool(given_back) == (eager and stays != "release")
    clip(made, options(9))
    assert made.text.loaded == kept
    assert bool(given_back) == kept  # who reads it again needs the copy again
    clip(made, options(9, prompts={0: "another one"}))
    assert told.loaded.count("models_t5_nano.pth") == (2 if read_again else 1)
    made.close()
    assert given_back


# ------------------------------------------------------------------ poses


def test_81_poses_and_three_make_21_latents(generator: Generator) -> None:
    """The original's guide: 81 frames + 3 repeated ones, in fours, are the clip's 21 latents."""
    poses = generator._poses(rendered(81), lambda: None)
    assert (81 + 3) // 4 == 21
    assert tuple(poses.shape) == (1, 5120, 21, SIZE[0] // 16, SIZE[1] // 16)
    with torch.inference_mode():
        whole = generator._pose_embedder().frames(rendered(81).transpose(0, 1)[None])
    assert (poses - whole).abs().max() < 1e-4


def test_pose_weights_load_with_the_first_poses_once(wan_volume: Path, tmp_path: Path) -> None:
    """Of 16 bits, as published: reading them casts, in threads that are in no inference mode."""
    given_back: list[str] = []
    stored = torch.load(wan_volume / "nano/wan/pose.ckpt", weights_only=True)
    torch.save({name: tensor.bfloat16() for name, tensor in stored.items()}, tmp_path / "pose.ckpt")
    files = nano.sources(wan_volume, pose=tmp_path / "pose.ckpt")
    files["pose"] = replace(files["pose"], done=lambda: given_back.append("pose"))
    told = Told()
    made = nano.load(files, told=told)
    plain = clip(made, options(9))
    assert "pose.ckpt" not in told.loaded and not given_back
    posed = clip(made, options(9), Guide(poses=rendered(9)))
    assert told.loaded.count("pose.ckpt") == 1 and given_back == ["pose"]
    assert (posed - plain).abs().max() > 1e-3
    moved = clip(made, options(9), Guide(poses=255 - rendered(9)))
    assert told.loaded.count("pose.ckpt") == 1
    assert (posed - moved).abs().max() > 1e-3
    assert torch.equal(plain, clip(made, options(9)))  # poses are of one job


def test_poses_act_where_they_are(generator: Generator) -> None:
    """A pose of the last block changes nothing before it."""
    poses = rendered(33)
    later = poses.clone()
    later[27:] = 255 - later[27:]  # latents 7 and 8; the block begins with latent 6, frame 21
    one, other = (clip(generator, options(33), Guide(poses=frames)) for frames in (poses, later))
    assert torch.equal(one[:21], other[:21])
    assert (one[21:] - other[21:]).abs().max() > 1e-3


def test_a_job_can_be_stopped_while_poses_are_embedded(generator: Generator) -> None:
    def on_step() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        generator._poses(rendered(9), on_step)


# ------------------------------------------------------------------ many steps, at once


def test_many_steps_make_a_clip_at_once_under_guidance(wan_volume: Path) -> None:
    made = nano.load(wan_volume, variant="nano-many")
    steps: list[int] = []
    asked = at_once(13, steps=6, guidance=3.0, negative="blurred")
    blocks = list(made.generate(asked, on_step=lambda: steps.append(1)))
    assert [len(block) for block in blocks] == [13]
    assert len(steps) == 6
    assert (blocks[0] - clip(made, replace(asked, guidance=1.0))).abs().max() > 1e-3
    assert (blocks[0] - clip(made, replace(asked, shift=8.0))).abs().max() > 1e-3
    few = nano.load(wan_volume)
    assert (blocks[0] - clip(few, asked)).abs().max() > 1e-3


# ------------------------------------------------------------------ conditioned on an image


@pytest.fixture(scope="module")
def image_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return nano.image_transformer(tmp_path_factory.mktemp("image") / "i2v.pt")


Loaded = Callable[..., tuple[Generator, Told]]


@pytest.fixture
def of_images(wan_volume: Path, image_file: Path) -> Loaded:
    def made(variant: str = "nano") -> tuple[Generator, Told]:
        told = Told()
        return nano.load(nano.sources(wan_volume, transformer=image_file), variant=variant, told=told), told

    return made


@pytest.mark.parametrize("variant", ["nano", "nano-many"])
def test_a_clip_of_an_image(of_images: Loaded, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, told = of_images(variant)
    assert made.able.image and "models_clip_nano.pth" not in told.loaded
    seen: list[Any] = []
    real = module.generate_blocks
    monkeypatch.setattr(module, "generate_blocks", lambda *given: (seen.append(given[2]), real(*given))[1])
    asked = options(21) if variant == "nano" else at_once(21, steps=4)
    image = moving(1)
    one = clip(made, asked, Guide(start=image))
    assert one.shape == (21, 3, *SIZE)
    assert told.loaded.count("models_clip_nano.pth") == 1
    (conditions,) = seen
    assert conditions.initial is None
    assert tuple(conditions.image.shape) == (1, 257, 160)
    assert tuple(conditions.y.shape) == (1, 20, 6, 4, 6)
    assert conditions.y[:, :4, 0].eq(1).all() and conditions.y[:, :4, 1:].eq(0).all()
    black = torch.cat([image, torch.zeros(20, 3, *SIZE)]).transpose(0, 1)[None]
    with torch.inference_mode():
        whole = condition.first_frame(made._vae.encode(black))
    assert (conditions.y - whole).abs().max() < 1e-4

    other = clip(made, asked, Guide(start=-image))
    assert (one - other).abs().max() > 1e-3
    assert told.loaded.count("models_clip_nano.pth") == 1


def test_the_pose_of_the_image_is_added_to_what_every_frame_sees(of_images: Loaded) -> None:
    made, told = of_images()
    image, poses, reference = moving(1), rendered(9), rendered(1)[0]
    plain = clip(made, options(9), Guide(start=image, poses=poses))
    posed = clip(made, options(9), Guide(start=image, poses=poses, reference=reference))
    assert (plain - posed).abs().max() > 1e-4
    assert told.loaded.count("pose.ckpt") == 1
