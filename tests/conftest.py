"""Fixtures that several test files share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

# Before numpy is imported: our matrices are small, and more threads wait for one another.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# A gate must not fail by chance: there the same examples are tried every time, here ever new ones.
settings.register_profile("gate", derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real slides, scans and tables; tests that need it are skipped without it."""
    folder = Path(os.environ.get("CONSILIUM_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("real data not found: set CONSILIUM_DATA to their folder")
    return folder
