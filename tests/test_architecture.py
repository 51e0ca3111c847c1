from __future__ import annotations

import ast
import importlib
import importlib.metadata
import pkgutil
import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("flows", "fusion", "infra", "modalities")
SOURCES = sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py"))
FORBIDDEN_NAMES = re.compile(r"utils?|common|helpers?|base|core|misc|.*(manager|handler)s?")
# In halves, or this file would name them too.
HOSTS = [
    ("pypi", "org"), ("pythonhosted", "org"), ("anaconda", "org"), ("download", "pytorch", "org"),
    ("huggingface", "co"), ("hf", "co"), ("docker", "io"), ("ghcr", "io"), ("quay", "io"),
    ("gcr", "io"), ("npmjs", "com"), ("npmjs", "org"), ("jsdelivr", "net"), ("unpkg", "com"),
]  # fmt: skip
HOST = re.compile("|".join(r"\b" + r"\.".join(parts) + r"\b" for parts in HOSTS), re.IGNORECASE)
# The package root is the whole of what another program may import from these.
EXPORTED = {
    "fusion.federation": {"Coordinator", "FederationPlan", "InProcess", "Transport"},
    "modalities.pathology": {"PathologySpec", "extract", "extract_slide", "read_bag"},
    "modalities.radiology": {"RadiologySpec", "extract", "extract_scan", "feature_names"},
    "modalities.synthetic": {"Truth", "read_truth", "simulate"},
}


@pytest.fixture(scope="module")
def settings() -> dict[str, dict[str, object]]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout, so the tracked files are unknown")
    found = [ROOT / name.decode() for name in listed.stdout.split(b"\0") if name]
    return [path for path in found if path.is_file()]


def test_imports_keep_their_arrows(tmp_path: Path) -> None:
    lint = Path(sys.executable).with_name("lint-imports")
    checked = subprocess.run(
        [lint, "--no-logo", "--cache-dir", tmp_path, "--config", ROOT / "pyproject.toml"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout


def test_every_package_is_built_typed_and_checked(settings: dict[str, dict[str, dict]]) -> None:  # type: ignore[type-arg]
    tool = settings["tool"]
    listed = [
        tool["hatch"]["build"]["targets"]["wheel"]["packages"],
        tool["mypy"]["packages"],
        tool["importlinter"]["root_packages"],
        tool["ruff"]["lint"]["isort"]["known-first-party"],
    ]
    assert [sorted(packages) for packages in listed] == [list(PACKAGES)] * len(listed)
    assert [p for p in PACKAGES if not (ROOT / p / "py.typed").is_file()] == []


def test_folder_mlflow_holds_configuration_only() -> None:
    assert list((ROOT / "mlflow").rglob("*.py*")) == []


def test_mlflow_is_the_installed_package_even_from_our_root() -> None:
    code = "import importlib.util as u; print(u.find_spec('mlflow').origin)"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    installed = importlib.metadata.distribution("mlflow").locate_file("mlflow/__init__.py")
    assert Path(found.stdout.strip()) == Path(str(installed))
    assert "site-packages" in found.stdout


def test_no_file_has_a_name_that_says_nothing() -> None:
    parts = {part for path in SOURCES for part in path.relative_to(ROOT).with_suffix("").parts}
    assert sorted(part for part in parts if FORBIDDEN_NAMES.fullmatch(part)) == []


def test_modalities_and_fusion_are_given_their_values() -> None:
    readers = [
        path.relative_to(ROOT).as_posix()
        for path in SOURCES
        if path.relative_to(ROOT).parts[0] in ("fusion", "modalities")
        and any(_reads_environment(node) for node in ast.walk(ast.parse(path.read_text())))
    ]
    assert readers == []


def _reads_environment(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")


def test_nothing_is_pickled() -> None:
    importers = [
        path.relative_to(ROOT).as_posix()
        for path in SOURCES
        if re.search(
            r"^\s*(import|from) (pickle|cloudpickle|joblib|dill)\b", path.read_text(), re.M
        )
    ]
    assert importers == []


@pytest.mark.parametrize("name", sorted(EXPORTED))
def test_public_names_exist(name: str) -> None:
    module = importlib.import_module(name)
    assert EXPORTED[name] <= set(module.__all__)
    assert [x for x in module.__all__ if not hasattr(module, x)] == []
    assert len(set(module.__all__)) == len(module.__all__)


def test_every_module_is_below_a_documented_package() -> None:
    packages = [
        m.name
        for top in PACKAGES
        for m in pkgutil.walk_packages([str(ROOT / top)], prefix=f"{top}.")
        if m.ispkg
    ]
    inits = [ROOT / name.replace(".", "/") / "__init__.py" for name in (*PACKAGES, *packages)]
    assert [p for p in inits if not ast.get_docstring(ast.parse(p.read_text()))] == []


def test_the_command_exists() -> None:
    (command,) = importlib.metadata.entry_points(group="console_scripts", name="consilium")
    assert callable(command.load())


def test_the_distribution_cannot_be_uploaded_by_accident() -> None:
    classifiers = importlib.metadata.metadata("consilium").get_all("Classifier") or []
    assert "Private :: Do Not Upload" in classifiers


def test_no_tracked_file_names_a_registry_or_hub(tracked: list[Path]) -> None:
    found = []
    for path in tracked:
        text = path.read_bytes().decode("utf-8", errors="ignore")
        found += [f"{path.relative_to(ROOT)}: {m.group()}" for m in HOST.finditer(text)]
    assert found == []


def test_tracked_files_are_small_and_no_data(tracked: list[Path]) -> None:
    data = {".csv", ".dcm", ".h5", ".h5ad", ".h5mu", ".nii", ".gz", ".svs", ".tif", ".tiff"}
    kept = [p for p in tracked if "golden" not in p.parts]  # reference values are small tables
    assert [p.name for p in kept if p.suffix in data] == []
    assert [p.name for p in tracked if p.stat().st_size > 1_000_000] == []


def test_lock_pins_and_hashes_everything_and_names_no_address(
    settings: dict[str, dict[str, list[str]]],
) -> None:
    text = (ROOT / "requirements.lock").read_text()
    blocks = re.split(r"\n(?=\S)", text.strip())
    pinned = {_normal(b.split("==")[0].split("[")[0]): b for b in blocks if "==" in b.split()[0]}
    assert len(pinned) == len(blocks)
    assert [
        name for name, b in pinned.items() if not re.search(r"--hash=sha256:[0-9a-f]{64}", b)
    ] == []
    assert "://" not in text
    assert "--index" not in text
    wanted = settings["project"]["dependencies"]
    assert [w for w in wanted if _normal(re.split(r"[=<>\[; ]", w)[0]) not in pinned] == []


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_no_second_lock_is_tracked(tracked: list[Path]) -> None:
    assert [p.name for p in tracked if p.name in ("uv.lock", "poetry.lock", "Pipfile.lock")] == []


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "ARCHITECTURE.md", "SECURITY.md"])
def test_links_between_our_files_lead_somewhere(name: str) -> None:
    text = (ROOT / name).read_text()
    targets = re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", text)
    assert [t for t in targets if not (ROOT / t).exists()] == []


def promises() -> list[list[str]]:
    """Per row of SECURITY.md's promises which tests it names, as FILE::PATTERN."""
    table = (ROOT / "SECURITY.md").read_text().partition("| promise | how | tests |")[2]
    found, file = [], ""
    for row in re.findall(r"^\|(?! ---).*\|$", table, re.M):
        found.append([])
        for named, test in re.findall(r"`(test_\w+\.py)?(?:::([\w*]+))?`", row.split("|")[3]):
            file = named or file  # a test without a file is of the file before it
            found[-1].append(f"{file}::{test or '*'}")
    return found


def marks_of_tests(tree: ast.Module) -> dict[str, set[str]]:
    """Per test of a file its marks, of the file, the class and its own."""

    def marks(nodes: list[ast.expr]) -> set[str]:
        return {x.attr for node in nodes for x in ast.walk(node) if isinstance(x, ast.Attribute)}

    def within(body: list[ast.stmt], outer: set[str]) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for node in body:
            if isinstance(node, ast.ClassDef):
                found |= within(node.body, outer | marks(node.decorator_list))
            elif isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                found[node.name] = outer | marks(node.decorator_list)
        return found

    of_file = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark"
    ]
    return within(tree.body, marks(of_file))


def test_each_promise_has_a_test() -> None:
    assert len(promises()) > 20
    assert all(promises())


@pytest.mark.parametrize("named", sorted({name for row in promises() for name in row}))
def test_a_test_that_security_names_is_there_and_selected_as_one_of_the_border(named: str) -> None:
    file, _, pattern = named.partition("::")
    found = marks_of_tests(ast.parse((ROOT / "tests" / file).read_text()))
    meant = {test: marks for test, marks in found.items() if fnmatch(test, pattern)}
    assert meant
    assert [test for test, marks in meant.items() if not marks & {"border", "slow"}] == []
