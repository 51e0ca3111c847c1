"""Keep services running: look at each, start again what ended, give up when that does not help."""

from __future__ import annotations

import time
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Self

from flows.services import Server, ServiceError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

RESTARTS = 5
WINDOW_S = 600.0
_READY_S = 180.0
_LOOK_S = 0.5
_ASK_EVERY_S = 30.0
_SILENCES = 4


class Kept:
    """One service that shall run; starts with the block and ends with it.

    Parameters
    ----------
    name
        What people call it.
    start
        Starts its process; the process ends with the context.
    line
        Text for when it is ready.
    asked
        Whether it is asked now and then if it still answers, and started anew if it does not.
    """

    def __init__(
        self,
        name: str,
        start: Callable[[], AbstractContextManager[Server]],
        *,
        line: str = "",
        asked: bool = True,
    ) -> None:
        self.name = name
        self.line = line
        self._start = start
        self._asked = asked
        self._stack = ExitStack()
        self._server: Server | None = None
        self._ended: list[float] = []
        self._silences = 0
        self._next_question = 0.0

    def __enter__(self) -> Self:
        self._server = self._stack.enter_context(self._start())
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def ready(self) -> None:
        """Wait until it answers.

        Raises
        ------
        ServiceError
            If it ended, or does not answer in three minutes.
        """
        assert self._server is not None
        self._server.wait_ready(_READY_S)
        self._silences = 0
        self._next_question = time.monotonic() + _ASK_EVERY_S

    def look(self, announce: Callable[[str], None]) -> None:
        """Start it again if it ended or has been silent for two minutes, each time more patiently.

        Raises
        ------
        ServiceError
            If it ended more than five times in ten minutes.
        """
        fault = self._fault()
        while fault is not None:
            self._ended = [x for x in self._ended if x > time.monotonic() - WINDOW_S]
            self._ended.append(time.monotonic())
            if len(self._ended) > RESTARTS:
                raise ServiceError(
                    f"{self.name}: found it ended {len(self._ended)} times in ten minutes, needed "
                    "it running; its log below logs/ says why"
                )
            announce(f"{self.name}: {fault}; starting it again")
            fault = self._again(pause_s=2.0 ** (len(self._ended) - 1))
            if fault is None:
                announce(f"{self.name}: ready again")

    def _fault(self) -> str | None:
        assert self._server is not None
        code = None if self._server.process is None else self._server.process.poll()
        if code is not None:
            return f"ended with code {code}"
        if self._asked and time.monotonic() > self._next_question:
            self._next_question = time.monotonic() + _ASK_EVERY_S
            self._silences = 0 if self._server.answers() else self._silences + 1
        return "does not answer" if self._silences >= _SILENCES else None

    def _again(self, *, pause_s: float) -> str | None:
        self._stack.close()
        time.sleep(pause_s)
        try:
            self.__enter__()
            self.ready()
        except ServiceError:
            return "did not start"
        return None


def keep(
    kept: Sequence[Kept],
    *,
    announce: Callable[[str], None],
    also: Callable[[], None] = lambda: None,
) -> None:
    """Look after services until interrupted.

    Parameters
    ----------
    kept
        In the order in which they depend on one another.
    announce
        Gets each line of text.
    also
        Done every half minute; a service that does not answer it is left to the next time.

    Raises
    ------
    ServiceError
        If one ends again and again.
    """
    last = time.monotonic()
    while True:
        time.sleep(_LOOK_S)
        for service in kept:
            service.look(announce)
        if time.monotonic() - last > _ASK_EVERY_S:
            last = time.monotonic()
            with suppress(ServiceError):
                also()
