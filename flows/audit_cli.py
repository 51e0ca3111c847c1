"""``consilium audit``: hold the parties' logs against themselves and against one another."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from flows.identity import PUBLIC_FILE, public_key
from fusion.audit import (
    LOG_FILE,
    NOTHING,
    AuditFault,
    joined_witnesses,
    party_of,
    read_entries,
    verify_log,
    witnesses_of,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

audit_app = typer.Typer(help="What this party did, and whether that still stands.")
_OUT = Console()


@audit_app.callback()
def _audit() -> None:
    """Keep ``verify`` a command of its own, however many there are."""


@dataclass(frozen=True)
class _Verdict:
    party: str
    entries: int
    head: str
    fault: AuditFault | None

    def sentence(self) -> str:
        if self.fault is not None:
            return f"{self.party}: {self.fault.fault}: {self.fault.sentence}"
        return f"{self.party}: {self.entries} entries, head {self.head}, whole"

    def values(self) -> dict[str, Any]:
        fault = None if self.fault is None else asdict(self.fault)
        return {"party": self.party, "entries": self.entries, "head": self.head, "fault": fault}


@audit_app.command()
def verify(
    path: Annotated[
        Path | None, typer.Argument(help=f"A log, or a folder with {LOG_FILE}.")
    ] = None,
    root: Annotated[
        Path | None,
        typer.Option("--root", help="Verify every log below this folder against the others."),
    ] = None,
    against: Annotated[
        list[Path] | None,
        typer.Option("--against", help="Log of another party that saw heads of this one."),
    ] = None,
    public: Annotated[
        str | None,
        typer.Option("--public", help=f"Key of the log's party; {PUBLIC_FILE} beside by default."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object and nothing else.")
    ] = False,
) -> None:
    """Name the first entry of a log that was edited, dropped, reordered, forked or truncated.

    Ends with status 1 if there is one.
    """
    from flows.terminal import UsageError

    if path is not None and root is not None:
        raise UsageError("audit verify: found a path and --root, needed one of them")
    if path is None and (public is not None or against):
        raise UsageError("audit verify: --public and --against need the path of one log")
    if path is None:
        logs = _logs_below(Path.cwd() if root is None else root)
        verdicts = _verdicts(logs, {log: _key_of(log) for log in logs})
    else:
        logs = [_log_at(path), *(_log_at(other) for other in against or ())]
        keys = {log: _key_of(log) for log in logs[1:]}
        verdicts = _verdicts(logs, keys | {logs[0]: public or _key_of(logs[0])})
    _show(verdicts, as_json=as_json)


def _verdicts(logs: Sequence[Path], keys: Mapping[Path, str]) -> list[_Verdict]:
    """Judge each log by itself, and by what the others saw of it that are sound themselves."""
    sound = [log for log in logs if verify_log(log, public=keys[log]) is None]
    return [_verdict(log, [x for x in sound if x != log], keys[log]) for log in logs]


def _show(verdicts: Sequence[_Verdict], *, as_json: bool) -> None:
    if as_json:
        whole = all(v.fault is None for v in verdicts)
        typer.echo(json.dumps({"whole": whole, "logs": [v.values() for v in verdicts]}))
    else:
        for verdict in verdicts:
            _OUT.print(verdict.sentence(), markup=False, highlight=False, soft_wrap=True)
    if any(v.fault is not None for v in verdicts):
        raise typer.Exit(1)


def _verdict(log: Path, others: Sequence[Path], public: str) -> _Verdict:
    # An empty log does not say whose it is; a party's folder bears its name.
    party = party_of(log) or log.resolve().parent.name
    seen = joined_witnesses(witnesses_of(other, party) for other in others)
    fault = verify_log(log, public=public, witnesses=seen)
    if fault is not None:
        return _Verdict(party, 0, "", fault)
    entries = read_entries(log)
    return _Verdict(party, len(entries), entries[-1].head if entries else NOTHING, None)


def _key_of(log: Path) -> str:
    from flows.terminal import UsageError

    found = public_key(log.parent)
    if found is None:
        raise UsageError(f"{LOG_FILE}: found no {PUBLIC_FILE} beside it; name the key by --public")
    return found


def _log_at(path: Path) -> Path:
    from flows.terminal import UsageError

    found = path / LOG_FILE if path.is_dir() else path
    if not found.is_file():
        raise UsageError(f"{found.name}: found no such log")
    return found


def _logs_below(root: Path) -> list[Path]:
    from flows.terminal import UsageError

    found = sorted(
        log
        for pattern in (LOG_FILE, f"*/{LOG_FILE}", f"*/*/{LOG_FILE}")
        for log in root.glob(pattern)
    )
    if not found:
        raise UsageError(f"{LOG_FILE}: found none in the folder; name the log's path")
    return found
