"""Where things are: settings of a site and of the coordinator. Local, never logged, never sent."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict
from pydantic_settings.exceptions import SettingsError as PydanticSettingsError

SITE_FILE = "site.toml"
STUDY_FILE = "study.toml"


class SettingsError(ValueError):
    """A ``site.toml`` or an environment variable that cannot be used; the message names the key."""


class SiteSettings(BaseSettings):
    """One site's paths, secret and limits, from ``site.toml`` and ``CONSILIUM_*`` variables.

    A variable wins over the file. Relative paths count from the folder of ``site.toml``.
    """

    model_config = SettingsConfigDict(
        env_prefix="CONSILIUM_SITE_", frozen=True, extra="forbid", str_strip_whitespace=True
    )

    name: str = Field(pattern=r"^[a-z][a-z0-9-]{0,39}$", description="opaque name of the site")
    home: Path = Field(description="folder that holds the site's files")
    manifest: Path = Field(default=Path("manifest.csv"), description="list of raw inputs")
    clinical: Path = Field(default=Path("clinical.csv"), description="registry export")
    secret: SecretStr = Field(
        min_length=32, description="key of the site's digests and of its train/test split"
    )
    epsilon: float | None = Field(
        default=None,
        gt=0,
        description="privacy budget of this site's patients over all studies, for ever; the first "
        "study's own where not given",
    )
    limits: dict[str, int] = Field(
        default_factory=dict,
        description="minimum counts of this site's own, as [privacy] of a study names them; they "
        "hold where they protect more than the study's",
    )
    batch_size: int = Field(default=64, ge=1, le=10_000, description="inputs per Prefect task")
    gpu_slots: int = Field(
        default=1, ge=1, le=64, description="slides embedded at once, each on the next of the GPUs"
    )
    weights: dict[str, Path] = Field(
        default_factory=dict,
        description="file of a tile encoder's weights, by modality, where a study pins them",
    )

    @field_validator("home", "manifest", "clinical")
    @classmethod
    def _expand(cls, path: Path) -> Path:
        return path.expanduser()

    @property
    def key(self) -> bytes:
        """The secret as bytes, for keyed hashes."""
        return self.secret.get_secret_value().encode()

    def path(self, *parts: str | Path) -> Path:
        """Give a path below the site's home; an absolute part stays as it is."""
        return self.home.joinpath(*parts)


def load_site(path: Path) -> SiteSettings:
    """Read a ``site.toml``.

    Raises
    ------
    SettingsError
        If it is missing or no TOML, or a key is unknown, missing or impossible.
    """
    try:
        values: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingsError(
            f"{SITE_FILE}: found no such file; write one with `consilium site init`"
        ) from None
    except OSError:
        raise SettingsError(f"{SITE_FILE}: needed a readable file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{SITE_FILE}: found no valid TOML: {error}") from None
    overridden = {
        key for key in SiteSettings.model_fields if f"CONSILIUM_SITE_{key.upper()}" in os.environ
    }
    given = {k: v for k, v in values.items() if k not in overridden}
    if "home" not in overridden and isinstance(values.get("home", ""), str):
        home = Path(values.get("home", "")).expanduser()
        given["home"] = path.parent.resolve() / home
    try:
        return SiteSettings(**given)
    except ValidationError as error:
        raise SettingsError(_faults(error)) from None


def _faults(error: ValidationError) -> str:
    lines = []
    for problem in error.errors():
        key = ".".join(map(str, problem["loc"]))
        text = "unknown key" if problem["type"] == "extra_forbidden" else problem["msg"].lower()
        lines.append(f"{SITE_FILE}: {key}: {text}")  # never the value: it may be the secret
    return "\n".join(lines)


class Workspace(BaseSettings):
    """A folder with a study and its sites, found through ``CONSILIUM_ROOT``.

    Flows know sites and studies by name only, because their parameters reach a server; this is
    where a name becomes a path. One hospital has its own ``site.toml`` in the folder; a simulated
    consortium has one subfolder per site.
    """

    model_config = SettingsConfigDict(env_prefix="CONSILIUM_", frozen=True, extra="ignore")

    root: Path = Field(default_factory=Path.cwd, description="folder with study.toml")
    tracking_uri: str | None = Field(
        default=None, description="MLflow tracking server; a SQLite file below root by default"
    )

    @property
    def study_file(self) -> Path:
        """The protocol."""
        return self.root / STUDY_FILE

    @property
    def mlflow_uri(self) -> str:
        """Where MLflow keeps the consortium's runs and models."""
        return self.tracking_uri or f"sqlite:///{(self.root / 'mlflow.db').resolve()}"

    def site_names(self) -> list[str]:
        """Names of the sites below the folder, sorted."""
        if (self.root / SITE_FILE).is_file():
            return [load_site(self.root / SITE_FILE).name]
        return sorted(p.parent.name for p in self.root.glob(f"*/{SITE_FILE}"))

    def site(self, name: str) -> SiteSettings:
        """Read the settings of one site.

        Raises
        ------
        SettingsError
            If there is no such site, or its file is faulty.
        """
        below = self.root / name / SITE_FILE
        if not below.is_file() and not (self.root / SITE_FILE).is_file():
            found = ", ".join(self.site_names()) or "none; write one with `consilium site init`"
            raise SettingsError(f"site: found no {name} in the folder, which has {found}")
        settings = load_site(below if below.is_file() else self.root / SITE_FILE)
        if settings.name != name:
            raise SettingsError(
                f"{SITE_FILE}: name: found {settings.name}, needed {name}; the folder and the "
                "file disagree"
            )
        return settings


class ServiceSettings(BaseSettings):
    """Where one party's services listen and keep what they know, from ``CONSILIUM_*`` variables."""

    model_config = SettingsConfigDict(env_prefix="CONSILIUM_", frozen=True, extra="ignore")

    prefect_port: int = Field(default=4200, ge=1, le=65535, description="port of Prefect's page")
    mlflow_port: int = Field(default=5000, ge=1, le=65535, description="port of MLflow's page")
    database_url: SecretStr | None = Field(
        default=None,
        description="PostgreSQL server, as postgresql://user:password@host:5432/name: Prefect gets "
        "the database name_prefect and MLflow name_mlflow; SQLite files in the folder without it",
    )
    artifacts: str | None = Field(
        default=None,
        pattern=r"^s3://[a-z0-9][a-z0-9./-]*$",
        description="S3-compatible store of MLflow's files, as s3://bucket/folder, found through "
        "the variables AWS_*; a folder beside the database without it",
    )
    workers: int = Field(default=1, ge=1, le=32, description="worker processes")
    worker_limit: int = Field(default=2, ge=1, le=64, description="runs at once of a worker")
    silence_s: int = Field(
        default=90,
        ge=40,
        le=86_400,
        description="seconds without a heartbeat, of one every 30, until a run counts as crashed",
    )
    prefect_auth: SecretStr | None = Field(
        default=None, description="what a shared Prefect server wants from us, as user:password"
    )


def load_services(**given: Any) -> ServiceSettings:
    """Read where services listen; what is given wins over the environment.

    Raises
    ------
    SettingsError
        If a variable cannot be used; it is named, its value is not.
    """
    try:
        return ServiceSettings(**given)
    except ValidationError as error:
        names = ", ".join(f"CONSILIUM_{str(x['loc'][0]).upper()}" for x in error.errors())
        raise SettingsError(f"environment: {names}: {error.errors()[0]['msg'].lower()}") from None


class TimeSettings(BaseSettings):
    """When a party's deployments run, from ``CONSILIUM_*`` variables; ``prefect.yaml`` without."""

    model_config = SettingsConfigDict(
        env_prefix="CONSILIUM_", frozen=True, extra="ignore", env_ignore_empty=True
    )

    timezone: str | None = Field(default=None, description="time zone, as Europe/Berlin")
    schedules: dict[str, str] = Field(
        default_factory=dict,
        description="JSON object of times as in a crontab, by flow",
    )


def load_times() -> TimeSettings:
    """Read when deployments run.

    Raises
    ------
    SettingsError
        If a variable cannot be used.
    """
    try:
        return TimeSettings()
    except (ValidationError, PydanticSettingsError):
        raise SettingsError(
            "environment: CONSILIUM_SCHEDULES: needed a JSON object of times by flow, as "
            '{"prepare-site": "30 0 * * *"}'
        ) from None
