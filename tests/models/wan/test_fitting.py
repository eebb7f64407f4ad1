from dataclasses import dataclass, field, replace

import pytest

from app.errors import UnavailableError
from app.memory import KERNELS, SLACK, Need, Room
from app.models.wan.fitting import Fit, Limits, fit
from app.models.wan.generate import GenerateOptions
from app.models.wan.length import length
from app.models.wan.memory import Choice, Task

GB = 10**9
OPTIONS = GenerateOptions({0: "a cat"}, length(81, "nothing", blocks=True), 480, 832)
TASK = Task(OPTIONS, text=11 * GB)
PLENTY = 500 * GB


@dataclass
class Linear:
    """A model of 3 GB and a text encoder of 11; a latent in sight takes 0.3 GB, one that is decoded 1.5."""

    asked: list[Choice] = field(default_factory=list)

    def need(self, task: Task, choice: Choice) -> Need:
        self.asked.append(choice)
        seen = replace(task.options, window=choice.window).latents_seen
        device = 3 * GB + 3 * seen * GB // 10 + 3 * (choice.decode or task.options.length.block) * GB // 2
        device += task.text if choice.text == "device" else 0
        return Need(device, task.text if choice.text == "host" else 0)


def fitted(
    device: float,
    host: float = PLENTY,
    limits: Limits | None = None,
    task: Task = TASK,
    *,
    apart: bool = True,
) -> Fit:
    """What is chosen where needs of `device` GB fit."""
    room = Room(int(device * SLACK * GB) + KERNELS + 1, int(host), apart)
    return fit(Linear(), task, room, limits or Limits(), "A result of 832x480")


def test_nothing_is_given_up_where_all_fits() -> None:
    model = Linear()
    assert fit(model, TASK, Room(PLENTY, 0, True), Limits(), "It").choice == Choice(None)
    assert set(model.asked) == {Choice(None)}, "nothing else was computed"


def test_least_is_given_up_first() -> None:
    assert fitted(24.8).choice == Choice(None)
    assert fitted(24.7).choice == fitted(21.8).choice == Choice(None, 1)
    assert fitted(21.7).choice == fitted(13.8).choice == Choice(None, None, "host")
    assert fitted(13.7).choice == fitted(10.8).choice == Choice(None, 1, "host")
    assert fitted(13.7, host=0).choice == Choice(None, 1, "nowhere")
    assert fitted(10.7).choice == Choice(18, 1, "host")
    assert fitted(10.7, host=0).choice == Choice(18, 1, "nowhere")
    assert fitted(6.3).choice == Choice(6, 1, "host")


def test_what_cannot_be_is_not_chosen() -> None:
    assert fitted(30, limits=Limits(("nowhere",))).choice == Choice(None, None, "nowhere")
    assert fitted(21.2, limits=Limits(("device", "nowhere")), apart=False).choice == Choice(
        None, None, "nowhere"
    )
    assert fitted(10.8, task=replace(TASK, text=0)).choice == Choice(None, 1), (
        "there is no text encoder to move"
    )
    sunk = replace(TASK, options=replace(OPTIONS, sink=6))
    assert fitted(8.1, task=sunk).choice == Choice(12, 1, "host")
    with pytest.raises(UnavailableError):
        fitted(8, task=sunk)


def test_refusals_say_the_numbers_and_what_to_do() -> None:
    with pytest.raises(UnavailableError) as caught:
        fitted(5)
    assert caught.value.code == "memory_short"
    for part in ("A result of 832x480 takes up to 7.5 GB of the device's 6.1 GB", "a window of 6 latents",
                 "decoded one by one", "out of memory; ask for a smaller size", "larger GPU"):  # fmt: skip
        assert part in caught.value.message, part
    with pytest.raises(UnavailableError, match="a smaller size or a shorter window, free"):
        fitted(5, limits=Limits(shorten=False))
    at_once = replace(TASK, options=replace(OPTIONS, length=length(81, "nothing", blocks=False)))
    with pytest.raises(UnavailableError, match=r"21 latents at once.* or fewer frames, free"):
        fitted(5, task=at_once)


def test_it_is_told_in_words() -> None:
    assert str(fitted(24.8)).startswith(
        "a window of 21 latents, decoded 3 at a time, the text encoder on the device: up to 27.9 GB of the"
    )
    assert "in the host's memory: up to 15.8 GB of the device's" in str(fitted(13.8))
    assert "12.1 GB of the host's" in str(fitted(13.8))
    assert "the text encoder in memory: up to" in str(fitted(30, apart=False))
