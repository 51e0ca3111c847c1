"""Which code made a result: the commit, the package's version, digests of our own sources."""

from __future__ import annotations

import importlib.metadata
import subprocess
from functools import lru_cache
from pathlib import Path

from modalities.files import digest_path, fingerprint

# Changed code here is a changed result, and one that sites approve anew.
CODE = ("flows", "fusion", "infra", "modalities")
_ROOT = Path(__file__).resolve().parent.parent


@lru_cache(maxsize=8)
def source_digest(*packages: str) -> str:
    """SHA-256 over the sources of some of our packages: changed code is a changed result."""
    files = sorted(f for p in packages for f in (_ROOT / p).rglob("*.py"))
    return fingerprint([[f.relative_to(_ROOT).as_posix(), digest_path(f)] for f in files])


@lru_cache(maxsize=1)
def lock_digest() -> str:
    """SHA-256 of the locked dependencies, or outside a checkout of those that are installed."""
    lock = _ROOT / "requirements.lock"
    if lock.is_file():
        return digest_path(lock)
    installed = {(x.name.lower(), x.version) for x in importlib.metadata.distributions()}
    return fingerprint(sorted(map(list, installed)))


@lru_cache(maxsize=1)
def git_commit() -> str:
    """Commit of the checkout that runs, or the package's version outside one."""
    try:
        done = subprocess.run(
            ["git", "-C", str(_ROOT), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return importlib.metadata.version("consilium")
    return done.stdout.strip()
