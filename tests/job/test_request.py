import pytest

from app.errors import UsageError
from app.job.payload import RestorePayload
from app.job.request import Part, RestoreRequest, parse, told


def test_text_from_a_command_line_is_understood() -> None:
    request = parse(RestoreRequest, {"scale": "2", "cuts": "false", "seed": "7", "rate": "29.97"})
    assert (request.scale, request.cuts, request.seed, request.rate) == (2.0, False, 7, 29.97)


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"heigth": 3}, ["heigth", "not a field", "height"]),
        ({"height": 8}, ["height", "8", "16"]),
        ({"height": 9000}, ["9000", "8192"]),
        ({"width": "wide"}, ["width", "wide", "integer"]),
        ({"scale": 0}, ["scale", "0", "greater than 0"]),
        ({"scale": "nan"}, ["scale", "nan"]),
        ({"scale": 17}, ["17", "16"]),
        ({"scale": 2, "height": 512}, ["more than one way"]),
        ({"short_side": 480, "width": 512}, ["more than one way"]),
        ({"seed": -1}, ["seed", "-1"]),
        ({"seed": 2**63}, ["seed", str(2**63)]),
        ({"steps": 0}, ["steps", "0"]),
        ({"steps": 101}, ["steps", "101", "100"]),
        ({"guidance": -1}, ["guidance", "-1"]),
        ({"rescale": 1.5}, ["rescale", "1.5"]),
        ({"condition_noise": 2}, ["condition_noise", "2"]),
        ({"window": 4}, ["window", "4", "5"]),
        ({"fit": "stretch"}, ["fit", "stretch", "pad", "crop"]),
        ({"color": "auto"}, ["color", "auto", "wavelet"]),
        ({"cuts": "perhaps"}, ["cuts", "perhaps"]),
        ({"rate": 0}, ["rate", "0"]),
        ({"rate": "inf"}, ["rate", "inf"]),
        ({"codec": "vp9"}, ["codec", "vp9", "h264"]),
        ({"quality": 60}, ["quality", "60", "51"]),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(values: dict[str, object], parts: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        parse(RestoreRequest, values)
    assert caught.value.code == "request_invalid"
    for part in parts:
        assert part in caught.value.message


def test_every_wrong_field_is_named_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        parse(RestoreRequest, {"steps": 0, "window": 1, "nonsense": True})
    assert all(name in caught.value.message for name in ("steps", "window", "nonsense"))


SIGNED = "https://me:hunter2@bucket.example/clip.mp4?X-Amz-Signature=5ec2e7"


@pytest.mark.parametrize(
    "source",
    [
        SIGNED,
        {"link": SIGNED},
        {"url": SIGNED + "x" * 9000},
        {"url": SIGNED, "path": "a.mp4"},
        {"url": [SIGNED]},
        [SIGNED],
        "bucket.example/clip.mp4?X-Amz-Signature=5ec2e7",
        "me:hunter2@bucket.example",
    ],
)
def test_no_secret_of_a_source_is_repeated(source: object) -> None:
    with pytest.raises(UsageError) as caught:
        parse(RestorePayload, {"task": "restore", "source": source})
    for secret in ("hunter2", "5ec2e7", "X-Amz"):
        assert secret not in caught.value.message
    assert caught.value.message.startswith("source")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (512.5, "512.5"),
        ("512", "'512'"),
        (True, "True"),
        (None, "None"),
        ([1, 2], "a list of 2"),
        ({"a": 1}, "an object of 1 (a)"),
        ("x" * 81, "a text of 81 characters"),
        (10**200, "1" + "0" * 81),
    ],
)
def test_how_a_value_is_told(value: object, shown: str) -> None:
    assert told(value) == shown


def test_a_message_stays_readable_however_much_is_wrong() -> None:
    with pytest.raises(UsageError) as caught:
        parse(RestoreRequest, {f"field{number}": 0 for number in range(5000)})
    assert caught.value.message.endswith("And 4,980 more.")
    assert len(caught.value.message) < 20_000


def test_every_field_is_described() -> None:
    assert all(field.description for field in RestoreRequest.model_fields.values())


PART = {"source_start": 90, "start": 100, "stop": 300, "shot": 4, "edges": [80, 120, 310]}


def test_a_part_lies_in_its_shots() -> None:
    assert parse(Part, PART).edges == [80, 120, 310]
    assert parse(Part, {**PART, "start": 80, "source_start": 0, "stop": 310}).start == 80


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"start": 79}, "start 79"),
        ({"start": 120}, "start 120"),
        ({"stop": 120}, "stop 120"),
        ({"stop": 311}, "stop 311"),
        ({"source_start": 101}, "source_start 101"),
        ({"edges": [80, 110], "stop": 100}, "follow each other"),
        ({"edges": [80, 120, 120, 310]}, "rise"),
        ({"edges": [80]}, "edges"),
        ({"edges": "80,120,310"}, "edges"),
        ({"shot": -1}, "shot"),
        ({"shot": "4"}, "shot"),
        ({"begin": 3}, "begin"),
        ({"edges": [0, 10**10]}, "edges"),
    ],
)
def test_a_part_that_makes_no_sense_is_refused(values: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=f"(?i){words}"):
        parse(Part, {**PART, **values})
