"""Container, compose and Kubernetes files: valid, hardened, without secrets, and in step with us.

No container is started here; what the files say is checked, by the validators of each format and
against our own commands and settings.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic_settings import BaseSettings
from typer.main import get_command

import infra.network
import infra.settings
from flows.cli import app

ROOT = Path(__file__).resolve().parents[1]
INFRA = ROOT / "infra"
BIN = Path(sys.executable).parent
DOCKERFILES = sorted((INFRA / "docker").glob("*.Dockerfile"))
COMPOSE = sorted((INFRA / "compose").glob("*.yaml"))
OVERLAYS = [INFRA / "kubernetes" / name for name in ("site", "coordinator")]
SCRIPTS = [*sorted((INFRA / "scripts").glob("*.sh")), INFRA / "docker" / "entrypoint.sh"]
OURS = ("consilium-site:", "consilium-coordinator:")
# The image's program has this as a file capability, and does not start where it is forbidden.
ALLOWED_CAPABILITY = {"caddy": ["NET_BIND_SERVICE"]}
EXAMPLES = {"192.0.2.10/32", "consilium.example.org"}

Named = dict[str, Any]


def ids(paths: list[Path]) -> list[str]:
    return [path.name if path.suffix else f"kubernetes-{path.name}" for path in paths]


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in command],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def compose_of(path: Path) -> Named:
    found: Named = yaml.safe_load(path.read_text())
    return found


@lru_cache
def resolved(overlay: Path) -> tuple[Named, ...]:
    """Read a kustomization as ``kubectl kustomize`` does, as far as ours go."""
    spec = yaml.safe_load((overlay / "kustomization.yaml").read_text())
    known = {
        "apiVersion", "kind", "resources", "patches", "images", "namespace", "labels"
    }  # fmt: skip
    assert set(spec) <= known
    found: list[Named] = []
    for name in spec["resources"]:
        path = (overlay / name).resolve()
        found += (
            json.loads(json.dumps(resolved(path)))
            if path.is_dir()
            else [one for one in yaml.safe_load_all(path.read_text()) if one]
        )
    for patch in spec.get("patches", []):
        part = yaml.safe_load((overlay / patch["path"]).read_text())
        (target,) = (
            one for one in found
            if (one["kind"], one["metadata"]["name"]) == (part["kind"], part["metadata"]["name"])
        )  # fmt: skip
        merge(target, part)
    for one in found:
        if "namespace" in spec and one["kind"] == "Namespace":
            one["metadata"]["name"] = spec["namespace"]
        elif "namespace" in spec:
            one["metadata"]["namespace"] = spec["namespace"]
        for container in containers_of(one):
            for image in spec.get("images", []):
                name, _, tag = container["image"].partition(":")
                if name == image["name"]:
                    container["image"] = f"{image['newName']}:{image.get('newTag', tag)}"
    return tuple(found)


def merge(target: Named, part: Named) -> None:
    for key, value in part.items():
        if isinstance(value, dict) and isinstance(target.get(key), dict):
            merge(target[key], value)
        elif isinstance(value, list) and key in MERGED:
            merge_lists(target.setdefault(key, []), value, MERGED[key])
        else:
            target[key] = value


# Lists that a strategic merge joins by a key; all others are replaced.
MERGED = {
    "containers": "name", "initContainers": "name", "volumes": "name", "env": "name",
    "volumeMounts": "mountPath", "ports": "containerPort", "hostAliases": "ip",
}  # fmt: skip


def merge_lists(target: list[Named], parts: list[Named], key: str) -> None:
    for part in parts:
        found = next((one for one in target if one.get(key) == part.get(key)), None)
        if found is None:
            target.append(part)
        else:
            merge(found, part)


def pod_of(resource: Named) -> Named:
    found: Named = resource.get("spec", {}).get("template", {}).get("spec", {})
    return found


def containers_of(resource: Named) -> list[Named]:
    pod = pod_of(resource)
    return [*pod.get("initContainers", []), *pod.get("containers", [])]


def pods() -> list[Any]:
    return [
        pytest.param(overlay, one, id=f"{overlay.name}-{one['metadata']['name']}")
        for overlay in OVERLAYS
        for one in resolved(overlay)
        if pod_of(one)
    ]


def services() -> list[Any]:
    return [
        pytest.param(path, name, one, id=f"{path.stem}-{name}")
        for path in COMPOSE
        for name, one in compose_of(path)["services"].items()
    ]


def kubernetes_containers() -> list[Any]:
    return [
        pytest.param(overlay, one, container, id=f"{overlay.name}-{container['name']}")
        for overlay in OVERLAYS
        for one in resolved(overlay)
        for container in containers_of(one)
    ]


@pytest.mark.parametrize("path", DOCKERFILES, ids=ids(DOCKERFILES))
def test_a_dockerfile_passes_its_linter(path: Path) -> None:
    done = run(BIN / "hadolint", "--no-color", "--failure-threshold", "style", path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", COMPOSE, ids=ids(COMPOSE))
def test_a_compose_file_is_of_the_schema(path: Path) -> None:
    done = run(BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", path)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", COMPOSE, ids=ids(COMPOSE))
def test_compose_itself_reads_the_file(path: Path) -> None:
    read_by_compose(path)


def program(name: str) -> str:
    """Find a second reader of our files, which .ci/run sees to."""
    found = shutil.which(name)
    if found is None:
        assert not os.environ.get("CI"), f"{name} is not installed"
        pytest.skip(f"{name} is not installed")
    return found


def read_by_compose(path: Path, **given: str) -> Named:
    """Let Compose itself put the example's values in, and give what it would start."""
    example = path.with_name(f"{path.stem}.env.example")
    done = run(program("docker-compose"), "--env-file", example, "-f", path, "config", **given)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    found: Named = yaml.safe_load(done.stdout)
    return found


@pytest.mark.parametrize("overlay", OVERLAYS, ids=ids(OVERLAYS))
def test_manifests_are_of_their_schemas(overlay: Path, tmp_path: Path) -> None:
    path = tmp_path / "all.yaml"
    path.write_text(yaml.safe_dump_all(resolved(overlay)))
    done = run(BIN / "kubernetes-validate", "--strict", path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (done.stdout + done.stderr).count("passed") == len(resolved(overlay))


@pytest.mark.parametrize("overlay", OVERLAYS, ids=ids(OVERLAYS))
def test_kustomize_reads_the_manifests_as_we_do(overlay: Path) -> None:
    done = run(program("kubectl"), "kustomize", overlay)
    assert done.returncode == 0, done.stderr
    theirs = {
        (one["kind"], one["metadata"]["name"]): one for one in yaml.safe_load_all(done.stdout)
    }
    ours = {(one["kind"], one["metadata"]["name"]): one for one in resolved(overlay)}
    assert theirs.keys() == ours.keys()
    for key, one in ours.items():
        assert by_name(pod_of(theirs[key])) == by_name(pod_of(one)), key
        assert theirs[key]["metadata"].get("namespace") == one["metadata"].get("namespace")


def by_name(value: Any) -> Any:
    """Put lists that are sets by name into one order."""
    if isinstance(value, dict):
        return {key: by_name(one) for key, one in value.items()}
    if isinstance(value, list):
        return sorted((by_name(one) for one in value), key=lambda x: json.dumps(x, sort_keys=True))
    return value


@pytest.mark.parametrize("path", SCRIPTS, ids=ids(SCRIPTS))
def test_a_script_is_of_the_language_it_names(path: Path) -> None:
    assert os.access(path, os.X_OK)
    shell = path.read_text().splitlines()[0].split("/")[-1].split()[-1]
    assert run(shell, "-n", path).returncode == 0


@pytest.mark.parametrize("path", DOCKERFILES, ids=ids(DOCKERFILES))
def test_an_image_runs_as_nobody_in_particular(path: Path) -> None:
    text = path.read_text()
    last = text.rpartition("\nFROM ")[2]
    assert re.findall(r"^USER (.*)$", last, re.MULTILINE) == ["10001:10001"]
    assert "HEALTHCHECK" in last
    assert "apt-get" not in last
    for stage in re.findall(r"^FROM (\S+)", text, re.MULTILINE):
        assert re.search(r":\d+\.\d+\.\d+", stage)
    assert "--require-hashes -r requirements.lock" in text
    assert not re.search(r"(?i)(password|secret|token)\s*=", text)


def test_the_images_differ_in_name_only() -> None:
    site, coordinator = (path.read_text() for path in sorted(DOCKERFILES, reverse=True))
    assert site.replace("site", "coordinator") == coordinator


def test_the_builder_is_given_no_data_and_no_key() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in lines
    allowed = {line[1:].split("/")[0] for line in lines if line.startswith("!")}
    assert allowed <= {
        "LICENSE", "README.md", "pyproject.toml", "prefect.yaml", "requirements.lock", "flows",
        "fusion", "infra", "mlflow", "modalities",
    }  # fmt: skip
    assert {"**/*.key", "**/.env"} <= set(lines)


@pytest.mark.parametrize(("path", "name", "one"), services())
def test_a_composed_service_is_hardened(path: Path, name: str, one: Named) -> None:
    assert re.fullmatch(r"\d+:\d+", one["user"])
    assert not one["user"].startswith("0:")
    assert one["read_only"] is True
    assert one["cap_drop"] == ["ALL"]
    assert one.get("cap_add", []) == ALLOWED_CAPABILITY.get(one["image"].partition(":")[0], [])
    assert one["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "pid", "ipc", "devices"} & set(one)
    assert one.get("network_mode", "service:services") == "service:services"
    assert one["pids_limit"] > 0
    assert {"cpus", "memory"} == set(one["deploy"]["resources"]["limits"])
    assert "healthcheck" in one
    assert "docker.sock" not in json.dumps(one)


@pytest.mark.parametrize(("path", "name", "one"), services())
def test_an_image_is_pinned_to_a_version(path: Path, name: str, one: Named) -> None:
    assert re.search(r":v?\d+\.\d+(\.\d+)?(-\w+)?$", one["image"])


@pytest.mark.parametrize(("path", "name", "one"), services())
def test_what_is_written_to_is_a_named_volume_or_memory(path: Path, name: str, one: Named) -> None:
    volumes = compose_of(path)["volumes"]
    for mount in one.get("volumes", []):
        source, _, rest = mount.partition(":")
        assert source in volumes or (source.startswith("./files/") and rest.endswith(":ro"))
        if source.startswith("./"):
            assert (path.parent / source).is_file()


def test_a_site_publishes_on_loopback_only_and_one_service_goes_out() -> None:
    composed = compose_of(INFRA / "compose" / "site.yaml")
    parts, networks = composed["services"], composed["networks"]
    for part in parts.values():
        for port in part.get("ports", []):
            assert port.startswith("127.0.0.1:")
    outward = {name for name, spec in networks.items() if not spec.get("internal")}
    data = {n for n, p in parts.items() if any(v.startswith("home:") for v in p.get("volumes", []))}
    assert data == {"services", "federation"}
    assert {n for n in data if outward & set(parts[n]["networks"])} == {"federation"}
    assert not parts["federation"].get("ports")


def test_a_coordinator_opens_two_ports_to_the_world() -> None:
    parts = compose_of(INFRA / "compose" / "coordinator.yaml")["services"]
    open_ports = {
        (name, port)
        for name, part in parts.items()
        for port in part.get("ports", [])
        if not port.startswith("127.0.0.1:")
    }
    assert open_ports == {("proxy", "443:8443"), ("federation", "8002:8002")}
    for name in ("services", "postgres", "objects", "mlflow"):
        assert list(parts[name]["networks"]) == ["inside"]
    assert compose_of(INFRA / "compose" / "coordinator.yaml")["networks"]["inside"]["internal"]


@pytest.mark.parametrize(("overlay", "resource"), pods())
def test_a_pod_is_of_the_restricted_standard(overlay: Path, resource: Named) -> None:
    pod = pod_of(resource)
    context = pod["securityContext"]
    assert context["runAsNonRoot"] is True
    assert context["runAsUser"] > 0
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
    for volume in pod["volumes"]:
        kinds = set(volume) - {"name"}
        assert kinds <= {"persistentVolumeClaim", "emptyDir", "secret", "configMap"}
    assert resource["spec"]["strategy"] == {"type": "Recreate"}


@pytest.mark.parametrize(("overlay", "resource", "container"), kubernetes_containers())
def test_a_container_of_a_pod_is_hardened(overlay: Path, resource: Named, container: Named) -> None:
    context = container["securityContext"]
    assert context["allowPrivilegeEscalation"] is False
    assert context["readOnlyRootFilesystem"] is True
    assert context["capabilities"] == {"drop": ["ALL"]}
    assert set(container["resources"]) == {"requests", "limits"}
    assert re.search(r":v?\d+\.\d+(\.\d+)?(-\w+)?$", container["image"])
    if container["name"] != "bucket":
        assert {"startupProbe", "livenessProbe"} <= set(container)
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted <= {volume["name"] for volume in pod_of(resource)["volumes"]}


@pytest.mark.parametrize("overlay", OVERLAYS, ids=ids(OVERLAYS))
def test_a_namespace_enforces_the_restricted_standard(overlay: Path) -> None:
    (namespace,) = (one for one in resolved(overlay) if one["kind"] == "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    policies = {
        one["metadata"]["name"]: one["spec"]
        for one in resolved(overlay)
        if one["kind"] == "NetworkPolicy"
    }
    nothing = policies["nothing-passes"]
    assert nothing == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}


def test_a_sites_pod_reaches_names_and_the_coordinator_and_nothing_reaches_it() -> None:
    site = resolved(INFRA / "kubernetes" / "site")
    assert {one["kind"] for one in site}.isdisjoint({"Service", "Ingress"})
    policies = [one["spec"] for one in site if one["kind"] == "NetworkPolicy"]
    assert not any(policy.get("ingress") for policy in policies)
    rules = [rule for policy in policies for rule in policy.get("egress", [])]
    assert sorted(port["port"] for rule in rules for port in rule["ports"]) == [53, 53, 443, 8002]
    (outside,) = (to["ipBlock"]["cidr"] for rule in rules for to in rule["to"] if "ipBlock" in to)
    assert outside.endswith("/32")


def test_what_is_persistent_is_claimed() -> None:
    for overlay in OVERLAYS:
        claims = {
            one["metadata"]["name"]
            for one in resolved(overlay)
            if one["kind"] == "PersistentVolumeClaim"
        }
        used = {
            volume["persistentVolumeClaim"]["claimName"]
            for one in resolved(overlay)
            for volume in pod_of(one).get("volumes", [])
            if "persistentVolumeClaim" in volume
        }
        assert used - {"raw"} == claims


def all_texts() -> list[Any]:
    found = [
        path
        for path in sorted(INFRA.rglob("*"))
        if path.is_file() and path.suffix in {".yaml", ".Dockerfile", ".example", ".caddy", ".sql"}
    ]
    return [pytest.param(path, id=path.relative_to(INFRA).as_posix()) for path in found]


@pytest.mark.parametrize("path", all_texts())
def test_no_file_holds_a_secret(path: Path) -> None:
    text = path.read_text()
    assert "PRIVATE KEY" not in text
    assert not re.search(r"://[^/\s:]+:[^/\s@]+@", text)  # a password in an address
    for found in re.finditer(
        r"(?im)^\s*-?\s*\{?(name: )?[\w]*(password|secret_key)[\w]*\b(.*)$", text
    ):
        assert re.search(r"_FILE|/run/secrets/|SECRETS_FOLDER|path:|secretName", found.group(0)), (
            found
        )
    assert "kind: Secret" not in text
    assert not re.search(r"[0-9a-f]{32}", text)


def test_secrets_are_new_random_and_their_owners_alone(tmp_path: Path) -> None:
    made = []
    for name in ("one", "two"):
        done = run(INFRA / "scripts" / "make_secrets.sh", tmp_path / name, "anna")
        assert done.returncode == 0, done.stderr
        made.append({p.name: p.read_text() for p in (tmp_path / name).iterdir()})
        for path in (tmp_path / name).iterdir():
            assert path.stat().st_mode & 0o377 == 0
    first, second = made
    assert first["mlflow_username"] == "anna\n"
    assert not {v for k, v in first.items() if k != "mlflow_username"} & set(second.values())
    composed = compose_of(INFRA / "compose" / "coordinator.yaml")
    wanted = {Path(secret["file"]).name for secret in composed["secrets"].values()}
    # The account's name and password are for the person who opens MLflow's pages first.
    assert wanted - {"tls.crt", "tls.key"} == set(first) - {"mlflow_username", "mlflow_password"}
    accounts = json.loads(first["s3_accounts.json"])
    assert accounts["identities"][0]["credentials"][0] == {
        "accessKey": first["s3_access_key"].strip(), "secretKey": first["s3_secret_key"].strip()
    }  # fmt: skip
    again = run(INFRA / "scripts" / "make_secrets.sh", tmp_path / "one")
    assert again.returncode == 2


def told_by_mlflow(code: str, **environment: str) -> Any:
    """Ask MLflow in a process of its own: importing its server warns, which here is an error."""
    done = run(sys.executable, "-W", "ignore", "-c", f"import json\n{code}", **environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_mlflow_gives_no_right_that_was_not_given(tmp_path: Path) -> None:
    run(INFRA / "scripts" / "make_secrets.sh", tmp_path / "made")
    found = told_by_mlflow(
        "from mlflow.server.auth.config import read_auth_config\n"
        "print(json.dumps(read_auth_config()._asdict()))",
        MLFLOW_AUTH_CONFIG_PATH=str(tmp_path / "made" / "basic_auth.ini"),
    )
    assert found["default_permission"] == "NO_PERMISSIONS"
    assert found["auth_cache_ttl_seconds"] == 60
    assert found["grant_default_workspace_access"] is False
    assert found["admin_password"] == (tmp_path / "made" / "mlflow_password").read_text().strip()
    assert found["database_uri"].startswith("postgresql+psycopg://")


def test_the_entry_point_reads_secrets_from_files(tmp_path: Path) -> None:
    entry = INFRA / "docker" / "entrypoint.sh"
    secret = tmp_path / "secret"
    secret.write_text("with 'quotes' $and `more`\n")
    shown = "import os; print(os.environ['AWS_SECRET_ACCESS_KEY'])"
    done = run(entry, sys.executable, "-c", shown, AWS_SECRET_ACCESS_KEY_FILE=str(secret))
    assert done.stdout == secret.read_text()
    gone = "import os; print('AWS_SECRET_ACCESS_KEY_FILE' in os.environ)"
    done = run(entry, sys.executable, "-c", gone, AWS_SECRET_ACCESS_KEY_FILE=str(secret))
    assert done.stdout == "False\n"
    done = run(entry, "true", AWS_SECRET_ACCESS_KEY_FILE=str(tmp_path / "none"))
    assert done.returncode == 2
    assert "found no readable file" in done.stderr


def test_every_secret_that_is_named_is_mounted_and_read() -> None:
    read = re.findall(r"\b[A-Z][A-Z0-9_]+\b", (INFRA / "docker" / "entrypoint.sh").read_text())
    for _, _, one in (param.values for param in services()):
        mounted = {f"/run/secrets/{name}" for name in one.get("secrets", [])}
        for name, value in one.get("environment", {}).items():
            if "/run/secrets/" in str(value):
                assert value in mounted
            if name.endswith("_FILE") and one["image"].startswith(OURS):
                assert name.removesuffix("_FILE") in read
    for _, resource, container in (param.values for param in kubernetes_containers()):
        items = {
            f"/run/secrets/{item['path']}"
            for volume in pod_of(resource)["volumes"]
            for item in volume.get("secret", {}).get("items", [])
        }
        for variable in container.get("env", []):
            if "/run/secrets/" in variable["value"]:
                assert variable["value"] in items


def known_variables() -> set[str]:
    classes = [
        found
        for module in (infra.settings, infra.network)
        for found in vars(module).values()
        if isinstance(found, type) and issubclass(found, BaseSettings) and found is not BaseSettings
    ]
    return {
        f"{one.model_config['env_prefix']}{field}".upper()
        for one in classes
        for field in one.model_fields
    }


@pytest.mark.parametrize("path", all_texts())
def test_every_variable_of_ours_is_a_setting(path: Path) -> None:
    used = {
        name.removesuffix("_FILE") if name != "CONSILIUM_CA_FILE" else name
        for name in re.findall(r"\bCONSILIUM_[A-Z_]+", path.read_text())
    }
    assert used <= known_variables()


TIMES = {
    "CONSILIUM_TIMEZONE": "Europe/Berlin",
    "CONSILIUM_SCHEDULES": '{"prepare-site": "30 0 * * *"}',
}


def times(monkeypatch: pytest.MonkeyPatch, environment: Named) -> infra.settings.TimeSettings:
    """Read what `consilium deploy` reads, run in a container of this environment."""
    with monkeypatch.context() as patched:  # Compose prefers the environment to the file
        for name in TIMES:
            patched.setenv(name, environment[name])
        return infra.settings.load_times()


@pytest.mark.parametrize("path", COMPOSE, ids=ids(COMPOSE))
def test_times_of_the_env_file_reach_deploy(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_is = read_by_compose(path)["services"]["services"]["environment"]
    assert times(monkeypatch, as_is) == infra.settings.TimeSettings(timezone=None, schedules={})
    lines = path.with_name(f"{path.stem}.env.example").read_text().splitlines()
    lines = [line for line in lines if line.partition("=")[0] not in TIMES]
    lines += [f"{name}='{value}'" for name, value in TIMES.items()]
    (tmp_path / path.name).write_text(path.read_text())
    (tmp_path / f"{path.stem}.env.example").write_text("\n".join(lines) + "\n")
    given = read_by_compose(tmp_path / path.name)["services"]["services"]["environment"]
    assert times(monkeypatch, given).model_dump() == {
        "timezone": "Europe/Berlin", "schedules": {"prepare-site": "30 0 * * *"}
    }  # fmt: skip


@pytest.mark.parametrize("overlay", OVERLAYS, ids=ids(OVERLAYS))
def test_times_of_the_manifests_reach_deploy(
    overlay: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (services,) = (
        one for _, _, one in (x.values for x in kubernetes_containers())
        if one["name"] == "services" and one["image"].startswith(f"consilium-{overlay.name}:")
    )  # fmt: skip
    environment = {one["name"]: one["value"] for one in services["env"]}
    assert times(monkeypatch, environment).model_dump() == {"timezone": "UTC", "schedules": {}}


def commands() -> list[Any]:
    found = []
    for path, name, one in (param.values for param in services()):
        for words in (one.get("command"), one["healthcheck"].get("test", [])[1:]):
            found.append((f"{path.stem}-{name}", words))
    for overlay, _, container in (param.values for param in kubernetes_containers()):
        label = f"kubernetes-{overlay.name}-{container['name']}"
        found.append((label, container.get("args")))
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            found.append((label, container.get(probe, {}).get("exec", {}).get("command")))
    for path in DOCKERFILES:
        for words in re.findall(r"CMD (\[.*\])", path.read_text()):
            found.append((path.stem, json.loads(words)))
    return [
        pytest.param(words, id=f"{label}-{'-'.join(map(str, words[1:4]))}")
        for label, words in found
        if words and words[0] == "consilium"
    ]


@pytest.mark.parametrize("words", commands())
def test_every_command_in_a_container_is_one_of_ours(words: list[str]) -> None:
    command, rest = get_command(app), words[1:]
    while hasattr(command, "commands"):
        command = command.commands[rest[0]]
        rest = rest[1:]
    flags = {flag for parameter in command.params for flag in parameter.opts}
    context = command.make_context("consilium", list(rest), resilient_parsing=False)
    assert {word for word in rest if word.startswith("--")} <= flags
    assert not context.args


def test_mlflow_knows_the_words_it_is_started_with() -> None:
    known = told_by_mlflow(
        "from mlflow.cli import cli\n"
        "print(json.dumps([f for p in cli.commands['server'].params for f in p.opts]))"
    )
    composed = compose_of(INFRA / "compose" / "coordinator.yaml")["services"]["mlflow"]["command"]
    manifests = next(
        container["args"]
        for _, _, container in (param.values for param in kubernetes_containers())
        if container["name"] == "mlflow"
    )
    assert [w.partition("=")[0] for w in composed] == [w.partition("=")[0] for w in manifests]
    for word in composed[2:]:
        assert word.partition("=")[0] in known


@pytest.mark.parametrize("path", COMPOSE, ids=ids(COMPOSE))
def test_the_example_names_every_value_that_is_asked_for(path: Path) -> None:
    asked = set(re.findall(r"\$\{([A-Z_]+)", path.read_text()))
    lines = path.with_name(f"{path.stem}.env.example").read_text().splitlines()
    given = {line.partition("=")[0] for line in lines if line and not line.startswith("#")}
    assert given == asked | {"COMPOSE_PROJECT_NAME"}


def test_the_page_says_where_commands_run_and_such_containers_are_there() -> None:
    page = (INFRA / "README.md").read_text()
    parts = {name for _, name, _ in (x.values for x in services())}
    named = re.findall(r"docker compose exec (?:-T |--env \S+ )*(\S+)", page)
    assert {"services", "federation", "postgres"} == set(named) <= parts
    found = {one["name"] for _, _, one in (x.values for x in kubernetes_containers())}
    assert {"services", "federation"} == set(re.findall(r" -c (\w+) --", page)) <= found
    for party in ("site", "coordinator"):
        where = f"kubectl -n consilium-{party} exec deploy/party -c services --"
        assert f"{where} consilium deploy\n" in page
    assert page.count("docker compose exec services consilium deploy ") == 2


def test_addresses_are_examples() -> None:
    """Nothing in these files points anywhere real before somebody puts an address in."""
    text = "".join(param.values[0].read_text() for param in all_texts())
    for address in re.findall(r"\b\d+\.\d+\.\d+\.\d+(?:/\d+)?", text):
        assert address in {"127.0.0.1", "0.0.0.0", *EXAMPLES}
    for host in re.findall(r"https?://([a-z][\w.-]*)", text):
        assert host in {"mlflow", "objects", "services", *EXAMPLES}
