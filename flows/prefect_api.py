"""Ask a Prefect server without importing Prefect, which costs seconds and 80 MB."""

from __future__ import annotations

import base64
import json
import urllib.error
import urllib.request
import uuid
from typing import Any
from urllib.parse import urlsplit

from flows.services import HOST, ServiceError

_WAIT_S = 30.0


class PrefectApi:
    """Calls to one Prefect server.

    Parameters
    ----------
    url
        Address of its API.
    auth
        What it wants from clients, as ``user:password``; None where it asks nothing.
    """

    def __init__(self, url: str, auth: str | None = None) -> None:
        self._url = url.rstrip("/")
        self._headers = {"Content-Type": "application/json"}
        if auth is not None:
            self._headers["Authorization"] = f"Basic {base64.b64encode(auth.encode()).decode()}"
        own = urlsplit(url).hostname in (HOST, "localhost", "::1")
        proxies = [urllib.request.ProxyHandler({})] if own else []
        self._opener = urllib.request.build_opener(*proxies)
        self._token: dict[str, str] | None = None

    def get(self, path: str) -> Any:
        """Read something.

        Raises
        ------
        ServiceError
            If the server cannot be reached or refuses.
        """
        return self._call("GET", path, None, {})

    def post(self, path: str, body: Any) -> Any:
        """Search, make or change something.

        Raises
        ------
        ServiceError
            If the server cannot be reached or refuses.
        """
        return self._call("POST", path, body, self._forgery_token())

    def put(self, path: str, body: Any) -> Any:
        """Replace something.

        Raises
        ------
        ServiceError
            If the server cannot be reached or refuses.
        """
        return self._call("PUT", path, body, self._forgery_token())

    def _forgery_token(self) -> dict[str, str]:
        if self._token is None:
            client = str(uuid.uuid4())
            try:
                answer = self._call("GET", f"/csrf-token?client={client}", None, {})
            except ServiceError:  # a server that wants none has none
                self._token = {}
            else:
                self._token = {
                    "Prefect-Csrf-Client": client,
                    "Prefect-Csrf-Token": answer["token"],
                }
        return self._token

    def _call(self, method: str, path: str, body: Any, more: dict[str, str]) -> Any:
        request = urllib.request.Request(
            f"{self._url}{path}",
            data=None if body is None else json.dumps(body).encode(),
            headers={**self._headers, **more},
            method=method,
        )
        try:
            with self._opener.open(request, timeout=_WAIT_S) as answer:
                return json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            with error:
                hint = "; check its password" if error.code in (401, 403) else ""
            raise ServiceError(
                f"Prefect server: found it answers {method} {path.split('?')[0]} with status "
                f"{error.code}, needed success{hint}"
            ) from None
        except (OSError, ValueError):
            raise ServiceError(
                "Prefect server: found no answer, needed one; look at its log or at its address"
            ) from None
