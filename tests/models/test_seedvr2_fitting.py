from dataclasses import dataclass, field, replace

import pytest

from app.errors import UnavailableError
from app.memory import KERNELS, SLACK, Need, Room
from app.models.seedvr2 import fitting
from app.models.seedvr2.fitting import Fit, Limits, fit
from app.models.seedvr2.memory import Choice, Task

GB = 10**9
TASK = Task(latents=100, frame=(138, 240))
PLENTY = 500 * GB
LONG = Limits(31)


@dataclass
class Linear:
    """A model of 10 GB, of which blocks are 8; whole frames take 40 GB, a tile its share; a latent 0.1 GB."""

    asked: list[Choice] = field(default_factory=list)

    def need(self, task: Task, choice: Choice) -> Need:
        self.asked.append(choice)
        frame = 40 * GB
        if choice.tile is not None:
            frame = frame * choice.tile**2 // (task.frame[0] * task.frame[1])
        weights = (2 if choice.stream else 10) * GB
        host = (8 * GB if choice.stream else 0) + (20 * GB if choice.tile else 0)
        return Need(weights + frame + choice.window * GB // 10, host)


def fitted(device: float, host: float = PLENTY, limits: Limits = LONG, *, apart: bool = True) -> Fit:
    """What is chosen where needs of `device` GB fit."""
    room = int(device * SLACK * GB) + KERNELS
    return fit(Linear(), TASK, Room(room, int(host), apart), limits, "A result of 8x8")


def test_nothing_is_given_up_where_all_fits() -> None:
    model = Linear()
    assert fit(model, TASK, Room(PLENTY, 0, True), Limits(31), "It").choice == Choice(31)
    assert set(model.asked) == {Choice(31)}, "nothing else was computed"


def test_least_is_given_up_first() -> None:
    assert fitted(53.2).choice == Choice(31)
    assert fitted(50).choice == Choice(31, None, stream=True)
    assert fitted(44.1).choice == Choice(31, 160)
    assert fitted(24.3).choice == Choice(31, 96)
    assert fitted(14).choice == Choice(31, 80, stream=True)
    assert fitted(6.4).choice == Choice(31, 32, stream=True)
    assert fitted(5.5).choice == Choice(15, 32, stream=True)


def test_what_cannot_be_is_not_chosen() -> None:
    assert fitted(51, host=0.0, limits=Limits(5)).choice == Choice(5)
    assert fitted(18.1, host=23 * GB).choice == Choice(31, 64)
    assert fitted(16, host=23 * GB).choice == Choice(31, 48)  # no room on the host for blocks
    assert fitted(50, limits=Limits(31, stream=False)).choice == Choice(31, 160)
    assert fitted(60, limits=Limits(31, tile=48)).choice == Choice(31, 48)
    one = fitted(80, apart=False).choice
    assert one == Choice(31) and not fitted(40, apart=False).choice.stream


def test_refusals_say_the_numbers_and_what_to_do() -> None:
    with pytest.raises(UnavailableError) as caught:
        fitted(3)
    assert caught.value.code == "memory_short"
    for part in ("A result of 8x8 takes up to 4.7 GB of the device's 3.9 GB", "host's 500.0 GB",
                 "windows of 5", "tiles of 256 pixels", "in the host's memory", "smaller size",
                 "larger GPU"):  # fmt: skip
        assert part in caught.value.message, part
    with pytest.raises(UnavailableError, match=r"windows of 31 latents, whole frames.*leave tile unset"):
        fitted(20, limits=Limits(31, tile=0, shorten=False))
    with pytest.raises(UnavailableError, match="shorter window"):
        fitted(5.5, limits=Limits(31, shorten=False))


def test_where_nothing_can_fit_few_ways_are_computed() -> None:
    model = Linear()
    with pytest.raises(UnavailableError):
        fit(model, replace(TASK, latents=250_000), Room(GB, 0, True), Limits(255), "It")
    assert set(model.asked) == {Choice(255), Choice(5, 32, stream=True), Choice(5, None, stream=True)}


class Heavier(Linear):
    """Tiles that are hardly smaller than a frame take more than that."""

    def need(self, task: Task, choice: Choice) -> Need:
        need = super().need(task, choice)
        return replace(need, device=need.device + (choice.tile is not None) * 39 * GB)


@pytest.mark.parametrize("kind", [Linear, Heavier])
@pytest.mark.parametrize("apart", [True, False])
def test_what_is_refused_early_would_have_been_refused(
    kind: type[Linear], apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(room: Room, limits: Limits) -> Choice | str:
        try:
            return fit(kind(), TASK, room, limits, "It").choice
        except UnavailableError as error:
            return error.message

    cases = [
        (Room(device * GB, host * GB, apart), limits)
        for device in range(1, 70)
        for host in (0, 10, 25, 200)
        for limits in (LONG, Limits(5), Limits(31, tile=64), Limits(31, tile=0), Limits(31, shorten=False))
    ]
    quick = [told(*case) for case in cases]
    monkeypatch.setattr(fitting, "_hopeless", lambda *_: False)
    assert quick == [told(*case) for case in cases]
    assert len({str(each)[:20] for each in quick}) > 5


def test_it_is_told_in_words() -> None:
    assert str(fitted(24.3)).startswith(
        "windows of 31 latents, tiles of 768 pixels: up to 27.3 GB of the device's"
    )
    assert "up to 58.4 GB of the machine's 88.6 GB" in str(fitted(80, apart=False))


def test_a_tile_is_told_in_pixels_of_its_own_autoencoder() -> None:
    """As a request would ask for it: the VAEs' strides differ."""
    task = replace(TASK, unit=4)
    room = Room(int(24.3 * SLACK * GB) + KERNELS, PLENTY, True)
    found = fit(Linear(), task, room, LONG, "It")
    assert found.choice.tile == 96 and found.tile == 384 and "tiles of 384 pixels" in str(found)
