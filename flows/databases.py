"""Where Prefect and MLflow keep what they know: two databases of one PostgreSQL server."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, unquote, urlsplit, urlunsplit

from flows.services import ServiceError

if TYPE_CHECKING:
    import psycopg

_SCHEMES = ("postgresql", "postgres")
_DEFAULT_NAME = "consilium"


@dataclass(frozen=True)
class Databases:
    """Addresses of the two databases; they hold a password, and are never printed.

    Attributes
    ----------
    prefect
        For Prefect's server.
    mlflow
        For MLflow's server.
    prefect_environment
        How Prefect's driver is told about TLS, which it does not read from an address.
    """

    prefect: str = field(repr=False)
    mlflow: str = field(repr=False)
    prefect_environment: dict[str, str]


def databases_of(url: str) -> Databases:
    """Name the two databases of a party: ``NAME_prefect`` and ``NAME_mlflow``.

    Parameters
    ----------
    url
        As ``postgresql://user:password@host:5432/NAME``, with ``?sslmode=verify-full`` and
        ``sslrootcert`` where wanted. Parties that share a server have a ``NAME`` each.

    Raises
    ------
    ServiceError
        If it is no such address.
    """
    parts = urlsplit(url)
    if parts.scheme not in _SCHEMES or not parts.hostname:
        raise ServiceError(
            "CONSILIUM_DATABASE_URL: found no address of PostgreSQL, needed one as "
            "postgresql://user:password@host:5432/consilium"
        )
    name = _name(url)
    tls = {f"PG{key.upper()}": values[-1] for key, values in parse_qs(parts.query).items()}
    return Databases(
        prefect=urlunsplit(("postgresql+asyncpg", parts.netloc, f"/{name}_prefect", "", "")),
        mlflow=urlunsplit(("postgresql+psycopg", parts.netloc, f"/{name}_mlflow", parts.query, "")),
        prefect_environment=tls,
    )


def make_databases(url: str) -> None:
    """Make the two databases where they are missing.

    Raises
    ------
    ServiceError
        If the server cannot be reached, or its user may not make databases.
    """
    import psycopg
    from psycopg import sql

    with closing(_connection(url)) as connection:
        for name in (f"{_name(url)}_prefect", f"{_name(url)}_mlflow"):
            query = "SELECT 1 FROM pg_database WHERE datname = %s"
            if connection.execute(query, (name,)).fetchone():
                continue
            try:
                connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
            except psycopg.errors.InsufficientPrivilege:
                raise ServiceError(
                    f"database {name}: found none, and this user may not make one, needed it; ask "
                    "the administrator of PostgreSQL for it"
                ) from None


def _connection(url: str) -> psycopg.Connection[tuple[object, ...]]:
    """Connect to the named database, or to the one that every server has."""
    import psycopg

    parts = urlsplit(url)
    for path in (f"/{_name(url)}", "/postgres"):
        address = urlunsplit(("postgresql", parts.netloc, path, parts.query, ""))
        try:
            return psycopg.connect(address, autocommit=True, connect_timeout=10)
        except psycopg.Error:
            continue
    # The driver's own words may hold the address; whoever runs this knows where it points.
    raise ServiceError(
        "CONSILIUM_DATABASE_URL: found no PostgreSQL that lets us in, needed one; check its "
        "address, user and password"
    )


def _name(url: str) -> str:
    return unquote(urlsplit(url).path.strip("/")) or _DEFAULT_NAME
