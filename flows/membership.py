"""The membership audit of a site: what its models tell of who was trained on, and the results.

Everything stays at the site. A result counts for one cohort, one protocol and one state of our
sources, and is sealed under the site's secret, so that one which was copied or edited is none.
"""

from __future__ import annotations

import hmac
import json
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from flows.inputs import keyed_digest
from flows.loading import encoder_key, load_encoders, load_inputs
from flows.sealed import note
from flows.shared import shared_networks
from flows.versions import source_digest
from fusion.encoder_inputs import take
from fusion.late import ESTIMATORS
from fusion.membership import (
    Effort,
    MembershipResult,
    audit,
    encoder_fit,
    fusion_fit,
    shared_fit,
)
from modalities.cohort import DataError
from modalities.files import fingerprint, replacing

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from flows.inputs import LocalEncoder, SiteInputs
    from flows.protocol import StudyProtocol
    from fusion.late import CoxFusion, GatedFusion, LogisticHazardFusion
    from fusion.membership import Fit
    from infra.settings import SiteSettings

    Rows = np.ndarray[tuple[int], np.dtype[np.intp]]

MEMBERSHIP: Final = "membership.json"
FUSION: Final = "fusion"
EFFORT: Final = Effort(n_models=128, time_budget_s=900.0)
"""What the audit of one model may cost where nothing else is asked for."""
_FORMAT: Final = 1


def planned_models(protocol: StudyProtocol, effort: Effort = EFFORT) -> int:
    """How many models :func:`audit_site` announces to its ``advance``, all together."""
    return effort.n_models * (len(protocol.modalities) + 1)


def audit_site(
    settings: SiteSettings,
    protocol: StudyProtocol,
    *,
    effort: Effort = EFFORT,
    advance: Callable[[int], object] = lambda n_models: None,
) -> list[MembershipResult]:
    """Attack each encoder and the fusion model on the site's training rows; keep the results.

    Parameters
    ----------
    effort
        Of each model's audit.
    advance
        Told how many more models are done, of :func:`planned_models`.

    Returns
    -------
    list
        The encoders by modality, then the fusion model under the name ``fusion``. A modality
        without an encoder at this site, or with too few patients, is left out; the local log says
        why.

    Raises
    ------
    DataError
        If there is no cohort of this protocol, the site does not train, or no encoder is trained.
    """
    inputs = load_inputs(settings, protocol)
    if not inputs.trains:
        raise DataError(
            "below_minimum",
            "training patients: found fewer than the study's minimum, needed at least those; "
            "a site that does not train has nothing to audit",
        )
    local = load_encoders(settings, protocol, inputs)
    results = audit_inputs(inputs, local, protocol, effort=effort, advance=advance)
    write_results(settings, protocol, results, cohort=inputs.cohort)
    return results


def audit_inputs(
    inputs: SiteInputs,
    local: Mapping[str, LocalEncoder],
    protocol: StudyProtocol,
    *,
    effort: Effort = EFFORT,
    advance: Callable[[int], object] = lambda n_models: None,
) -> list[MembershipResult]:
    """Audit as :func:`audit_site`, from rows and encoders that are there already.

    Raises
    ------
    DataError
        If no encoder of these rows is trained.
    """
    if all(found.encoder is None for found in local.values()):
        raise DataError(
            "not_trained",
            "encoders: found none of this cohort and protocol, needed them for the audit; run "
            "`consilium site train`",
        )
    results = []
    for name in (*protocol.modalities, FUSION):
        target = _target(name, inputs, local, protocol)
        if target is None:
            advance(effort.n_models)
            continue
        rows, fit = target
        try:
            result = audit(
                fit,
                inputs.event[rows],
                inputs.time[rows],
                name=name,
                seed=protocol.study.seed,
                effort=effort,
                advance=advance,
            )
        except ValueError as error:  # too few patients of this one model
            note(error)
        else:
            results.append(result)
    return results


def _target(
    name: str,
    inputs: SiteInputs,
    local: Mapping[str, LocalEncoder],
    protocol: StudyProtocol,
) -> tuple[Rows, Fit] | None:
    """Rows of the cohort that a model is trained on, and its training; None without the model."""
    if name == FUSION:
        return _fusion_target(inputs, local, protocol)
    found = inputs.modalities.get(name)
    if found is None:
        return None
    train = np.flatnonzero(inputs.train[found.rows])
    rows = found.rows[train]
    outcome = (inputs.event[rows], inputs.time[rows])
    if protocol.encoder[name].sharing == "weights":
        network = shared_networks(inputs, protocol)[name]
        values = take(network.values, train)
        plan = protocol.plan(fingerprint(name)).networks[name]
        return rows, shared_fit(values, *outcome, protocol.encoder[name], plan)
    encoder = local[name].encoder if name in local else None
    if encoder is None:
        return None
    return rows, encoder_fit(
        take(found.values, train),
        *outcome,
        encoder.chosen,
        n_steps=encoder.n_steps,
        seed=protocol.study.seed,
    )


def _fusion_target(
    inputs: SiteInputs, local: Mapping[str, LocalEncoder], protocol: StudyProtocol
) -> tuple[Rows, Fit] | None:
    names = [x for x in protocol.modalities if x in local and local[x].encoder is not None]
    columns = np.column_stack([inputs.spread(x, local[x].log_hazard).train for x in names])
    present = ~np.isnan(columns).all(axis=1)
    rows = np.flatnonzero(inputs.train)[present]

    def _estimator() -> CoxFusion | LogisticHazardFusion | GatedFusion:
        section = protocol.fusion
        options: dict[str, Any] = {"hidden": section.hidden} if section.model == "gated" else {}
        return ESTIMATORS[section.model](
            modalities=names,
            edges_days=protocol.study.grid_days,
            ridge=section.ridge,
            seed=protocol.study.seed,
            **options,
        )

    return rows, fusion_fit(columns[present], inputs.event[rows], inputs.time[rows], _estimator)


def write_results(
    settings: SiteSettings,
    protocol: StudyProtocol,
    results: list[MembershipResult],
    *,
    cohort: str,
) -> Path:
    """Keep the results of an audit at the site, readable by its owner only; give the file.

    Parameters
    ----------
    cohort
        Digest of the audited cohort under the site's secret.
    """
    values: dict[str, Any] = {
        "format": _FORMAT,
        "protocol": protocol.fingerprint(),
        "code": source_digest("fusion", "modalities"),
        "results": [
            {
                "key": encoder_key(cohort, protocol, result.name),
                "passes": result.passes,
                "result": result.to_dict(),
            }
            for result in results
        ],
    }
    path = settings.path(MEMBERSHIP)
    with replacing(path) as temporary:  # which makes it for its owner only
        temporary.write_text(json.dumps(values | {"seal": _seal(settings, values)}, indent=1))
    return path


def read_results(settings: SiteSettings, protocol: StudyProtocol) -> dict[str, MembershipResult]:
    """Results of the last audit by their encoder keys; none if it was of another protocol."""
    try:
        values = json.loads(settings.path(MEMBERSHIP).read_text(encoding="utf-8"))
        seal = str(values.pop("seal"))
        is_ours = hmac.compare_digest(seal, _seal(settings, values))
        if not is_ours or (values["format"], values["protocol"]) != (
            _FORMAT,
            protocol.fingerprint(),
        ):
            return {}
        return {one["key"]: MembershipResult(**one["result"]) for one in values["results"]}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        note(error)
        return {}


def _seal(settings: SiteSettings, values: dict[str, Any]) -> str:
    return keyed_digest(settings.key, fingerprint(["membership", values]))


def may_share_weights(
    settings: SiteSettings, protocol: StudyProtocol, modality: str, key: str
) -> bool:
    """Whether the site's last audit lets a network's weights leave it.

    Parameters
    ----------
    modality
        Whose encoder's weights are shared; ``fusion`` for those of a gated fusion model.
    key
        :func:`flows.site.encoder_key` of the cohort that takes part, the protocol and ``modality``:
        a passing audit of another cohort, protocol or state of our sources does not count.
    """
    result = read_results(settings, protocol).get(key)
    return result is not None and result.name == modality and result.passes


__all__ = [
    "EFFORT",
    "FUSION",
    "MEMBERSHIP",
    "audit_inputs",
    "audit_site",
    "may_share_weights",
    "planned_models",
    "read_results",
    "write_results",
]
