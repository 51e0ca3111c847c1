"""Keep what a site knows at the site: an exception reaches Prefect's server as a code only."""

from __future__ import annotations

import functools
import logging
import re
from logging.handlers import RotatingFileHandler
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from modalities.pathology import MissingWeights

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from prefect.client.schemas import State

P = ParamSpec("P")
R = TypeVar("R")

_LOG = logging.getLogger("consilium.local")
_LOG.propagate = False
_LOG.addHandler(logging.NullHandler())  # without any, logging prints tracebacks
_CODE = re.compile(r"[a-z][a-z0-9_]{0,39}")


class SiteError(RuntimeError):
    """A failure at a site, as a code: what failed, and how.

    Attributes
    ----------
    cause
        The exception itself, for the person at this terminal; not part of this one's text, which
        is what Prefect sends to its server.
    """

    def __init__(self, code: str, cause: Exception) -> None:
        super().__init__(code)
        self.cause = cause

    def __reduce__(self) -> tuple[type[SiteError], tuple[str, Exception]]:
        # Prefect keeps a failure's exception with its results, which may lie on another machine.
        return SiteError, (str(self), RuntimeError(str(self)))


def _code_of(error: Exception) -> str:
    # Other libraries' exceptions have a `code` too, and that may be any text.
    code = getattr(error, "code", None)
    is_code = isinstance(code, str) and _CODE.fullmatch(code) is not None
    return str(code) if is_code else type(error).__name__


def log_to(folder: Path) -> None:
    """Keep a local log below ``folder``; it holds details and never leaves the site."""
    target = (folder / "logs" / "consilium.log").resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    for handler in list(_LOG.handlers):
        if isinstance(handler, RotatingFileHandler):
            if handler.baseFilename == str(target):
                return
            _LOG.removeHandler(handler)
            handler.close()
    handler = RotatingFileHandler(target, maxBytes=5_000_000, backupCount=3, delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    _LOG.addHandler(handler)
    _LOG.setLevel(logging.INFO)


def note(error: Exception) -> None:
    """Write an exception with its traceback to the local log."""
    _LOG.error("%s", type(error).__name__, exc_info=error)


def warn(sentence: str) -> None:
    """Write to the local log what a person at the site should look at."""
    _LOG.warning("%s", sentence)


def may_pass(task: object, run: object, state: State[object]) -> bool:
    """Say whether a failed task is worth another try: a disk or a network may recover."""
    del task, run
    error = state.result(raise_on_failure=False)
    cause = error.cause if isinstance(error, SiteError) else None
    final = (FileNotFoundError, PermissionError, MissingWeights)
    return isinstance(cause, OSError) and not isinstance(cause, final)


def sealed(body: Callable[P, R]) -> Callable[P, R]:
    """Wrap the body of a task so that only a code leaves it, and the details stay in the local log.

    Prefect sends an exception's text to its server with the run's state and event.
    """

    @functools.wraps(body)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return body(*args, **kwargs)
        except SiteError:
            raise
        except Exception as error:  # noqa: BLE001
            note(error)
            code = f"{body.__name__}:{_code_of(error)}"
            cause = error
        # Outside the except block: a chained exception's text would go to the server with it.
        raise SiteError(code, cause)

    return wrapped
