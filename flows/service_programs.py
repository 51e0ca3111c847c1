"""What runs inside a service's own process: Prefect's server, its worker, MLflow's server.

Started by ``flows.services`` with a pipe as standard input: a line on it lets a worker begin, and
its end ends the service, however the parent ended.
"""

from __future__ import annotations

import gc
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

HOST = "127.0.0.1"
STOP_S = 10.0
MARK = "CONSILIUM_SERVED_AS"
_POLL_S = 0.1
# The pages name pictures and services of the wide world; a browser shall not ask there.
_OWN_PAGES_ONLY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; "
    "connect-src 'self' ws: data: blob:; form-action 'self'; base-uri 'self'"
)


def end_with_parent() -> threading.Event:
    """Stop our process group once standard input closes: the parent stopped, however it did.

    Returns
    -------
    threading.Event
        Set when the parent wrote a line.
    """
    told = threading.Event()

    def wait() -> None:
        if sys.stdin.buffer.readline():
            told.set()
        sys.stdin.buffer.read()
        end_group()

    threading.Thread(target=wait, daemon=True).start()
    return told


def end_group() -> None:
    """Ask our process group to stop, and end what has not after a while, ourselves included."""
    os.killpg(os.getpgrp(), signal.SIGTERM)
    time.sleep(STOP_S)
    for pid in marked(os.environ.get(MARK, "")) - {os.getpid()}:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    os.killpg(os.getpgrp(), signal.SIGKILL)


def marked(mark: str) -> set[int]:
    """Find the processes of a service; none where the system does not tell.

    A worker's runs leave its process group, and have no parent any more once it is killed, but
    they inherit its environment.
    """
    wanted = f"\0{MARK}={mark}\0".encode()
    found = set()
    for process in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if mark and wanted in b"\0" + process.read_bytes():
                found.add(int(process.parent.name))
    return found


def end_marked(mark: str) -> None:
    """Ask the processes of a service to stop, except this one, and end those that do not."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        left = marked(mark) - {os.getpid()}
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, how)
        deadline = time.monotonic() + STOP_S
        while left and time.monotonic() < deadline:
            time.sleep(_POLL_S)
            left = marked(mark) - {os.getpid()}


def guarded(app: Any, *, refused: str | None = None) -> Callable[[Any, Any, Any], Awaitable[None]]:
    """Wrap a web application so that its pages load nothing from elsewhere.

    Parameters
    ----------
    app
        ASGI application.
    refused
        Part of the paths that shall not exist.
    """

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        if refused is not None and refused in scope.get("path", ""):
            start = {"type": "http.response.start", "status": 404, "headers": []}
            await send(start if scope["type"] == "http" else {"type": "websocket.close"})
            if scope["type"] == "http":
                await send({"type": "http.response.body", "body": b""})
            return

        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                own = (b"content-security-policy", _OWN_PAGES_ONLY.encode())
                message["headers"] = [
                    *message.get("headers", ()),
                    own,
                    (b"referrer-policy", b"no-referrer"),
                ]
            await send(message)

        await app(scope, receive, with_headers if scope["type"] == "http" else send)

    return answer


def _run_uvicorn(app: Any, port: int) -> None:
    import uvicorn

    uvicorn.run(
        app,
        host=HOST,
        port=port,
        log_level="error",
        lifespan="on",
        timeout_graceful_shutdown=3,
    )


def _serve_prefect(mode: str, port: str) -> None:
    gc.disable()  # collecting while models are built costs a seventh of the start
    import prefect
    from prefect.server.api import collections
    from prefect.server.api.server import create_app

    for view in collections.KNOWN_VIEWS:
        # It asks the world for news of its catalogue; refused, it shows the one it came with.
        collections.KNOWN_VIEWS[view] = f"http://{HOST}:9/{view}"
    prefect.__ui_v2_static_path__ = Path("no-such-folder")  # nor are its second pages for offline
    app = create_app(ephemeral=mode == "api", final=True)
    gc.enable()
    gc.freeze()
    _run_uvicorn(guarded(app), int(port))


def _serve_mlflow(port: str, *arguments: str) -> None:
    """Run ``mlflow server`` in this process; by itself it starts a second one as large.

    Its security settings are read on import, so they come from the environment.
    """
    import mlflow.server
    from mlflow.cli import cli

    def serve(command: Sequence[str], *, extra_env: dict[str, str], **_: object) -> None:
        del command
        os.environ.update(extra_env)
        from mlflow.server.fastapi_app import app

        gc.freeze()
        # Its assistant runs any command on this machine for whoever asks from this machine.
        _run_uvicorn(guarded(app, refused="/mlflow/assistant"), int(port))
        raise SystemExit(0)

    mlflow.server._exec_cmd = serve
    cli(["server", "--host", HOST, "--port", port, *arguments], standalone_mode=False)


def _keep_worker(told: threading.Event, arguments: Sequence[str]) -> None:
    """Run the worker below us, and end all runs that it leaves behind when it ends."""
    signal.signal(signal.SIGTERM, lambda *_: None)  # sent to all of the group: outlive them
    worker = subprocess.Popen(
        [sys.executable, "-m", "flows.service_programs", "worker-process", *arguments],
        stdin=subprocess.PIPE,
    )
    assert worker.stdin is not None
    while worker.poll() is None and not told.wait(_POLL_S):
        pass
    with suppress(BrokenPipeError):
        worker.stdin.write(b"\n")
        worker.stdin.flush()
    code = worker.wait()
    end_marked(os.environ[MARK])
    os._exit(code if 0 <= code < 256 else 1)


def _serve_worker(pool: str, name: str, limit: str) -> None:
    import prefect.cli.worker  # noqa: F401  while the server boots
    import prefect.workers.process  # noqa: F401

    sys.stdin.buffer.readline()
    sys.argv = ["prefect", "worker", "start", "--pool", pool, "--name", name, "--limit", limit]
    sys.argv += ["--type", "process", "--install-policy", "never"]
    runpy.run_module("prefect", run_name="__main__", alter_sys=True)


def _main(program: str, *arguments: str) -> None:
    # A shell starts what runs behind it with this ignored, and a worker that is asked to stop asks
    # itself so.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if program == "worker-process":
        _serve_worker(*arguments)
        return
    told = end_with_parent()
    if program == "prefect":
        _serve_prefect(*arguments)
    elif program == "worker":
        _keep_worker(told, arguments)
    else:
        _serve_mlflow(*arguments)


if __name__ == "__main__":
    _main(*sys.argv[1:])
