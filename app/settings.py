"""The settings, read once from the environment into a frozen object.

This is the only module that reads the environment. `load_settings` takes the mapping as an argument,
so a test passes a dict. It knows nothing of manifests, files or devices: narrow values travel on
from here.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from app.errors import ConfigError

PREFIX = "SEEDPOD_"


class Settings(BaseSettings):
    """Everything the environment can say. Each field's variable is `SEEDPOD_` and its upper-case name,
    unless it names another one."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="ignore")

    roots: Annotated[tuple[Path, ...], NoDecode] = Field(
        default=(Path("/workspace"), Path("/runpod-volume")),
        description="Folders that may hold checkpoints, in order of preference; colon-separated.",
    )
    models: Annotated[tuple[str, ...] | None, NoDecode] = Field(
        default=None,
        description="Models to boot, comma-separated. Unset: every model whose files are all there.",
    )
    manifest: Annotated[tuple[Path, ...], NoDecode] = Field(
        default=(),
        description="Your own manifest files, colon-separated. Each extends the built-in one; "
        "a file that says `replace = true` at its top replaces everything before it.",
    )
    verify: Literal["quick", "full"] = Field(
        default="quick",
        description="quick: presence, size, format, tensor names and shapes, and hashes that are remembered; "
        "a hash that is not is computed while the file is staged, or before it is first loaded. full: every "
        "hash is computed at once, and remembered.",
    )
    stage: Literal["auto", "shm", "tmp", "off"] = Field(
        default="auto",
        description="Where files marked `stage` are copied: auto tries /dev/shm, then /tmp, then leaves "
        "them in place; shm and tmp allow only that folder; off never copies.",
    )
    keep_staged: bool = Field(
        default=False,
        description="Whether staged copies stay when the models that read them are loaded: for containers "
        "that share a /dev/shm or /tmp, and for parts that are read again. Off: their room is given back.",
    )
    text_encoder: Literal["auto", "host", "release"] = Field(
        default="auto",
        description="Where the text encoder (11 GB) stays between prompts. auto: on the device while there "
        "is room for it, else in host memory. host: in host memory. release: nowhere; it is read again for "
        "a new prompt.",
    )
    fetch: Literal["missing", "never"] = Field(
        default="never",
        description="missing: download what is missing of the models in SEEDPOD_MODELS at boot.",
    )
    device: str = Field(
        default="auto",
        pattern=r"^(auto|cpu|mps|cuda(:\d{1,3})?)$",
        description="auto (CUDA when there is one, else CPU), cpu, cuda, cuda:N or mps.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float8"] = Field(
        default="auto",
        description="auto: bfloat16 on CUDA, float32 elsewhere. float8: bfloat16, and the matrices of the "
        "transformers' blocks in 8 bits, which takes half their memory (docs/precision.md).",
    )
    compile: Literal["off", "on"] = Field(
        default="off",
        description="on: the element-wise steps of the transformers are compiled at the boot "
        "(docs/speed.md): for cards; on a CPU it costs time.",
    )
    sp_size: int = Field(
        default=1,
        ge=1,
        le=64,
        description="Cards that work on one job of restore together (sequence parallelism): they share the "
        "windows of SeedVR2's transformer.",
    )
    gpus: str = Field(
        default="auto",
        pattern=r"^(auto|[1-9]\d?)$",
        description="auto or a number: jobs that a server runs at a time, each in a process with a card of "
        "its own, or SEEDPOD_SP_SIZE of them. auto: as many as the machine's cards allow, where "
        "SEEDPOD_DEVICE is auto or cuda; else one.",
    )
    visible: str | None = Field(
        default=None,
        validation_alias="CUDA_VISIBLE_DEVICES",
        description="The cards that CUDA programs may use, as CUDA reads it; the processes of SEEDPOD_GPUS "
        "share them out.",
    )
    cache: Path | None = Field(
        default=None,
        description="Folder for remembered hashes, for embeddings of prompts and for compiled code. Unset: "
        "hashes are kept in `.seedpod` in the first root that can be written, else in the user's cache "
        "folder, embeddings in memory alone, and compiled code in the system's temporary folder.",
    )
    user_cache: Path | None = Field(
        default=None,
        validation_alias="XDG_CACHE_HOME",
        description="The user's cache folder. Unset: `.cache` in the home folder.",
    )
    home: Path | None = Field(
        default=None, validation_alias="HOME", description="The user's home folder. Unset: none is used."
    )
    readers: int = Field(
        default=8, ge=1, le=64, description="Parallel readers while a file is staged or hashed."
    )
    max_pixels: int = Field(
        default=3840 * 2160,
        ge=256,
        description="Largest frame of a result, in pixels (height x width); a source may have four times as "
        "many.",
    )
    max_frames: int = Field(default=1_000_000, ge=1, description="Longest input, in frames.")
    log_format: Literal["auto", "human", "json"] = Field(
        default="auto", description="auto: human on a terminal, JSON lines on RunPod."
    )
    host: str = Field(default="127.0.0.1", description="Address that the local server listens on.")
    port: int = Field(
        default=8000, ge=0, le=65535, description="Port of the local server; 0 takes a free one."
    )
    api_key: SecretStr | None = Field(
        default=None, description="Bearer key that callers of the local server must give. Unset: none."
    )
    job_seconds: float = Field(default=3600, gt=0, description="Longest that a job may run, in seconds.")
    grace_seconds: float = Field(
        default=25, ge=0, description="Time that a running job has to finish after SIGTERM, in seconds."
    )
    input: Path | None = Field(default=None, description="Folder that jobs may read sources from, by path.")
    output: Path | None = Field(default=None, description="Folder that results are written to.")
    scratch: Path | None = Field(
        default=None, description="Folder for the files of running jobs. Unset: the system's temporary one."
    )
    inline_bytes: int = Field(
        default=7_000_000,
        ge=0,
        description="Largest result that is sent inside the answer, in bytes of the file.",
    )
    source_bytes: int = Field(default=4_000_000_000, ge=1, description="Largest source of a job, in bytes.")
    source_seconds: float = Field(
        default=900, gt=0, description="Longest that a source may take to download, in seconds."
    )
    source_ports: Annotated[tuple[int, ...], NoDecode] = Field(
        default=(80, 443, 8080, 8443), description="Ports that a source URL may name, comma-separated."
    )
    source_private: bool = Field(
        default=False,
        description="Whether source URLs may lead to this machine and to private networks. Leave it off "
        "wherever callers are not your own.",
    )
    bucket: str | None = Field(
        default=None, description="Name of the bucket, where BUCKET_ENDPOINT_URL does not hold it."
    )
    bucket_region: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9-]{1,60}$",
        description="Region of the bucket. Unset: the one that the host names, else us-east-1.",
    )
    bucket_link_seconds: int = Field(
        default=7 * 24 * 3600,
        ge=60,
        le=7 * 24 * 3600,
        description="How long a link to a result in the bucket holds, in seconds; seven days is the most.",
    )
    bucket_prefix: str = Field(default="", description="What the keys of results in the bucket begin with.")
    bucket_endpoint_url: str | None = Field(
        default=None,
        validation_alias="BUCKET_ENDPOINT_URL",
        description="An S3-compatible bucket for results: https://host/bucket. Unset: none.",
    )
    bucket_access_key_id: SecretStr | None = Field(
        default=None, validation_alias="BUCKET_ACCESS_KEY_ID", description="The bucket's access key."
    )
    bucket_secret_access_key: SecretStr | None = Field(
        default=None, validation_alias="BUCKET_SECRET_ACCESS_KEY", description="The bucket's secret key."
    )
    runpod_jobs: str | None = Field(
        default=None,
        validation_alias="RUNPOD_WEBHOOK_GET_JOB",
        description="Set by RunPod: the worker takes its jobs from there. Unset: the local server.",
    )
    runpod_key: SecretStr | None = Field(
        default=None, validation_alias="RUNPOD_AI_API_KEY", description="Set by RunPod: the worker's key."
    )
    hf_token: SecretStr | None = Field(
        default=None, validation_alias="HF_TOKEN", description="Token for gated or private hub repositories."
    )
    hf_endpoint: str = Field(
        default="https://huggingface.co",
        validation_alias="HF_ENDPOINT",
        description="The hub, or a mirror of it.",
    )

    @field_validator("roots", "manifest", mode="before")
    @classmethod
    def _paths(cls, value: Any) -> Any:
        return [part for part in value.split(":") if part] if isinstance(value, str) else value

    @field_validator("source_ports", mode="before")
    @classmethod
    def _ports(cls, value: Any) -> Any:
        return [part.strip() for part in value.split(",")] if isinstance(value, str) else value

    @field_validator("models", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        return [part.strip() for part in value.split(",") if part.strip()] or None

    def secrets(self) -> tuple[SecretStr, ...]:
        """Every secret, to be masked in the log and kept from children."""
        return tuple(value for _, value in self if isinstance(value, SecretStr))

    @field_validator("roots", "manifest")
    @classmethod
    def _absolute(cls, value: tuple[Path, ...]) -> tuple[Path, ...]:
        for path in value:
            if not path.is_absolute():
                raise ValueError(f"{path} is not an absolute path")
        return value

    @field_validator("roots")
    @classmethod
    def _some_root(cls, value: tuple[Path, ...]) -> tuple[Path, ...]:
        if not value:
            raise ValueError("at least one folder is needed")
        return value

    def user_cache_folder(self) -> Path:
        """Where Seedpod may keep what is cheap to make again, when no root can be written."""
        base = self.user_cache or (self.home / ".cache" if self.home else Path(tempfile.gettempdir()))
        return base / "seedpod"

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)  # `load_settings` hands the environment over itself, as an argument


def variable(name: str) -> str:
    """The environment variable of the field called `name`."""
    alias = Settings.model_fields[name].validation_alias
    return alias if isinstance(alias, str) else PREFIX + name.upper()


def load_settings(environ: Mapping[str, str] = os.environ) -> Settings:
    """The settings that `environ` holds.

    An empty variable counts as unset, as compose files write it that way.

    Raises:
        ConfigError: `settings_invalid` or `settings_unknown`, with the variable, what it holds and
            what it may hold; every wrong variable at once.
    """
    fields = {variable(name): name for name in Settings.model_fields}
    for key in environ:
        if key.startswith(PREFIX) and key not in fields:
            near = get_close_matches(key, fields, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known variables: {', '.join(sorted(fields))}."
            raise ConfigError("settings_unknown", f"{key} is not a setting of Seedpod; {hint}")
    values = {}
    for key, name in fields.items():
        if environ.get(key):
            aliased = Settings.model_fields[name].validation_alias is not None
            values[key if aliased else name] = environ[key]
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        raise ConfigError("settings_invalid", " ".join(_sentences(error, values))) from None


def _sentences(error: ValidationError, values: Mapping[str, str]) -> list[str]:
    sentences = []
    for problem in error.errors(include_url=False):
        key = str(problem["loc"][0])
        field = next(n for n in Settings.model_fields if key in (n, variable(n)))
        reason = problem["msg"].removeprefix("Value error, ")
        secret = "SecretStr" in str(Settings.model_fields[field].annotation)
        held = "a secret" if secret else repr(values.get(key))
        sentences.append(
            f"{variable(field)} is {held}: {reason[:1].lower()}{reason[1:]}. "
            f"It may hold: {Settings.model_fields[field].description}"
        )
    return sentences
