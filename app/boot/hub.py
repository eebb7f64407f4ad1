"""The hub, for one file at a time: what it says of the file, and the file's bytes from any offset on.

It speaks through huggingface_hub's client, and turns what can go wrong into our errors, or into
`InterruptedDownloadError` where trying again may help. huggingface_hub's own download cannot go on after
it was stopped (its partial file has a random name and is removed), so the loop over the bytes is ours,
in fetch.py. This module knows nothing of disks, and puts no token and no signed address in a message.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Final
from urllib.parse import urlsplit

from app.boot.manifest import Origin
from app.errors import ConfigError, SeedpodError, UnavailableError

TIMEOUT: Final = 30.0  # seconds without an answer, or without a byte
_PASSING: Final = (408, 425, 429, 500, 502, 503, 504)  # status codes that may go away
_SHA256: Final = re.compile(r"[0-9a-f]{64}")


class InterruptedDownloadError(Exception):
    """The hub did not answer, or stopped in the middle: trying again may help. The text says how."""


@dataclass(frozen=True)
class Remote:
    """A file as the hub describes it. `sha256` is known for large files; `size` is in bytes."""

    origin: Origin
    url: str
    size: int | None
    sha256: str | None
    etag: str


@dataclass(frozen=True)
class Hub:
    """The hub at `endpoint`. `token` is sent to it, and to nobody it redirects to."""

    endpoint: str
    token: str | None
    timeout: float = TIMEOUT

    @property
    def name(self) -> str:
        """The endpoint as a message shows it, without a user or password that it may hold."""
        parts = urlsplit(self.endpoint)
        port = f":{parts.port}" if parts.port else ""
        return f"{parts.hostname}{port}" if parts.hostname else "the hub"

    def look(self, origin: Origin) -> Remote:
        """What the hub says of a file, without its bytes.

        Raises:
            ConfigError: `fetch_not_found`, `fetch_denied`.
            UnavailableError: `fetch_refused`, for an answer that makes no sense.
            InterruptedDownloadError: for now.
        """
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        address = {"repo_id": origin.repo, "filename": origin.filename, "endpoint": self.endpoint.rstrip("/")}
        with self._errors(origin):
            url = hf_hub_url(**address, revision=origin.revision)
            facts = get_hf_file_metadata(
                url, token=self.token or False, timeout=self.timeout, endpoint=self.endpoint
            )
            if facts.commit_hash is None or facts.etag is None:
                raise self._refused(origin, "it answers, but not as a hub does (no commit, no etag)")
            url = hf_hub_url(**address, revision=facts.commit_hash)  # every byte from one commit
        sha256 = facts.etag if _SHA256.fullmatch(facts.etag) else None
        return Remote(origin, url, facts.size, sha256, facts.etag)

    @contextmanager
    def read(self, remote: Remote, start: int) -> Iterator[tuple[int, Iterator[bytes]]]:
        """The bytes of a file from offset `start` on: (the offset that they really begin at, chunks).

        That is 0 where the server knows no ranges. Errors as in `look`, also while chunks are read.
        """
        from huggingface_hub import get_session, hf_raise_for_status

        headers = {"User-Agent": "seedpod", "Accept-Encoding": "identity"}
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"  # the client drops it on the way to a CDN
        if start:
            headers["Range"] = f"bytes={start}-"
        with (
            self._errors(remote.origin),
            get_session().stream("GET", remote.url, headers=headers, timeout=self.timeout) as response,
        ):
            if start and response.status_code == 416:  # what we have is longer than the file
                yield 0, iter(())
                return
            hf_raise_for_status(response)
            if response.status_code != 206:
                yield 0, response.iter_bytes()
            elif response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                yield start, response.iter_bytes()
            else:
                raise InterruptedDownloadError("it sent another range than was asked for")

    @contextmanager
    def _errors(self, origin: Origin) -> Iterator[None]:
        from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

        httpx: Any = import_module("huggingface_hub.utils").httpx  # httpx or httpx2, as its version has it
        try:
            yield
        except OfflineModeIsEnabled:
            raise self._refused(origin, "HF_HUB_OFFLINE is set, so nothing is downloaded") from None
        except HfHubHTTPError as error:
            status = error.response.status_code
            if status in _PASSING:
                raise InterruptedDownloadError(f"it answers with status {status}") from None
            raise self._permanent(origin, status) from None
        except (httpx.UnsupportedProtocol, httpx.InvalidURL):
            raise self._refused(origin, "that is no address of a hub; expected https://host") from None
        except httpx.TimeoutException:
            raise InterruptedDownloadError(f"it gave no answer for {self.timeout:g} s") from None
        except httpx.ConnectError:
            raise InterruptedDownloadError("no connection to it can be made") from None
        except httpx.TransportError:
            raise InterruptedDownloadError("the connection was closed in the middle") from None
        except httpx.HTTPError as error:
            raise self._refused(origin, f"its answer makes no sense ({type(error).__name__})") from None

    def _permanent(self, origin: Origin, status: int) -> SeedpodError:
        """The error for a status that stays."""
        what = f"{origin.repo} @ {origin.revision or 'main'}: {origin.filename}"
        if status in (401, 403):
            held = "the one in HF_TOKEN is not accepted" if self.token else "none was given"
            return ConfigError(
                "fetch_denied",
                f"{self.name} does not give out {what} (status {status}): it is gated or private, or does "
                f"not exist; expected a token with access, and {held}. Accept the terms on the model's page "
                "and set HF_TOKEN to a token that may read it.",
            )
        if status in (404, 410):
            return ConfigError(
                "fetch_not_found",
                f"{self.name} has no {what} (status {status}); expected a repository, revision and file that "
                "exist. Correct repo, revision and filename in the manifest.",
            )
        return self._refused(origin, f"it answers with status {status}")

    def _refused(self, origin: Origin, reason: str) -> UnavailableError:
        return UnavailableError(
            "fetch_refused",
            f"{self.name} cannot give {origin.repo}/{origin.filename}: {reason}. Check HF_ENDPOINT and the "
            "network.",
        )
