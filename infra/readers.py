"""Accounts of the consortium's registry that may read one study's models, and nothing else.

Run at the coordinator, with the account of the registry's administrator in the environment. It asks
the registry over HTTP and needs nothing but Python.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import re
import secrets
import ssl
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlencode

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_NAME: Final = re.compile(r"[a-z][a-z0-9-]{0,39}")
_WAIT_S: Final = 30.0
_VARIABLES: Final = (
    "CONSILIUM_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD",
)  # fmt: skip


class ReaderError(RuntimeError):
    """An account that cannot be made, or be given its rights, as asked."""


@dataclass(frozen=True)
class Registry:
    """A served registry, asked as its administrator.

    Attributes
    ----------
    address
        As https://consilium.example.org.
    name, password
        Account of the administrator.
    authorities
        File of the certificates that count, in PEM form; the usual ones where None.
    """

    address: str
    name: str
    password: str = field(repr=False)
    authorities: str | None = None

    def ask(self, method: str, path: str, body: Mapping[str, str]) -> tuple[int, Any]:
        """Give status and content of an answer.

        Raises
        ------
        ReaderError
            If there is none, or the account is not the administrator's.
        """
        query = f"?{urlencode(body)}" if method == "GET" else ""
        account = base64.b64encode(f"{self.name}:{self.password}".encode()).decode()
        request = urllib.request.Request(
            f"{self.address.rstrip('/')}/api/{path}{query}",
            data=None if query else json.dumps(body).encode(),
            headers={"Authorization": f"Basic {account}", "Content-Type": "application/json"},
            method=method,
        )
        try:
            context = ssl.create_default_context(cafile=self.authorities)
            with urllib.request.urlopen(request, timeout=_WAIT_S, context=context) as answer:
                return answer.status, json.loads(answer.read() or b"{}")
        except urllib.error.HTTPError as error:
            with error:
                told = error.read()
            if error.code in (401, 403):
                raise ReaderError(
                    f"registry: found that {self.name} may not do this, needed the administrator's "
                    "account and password"
                ) from None
            return error.code, _as_json(told)
        except (OSError, ValueError):
            raise ReaderError(
                "registry: found no answer that can be read, needed its server; check address, "
                "certificate and network"
            ) from None


def _as_json(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return {}


def add_reader(registry: Registry, study: str, name: str) -> str | None:
    """Let an account read a study's model and its runs; make the account where there is none.

    Returns
    -------
    str or None
        Password of a new account.

    Raises
    ------
    ReaderError
        If the study has no model in the registry yet, or the registry refuses.
    """
    if not _NAME.fullmatch(name):
        raise ReaderError(
            f"account: found {name!r}, needed lower-case letters, digits and hyphens, at most 40"
        )
    experiment = {"experiment_name": f"consilium/{study}"}
    status, found = registry.ask("GET", "2.0/mlflow/experiments/get-by-name", experiment)
    if status != 200:
        raise ReaderError(
            f"study {study}: found no model of it in the registry, needed one; run the study first"
        )
    password = secrets.token_urlsafe(18)
    account = {"username": name, "password": password}
    status, told = registry.ask("POST", "2.0/mlflow/users/create", account)
    if status != 200 and not _is_there(told):
        raise ReaderError(f"account {name}: found status {status}, needed it made")
    readable = {
        "registered_model": f"{study}-fusion",
        "experiment": str(found["experiment"]["experiment_id"]),
    }
    for kind, which in readable.items():
        right = {"username": name, "resource_type": kind, "resource_id": which}
        wanted = {**right, "permission": "READ"}
        answered, given = registry.ask("POST", "3.0/mlflow/users/permissions/grant", wanted)
        if answered != 200 and not _is_there(given):
            raise ReaderError(f"account {name}: found status {answered}, needed READ on its {kind}")
    return password if status == 200 else None


def _is_there(told: Any) -> bool:
    return isinstance(told, dict) and told.get("error_code") == "RESOURCE_ALREADY_EXISTS"


def main(arguments: Sequence[str] | None = None) -> int:
    """Add a reader, as the script beside this package asks."""
    parser = argparse.ArgumentParser(prog="add_reader")
    parser.add_argument("study", help="name of the study, as in study.toml")
    parser.add_argument("name", help="account of the person")
    given = parser.parse_args(arguments)
    address, name, password = (os.environ.get(x, "") for x in _VARIABLES)
    try:
        if not (address.startswith(("https://", "http://")) and name and password):
            raise ReaderError(
                f"environment: needed the registry's address and its administrator's account in "
                f"{', '.join(_VARIABLES)}"
            )
        authorities = os.environ.get("CONSILIUM_CA_FILE") or None
        registry = Registry(address, name, password, authorities)
        made = add_reader(registry, given.study, given.name)
    except ReaderError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    told = f"password {made}" if made else "the account was there; its password stays"
    sys.stdout.write(f"{given.name} may read {given.study}; {told}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
