from pathlib import Path

import pytest

from app.errors import ConfigError
from app.settings import Settings, load_settings, variable


def test_defaults_are_those_of_the_platform() -> None:
    settings = load_settings({})
    assert settings.roots == (Path("/workspace"), Path("/runpod-volume"))
    assert settings.models is None
    assert settings.verify == "quick"


def test_lists_are_split() -> None:
    settings = load_settings({"SEEDPOD_ROOTS": "/a:/b", "SEEDPOD_MODELS": "seedvr2-3b, nano"})
    assert settings.roots == (Path("/a"), Path("/b"))
    assert settings.models == ("seedvr2-3b", "nano")


def test_an_empty_variable_is_an_unset_one() -> None:
    assert load_settings({"SEEDPOD_MODELS": "", "SEEDPOD_STAGE": ""}) == load_settings({})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("SEEDPOD_STAGE", "ram"),
        ("SEEDPOD_VERIFY", "deep"),
        ("SEEDPOD_FETCH", "yes"),
        ("SEEDPOD_DEVICE", "gpu"),
        ("SEEDPOD_DTYPE", "int8"),
        ("SEEDPOD_ROOTS", "workspace"),
        ("SEEDPOD_ROOTS", ":"),
        ("SEEDPOD_READERS", "0"),
        ("SEEDPOD_READERS", "many"),
        ("SEEDPOD_MAX_PIXELS", "-5"),
    ],
)
def test_a_value_without_sense_is_refused_by_name(key: str, value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings({key: value})
    assert caught.value.code == "settings_invalid"
    assert key in caught.value.message
    assert value in caught.value.message
    assert "may hold" in caught.value.message


def test_a_misspelt_variable_is_refused_with_the_right_name() -> None:
    with pytest.raises(ConfigError, match=r"SEEDPOD_MODEL is not a setting.*SEEDPOD_MODELS"):
        load_settings({"SEEDPOD_MODEL": "nano"})


def test_the_token_never_shows() -> None:
    settings = load_settings({"HF_TOKEN": "hf_secret"})
    assert "hf_secret" not in repr(settings)
    assert settings.hf_token is not None
    assert settings.hf_token.get_secret_value() == "hf_secret"


def test_every_field_is_described() -> None:
    assert all(field.description for field in Settings.model_fields.values())
    assert variable("hf_token") == "HF_TOKEN"
    assert variable("stage") == "SEEDPOD_STAGE"
