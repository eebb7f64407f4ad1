"""RunPod's Hub: hub.json and tests.json by its published rules (docs.runpod.io/hub/publishing-guide)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from app.job.payload import validate
from app.settings import load_settings

REPOSITORY = Path(__file__).resolve().parents[1]
TEXT = {"type": "string", "minLength": 1}
VERSIONS = {"type": "array", "minItems": 1, "items": {"type": "string", "pattern": r"^\d+\.\d+$"}}
POOLS = "AMPERE_16|AMPERE_24|ADA_24|AMPERE_48|ADA_48_PRO|AMPERE_80|ADA_80_PRO|HOPPER_141"
VALUE = {"type": ["string", "number", "boolean"]}


def closed(required: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": required | (optional or {}),
        "required": list(required),
        "additionalProperties": False,
    }


OPTION = closed({"label": TEXT, "value": {"type": "string"}})
INPUT = closed(
    {"name": TEXT, "type": {"enum": ["string", "number", "boolean", "huggingface"]}, "description": TEXT},
    {
        "default": VALUE, "advanced": {"type": "boolean"}, "options": {"type": "array", "items": OPTION},
        "min": {"type": "number"}, "max": {"type": "number"}, "trueValue": TEXT, "falseValue": TEXT,
    },
)  # fmt: skip
VARIABLE = {
    "oneOf": [closed({"key": TEXT, "value": {"type": "string"}}), closed({"key": TEXT, "input": INPUT})]
}
PRESET = closed({"name": TEXT, "defaults": {"type": "object", "additionalProperties": VALUE}})
HUB = closed(
    {
        "title": TEXT, "description": TEXT, "type": {"const": "serverless"},
        "category": {"enum": ["audio", "embedding", "language", "video", "image"]},
        "config": closed(
            {
                "runsOn": {"const": "GPU"}, "containerDiskInGb": {"type": "integer", "minimum": 1},
                "gpuCount": {"type": "integer", "minimum": 1},
                "gpuIds": {"type": "string", "pattern": rf"^({POOLS})(,({POOLS}|-NVIDIA .+))*$"},
            },
            {
                "allowedCudaVersions": VERSIONS, "env": {"type": "array", "items": VARIABLE},
                "presets": {"type": "array", "items": PRESET},
            },
        ),
    },
    {"iconUrl": {"type": "string", "format": "uri"}},
)  # fmt: skip
CASE = closed({"name": TEXT, "input": {"type": "object"}}, {"timeout": {"type": "integer", "minimum": 1}})
TESTS = closed(
    {
        "tests": {"type": "array", "minItems": 1, "items": CASE},
        "config": closed(
            {"gpuTypeId": {"type": "string", "pattern": "^NVIDIA "}, "gpuCount": {"type": "integer"}},
            {
                "allowedCudaVersions": VERSIONS,
                "env": {"type": "array", "items": closed({"key": TEXT, "value": {"type": "string"}})},
            },
        ),
    }
)


def read(name: str) -> Any:
    return json.loads((REPOSITORY / ".runpod" / name).read_text())


@pytest.mark.parametrize(("name", "schema"), [("hub.json", HUB), ("tests.json", TESTS)])
def test_follows_the_published_rules(name: str, schema: dict[str, Any]) -> None:
    jsonschema.validate(read(name), schema, format_checker=jsonschema.FormatChecker())


def test_the_files_that_the_hub_wants_are_there() -> None:
    for name in ("handler.py", "Dockerfile", "README.md"):
        assert (REPOSITORY / name).is_file() or (REPOSITORY / ".runpod" / name).is_file(), name


def test_every_default_and_preset_is_a_setting_that_makes_sense() -> None:
    config = read("hub.json")["config"]
    defaults = {e["key"]: str(e["input"]["default"] if "input" in e else e["value"]) for e in config["env"]}
    for preset in [{"defaults": {}}, *config["presets"]]:
        assert set(preset["defaults"]) <= set(defaults)
        load_settings(defaults | {key: str(value) for key, value in preset["defaults"].items()})
    for entry in config["env"]:
        for option in entry.get("input", {}).get("options", []):
            load_settings({entry["key"]: option["value"]})


def test_the_hubs_own_tests_are_jobs_of_nano() -> None:
    tests = read("tests.json")
    environment = {entry["key"]: entry["value"] for entry in tests["config"]["env"]}
    assert load_settings(environment).models == ("nano",)
    for case in tests["tests"]:
        assert validate(case["input"]).model == "nano"
