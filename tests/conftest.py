"""Fixtures that several test files share."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from hypothesis import settings

# Before numpy is imported: our matrices are small, and more threads wait for one another.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# A gate must not fail by chance: there the same examples are tried every time, here ever new ones.
settings.register_profile("gate", derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

# Programs that tests interrupt inherit it: a shell starts what runs behind it with this ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real slides, scans and tables; tests that need it are skipped without it."""
    folder = Path(os.environ.get("CONSILIUM_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("real data not found: set CONSILIUM_DATA to their folder")
    return folder


# Files that make one consortium over the engine for all of them, see `federated.shared`.
ENGINE = {"test_canary", "test_failures", "test_federated_study", "test_flare"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep tests that share what is slow to make in one process, where several run them."""
    for item in items:
        if item.get_closest_marker("slow"):
            group = "engine" if item.path.stem in ENGINE else item.path.stem
            item.add_marker(pytest.mark.xdist_group(group))
