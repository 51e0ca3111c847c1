"""Scoring over HTTP: MLflow's own server on this machine, with answers that give nothing away.

MLflow's server is built as MLflow builds it. In front of it stands a filter: whatever it would say
of an error, stack traces, paths and the rows that were sent among it, becomes one sentence.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any, Final

from flows.mlflow_store import quietly_imported
from flows.services import HOST, ServiceError, free_port

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, MutableMapping

    from flows.registered_model import StudyModel

    Message = MutableMapping[str, Any]
    Receive = Callable[[], Awaitable[Message]]
    Send = Callable[[Message], Awaitable[None]]

MAX_BODY_BYTES: Final = 8 << 20
_PATHS: Final = {"/ping": "GET", "/health": "GET", "/version": "GET", "/invocations": "POST"}
_JSON: Final = "application/json"


class PlainErrors:
    """An ASGI application in front of MLflow's: known paths only, errors as one sentence.

    Parameters
    ----------
    inner
        MLflow's scoring server.
    modalities
        What a request must have one column of each.
    hosts
        Values of the Host header that are answered; a web page of elsewhere, made to look like this
        machine, is not.
    """

    def __init__(self, inner: Any, modalities: tuple[str, ...], hosts: tuple[str, ...]) -> None:
        self._inner, self._modalities, self._hosts = inner, modalities, hosts

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._inner(scope, receive, send)
            return
        refusal = self._refusal(scope)
        body = b""
        if refusal is None and scope["method"] == "POST":
            body, whole = await _body(receive)
            if not whole:
                refusal = 413, f"body: found more than {MAX_BODY_BYTES} bytes, needed less"
        if refusal is not None:
            await _answer(send, *refusal)
            return
        status, headers, content = await self._inside(scope, body)
        if status >= 400:
            status, text = self._fault(status)
            await _answer(send, status, text)
            return
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    def _refusal(self, scope: Message) -> tuple[int, str] | None:
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1")
        if host not in self._hosts:
            return 400, "host: found another than this machine's own address"
        method = _PATHS.get(scope["path"])
        if method is None:
            return 404, f"path: found an unknown one, needed one of {', '.join(_PATHS)}"
        if scope["method"] != method:
            return 405, f"method: found {scope['method'][:10]}, needed {method}"
        kind = headers.get(b"content-type", b"").decode("latin-1").partition(";")[0].strip()
        if method == "POST" and kind != _JSON:
            return 415, f"content type: found another, needed {_JSON}"
        return None

    def _fault(self, status: int) -> tuple[int, str]:
        if status == 504:
            return status, "request: found that it takes too long, needed fewer rows at once"
        example = json.dumps({"dataframe_split": {"columns": list(self._modalities), "data": []}})
        return 400, (
            f"body: found no table that the model reads, needed {example} with one row per patient "
            "and one log hazard per modality, null where the patient lacks it"
        )

    async def _inside(
        self, scope: Message, body: bytes
    ) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
        """Ask MLflow's server, and keep its answer here until it is known to be one."""
        given = iter([{"type": "http.request", "body": body, "more_body": False}])
        status, headers, content = 500, [], b""

        async def receive() -> Message:
            return next(given, {"type": "http.disconnect"})

        async def send(message: Message) -> None:
            nonlocal status, headers, content
            if message["type"] == "http.response.start":
                status, headers = message["status"], list(message["headers"])
            elif message["type"] == "http.response.body":
                content += message.get("body", b"")

        try:
            await self._inner(scope, receive, send)
        except Exception:  # noqa: BLE001
            return 500, [], b""
        return status, headers, content


async def _body(receive: Receive) -> tuple[bytes, bool]:
    """Read a request's body, and say whether that is all of it."""
    body = b""
    while len(body) <= MAX_BODY_BYTES:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body", False):
            return body, len(body) <= MAX_BODY_BYTES
    return body, False


async def _answer(send: Send, status: int, text: str) -> None:
    content = json.dumps({"error": text}).encode()
    headers = [(b"content-type", _JSON.encode()), (b"content-length", b"%d" % len(content))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})


def scoring_app(model: StudyModel, *, port: int) -> PlainErrors:
    """Build MLflow's scoring server for a model, behind the filter.

    Parameters
    ----------
    port
        Where it will listen, which its clients name in their requests.
    """
    server = quietly_imported("mlflow.pyfunc.scoring_server")
    hosts = tuple(f"{name}:{port}" for name in (HOST, "localhost"))
    return PlainErrors(server.init(model.pyfunc), model.fusion.modalities, hosts)


def serve_model(model: StudyModel, *, port: int, announce: Callable[[str], None]) -> None:
    """Score over HTTP on the loopback address until Ctrl-C; ``/ping`` answers when it is ready.

    ``POST /invocations`` takes ``{"dataframe_split": {"columns": [...], "data": [...]}}``: one
    column per modality, its log hazard on the scale of its encoder, null where absent.

    Raises
    ------
    ServiceError
        If the port is taken.
    """
    import uvicorn

    if free_port(port) != port:
        raise ServiceError(f"--port: found {port} taken, needed a free one; name another")
    # What MLflow logs of a faulty request holds the request.
    os.environ["MLFLOW_LOGGING_LEVEL"] = "CRITICAL"
    app = scoring_app(model, port=port)
    announce(f"{model.title}: http://{HOST}:{port}/invocations, until Ctrl-C")
    config = uvicorn.Config(
        app, host=HOST, port=port, workers=1, log_level="critical", access_log=False,
        lifespan="off", timeout_graceful_shutdown=3, server_header=False, proxy_headers=False,
    )  # fmt: skip
    uvicorn.Server(config).run()
