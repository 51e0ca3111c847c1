"""A site's folder as it is at a hospital: by itself, what it was given of the study below kits/."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from flows.identity import identity, public_key
from fusion.federation.consortium import CONSORTIUM_FILE, COORDINATOR, Consortium
from infra.settings import STUDY_FILE

if TYPE_CHECKING:
    from pathlib import Path


def at_hospital(root: Path, site: str, home: Path, *, study: str) -> Path:
    """Copy a site out of a folder with all parties; what it knows of the coordinator is its kit."""
    shutil.copytree(root / site, home)
    shutil.copy(root / STUDY_FILE, home)
    coordinator = public_key(root / COORDINATOR)
    assert coordinator is not None
    sites = {name: identity(home.parent / f"key-{name}").public for name in ("site-01", "site-02")}
    kit = home / "kits" / site
    kit.mkdir(parents=True)
    (kit / CONSORTIUM_FILE).write_bytes(Consortium(study, coordinator, sites, 2, ()).to_bytes())
    return home
