"""One endpoint, through the official client: an id on RunPod, which has many workers, or the address of a
server of one's own. Knows nothing of parts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

from app.errors import InputError, SeedpodError, UnavailableError, UsageError

FINAL: Final = ("COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT")
# Codes of errors that another worker would only repeat.
HOPELESS: Final = ("request_", "input_", "part_", "size_", "model_", "output_", "deliver_too_", "source_no_")
Answer = TypeVar("Answer")


class SilentError(Exception):
    """An endpoint does not answer, or takes no job, now."""


class JobFailedError(Exception):
    """A job came to nothing; another try may do better."""


class Endpoint:
    """An endpoint. `abandoned`: jobs that may run there still, and that nobody waits for."""

    def __init__(self, where: str, environ: Mapping[str, str] = os.environ) -> None:
        """`where`: an id, or http://host:port. RunPod's key goes to RunPod only."""
        import runpod
        from requests.adapters import HTTPAdapter

        url = urlsplit(where)
        own = url.scheme in ("http", "https")
        self.name = where if own else f"endpoint {where}"
        self.own = own
        self.abandoned: list[str] = []
        key = environ.get("SEEDPOD_API_KEY") or "none" if own else environ.get("RUNPOD_API_KEY")
        if not key:
            raise UsageError("key_missing", f"RUNPOD_API_KEY is not set; {where} on RunPod needs your key.")
        base, _, name = url.path.strip("/").partition("/")
        self._endpoint = runpod.Endpoint((name or "local") if own else where, api_key=key)
        client = self._endpoint.rp_client
        if own:
            client.endpoint_url_base = f"{url.scheme}://{url.netloc}/{base or 'v2'}"
        for scheme in ("http://", "https://"):  # the client's own retries wait half a minute for what is gone
            client.rp_session.mount(scheme, HTTPAdapter())

    def run(self, payload: Mapping[str, Any]) -> str:
        """Submit a job; returns its id. Raises SilentError, or SeedpodError where the request is refused."""
        return str(self._asked(lambda: self._endpoint.run({"input": dict(payload)})).job_id)

    def status(self, job_id: str) -> dict[str, Any]:
        """Where a job stands. Raises SilentError; JobFailedError where the endpoint does not know it."""
        client, name = self._endpoint.rp_client, self._endpoint.endpoint_id
        answer: dict[str, Any] = self._asked(lambda: client.get(f"{name}/status/{job_id}"), job=True)
        return answer

    def cancel(self, job_id: str) -> None:
        """Cancel a job, if that can be done."""
        client, name = self._endpoint.rp_client, self._endpoint.endpoint_id
        with suppress(SilentError, JobFailedError, SeedpodError):
            self._asked(lambda: client.post(f"{name}/cancel/{job_id}", data=None, timeout=3), job=True)

    def answers(self) -> bool:
        """Whether the endpoint is there; what was abandoned is then cancelled."""
        try:
            self._asked(self._endpoint.health)
        except SilentError:
            return False
        while self.abandoned:
            self.cancel(self.abandoned.pop())
        return True

    def _asked(self, ask: Callable[[], Answer], job: bool = False) -> Answer:
        import requests

        try:
            return ask()
        except requests.RequestException as error:
            if error.response is not None:
                raise self._refusal(error.response.status_code, error.response.text, job) from None
            raise SilentError(f"{self.name} does not answer ({type(error).__name__})") from None
        except RuntimeError:  # what the client makes of 401
            raise self._refusal(401, "", job) from None

    def _refusal(self, status: int, text: str, job: bool) -> Exception:
        if status in (408, 425, 429) or status >= 500:
            return SilentError(f"{self.name} answers {status}{_said(text)}")
        if job and status == 404:
            return JobFailedError(f"{self.name} does not know the job any more")
        if status in (401, 403, 404):
            return UnavailableError(
                "endpoint_refused",
                f"{self.name} answers {status}{_said(text)}; expected an endpoint that takes the key: check "
                "its id or address, and RUNPOD_API_KEY (SEEDPOD_API_KEY for a server of your own).",
            )
        return UsageError("job_refused", f"{self.name} refuses the job: {status}{_said(text)}")


def _said(text: str) -> str:
    """What a refusal says, in its own words, where it is Seedpod's."""
    try:
        return f": {json.loads(text)['error']['message']}"
    except (KeyError, TypeError, ValueError):
        return ""


def failure(answer: Mapping[str, Any]) -> Exception:
    """Why a job has no result. Seedpod tells it as JSON text, the platform as plain text."""
    told = answer.get("error")
    try:
        error = json.loads(str(told))
        code, message = str(error["code"]), str(error["message"])
    except (KeyError, TypeError, ValueError):
        return JobFailedError(f"{answer.get('status')}: {told or 'no reason is told'}")
    if code.startswith(HOPELESS):
        return InputError(code, message)
    return JobFailedError(f"{message} [{code}]")
