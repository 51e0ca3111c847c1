from __future__ import annotations

import importlib.metadata
import re
import shutil
from typing import TYPE_CHECKING

import pytest

from flows import versions
from flows.versions import git_commit, source_digest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    source_digest.cache_clear()
    git_commit.cache_clear()
    yield
    source_digest.cache_clear()
    git_commit.cache_clear()


def test_the_digest_sees_changed_sources_of_the_named_packages_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("fusion", "modalities"):
        shutil.copytree(versions._ROOT / name, tmp_path / name)
    here = source_digest("fusion", "modalities")
    monkeypatch.setattr(versions, "_ROOT", tmp_path)
    source_digest.cache_clear()
    both, one = source_digest("fusion", "modalities"), source_digest("fusion")
    assert both == here  # wherever the code lies
    assert both != one
    (tmp_path / "modalities" / "cohort.py").write_text("changed = True\n")
    (tmp_path / "fusion" / "notes.txt").write_text("no source")
    source_digest.cache_clear()
    assert source_digest("fusion", "modalities") != both
    assert source_digest("fusion") == one


def test_outside_a_checkout_the_version_stands_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "_ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_commit() == importlib.metadata.version("consilium")


def test_in_a_checkout_it_is_the_commit() -> None:
    if not (versions._ROOT / ".git").exists():
        pytest.skip("not in a git checkout")
    assert re.fullmatch(r"[0-9a-f]{40}", git_commit())
