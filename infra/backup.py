"""Backup of one party's folder and databases, and its restoration into an empty folder.

A backup is a folder of plain files with the digest of each. Databases are taken first: what they
refer to is written before they refer to it, so that the files copied afterwards are complete.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Final
from urllib.parse import parse_qs, unquote, urlsplit

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

SUMS: Final = "SHA256SUMS"
ABOUT: Final = "backup.json"
FILES: Final = "files"
DUMPS: Final = "postgres"
DATABASES: Final = ("prefect", "mlflow", "mlflow_auth")
_URL: Final = "CONSILIUM_DATABASE_URL"
_SQLITE: Final = b"SQLite format 3\0"
_CHUNK_BYTES: Final = 1 << 20
# Whoever has these can act as the party, or undo the site's pseudonyms.
_SECRET: Final = (
    "site.toml", "identity*.key", "*.key", "*.auth", "kits/**", "kit/**", "authority/**",
    ".mlflow/**",
)  # fmt: skip
# Made anew, or of a process that runs.
_PASSING: Final = (
    "logs/**", "services.json", "*.lock", "*-wal", "*-shm", "*-journal", "*.part",
)  # fmt: skip
_PARTIAL: Final = ".partial-"
_FEATURES: Final = ("features/**",)


class BackupError(RuntimeError):
    """A backup that cannot be made or restored as asked."""


@dataclass(frozen=True)
class Server:
    """Where a party's PostgreSQL databases are, without a password on any command line."""

    url: str

    @property
    def environment(self) -> dict[str, str]:
        """What PostgreSQL's programs read instead of arguments."""
        parts = urlsplit(self.url)
        given = {
            "PGHOST": parts.hostname,
            "PGPORT": str(parts.port or 5432),
            "PGUSER": unquote(parts.username or ""),
            "PGPASSWORD": unquote(parts.password or ""),
        }
        tls = {f"PG{name.upper()}": values[-1] for name, values in parse_qs(parts.query).items()}
        return {**os.environ, **tls, **{name: value for name, value in given.items() if value}}

    def name(self, database: str) -> str:
        """Full name of one of the party's databases."""
        return f"{urlsplit(self.url).path.strip('/') or 'consilium'}_{database}"


def back_up(
    root: Path,
    folder: Path,
    *,
    with_keys: bool = False,
    with_features: bool = True,
    database_url: str | None = None,
) -> Path:
    """Write a new backup below ``folder`` while the services run; whole, or not there at all.

    Parameters
    ----------
    root
        The party's folder.
    with_keys
        Also ``site.toml``, identity keys and kits: keep the backup as safe as these.
    with_features
        Also ``features/``, which is the largest part and can be extracted again.
    database_url
        The party's PostgreSQL server, as ``CONSILIUM_DATABASE_URL``.

    Returns
    -------
    Path
        The backup's own folder.

    Raises
    ------
    BackupError
        If ``root`` is no party's folder, ``folder`` lies in it, or a database cannot be read.
    """
    root, folder = root.resolve(), folder.resolve()
    if not any((root / name).is_file() for name in ("study.toml", "site.toml")):
        raise BackupError("backup: found no study.toml or site.toml, needed a party's folder")
    if folder.is_relative_to(root):
        raise BackupError("backup: found the target inside the folder, needed one outside")
    now = datetime.now(UTC)
    final = folder / f"consilium-{now:%Y%m%dT%H%M%S%fZ}"
    partial = folder / f"{_PARTIAL}{final.name}"
    partial.mkdir(parents=True, mode=0o700)
    try:
        if database_url:
            _dump(Server(database_url), partial / DUMPS)
        skipped = (*_PASSING, *(() if with_keys else _SECRET))
        _copy_folder(root, partial / FILES, (*skipped, *(() if with_features else _FEATURES)))
        about = {"made": now.isoformat(), "root": str(root), "with_keys": with_keys}
        _write(partial / ABOUT, json.dumps(about, indent=1) + "\n")
        _write(partial / SUMS, "".join(_sums(partial)))
        partial.rename(final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


def restore(backup: Path, root: Path, *, database_url: str | None = None) -> None:
    """Put a backup into an empty folder and, where it has them, into empty databases.

    Raises
    ------
    BackupError
        If a file of the backup was changed, is missing or was added, the folder or a database is
        not empty, or the backup has databases and no server is named.
    """
    verify(backup)
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise BackupError("restore: found something in the folder, needed an empty one")
    dumps = sorted((backup / DUMPS).glob("*.dump"))
    if dumps and not database_url:
        raise BackupError(f"restore: found dumps of PostgreSQL, needed {_URL} of an empty server")
    partial = root.absolute().parent / f"{_PARTIAL}{root.absolute().name}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        shutil.copytree(backup / FILES, partial)
        if database_url:
            _load(Server(database_url), dumps)
        if root.exists():
            root.rmdir()
        partial.rename(root)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def verify(backup: Path) -> None:
    """Compare every file of a backup with its digest.

    Raises
    ------
    BackupError
        If the folder is no backup, or a file was changed, is missing or was added.
    """
    try:
        lines = (backup / SUMS).read_text().splitlines()
        known = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    except (OSError, ValueError):
        raise BackupError(f"backup: found no {SUMS}, needed a whole backup") from None
    present = {path.relative_to(backup).as_posix() for path in _files(backup)} - {SUMS}
    faults = {
        "is missing": sorted(known.keys() - present),
        "was added": sorted(present - known.keys()),
        # Copying would follow it, out of the backup.
        "is a link": sorted(
            p.relative_to(backup).as_posix() for p in backup.rglob("*") if p.is_symlink()
        ),
        "was changed": [
            n for n in sorted(known) if n in present and _digest(backup / n) != known[n]
        ],
    }
    for fault, names in faults.items():
        if names:
            raise BackupError(
                f"backup: {len(names)} of its files, one named here, {fault}: {names[0]}"
            )


def _copy_folder(source: Path, target: Path, skipped: Sequence[str]) -> None:
    target.mkdir(mode=0o700)
    names = [
        name for name in sorted(p.relative_to(source) for p in _files(source))
        if not _matches(PurePosixPath(name.as_posix()), skipped)
    ]  # fmt: skip
    databases = [name for name in names if _is_sqlite(source / name)]
    for name in (*databases, *(name for name in names if name not in set(databases))):
        copy = target / name
        copy.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            if name in databases:
                _copy_sqlite(source / name, copy)
            else:
                shutil.copy2(source / name, copy)
        except FileNotFoundError:
            continue  # it was replaced or withdrawn meanwhile


def _copy_sqlite(source: Path, target: Path) -> None:
    """Copy a database as it is at one moment, while others write to it."""
    reading = sqlite3.connect(f"{source.as_uri()}?mode=ro", uri=True, timeout=60)
    with closing(reading), closing(sqlite3.connect(target)) as writing:
        reading.backup(writing)
        (found,) = writing.execute("PRAGMA quick_check").fetchone()
    target.chmod(0o600)
    if found != "ok":
        raise BackupError(f"{source.name}: found a damaged database, needed a sound one")


def _is_sqlite(path: Path) -> bool:
    try:
        with path.open("rb") as stream:
            return stream.read(len(_SQLITE)) == _SQLITE
    except OSError:
        return False


def _dump(server: Server, folder: Path) -> None:
    folder.mkdir(mode=0o700)
    there = set(_psql(server, "postgres", "SELECT datname FROM pg_database").split())
    wanted = [name for name in DATABASES if server.name(name) in there]
    if not wanted:
        raise BackupError(f"{_URL}: found none of the party's databases on the server")
    for name in wanted:
        target = str(folder / f"{name}.dump")
        _run(
            server, "pg_dump", "--format=custom", "--no-owner", "--no-privileges",
            f"--file={target}", f"--dbname={server.name(name)}",
        )  # fmt: skip


def _load(server: Server, dumps: Sequence[Path]) -> None:
    there = set(_psql(server, "postgres", "SELECT datname FROM pg_database").split())
    for dump in dumps:
        name = server.name(dump.stem)
        if name not in there:
            _psql(server, "postgres", f'CREATE DATABASE "{name}"')
        tables = "SELECT count(*) FROM information_schema.tables WHERE table_schema = 'public'"
        if _psql(server, name, tables).strip() != "0":
            raise BackupError(f"restore: found tables in {name}, needed an empty database")
    for dump in dumps:
        _run(
            server, "pg_restore", "--exit-on-error", "--single-transaction", "--no-owner",
            "--no-privileges", f"--dbname={server.name(dump.stem)}", str(dump),
        )  # fmt: skip


def _psql(server: Server, database: str, statement: str) -> str:
    settings = ("--no-psqlrc", "--tuples-only", "--no-align", "--set=ON_ERROR_STOP=1")
    return _run(server, "psql", *settings, f"--dbname={database}", f"--command={statement}")


def _run(server: Server, program: str, *arguments: str) -> str:
    found = shutil.which(program)
    if found is None:
        raise BackupError(f"{program}: found none, needed PostgreSQL's client programs")
    done = subprocess.run(
        [found, *arguments],
        env=server.environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise BackupError(f"{program}: ended with status {done.returncode}: {lines[0]}")
    return done.stdout


def _matches(name: PurePosixPath, patterns: Sequence[str]) -> bool:
    """Whether a pattern fits a file, or for ``folder/**`` any folder above it."""
    folders = set(name.parts[:-1])
    return any(part.startswith(_PARTIAL) for part in name.parts) or any(
        pattern[:-3] in folders if pattern.endswith("/**") else name.match(pattern)
        for pattern in patterns
    )


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def _sums(folder: Path) -> list[str]:
    return [
        f"{_digest(path)}  {path.relative_to(folder).as_posix()}\n"
        for path in sorted(_files(folder))
    ]


def _digest(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            found.update(chunk)
    return found.hexdigest()


def _write(path: Path, text: str) -> None:
    path.touch(mode=0o600)
    path.write_text(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Make or restore a backup, as the two scripts beside this package ask."""
    os.umask(0o077)
    parser = argparse.ArgumentParser(prog="backup")
    actions = parser.add_subparsers(dest="action", required=True)
    save = actions.add_parser("save", help="write a new backup")
    save.add_argument("root", type=Path, help="the party's folder")
    save.add_argument("folder", type=Path, help="where backups are kept")
    save.add_argument("--with-keys", action="store_true", help="also keys, kits and site.toml")
    save.add_argument("--without-features", action="store_true", help="not features/")
    load = actions.add_parser("restore", help="put a backup into an empty folder")
    load.add_argument("backup", type=Path, help="one backup's folder")
    load.add_argument("root", type=Path, help="an empty folder, best where the party's was")
    given = parser.parse_args(arguments)
    url = os.environ.get(_URL)
    try:
        if given.action == "save":
            made = back_up(
                given.root,
                given.folder,
                with_keys=given.with_keys,
                with_features=not given.without_features,
                database_url=url,
            )
            sys.stdout.write(f"{made}\n")
        else:
            restore(given.backup, given.root, database_url=url)
            sys.stdout.write(f"{given.root}\n")
    except (BackupError, OSError, sqlite3.Error) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
