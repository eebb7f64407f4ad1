"""The API against its own OpenAPI page, with requests that schemathesis makes from it, right and wrong ones:
no fault of ours, and no answer that the page does not tell of."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from app.job.payload import PAYLOADS, validate
from app.serve.record import State
from app.serve.reporter import Reporter
from tests.serve.local_server import lifecycle, serving

KEY = "a-key"
EXCLUDED = "positive_data_acceptance"  # a size given in two ways fits the schema, and is refused


def instant(job_id: str, payload: Mapping[str, Any], reporter: Reporter) -> Mapping[str, Any]:
    reporter.start("restore", 1, "frames")
    reporter.emit({"step": 1})
    return {"asked": dict(payload)}


@pytest.mark.slow
def test_schemathesis_finds_no_fault_and_no_answer_that_is_not_told_of(tmp_path: Path) -> None:
    accepted = 0

    def counted(payload: Mapping[str, Any]) -> Any:
        nonlocal accepted
        request = validate(payload)
        accepted += 1
        return request

    with serving(lifecycle(instant), api_key=KEY, validate=counted, payloads=PAYLOADS) as served:
        served.jobs.submit({}, "clip-1")  # the page's example of an id
        ran = subprocess.run(
            [
                sys.executable, "-m", "schemathesis.cli", "run", f"{served.url}/openapi.json",
                "--header", f"Authorization: Bearer {KEY}", "--exclude-checks", EXCLUDED,
                "--max-examples", "5", "--seed", "1", "--no-color",
            ],
            cwd=tmp_path, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, timeout=240,
        )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "18 selected / 18 total" in ran.stdout
    assert accepted > 100 and served.jobs.counts()[State.COMPLETED] > 3  # it went past the refusals


def page(**options: Any) -> dict[str, Any]:
    with serving(validate=validate, payloads=PAYLOADS, **options) as served:
        return dict(served.get("/openapi.json").json())


def test_the_page_tells_of_every_answer_and_of_no_other() -> None:
    told = {
        (path, method): set(operation["responses"])
        for path, methods in page()["paths"].items()
        for method, operation in methods.items()
    }
    submitting = {"200", "400", "413", "415", "421", "422", "429", "503"}
    calls: dict[tuple[str, str], set[str]] = {
        ("/run", "post"): submitting,
        ("/runsync", "post"): submitting,
        ("/status/{job_id}", "get"): {"200", "404", "421"},
        ("/status/{job_id}", "post"): {"200", "404", "421"},
        ("/stream/{job_id}", "get"): {"200", "404", "421"},
        ("/cancel/{job_id}", "post"): {"200", "404", "421"},
        ("/purge-queue", "post"): {"200", "421"},
        ("/health", "get"): {"200", "421"},
    }
    prefixed = {
        (f"/v2/{{endpoint_id}}{path}", method): calls[path, method] | {"404"} for path, method in calls
    }
    worker = {("/ping", "get"): {"200", "204", "503"}, ("/metrics", "get"): {"200", "421"}}
    assert told == calls | prefixed | worker


def test_the_page_asks_for_a_key_only_where_one_is_needed() -> None:
    paths = page(api_key=KEY)["paths"]
    needed = {path for path, methods in paths.items() for call in methods.values() if "security" in call}
    assert needed == set(paths) - {"/ping"}
    assert all("401" in call["responses"] for path in needed for call in paths[path].values())
    assert "security" not in str(page()["paths"])


def test_the_page_holds_the_schema_of_each_task() -> None:
    told = page(endpoint="mine")
    body = told["paths"]["/run"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["required"] == ["input"] and body["additionalProperties"] is False
    tasks = [task["$ref"].rpartition("/")[2] for task in body["properties"]["input"]["oneOf"]]
    assert tasks == [payload.__name__ for payload in PAYLOADS.values()]
    fields = told["components"]["schemas"]["RestorePayload"]["properties"]
    assert fields["window"]["minimum"] == 5 and "description" in fields["window"]
    endpoint, *_ = told["paths"]["/v2/{endpoint_id}/health"]["get"]["parameters"]
    assert endpoint["schema"]["enum"] == ["mine"]
