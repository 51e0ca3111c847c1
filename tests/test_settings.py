from __future__ import annotations

import os
from pathlib import Path

import pytest

from infra.settings import SettingsError, SiteSettings, Workspace, load_site

SECRET = "c0ffee" * 8


@pytest.fixture(autouse=True)
def _no_settings_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [x for x in os.environ if x.upper().startswith("CONSILIUM_")]:
        monkeypatch.delenv(name)


def write(folder: Path, text: str = "", **values: object) -> Path:
    lines = [f"{k} = {v!r}" for k, v in ({"name": "site-01", "secret": SECRET} | values).items()]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "site.toml"
    path.write_text("\n".join([*lines, text]))
    return path


def test_paths_count_from_the_folder_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/")
    settings = load_site(write(tmp_path, manifest="lists/manifest.csv"))
    assert settings.home == tmp_path
    assert settings.path(settings.manifest) == tmp_path / "lists/manifest.csv"
    assert settings.path(settings.clinical) == tmp_path / "clinical.csv"
    assert settings.path(Path("/data/registry.csv")) == Path("/data/registry.csv")
    assert load_site(write(tmp_path, home="files")).home == tmp_path / "files"
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    assert load_site(write(tmp_path, home="~/files")).home == tmp_path / "me/files"
    assert load_site(write(tmp_path, home="/data")).home == Path("/data")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extra = 1", "site.toml: extra: unknown key"),
        ("[secrets]\na = 'x'", "site.toml: secrets: unknown key"),
        ("batch_size = 0", "site.toml: batch_size: input should be greater"),
        ("batch_size = 'many'", "site.toml: batch_size: input should be a valid integer"),
        ("home = 3", "site.toml: home: "),
        ("= 3", "site.toml: found no valid TOML"),
    ],
)
def test_a_faulty_key_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SettingsError) as error:
        load_site(write(tmp_path, text))
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_missing_keys_and_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"found no such file; write one with"):
        load_site(tmp_path / "site.toml")
    (tmp_path / "site.toml").write_text("")
    with pytest.raises(SettingsError) as error:
        load_site(tmp_path / "site.toml")
    lines = str(error.value).splitlines()
    assert lines == ["site.toml: name: field required", "site.toml: secret: field required"]
    with pytest.raises(SettingsError, match="needed a readable file"):
        load_site(tmp_path)
    (tmp_path / "site.toml").write_bytes(b"name = '\xff'")
    with pytest.raises(SettingsError, match="no valid TOML"):
        load_site(tmp_path / "site.toml")


@pytest.mark.parametrize("name", ["Site", "1a", "a/b", "../x", "", "a" * 41, "a b"])
def test_a_site_has_an_opaque_short_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(SettingsError, match="name: string should match"):
        load_site(write(tmp_path, name=name))


@pytest.mark.parametrize(
    "text",
    [
        'secret = "hunter2"',
        "secret = 31415926",
        'secret = ["hunter2", "31415926"]',
        f'secret = "{SECRET}"\nbatch_size = 0\nextra = "{SECRET}"',
        f'secret = "{SECRET}" x',
        f'secret = "{SECRET}',
        f'secret = "{SECRET}"\nsecret = "{SECRET}"',
    ],
)
def test_no_error_tells_the_secret(tmp_path: Path, text: str) -> None:
    (tmp_path / "site.toml").write_text(f'name = "site-01"\n{text}\n')
    with pytest.raises(SettingsError) as error:
        load_site(tmp_path / "site.toml")
    for secret in ("hunter2", "31415926", SECRET):
        assert secret not in f"{error.value} {error.value!r}"
    assert error.value.__cause__ is None
    assert error.value.__suppress_context__


def test_the_secret_is_in_no_text_of_the_settings(tmp_path: Path) -> None:
    settings = load_site(write(tmp_path))
    assert SECRET not in f"{settings} {settings!r} {settings.model_dump()} {vars(settings)}"
    assert SECRET not in settings.model_dump_json()
    assert settings.key == SECRET.encode()


def test_an_environment_variable_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONSILIUM_SITE_BATCH_SIZE", "7")
    monkeypatch.setenv("CONSILIUM_SITE_SECRET", "d" * 32)
    monkeypatch.setenv("CONSILIUM_SITE_HOME", "/elsewhere")
    settings = load_site(write(tmp_path, batch_size=3, home="here"))
    assert (settings.batch_size, settings.key) == (7, b"d" * 32)
    assert settings.home == Path("/elsewhere")
    monkeypatch.setenv("CONSILIUM_SITE_BATCH_SIZE", "seven")
    with pytest.raises(SettingsError, match=r"site\.toml: batch_size: input should be a valid"):
        load_site(write(tmp_path))


def test_settings_are_frozen(tmp_path: Path) -> None:
    settings = load_site(write(tmp_path))
    with pytest.raises(ValueError, match="frozen"):
        settings.name = "site-02"  # type: ignore[misc]
    assert isinstance(settings, SiteSettings)


def test_a_workspace_finds_its_sites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONSILIUM_ROOT", str(tmp_path))
    workspace = Workspace()
    assert workspace.site_names() == []
    for name in ("site-02", "site-01"):
        write(tmp_path / name, name=name)
    (tmp_path / "logs").mkdir()
    assert workspace.site_names() == ["site-01", "site-02"]
    assert workspace.site("site-02").home == tmp_path / "site-02"
    assert workspace.study_file == tmp_path / "study.toml"
    assert workspace.mlflow_uri == f"sqlite:///{tmp_path}/mlflow.db"
    assert Workspace(tracking_uri="http://h:1").mlflow_uri == "http://h:1"
    with pytest.raises(SettingsError, match="found no site-03"):
        workspace.site("site-03")


def test_a_folder_of_another_name_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "site-01", name="site-09")
    with pytest.raises(SettingsError, match="name: found site-09, needed site-01; the folder"):
        Workspace(root=tmp_path).site("site-01")


def test_one_hospital_has_its_file_in_the_root(tmp_path: Path) -> None:
    write(tmp_path, name="berlin")
    workspace = Workspace(root=tmp_path)
    assert workspace.site_names() == ["berlin"]
    assert workspace.site("berlin").home == tmp_path
    with pytest.raises(SettingsError, match="found berlin, needed rome"):
        workspace.site("rome")
