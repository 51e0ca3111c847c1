"""The ``consilium`` command."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from flows.site_cli import site_app
from flows.terminal import (
    ERR,
    OUT,
    Force,
    Json,
    Root,
    UsageError,
    opened,
    print_json,
    say,
    serving,
    write_new,
)
from infra.network import network_environment
from infra.settings import STUDY_FILE, SettingsError

if TYPE_CHECKING:
    from collections.abc import Iterator


app = typer.Typer(
    help="Survival models that cancer centres train together without showing their patients.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
study_app = typer.Typer(help="Define, check and run a study.", no_args_is_help=True)
app.add_typer(study_app, name="study")
app.add_typer(site_app, name="site")

_SIGINT_STATUS = 130


class Federations(StrEnum):
    """How a run reaches its sites."""

    memory = "memory"
    flare = "flare"


Seed = Annotated[int, typer.Option(min=0, help="Seed of the simulation.")]
Sites = Annotated[str, typer.Option(help="Patients per site, as 160,110,90,40.")]
Engine = Annotated[
    Federations,
    typer.Option(
        "--federation",
        help="memory: all sites in this process; flare: each party a process of its own, over "
        "the network.",
    ),
]


def main() -> None:
    """Run the command; bad input ends with one sentence on standard error and exit status 2."""
    # Our matrices are small: more threads in each product only wait for one another.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        os.environ.update(network_environment(os.environ))
        app()
    except KeyboardInterrupt:
        _interrupted()
    except SystemExit as ending:
        if ending.code == _SIGINT_STATUS:  # typer ends so on Ctrl-C, without a word
            _interrupted()
        raise
    except Exception as error:
        sentence = _sentence(error)
        if sentence is None:
            raise
        ERR.print(f"consilium: {sentence}", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)


def _interrupted() -> None:
    ERR.print("consilium: interrupted; run the same command again to continue")
    sys.exit(_SIGINT_STATUS)


def _sentence(error: Exception) -> str | None:
    """Give what a user should read of an expected error; None for a defect of ours."""
    if isinstance(error, UsageError | SettingsError):
        return str(error)
    from flows.certificates import CertificateExpired
    from flows.decisions import DecisionRefused, PromotionRefused
    from flows.deployments import DeploymentError
    from flows.federated import FederationRefused
    from flows.mlflow_store import RegistryError
    from flows.model_signing import ModelNotTrusted
    from flows.parties import PartyFailed
    from flows.policy import PolicyError
    from flows.protocol import ProtocolError
    from flows.provenance import LineageError
    from flows.registered_model import PredictionRefused
    from flows.sealed import SiteError
    from flows.services import ServiceError
    from flows.version_files import ExportRefused
    from fusion.audit import AuditError
    from fusion.federation import BoundsBroken, FederationLost, QuorumNotMet
    from fusion.keys import KeyFault
    from fusion.newton import ConvergenceError
    from infra.provision import ProvisionError
    from modalities.cohort import DataError
    from modalities.pathology import MissingCompiler, MissingWeights, UnknownEncoder, WrongWeights

    if isinstance(error, SiteError):
        return _sentence(error.cause) or f"{error}; see the local log, logs/consilium.log"
    known = (
        ProtocolError, ServiceError, QuorumNotMet, ConvergenceError, DataError, MissingWeights,
        MissingCompiler, WrongWeights,
        UnknownEncoder, FederationRefused, FederationLost, PartyFailed, ProvisionError, AuditError,
        BoundsBroken, KeyFault, CertificateExpired, DeploymentError, PredictionRefused,
        DecisionRefused, PolicyError, PromotionRefused, LineageError, ModelNotTrusted,
        RegistryError, ExportRefused,
    )  # fmt: skip
    if isinstance(error, known):
        return str(error)
    if isinstance(error, OSError) and error.filename:  # a full disk, a folder without permission
        return f"{error.filename}: {error.strerror}"
    return None


def _sizes(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise UsageError(f"--sites: found {text!r}, needed patients per site, as 160,110,90,40")
    return sizes


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder to write to, and to continue in.")] = Path(
        "demo"
    ),
    sites: Sites = "160,110,90,40",
    seed: Seed = 0,
    tables_only: Annotated[
        bool, typer.Option("--tables-only", help="Simulate tables instead of raw files.")
    ] = False,
    seeds: Annotated[
        int, typer.Option(min=1, help="Repeat over this many seeds; tables only.")
    ] = 1,
    federation: Engine = Federations.memory,
    as_json: Json = False,
) -> None:
    """Simulate a consortium from raw files, and run the whole study on it."""
    sizes = _sizes(sites)
    if seeds > 1 and federation is not Federations.memory:
        raise UsageError("--seeds: found it with --federation, needed one of them")
    if seeds > 1 and not tables_only:
        raise UsageError("--seeds: found it without --tables-only, needed both")
    if seeds > 1:
        from flows.demo import compare_seeds

        with _quiet_status("comparing over seeds"):
            found = compare_seeds(sizes, range(seed, seed + seeds))
        _print_seeds(found, as_json=as_json)
        return
    root = out.resolve()
    with serving(root, as_json=as_json) as run, _as_usage_error():
        from flows.demo import run_demo

        summary = run_demo(
            root, sizes, run, seed=seed, tables_only=tables_only, federation=federation.value
        )
    _print_study(summary, as_json=as_json)


@app.command()
def simulate(
    folder: Annotated[Path, typer.Argument(help="Folder to write to.")],
    sites: Sites = "160,110,90,40",
    seed: Seed = 0,
    tables_only: Annotated[
        bool, typer.Option("--tables-only", help="Write tables instead of raw files.")
    ] = False,
) -> None:
    """Write a consortium of raw files with a known truth, and a study over it."""
    from flows.demo import write_consortium
    from flows.progress import Progress

    sizes = _sizes(sites)
    with _as_usage_error(), Progress("simulate", total=sum(sizes)) as progress:
        names = write_consortium(
            folder, sizes, seed=seed, tables_only=tables_only, advance=progress.advance
        )
    say(f"{sum(sizes)} patients at {', '.join(names)}; run: consilium study run --root {folder}")


@app.command()
def ui(
    folder: Annotated[Path, typer.Argument(help="Folder of a demo or study.")] = Path("demo"),
    prefect_port: Annotated[int, typer.Option(min=1, max=65535)] = 4200,
    mlflow_port: Annotated[int, typer.Option(min=1, max=65535)] = 5000,
) -> None:
    """Open what a study made: Prefect's and MLflow's pages on this machine, until Ctrl-C."""
    from flows.serve import running
    from flows.services import open_ui

    if prefect_port == mlflow_port:
        raise UsageError(f"--mlflow-port: found {mlflow_port} for both pages, needed two ports")
    served = running(folder)
    if served is not None:
        say(f"Prefect: {served.prefect_api.removesuffix('/api')}")
        say(f"MLflow: {served.mlflow}")
        say("`consilium serve` runs for this folder; these are its pages")
        return
    open_ui(folder, prefect_port=prefect_port, mlflow_port=mlflow_port)


@app.command()
def report(
    run: Annotated[
        str | None, typer.Argument(help="Run, or the first characters of its name; the newest.")
    ] = None,
    root: Root = Path(),
    out: Annotated[
        Path | None, typer.Option(help="File to write; by default report.html of the run.")
    ] = None,
) -> None:
    """Write the report of a finished run as one web page that needs nothing else."""
    from flows.report_files import REPORT, render_again
    from modalities.files import replacing

    folder = _run_folder(root, run)
    target = folder / REPORT if out is None else out
    if target.is_dir():
        raise UsageError(f"--out: found the folder {target}, needed a file, such as report.html")
    text = render_again(folder)
    with replacing(target) as temporary:
        temporary.write_text(text, encoding="utf-8")
    say(f"wrote {target}")


def _run_folder(root: Path, run: str | None) -> Path:
    """Folder of the run that is meant: the newest, or the only one whose name begins so."""
    from flows.report_files import RECORD

    if not root.is_dir():
        raise UsageError(f"--root: found no folder {root}, needed that of a study")
    # A demo or a study folder may be named from outside, as `consilium ui` takes it.
    found = [
        path.parent
        for path in (*root.glob(f"runs/*/{RECORD}"), *root.glob(f"*/runs/*/{RECORD}"))
        if run is None or path.parent.name.startswith(run[:12])
    ]
    if run is None and found:
        return max(found, key=lambda folder: (folder / RECORD).stat().st_mtime)
    if len(found) != 1:
        wanted = "" if run is None else f" beginning with {run!r}"
        raise UsageError(
            f"runs: found {len(found)}{wanted} below {root}, needed one; see the folder runs of "
            "the study"
        )
    return found[0]


@study_app.command("init")
def study_init(
    name: Annotated[str, typer.Argument(help="Short lower-case name, as lung-os.")],
    root: Root = Path(),
    strict: Annotated[
        bool, typer.Option("--strict", help="Secure sums, and differential privacy of epsilon 3.")
    ] = False,
    force: Force = False,
) -> None:
    """Write a commented study.toml."""
    from flows.demo import template
    from flows.protocol import read_protocol_text

    profile = {"sums": "secure_sum", "epsilon": 3} if strict else {"sums": "plain", "epsilon": 0}
    text = template("study.toml").format(name=name, **profile)
    read_protocol_text(text, source="study.toml")
    write_new(root / STUDY_FILE, text, force=force)


@study_app.command("check")
def study_check(
    file: Annotated[Path, typer.Argument(help="Protocol to check.")] = Path(STUDY_FILE),
    root: Root = Path(),
) -> None:
    """Validate a study.toml and print its fingerprint."""
    from flows.protocol import load_protocol

    protocol = load_protocol(root / file)
    say(f"{protocol.study.name}: valid, fingerprint {protocol.fingerprint()}")
    for lowered in protocol.privacy.lowered():
        say(f"lowered minimum: {lowered}")


@study_app.command("run")
def study_run(
    root: Root = Path(), federation: Engine = Federations.memory, as_json: Json = False
) -> None:
    """Prepare and train every site below a folder, then fit, evaluate and register the model.

    All sites run in this process: for simulated and public data, and for trying out. Over flare,
    sites are prepared where they are; the folder is the coordinator's, with its kits.
    """
    workspace, _ = opened(root)
    if federation is Federations.flare:
        with serving(workspace.root, as_json=as_json) as run:
            from flows.demo import run_from_kits

            summary = run_from_kits(workspace.root, run)
        _print_study(summary, as_json=as_json)
        return
    names = workspace.site_names()
    if len(names) < 2:
        raise UsageError(
            f"sites: found {len(names)} below the folder, needed at least 2; one site has nothing "
            "to federate"
        )
    with serving(workspace.root, as_json=as_json) as run:
        from flows.demo import run_workspace

        summary = run_workspace(workspace.root, names, run)
    _print_study(summary, as_json=as_json)


@contextmanager
def _as_usage_error() -> Iterator[None]:
    """Show arguments that a simulation refuses as the user's to correct."""
    try:
        yield
    except ValueError as error:
        if type(error) is not ValueError:
            raise
        raise UsageError(str(error)) from None


@contextmanager
def _quiet_status(text: str) -> Iterator[None]:
    if ERR.is_terminal:
        with ERR.status(text):
            yield
    else:
        yield


def _print_study(summary: dict[str, Any], *, as_json: bool) -> None:
    table = summary.pop("table")
    if as_json:
        print_json(summary)
        return
    from flows.reports import to_rich

    OUT.print(to_rich(table))
    reused = " (unchanged: the version of an earlier run)" if summary["reused"] else ""
    say(f"registered: {summary['model_name']} version {summary['model_version']}{reused}")
    say(f"took {summary['wall_s']['total']:.0f} s; everything is in {summary['root']}")
    folder = os.path.relpath(summary["root"])
    say("look at it:")
    say(f"  {folder}/runs/{summary['run'][:12]}/report.html")
    say(f"  consilium ui {folder}")
    say(f"  python -m json.tool {folder}/runs/{summary['run'][:12]}/summary.json")


def _print_seeds(found: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(found)
        return
    arms = list(found["mean_concordance"])
    table = Table("seed", *(arm.replace("_", " ") for arm in arms))
    for run in found["seeds"]:
        table.add_row(str(run["seed"]), *(f"{run['concordance'][arm]:.3f}" for arm in arms))
    table.add_section()
    table.add_row("mean", *(f"{found['mean_concordance'][arm]:.3f}" for arm in arms))
    OUT.print(table)
    say(f"federated above local in {found['n_federated_above_local']} of {found['n_seeds']} seeds")


def _register() -> None:
    from flows.approve_cli import register as register_approve
    from flows.audit_cli import audit_app
    from flows.deploy_cli import register as register_deploy
    from flows.dossier_cli import register as register_dossier
    from flows.explain_cli import explain_app
    from flows.extract_cli import extract_app
    from flows.federation_cli import federation_app
    from flows.lineage_cli import lineage_app
    from flows.model_cli import register as register_model
    from flows.predict_cli import register as register_predict
    from flows.serve_cli import register as register_serve

    app.add_typer(extract_app, name="extract")
    app.add_typer(explain_app, name="explain")
    app.add_typer(federation_app, name="federation")
    app.add_typer(audit_app, name="audit")
    app.add_typer(lineage_app, name="lineage")
    register_approve(app)
    register_deploy(app)
    register_dossier(app)
    register_model(app)
    register_predict(app)
    register_serve(app)


_register()
