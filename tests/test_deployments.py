"""What is deployed at a site and at the coordinator, read without a server."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.cli.deploy._config import _load_deploy_configs_and_actions
from rich.console import Console

from flows import deployments
from flows.demo import write_consortium
from flows.deployments import (
    FILE,
    MAX_RUNS,
    DeploymentError,
    _retry_automation,
    apply,
    as_deployment,
    deployments_file,
    next_run,
    retry_crashed,
    wanted_deployments,
)
from flows.described import descriptions
from infra.settings import SettingsError, Workspace

SITE_FLOWS = {"check-data", "prepare-site", "train-encoders", "audit-privacy"}
COORDINATOR_FLOWS = {"run-study", "evaluate-champion", "promote"}


class FakeApi:
    """A server that knows some deployments and automations."""

    def __init__(self, **found: Any) -> None:
        self.found, self.calls = found, []

    def post(self, path: str, body: Any) -> Any:
        self.calls.append(("POST", path, body))
        return self.found.get(path.split("/")[1], []) if path.endswith("/filter") else {}

    def put(self, path: str, body: Any) -> Any:
        self.calls.append(("PUT", path, body))


@pytest.fixture(scope="module")
def consortium(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("consortium")
    write_consortium(root, (60, 40), seed=1, tables_only=True)
    return root


def test_a_site_gets_its_four_deployments(consortium: Path, tmp_path: Path) -> None:
    for name in ("study.toml", "site-01/site.toml"):
        (tmp_path / Path(name).name).write_text((consortium / name).read_text())
    wanted = wanted_deployments(Workspace(root=tmp_path))
    assert {one.full_name for one in wanted} == {f"{flow}/site-01" for flow in SITE_FLOWS}
    assert all(one.spec["parameters"]["site"] == "site-01" for one in wanted)


def test_a_coordinator_gets_its_three_deployments(consortium: Path, tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text((consortium / "study.toml").read_text())
    wanted = {one.flow: one for one in wanted_deployments(Workspace(root=tmp_path))}
    assert set(wanted) == COORDINATOR_FLOWS
    assert wanted["run-study"].spec["parameters"] == {
        "study": wanted["run-study"].name,
        "sites": [],
        "federation": "flare",
    }
    assert not wanted["promote"].cron


def test_a_simulated_consortium_gets_all_of_them(consortium: Path) -> None:
    wanted = wanted_deployments(Workspace(root=consortium))
    assert len(wanted) == 2 * len(SITE_FLOWS) + len(COORDINATOR_FLOWS)
    assert len({one.full_name for one in wanted}) == len(wanted)
    run = next(one for one in wanted if one.flow == "run-study")
    assert run.spec["parameters"]["federation"] == "memory"


def test_no_name_is_left_open_and_only_slugs_are_told(consortium: Path) -> None:
    told = [one.spec for one in wanted_deployments(Workspace(root=consortium))]
    assert "{{" not in json.dumps(told)
    assert str(consortium) not in json.dumps(told)
    slug = re.compile(r"[a-z][a-z0-9-]*")
    for spec in told:
        for value in spec["parameters"].values():
            assert value == [] or slug.fullmatch(value)
        assert all(slug.fullmatch(tag) for tag in spec["tags"])


def test_every_parameter_has_a_type_and_a_description(consortium: Path) -> None:
    for one in wanted_deployments(Workspace(root=consortium)):
        schema = as_deployment(one, "consilium")._parameter_openapi_schema
        assert set(one.spec["parameters"]) <= set(schema.properties)
        for name, parameter in schema.properties.items():
            assert parameter.get("description"), f"{one.flow}: {name}"
            assert parameter.get("type"), f"{one.flow}: {name}"
        assert schema.properties["study"]["pattern"], one.flow


def test_a_deployment_is_what_the_file_says(consortium: Path) -> None:
    wanted = {one.full_name: one for one in wanted_deployments(Workspace(root=consortium))}
    made = as_deployment(wanted["prepare-site/site-02"], "consilium-site-02", active=False)
    assert made.entrypoint == "flows.site.prepare_site"
    assert made.work_pool_name == "consilium-site-02"
    assert made.tags == ["consilium", "site", "site-02"]
    assert made.concurrency_limit == 1
    assert made.concurrency_options is not None
    assert made.concurrency_options.collision_strategy == "CANCEL_NEW"
    assert made.schedules is not None
    assert [x.active for x in made.schedules] == [False]
    assert made.enforce_parameter_schema
    train = as_deployment(wanted["train-encoders/site-02"], "consilium")
    assert train.triggers[0].match.root == {"prefect.resource.id": "consilium.site.site-02"}


def test_flow_runs_are_named_by_site_study_and_version_only(consortium: Path) -> None:
    for one in wanted_deployments(Workspace(root=consortium)):
        flow = deployments._flow(one.entrypoint)
        fields = set(re.findall(r"{(\w+)}", str(flow.flow_run_name)))
        assert fields <= {"site", "study", "version"}
        assert not flow.persist_result
        assert not flow.log_prints


def test_own_times_replace_those_of_the_file(
    consortium: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONSILIUM_TIMEZONE", "Europe/Berlin")
    monkeypatch.setenv("CONSILIUM_SCHEDULES", '{"prepare-site": "30 0 * * *"}')
    wanted = {one.full_name: one for one in wanted_deployments(Workspace(root=consortium))}
    ours = wanted["prepare-site/site-01"]
    assert (ours.cron, ours.timezone) == ("30 0 * * *", "Europe/Berlin")
    other = wanted["run-study/" + wanted_study(consortium)]
    assert other.timezone == "Europe/Berlin"
    assert other.cron == "41 4 * * 0"
    found = next_run(ours)
    assert found is not None
    assert (found.hour, found.minute) == (0, 30)
    assert found > datetime.now(UTC)


def wanted_study(root: Path) -> str:
    return next(
        one.name for one in wanted_deployments(Workspace(root=root)) if one.flow == "promote"
    )


@pytest.mark.parametrize(
    ("schedules", "sentence"),
    [
        ('{"promote": "0 0 * * *"}', "found promote, needed names of"),
        ("[", "needed a JSON object"),
        ('{"prepare-site": "at night"}', "found 'at night' in 'UTC', needed a time"),
    ],
)
def test_times_that_are_none_are_refused(
    consortium: Path, monkeypatch: pytest.MonkeyPatch, schedules: str, sentence: str
) -> None:
    monkeypatch.setenv("CONSILIUM_SCHEDULES", schedules)

    def all_of_them() -> None:
        for one in wanted_deployments(Workspace(root=consortium)):
            as_deployment(one, "consilium")

    with pytest.raises(SettingsError, match=re.escape(sentence)):
        all_of_them()


def test_prefects_own_command_reads_the_file() -> None:
    found, actions = _load_deploy_configs_and_actions(deployments_file(), console=Console())
    assert len(found) == len(SITE_FLOWS | COORDINATOR_FLOWS)
    assert actions["pull"] == []
    assert all(one["work_pool"]["name"] == "consilium" for one in found)
    assert {len(one.get("schedules") or []) for one in found} == {0, 1}


def test_what_people_switched_off_stays_off(
    consortium: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    applied: list[Any] = []
    monkeypatch.setattr(
        "prefect.deployments.runner.RunnerDeployment.apply",
        lambda self, work_pool_name: applied.append((self, work_pool_name)),
    )
    off = {
        "entrypoint": "flows.site.prepare_site",
        "name": "site-01",
        "schedules": [{"active": False}],
    }
    api = FakeApi(deployments=[off])
    wanted = wanted_deployments(Workspace(root=consortium))
    found = apply(wanted, pool="consilium", api=api)  # type: ignore[arg-type]
    assert [one.wanted.full_name for one in found if not one.active] == ["prepare-site/site-01"]
    assert {pool for _, pool in applied} == {"consilium"}
    assert len(applied) == len(wanted)
    schedules = {one.full_name: one.schedules for one, _ in applied}
    assert [x.active for x in schedules["prepare-site/site-01"]] == [False]
    assert [x.active for x in schedules["prepare-site/site-02"]] == [True]


def test_the_automation_is_made_once_and_renewed_after() -> None:
    first = FakeApi()
    retry_crashed(first)  # type: ignore[arg-type]
    assert [x[:2] for x in first.calls] == [
        ("POST", "/automations/filter"),
        ("POST", "/automations/"),
    ]
    again = FakeApi(automations=[{"id": "1"}])
    retry_crashed(again)  # type: ignore[arg-type]
    assert again.calls[-1][:2] == ("PUT", "/automations/1")


def test_the_automation_is_one_of_prefects_and_ends_after_some_runs() -> None:
    from prefect.events.schemas.automations import AutomationCore

    automation = AutomationCore.model_validate(_retry_automation())
    assert automation.trigger.match["prefect.run-count"] == [  # type: ignore[union-attr]
        str(n) for n in range(1, MAX_RUNS)
    ]


def test_a_file_without_deployments_is_refused(
    tmp_path: Path, consortium: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deployments, "_PLACES", (tmp_path / FILE,))
    with pytest.raises(DeploymentError, match="found none with the package"):
        deployments_file()
    (tmp_path / FILE).write_text("name: consilium\n")
    with pytest.raises(DeploymentError, match="found no deployments"):
        wanted_deployments(Workspace(root=consortium))
    (tmp_path / FILE).write_text(
        yaml.safe_dump(
            {"deployments": [{"entrypoint": "flows.none", "name": "x", "tags": ["site"]}]}
        )
    )
    with pytest.raises(DeploymentError, match=r"found flows\.none"):
        wanted_deployments(Workspace(root=consortium))


def test_descriptions_are_read_from_numpydoc() -> None:
    text = """Do.

    Parameters
    ----------
    a
        First,
        on two lines.
    b, c
        Both.

    Returns
    -------
    int
        One.
    """
    assert descriptions(text) == {"a": "First, on two lines.", "b": "Both.", "c": "Both."}
    assert descriptions("Do.") == {}
