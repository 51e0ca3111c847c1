"""``consilium audit``: hold the parties' logs against themselves and against one another."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from flows.identity import PUBLIC_FILE, public_key
from flows.terminal import Json, Root, Site, UsageError, only_site, opened, print_json, say
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

    from fusion.membership import MembershipResult

audit_app = typer.Typer(
    help="What this party did, whether that still stands, and what its models tell.",
    no_args_is_help=True,
)
_OUT = Console()


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


@audit_app.command()
def membership(
    site: Site = None,
    models: Annotated[
        int, typer.Option(min=8, help="Models trained per audit; below 64 none passes.")
    ] = 128,
    budget: Annotated[float, typer.Option(min=1.0, help="Most seconds per model.")] = 900.0,
    root: Root = Path(),
    as_json: Json = False,
) -> None:
    """Attack this site's own models, to see whether they tell who was trained on.

    Trains each of them anew on many halves of the patients and guesses who was in. Nothing leaves
    the site. Weights of a network are shared only after its audit passed; ends with status 1 where
    a network whose weights the study shares did not.
    """
    from flows.membership import FUSION, audit_site, planned_models
    from flows.progress import Progress
    from fusion.membership import Effort

    workspace, protocol = opened(root)
    settings = workspace.site(only_site(workspace, site))
    effort = Effort(n_models=models, time_budget_s=budget)
    with Progress("audit", total=planned_models(protocol, effort)) as progress:
        results = audit_site(settings, protocol, effort=effort, advance=progress.advance)
    found = {result.name: result for result in results}
    if as_json:
        print_json([result.to_dict() | {"passes": result.passes} for result in results])
    else:
        for name in (*protocol.modalities, FUSION):
            say(_told(name, found.get(name)))
    failed = [x for x in protocol.audited() if x not in found or not found[x].passes]
    raise typer.Exit(1 if failed else 0)


def _told(name: str, result: MembershipResult | None) -> str:
    if result is None:
        return f"{name}: not audited; logs/consilium.log says why"
    verdict = "passes" if result.passes else "fails"
    return (
        f"{name}: {verdict}: AUC {result.auc:.2f} ({result.auc_low:.2f} to {result.auc_high:.2f}), "
        f"true positives at 5 % false ones {result.tpr_at_5_fpr:.1%} ({result.tpr_low:.1%} to "
        f"{result.tpr_high:.1%}); {result.n_patients} patients, {result.n_models} models"
    )


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
    found = public_key(log.parent)
    if found is None:
        raise UsageError(f"{LOG_FILE}: found no {PUBLIC_FILE} beside it; name the key by --public")
    return found


def _log_at(path: Path) -> Path:
    found = path / LOG_FILE if path.is_dir() else path
    if not found.is_file():
        raise UsageError(f"{found.name}: found no such log")
    return found


def _logs_below(root: Path) -> list[Path]:
    found = sorted(
        log
        for pattern in (LOG_FILE, f"*/{LOG_FILE}", f"*/*/{LOG_FILE}")
        for log in root.glob(pattern)
    )
    if not found:
        raise UsageError(f"{LOG_FILE}: found none in the folder; name the log's path")
    return found
