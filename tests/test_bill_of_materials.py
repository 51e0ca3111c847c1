from __future__ import annotations

import json
from email.message import Message
from importlib.metadata import Distribution, version
from typing import TYPE_CHECKING, Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from flows import bill_of_materials as bill
from flows.record_values import record_values
from tests.simulated_record import RUN, full_record
from tests.test_dossier import CREATED

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="module")
def values() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(record_values(full_record(), created=CREATED)))
    return found


@pytest.fixture
def unread() -> Iterator[None]:
    bill.packages.cache_clear()
    yield
    bill.packages.cache_clear()


def test_the_bill_is_cyclonedx_and_the_same_again(values: dict[str, Any]) -> None:
    found = bill.materials(values)
    named = {"run": RUN, "created": values["created"], "model": "lung-os-fusion"}
    text = bill.to_cyclonedx(found, **named)
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    assert text == bill.to_cyclonedx(found, **named)
    listed = json.loads(text)
    assert listed["specVersion"] == "1.6"
    packages = {x["name"]: x for x in listed["components"] if x["type"] == "library"}
    assert len(packages) == found["n_packages"]
    assert packages["numpy"]["version"] == version("numpy")
    assert packages["numpy"]["purl"] == f"pkg:pypi/numpy@{version('numpy')}"
    models = [x for x in listed["components"] if x["type"] == "machine-learning-model"]
    assert {x["name"] for x in models} == {x["name"] for x in found["models"]}
    assert all(x["licenses"] for x in listed["components"])


def test_every_package_and_model_says_its_terms(values: dict[str, Any]) -> None:
    found = bill.materials(values)
    assert found["source"] == "requirements.lock"
    assert all(x["licence"] and x["version"] for x in found["packages"])
    assert all(all(x.values()) for x in found["models"])
    direct = {x["name"] for x in found["packages"] if x["direct"]}
    assert {"numpy", "torch", "cyclonedx-python-lib"} <= direct
    assert "pytest" not in direct
    (tiles,) = [x for x in found["models"] if x["part"] == "tile encoder of pathology"]
    assert tiles["name"] == "tf_efficientnet_lite0"
    assert "names no licence" in tiles["licence"]


def test_another_network_is_named_with_its_publishers_terms(values: dict[str, Any]) -> None:
    spec = {**values["protocol"]["modality"]["pathology"], "encoder": "hf-hub:some/network"}
    changed = {**values, "protocol": {**values["protocol"], "modality": {"pathology": spec}}}
    (first, *_) = bill.materials(changed)["models"]
    assert first["name"] == "hf-hub:some/network"
    assert "whoever published" in first["licence"]
    spec["pretrained"] = False
    assert "not pretrained" in bill.materials(changed)["models"][0]["licence"]


@pytest.mark.usefixtures("unread")
def test_without_a_checkout_the_installed_packages_are_listed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bill, "_ROOT", tmp_path)
    found = bill.packages()
    assert found["source"] == "installed packages"
    names = [x["name"] for x in found["packages"]]
    assert "numpy" in names
    assert "consilium" not in names


class Named(Distribution):
    """A package of which only the metadata are known."""

    def __init__(self, **lines: str | list[str]) -> None:
        self.lines = lines

    @property
    def metadata(self) -> Any:
        message = Message()
        for key, values in self.lines.items():
            for value in [values] if isinstance(values, str) else values:
                message[key.replace("_", "-")] = value
        return message

    def read_text(self, filename: str) -> str | None:
        return None

    def locate_file(self, path: Any) -> Any:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("lines", "licence"),
    [({"License_Expression": "MIT OR Apache-2.0", "License": "x"}, "MIT OR Apache-2.0"),
     ({"License": "BSD-3-Clause"}, "BSD-3-Clause"),
     ({"License": "UNKNOWN"}, bill.NO_LICENCE),
     ({}, bill.NO_LICENCE),
     ({"Classifier": ["License :: OSI Approved :: MIT License", "Topic :: x"]}, "MIT License"),
     ({"Classifier": ["License :: OSI Approved"]}, bill.NO_LICENCE)],
)  # fmt: skip
def test_a_licence_is_read_from_where_a_package_names_it(
    lines: dict[str, Any], licence: str
) -> None:
    assert bill.licence_of(Named(**lines)) == licence
    assert bill.licence_of(None) == "not installed here"
