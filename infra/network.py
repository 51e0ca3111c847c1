"""How clients on this machine find the way out: the hospital's proxy, and whom they trust.

Each library has variables of its own for the same two facts. The usual ones are respected, and
completed so that all of our clients agree.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from infra.settings import SettingsError

if TYPE_CHECKING:
    from collections.abc import Mapping

CA_VARIABLE: Final = "CONSILIUM_CA_FILE"
# OpenSSL's users and httpx; requests, which MLflow uses; boto3; Prefect's client.
_CA_VARIABLES: Final = (
    "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "AWS_CA_BUNDLE", "PREFECT_API_SSL_CERT_FILE",
)  # fmt: skip
_PROXIES: Final = ("http_proxy", "https_proxy", "no_proxy")
_LOOPBACK: Final = ("127.0.0.1", "localhost", "::1")
_PEM: Final = b"-----BEGIN CERTIFICATE-----"


class NetworkSettings(BaseSettings):
    """Settings of the network, from ``CONSILIUM_*`` variables."""

    model_config = SettingsConfigDict(env_prefix="CONSILIUM_", frozen=True, extra="ignore")

    ca_file: Path | None = Field(
        default=None,
        description="certificates of authorities that clients trust, in PEM form; it replaces the "
        "built-in list, so a file with both is usual",
    )


def network_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Give the variables that are to be added, so that all clients use one proxy and one list.

    Parameters
    ----------
    environment
        What is set so far. What is set there for one library alone stays as it is.

    Returns
    -------
    dict
        Only what is missing or longer: each proxy in lower and upper case, since some libraries
        read one and gRPC the other; loopback addresses among those that need no proxy; the file
        of authorities under each library's name for it.

    Raises
    ------
    SettingsError
        If ``CONSILIUM_CA_FILE`` cannot be read or holds no certificate.
    """
    added = _proxies(environment)
    given = environment.get(CA_VARIABLE)
    if given:
        path = _checked(given)
        added |= {name: path for name in _CA_VARIABLES if not environment.get(name)}
    return added


def _proxies(environment: Mapping[str, str]) -> dict[str, str]:
    found = {name: environment.get(name) or environment.get(name.upper(), "") for name in _PROXIES}
    if not any(found[name] for name in _PROXIES if name != "no_proxy"):
        return {}
    direct = [host.strip() for host in found["no_proxy"].split(",") if host.strip()]
    missing = [] if "*" in direct else [host for host in _LOOPBACK if host not in direct]
    found["no_proxy"] = ",".join([*direct, *missing])
    both = {**found, **{name.upper(): value for name, value in found.items()}}
    return {k: v for k, v in both.items() if v and environment.get(k) != v}


def _checked(given: str) -> str:
    try:
        settings = NetworkSettings(ca_file=Path(given).expanduser().resolve())
        assert settings.ca_file is not None
        content = settings.ca_file.read_bytes()
    except (OSError, ValidationError):
        raise SettingsError(
            f"{CA_VARIABLE}: found no readable file, needed authorities' certificates in PEM form"
        ) from None
    if _PEM not in content:
        raise SettingsError(
            f"{CA_VARIABLE}: found a file without certificates, needed them in PEM form"
        )
    return str(settings.ca_file)
