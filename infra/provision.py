"""Start-up kits of a federation: certificates, addresses and what each party's engine may do.

The engine's own provisioning makes the certificates and signs them; here its kits are narrowed to
what the federation needs. A kit holds private keys of the engine, and no patient's data.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

COORDINATOR: Final = "coordinator"
ADMIN: Final = "admin"
AUTHORITY: Final = "authority"
CONSORTIUM_FILE: Final = "consortium.json"
PARTY_FILE: Final = "party.json"
CLASSES: Final = ("fusion.flare.CoordinatorRelay", "fusion.flare.SiteExecutor")
LAUNCHER: Final = "fusion.flare.SiteJobLauncher"
_RESERVED: Final = {COORDINATOR, ADMIN, AUTHORITY, "server", "relay"}
_NAME: Final = re.compile(r"[a-z][a-z0-9-]{0,39}")
_HOST: Final = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,61}[A-Za-z0-9])?")
STUDY_USER: Final = "study@consilium.local"
_PUBLIC_KEY: Final = re.compile(r"[0-9a-f]{64}")
_ORG: Final = "consilium"
_ROLE: Final = "lead"
# They say a dozen lines per message.
_TALKATIVE: Final = (
    "apis.impl.wf_comm_server",
    "private.fed.client.client_runner",
    "private.fed.client.communicator",
    "private.fed.server.server_commands",
    "private.fed.server.server_runner",
)
_LOG_BYTES: Final = 20 * 1024 * 1024


class ProvisionError(ValueError):
    """Kits that cannot be written as asked."""


@dataclass(frozen=True)
class Server:
    """Where sites find the coordinator.

    Parameters
    ----------
    host
        Name or address; it is in the server's certificate.
    port
        The only port that is open, for sites and for the admin alike.
    """

    host: str = "localhost"
    port: int = 8002


@dataclass(frozen=True)
class Keys:
    """Public signing keys of the parties, each 64 hex digits, and who was shut out.

    Parameters
    ----------
    coordinator
        Of the coordinator.
    sites
        Per site.
    quorum
        Sites that must approve a study.
    revoked
        Keys that count no more.
    """

    coordinator: str
    sites: Mapping[str, str]
    quorum: int
    revoked: tuple[str, ...] = ()


def provision(
    study: str,
    keys: Keys,
    *,
    out: Path,
    server: Server = Server(),
    homes: Mapping[str, Path] | None = None,
    valid_days: int = 1800,
) -> dict[str, Path]:
    """Write one kit per site, one for the coordinator and one for the admin.

    A second call with the same ``out`` uses the same certificate authority, so that a site can be
    added; a kit that exists is not written again.

    Parameters
    ----------
    study
        Name of the study.
    keys
        Public keys of all parties; its sites get kits.
    out
        Folder of the kits; its ``authority`` holds the key that signs certificates.
    homes
        Per site whose files are on this machine, the folder with ``study.toml`` and the site.
    valid_days
        Days until the authority expires, and with it every certificate; these last at most 360
        days each, and are renewed by :func:`infra.renewal.renew`.

    Returns
    -------
    dict
        Folder per name, with ``coordinator`` and ``admin``.

    Raises
    ------
    ProvisionError
        If a name, the host or a port cannot be used, a kit exists, or the engine's own
        provisioning fails.
    """
    sites = tuple(sorted(keys.sites))
    _check(study, sites, server, out)
    names = (*sites, COORDINATOR, ADMIN)
    for name in names:
        if (out / name).exists():
            raise ProvisionError(
                f"{out.name}/{name}: found a kit, needed none; move it away or name another folder"
            )
    out.mkdir(parents=True, exist_ok=True, mode=0o700)
    made = run_engine(study, sites, out / AUTHORITY, server=server, valid_days=valid_days)
    kits = {name: out / name for name in names}
    try:
        for name, kit in kits.items():
            source = {COORDINATOR: server.host, ADMIN: STUDY_USER}.get(name, name)
            shutil.move(made / source, kit)
            narrow(kit, name)
            _write(kit / CONSORTIUM_FILE, consortium_bytes(study, keys).decode())
            home = (homes or {}).get(name)
            _write_json(
                kit / PARTY_FILE, {"name": name, "home": None if home is None else str(home)}
            )
            make_private(kit)
    finally:
        shutil.rmtree(made, ignore_errors=True)
        make_private(out)
    return kits


def consortium_bytes(study: str, keys: Keys) -> bytes:
    """Canonical JSON of ``consortium.json``: the same bytes at every party."""
    value = {
        "study": study,
        "coordinator": keys.coordinator,
        "sites": dict(keys.sites),
        "quorum": keys.quorum,
        "revoked": list(keys.revoked),
    }
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def read_party(kit: Path) -> dict[str, Any]:
    """Name of the party whose kit this is, and the folder of its files.

    Raises
    ------
    ProvisionError
        If the folder is no kit.
    """
    try:
        party: dict[str, Any] = json.loads((kit / PARTY_FILE).read_text())
        if not isinstance(party["name"], str) or not isinstance(party["home"], str | None):
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError):
        raise ProvisionError(
            f"{PARTY_FILE}: found no kit in the folder, needed one that `consilium federation "
            "provision` wrote"
        ) from None
    return party


def set_home(kit: Path, home: Path) -> None:
    """Note in a site's kit which folder has ``study.toml`` and the site's files.

    Raises
    ------
    ProvisionError
        If the folder is no kit.
    """
    _write_json(kit / PARTY_FILE, {**read_party(kit), "home": str(home.resolve())})


def revoke(kits: Path, site: str) -> Path:
    """Count a site's key as revoked in the consortium of every kit below a folder; give one file.

    The quorum is lowered to the sites that are left, where it was higher.

    Raises
    ------
    ProvisionError
        If no kit lists the site.
    """
    return _rewrite(kits, lambda keys: _without(keys, site))


def rekey(kits: Path, party: str, public: str) -> Path:
    """Put a party's new key in place of its old one, which counts as revoked from then on.

    Rewrites the consortium of every kit below a folder and gives one file. All parties need the
    new file, and every site approves the study again, since the consortium has changed.

    Parameters
    ----------
    party
        Name of a site, or ``coordinator``.
    public
        Its new public key, 64 hex digits.

    Raises
    ------
    ProvisionError
        If no kit lists the party, or the key is none, one in force or one that was revoked.
    """
    if not _PUBLIC_KEY.fullmatch(public):
        raise ProvisionError(f"{party}: found no public key, needed 64 hex digits")
    return _rewrite(kits, lambda keys: _rekeyed(keys, party, public))


def _rewrite(kits: Path, change: Callable[[Keys], Keys]) -> Path:
    files = sorted(kits.glob(f"*/{CONSORTIUM_FILE}"))
    if not files:
        raise ProvisionError("kits: found none in the folder, needed those of the study")
    value = json.loads(files[0].read_text())
    keys = change(
        Keys(
            value["coordinator"],
            value["sites"],
            quorum=value["quorum"],
            revoked=tuple(value["revoked"]),
        )
    )
    for file in files:
        _write(file, consortium_bytes(value["study"], keys).decode())
    return files[0]


def _without(keys: Keys, site: str) -> Keys:
    if site == COORDINATOR:
        raise ProvisionError(
            f"{COORDINATOR}: found the coordinator, needed a site; without it there is no study"
        )
    revoked = {*keys.revoked, _key_of(keys, site)}
    in_force = sum(key not in revoked for key in keys.sites.values())
    # A quorum of more sites than are left could never be reached.
    quorum = max(1, min(keys.quorum, in_force))
    return replace(keys, quorum=quorum, revoked=tuple(sorted(revoked)))


def _rekeyed(keys: Keys, party: str, public: str) -> Keys:
    old = _key_of(keys, party)
    if public == old:
        raise ProvisionError(f"{party}: found its present key, needed its new one")
    if public in {keys.coordinator, *keys.sites.values(), *keys.revoked}:
        raise ProvisionError(
            f"{party}: found a key that another party has or that was revoked, needed a new one"
        )
    revoked = tuple(sorted({*keys.revoked, old}))
    if party == COORDINATOR:
        return replace(keys, coordinator=public, revoked=revoked)
    return replace(keys, sites={**keys.sites, party: public}, revoked=revoked)


def _key_of(keys: Keys, party: str) -> str:
    key = keys.coordinator if party == COORDINATOR else keys.sites.get(party)
    if key is None:
        raise ProvisionError(f"{party}: found no such site in {CONSORTIUM_FILE}")
    return key


def settle(kit: Path) -> None:
    """Set the paths that the engine wants whole, where the kit lies now.

    Raises
    ------
    ProvisionError
        If the engine cannot run from a folder of this name.
    """
    if re.search(r"[\s'\"\\]", str(kit)):
        raise ProvisionError("kit: found a path with a space or quote, which the engine cannot use")
    path = kit / "local" / "resources.json"
    resources = json.loads(path.read_text())
    store = resources.get("snapshot_persistor", {}).get("args", {}).get("storage", {})
    if store:
        store["args"]["root_dir"] = str(kit / "store" / "snapshots")
    for component in resources["components"]:
        if component["id"] == "job_manager":
            component["args"]["uri_root"] = str(kit / "store" / "jobs")
    _write_json(path, resources)
    make_private(kit)


def make_private(folder: Path) -> None:
    """Let only the owner read anything below a folder."""
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            path.chmod(0o700 if path.is_dir() else 0o600)


def _check(study: str, sites: Sequence[str], server: Server, out: Path) -> None:
    for name in (study, *sites):
        if not _NAME.fullmatch(name):
            raise ProvisionError(
                f"name: found {name!r}, needed lower-case letters, digits and hyphens"
            )
    if taken := _RESERVED & set(sites):
        raise ProvisionError(f"sites: found {min(taken)}, which names another party")
    if len(sites) < 2:
        raise ProvisionError(f"sites: found {len(sites)}, needed at least 2")
    if not _HOST.fullmatch(server.host) or server.host in sites:
        raise ProvisionError(f"host: found {server.host!r}, needed a host's name or address")
    if not 0 < server.port < 65536:
        raise ProvisionError(f"port: found {server.port}, needed 1 to 65535")


def run_engine(
    study: str, sites: Sequence[str], authority: Path, *, server: Server, valid_days: int
) -> Path:
    """Let the engine make certificates and raw kits; give the folder that holds them.

    Parameters
    ----------
    authority
        Folder of the authority's key, which is made if absent and kept.
    valid_days
        Life of the authority, the same at every call; certificates last at most 360 days of it.

    Raises
    ------
    ProvisionError
        If the engine's own provisioning fails.
    """
    authority.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(prefix="consilium-") as scratch:
        project = Path(scratch) / "project.yml"  # JSON is YAML
        project.write_text(json.dumps(_project(study, sites, server, valid_days)))
        done = subprocess.run(
            [
                *(sys.executable, "-W", "ignore", "-m", "nvflare.lighter.provision"),
                *("-p", str(project), "-w", str(authority), "--force"),
            ],
            cwd=scratch,
            env={**os.environ, "HOME": scratch, "PYTHONSAFEPATH": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
    found = sorted((authority / study).glob("prod_*"))
    if done.returncode or not found:
        lines = (done.stderr + done.stdout).strip().splitlines() or ["no output"]
        raise ProvisionError(f"engine: provisioning failed: {lines[0]}")
    return found[-1]


def _project(study: str, sites: Sequence[str], server: Server, valid_days: int) -> dict[str, Any]:
    builders = "nvflare.lighter.impl"
    return {
        "api_version": 3,
        "name": study,
        "description": "federation of a study",
        "participants": [
            {
                "name": server.host, "type": "server", "org": _ORG,
                "fed_learn_port": server.port, "admin_port": server.port,
            },
            *({"name": site, "type": "client", "org": _ORG} for site in sites),
            {"name": STUDY_USER, "type": "admin", "org": _ORG, "role": _ROLE},
        ],
        "builders": [
            {
                "path": f"{builders}.workspace.WorkspaceBuilder",
                "args": {"template_file": ["master_template.yml"]},
            },
            {
                "path": f"{builders}.static_file.StaticFileBuilder",
                "args": {
                    "config_folder": "config", "scheme": "grpc", "require_signed_jobs": True,
                },
            },
            {
                "path": f"{builders}.cert.CertBuilder",
                "args": {"root_valid_days": valid_days},
            },
            {"path": f"{builders}.signature.SignatureBuilder"},
        ],
    }  # fmt: skip


def narrow(kit: Path, name: str) -> Path:
    """Keep of a raw kit what the federation needs, and forbid the rest; give the kit."""
    for left_over in (
        *kit.glob("startup/*.sh"), *kit.glob("startup/*.ipynb"), *kit.glob("*/readme.txt"),
        *kit.glob("readme.txt"), *kit.glob("local/*.sample"),
        *kit.glob("local/log_config.json.default"), *kit.glob("local/authorization.json.default"),
    ):  # fmt: skip
        left_over.unlink()
    default = kit / "local" / "resources.json.default"
    resources = json.loads(default.read_text())
    default.unlink()
    if name != ADMIN:
        resources = _resources(resources, server=name == COORDINATOR)
        _write_json(kit / "local" / "authorization.json", _authorization(name))
        _write_json(kit / "local" / "log_config.json", _log_config())
        (kit / "transfer").mkdir(exist_ok=True)
    _write_json(kit / "local" / "resources.json", resources)
    return kit


def _resources(resources: dict[str, Any], *, server: bool) -> dict[str, Any]:
    shut = {"site_log_streamer", "log_receiver"}
    components = [c for c in resources["components"] if c["id"] not in shut]
    for component in components:
        if component["id"] == "job_scheduler":
            # One job at a time: two processes of one site must not answer side by side.
            component["args"] = {
                "max_jobs": 1, "min_schedule_interval": 1.0, "max_schedule_interval": 5.0,
                "max_schedule_count": 100,
            }  # fmt: skip
        if component["id"] == "process_launcher" and not server:
            component["path"] = LAUNCHER
    narrowed = {
        **resources,
        "class_list_enforcement_mode": "enforce",
        "class_allow_list": list(CLASSES),
        "allow_log_streaming": False,
        "components": components,
    }
    if server:
        narrowed["servers"] = [{**narrowed["servers"][0], "heart_beat_timeout": 60}]
    return narrowed


def _authorization(name: str) -> dict[str, Any]:
    """Rights of the study's user at this party: jobs, and at the coordinator whom to shut out."""
    rights = dict.fromkeys(
        (
            "clone_job", "download_job", "operate", "shell_commands", "byoc", "view",
            "server-predeployed-flwr",
        ),
        "none",
    )  # fmt: skip
    rights |= {"submit_job": "any", "manage_job": "any"}
    if name == COORDINATOR:
        rights |= {"view": "any", "operate": "any"}
    return {"format_version": "1.0", "permissions": {_ROLE: rights}}


def _log_config() -> dict[str, Any]:
    """Log to one file of the party's own; the engine's running comment on each message is off."""
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {
            "plain": {
                "()": "nvflare.fuel.utils.log_utils.BaseFormatter",
                "fmt": "%(asctime)s - %(name)s - %(levelname)s - %(fl_ctx)s - %(message)s",
            }
        },
        "filters": {},
        "handlers": {
            "file": {
                "class": "logging.handlers.RotatingFileHandler",
                "level": "DEBUG",
                "formatter": "plain",
                "filename": "log.txt",
                "mode": "a",
                "maxBytes": _LOG_BYTES,
                "backupCount": 5,
            }
        },
        "loggers": {
            "root": {"level": "INFO", "handlers": ["file"]},
            **{f"nvflare.{name}": {"level": "WARNING"} for name in _TALKATIVE},
        },
    }


def _write_json(path: Path, value: Any) -> None:
    _write(path, json.dumps(value, indent=2) + "\n")


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".partial-{path.name}")
    partial.touch(mode=0o600)
    partial.write_text(text)
    partial.replace(path)
