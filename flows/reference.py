"""What the truth says: the pooled rows, the true hazard, each site's model everywhere.

For simulated and public data only: everything here needs all rows in one place, which is what the
federation exists to avoid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from flows.inputs import shared_table
from flows.records import Reference
from fusion.discrete import fit_logistic_hazard
from fusion.encoder_inputs import take
from fusion.evaluation import NoComparablePairs, PairCounts, concordance_index, pair_counts
from fusion.federation import LOCAL_ENCODERS, PROTOCOL
from fusion.late import LogisticHazardModel, fit_late_fusion, linear_inputs
from fusion.survival import fit_cox, moments

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from flows.inputs import LocalEncoder, SiteInputs
    from flows.protocol import StudyProtocol
    from fusion.evaluation import Estimate
    from fusion.federation import Fitted, SiteStudy
    from fusion.late import FusionModel

    Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Consortium:
    """Everything of every site in one place.

    Attributes
    ----------
    inputs, studies, local
        Per site its inputs, its part in the run and its own encoders, in one order.
    """

    protocol: StudyProtocol
    inputs: Mapping[str, SiteInputs]
    studies: Mapping[str, SiteStudy]
    local: Mapping[str, Mapping[str, LocalEncoder]]


def compare(
    consortium: Consortium,
    fitted: Fitted,
    *,
    true_log_hazard: Mapping[str, Mapping[str, float]] | None = None,
) -> Reference:
    """Score every arm on the same patients: all test patients of all sites.

    Parameters
    ----------
    true_log_hazard
        Per site and patient; None where nobody knows it.
    """
    scored = arm_log_hazard(consortium, fitted)
    if true_log_hazard is not None:
        scored["true_hazard"] = {
            site: np.array(
                [
                    true_log_hazard[site][x]
                    for x in found.patient_ids[~found.train][
                        consortium.studies[site].designs.tested
                    ]
                ]
            )
            for site, found in consortium.inputs.items()
        }
    counts = {arm: _pairs(consortium, by_site) for arm, by_site in scored.items()}
    local = {
        site: concordance_index(list(_pairs(consortium, everywhere).values()))
        for site, everywhere in local_log_hazard(consortium).items()
    }
    return Reference(
        concordance={arm: concordance_index(list(c.values())) for arm, c in counts.items()},
        by_site={arm: _estimates(c) for arm, c in counts.items()},
        local=local,
        local_mean=float(np.mean([e.value for e in local.values()])),
        max_coefficient_gap=max_coefficient_gap(consortium, fitted),
    )


def arm_log_hazard(consortium: Consortium, fitted: Fitted) -> dict[str, dict[str, Floats]]:
    """Per arm and site, the (n_test,) log hazard of the site's test patients; higher is worse."""
    return {
        "federated": _federated(consortium, fitted, PROTOCOL),
        "federated_local_encoders": _federated(consortium, fitted, LOCAL_ENCODERS),
        "pooled": pooled_log_hazard(consortium, fitted),
    }


def _pairs(consortium: Consortium, log_hazard: Mapping[str, Floats]) -> dict[str, PairCounts]:
    counts = {}
    for site, scores in log_hazard.items():
        test = consortium.studies[site].designs.test
        counts[site] = pair_counts(scores, test.event, test.time)
    return counts


def _estimates(counts: Mapping[str, PairCounts]) -> dict[str, Estimate]:
    found = {}
    for site, pairs in counts.items():
        try:
            found[site] = concordance_index(pairs)
        except NoComparablePairs:
            continue
    return found


def _federated(consortium: Consortium, fitted: Fitted, arm: str) -> dict[str, Floats]:
    model = fitted.models.get(arm, fitted.models[PROTOCOL])
    arm = arm if arm in fitted.models else PROTOCOL
    return {
        site: study.test_log_hazard(arm, model.coefficients)
        for site, study in consortium.studies.items()
    }


def local_log_hazard(consortium: Consortium) -> dict[str, dict[str, Floats]]:
    """Per training site, the log hazard of its own model on the test rows of every site."""
    found = {}
    for site, study in consortium.studies.items():
        model = study.own_model()
        if model is not None:
            found[site] = {
                # Who lacks all that the site's own model reads is at its average.
                other: np.nan_to_num(
                    model.predict(_columns_by(consortium, encoders_of=site, patients_of=other))
                )
                for other in consortium.studies
            }
    return found


def _columns_by(consortium: Consortium, *, encoders_of: str, patients_of: str) -> Floats:
    """(n_test, m) log hazards of one site's encoders on the test patients of another."""
    inputs = consortium.inputs[patients_of]
    tested = consortium.studies[patients_of].designs.tested
    columns = np.full((int((~inputs.train).sum()), len(consortium.protocol.modalities)), np.nan)
    for column, modality in enumerate(consortium.protocol.modalities):
        trained = consortium.local[encoders_of].get(modality)
        if trained is not None and trained.encoder is not None and modality in inputs.modalities:
            scores = trained.encoder.log_hazard(inputs.modalities[modality].values)
            columns[:, column] = inputs.spread(modality, scores).test
    return columns[tested]


def pooled_log_hazard(consortium: Consortium, fitted: Fitted) -> dict[str, Floats]:
    """Per site, the test log hazard of a model whose encoders and fusion saw the pooled rows.

    Bags get the network that the protocol names, trained on all sites' bags, also where the
    consortium shares a linear encoder of them: what pooling would allow, not what it would mimic.
    """
    protocol = consortium.protocol
    columns = {}
    for modality in protocol.modalities:
        columns[modality] = (
            _pooled_linear(consortium, fitted, modality)
            if modality in fitted.encoders and not protocol.encoder[modality].reads_tiles
            else _pooled_encoder(consortium, modality)
        )
    trained = [x for x in consortium.inputs.values() if x.trains]
    stacked = {
        site: np.column_stack([columns[m][site] for m in protocol.modalities])
        for site in consortium.inputs
    }
    train = [stacked[x.site][x.train] for x in trained]
    model = fit_late_fusion(
        np.concatenate(train),
        np.concatenate([x.event[x.train] for x in trained]),
        np.concatenate([x.time[x.train] for x in trained]),
        modalities=protocol.modalities,
        edges_days=protocol.study.grid_days,
        ridge=fitted.ridge[PROTOCOL],
        strata=_labels([len(rows) for rows in train]),
        model="logistic_hazard" if protocol.fusion.model == "logistic_hazard" else "cox",
    )
    return {
        site: model.predict(stacked[site][~found.train][consortium.studies[site].designs.tested])
        for site, found in consortium.inputs.items()
    }


def _labels(sizes: Sequence[int]) -> NDArray[np.intp]:
    return np.repeat(np.arange(len(sizes)), sizes)


@dataclass(frozen=True)
class _Pool:
    """Training rows of one modality over all sites that contribute it."""

    sites: tuple[str, ...]
    at: tuple[NDArray[np.intp], ...]  # per site, which of the modality's patients are in training
    event: NDArray[np.bool_]
    time: Floats
    strata: NDArray[np.intp]
    folds: NDArray[np.int64]


def _pool(consortium: Consortium, modality: str) -> _Pool:
    sites = tuple(s for s, study in consortium.studies.items() if study.contributes(modality))
    inputs = [consortium.inputs[s] for s in sites]
    at = tuple(np.flatnonzero(x.train[x.modalities[modality].rows]) for x in inputs)
    rows = [x.modalities[modality].rows[a] for x, a in zip(inputs, at, strict=True)]
    return _Pool(
        sites=sites,
        at=at,
        event=np.concatenate([x.event[r] for x, r in zip(inputs, rows, strict=True)]),
        time=np.concatenate([x.time[r] for x, r in zip(inputs, rows, strict=True)]),
        strata=_labels([len(r) for r in rows]),
        folds=np.concatenate([x.folds[r] for x, r in zip(inputs, rows, strict=True)]),
    )


def _spread(
    consortium: Consortium, modality: str, pool: _Pool, *, every: Mapping[str, Floats], oof: Floats
) -> dict[str, Floats]:
    """(n,) column per site: out-of-fold on pooled training rows, refitted elsewhere, else NaN."""
    parts = np.split(oof, np.cumsum([len(a) for a in pool.at])[:-1])
    found = {}
    for site, inputs in consortium.inputs.items():
        column = np.full(len(inputs.time), np.nan)
        if site in every:
            scores = every[site].copy()
            if site in pool.sites:
                at = pool.sites.index(site)
                scores[pool.at[at]] = parts[at]
            column[inputs.modalities[modality].rows] = scores
        found[site] = column
    return found


def _pooled_encoder(consortium: Consortium, modality: str) -> dict[str, Floats]:
    from fusion.training import cross_fit, fit_encoder  # torch takes seconds to import

    having = {s: x for s, x in consortium.inputs.items() if modality in x.modalities}
    if not any(study.contributes(modality) for study in consortium.studies.values()):
        return {s: np.full(len(x.time), np.nan) for s, x in consortium.inputs.items()}
    pool = _pool(consortium, modality)
    values = [
        take(consortium.inputs[s].modalities[modality].values, a)
        for s, a in zip(pool.sites, pool.at, strict=True)
    ]
    rows = (
        np.concatenate([np.asarray(v) for v in values])
        if isinstance(values[0], np.ndarray)
        else [bag for bags in values for bag in bags]
    )
    spec = consortium.protocol.encoder[modality]
    seed = consortium.protocol.study.seed
    crossed = cross_fit(
        rows, pool.event, pool.time, pool.folds, spec, strata=pool.strata, seed=seed
    )
    encoder = fit_encoder(rows, pool.event, pool.time, spec, strata=pool.strata, seed=seed)
    every = {s: encoder.log_hazard(x.modalities[modality].values) for s, x in having.items()}
    return _spread(consortium, modality, pool, every=every, oof=crossed.out_of_fold)


def _pooled_linear(consortium: Consortium, fitted: Fitted, modality: str) -> dict[str, Floats]:
    protocol = consortium.protocol
    pool = _pool(consortium, modality)
    tables = {
        s: shared_table(x, modality, protocol)
        for s, x in consortium.inputs.items()
        if modality in x.modalities
    }
    raw = np.concatenate([tables[s][a] for s, a in zip(pool.sites, pool.at, strict=True)])
    seen = moments(raw)
    x = linear_inputs(raw, seen.mean, seen.scale)
    axes = consortium.studies[pool.sites[0]].designs.axes.get(modality, np.eye(x.shape[1]))
    penalty = _penalty(fitted, modality)

    def coefficients(rows: NDArray[np.bool_]) -> Floats:
        fit = fit_cox(
            x[rows] @ axes,
            pool.event[rows],
            pool.time[rows],
            strata=pool.strata[rows],
            ridge=penalty["ridge"],
            l1=penalty["l1"],
        )
        return np.asarray(axes @ fit.candidate)

    everyone = np.ones(len(x), dtype=bool)
    refitted = coefficients(everyone)
    oof = x @ refitted
    if fitted.encoders[modality].cross_fitted:
        for fold in np.unique(pool.folds):
            held_out = pool.folds == fold
            oof[held_out] = x[held_out] @ coefficients(~held_out)
    every = {s: linear_inputs(t, seen.mean, seen.scale) @ refitted for s, t in tables.items()}
    return _spread(consortium, modality, pool, every=every, oof=oof)


def _penalty(fitted: Fitted, modality: str) -> dict[str, float]:
    ridge, share = fitted.ridge[modality], fitted.plan.l1_ratio.get(modality, 0.0)
    return {"ridge": ridge * (1.0 - share), "l1": ridge * share}


def max_coefficient_gap(consortium: Consortium, fitted: Fitted) -> float:
    """Largest difference between federated coefficients and those of a fit to the pooled rows.

    Compares every fusion arm and every encoder fitted from sums, each with its penalty and strata.
    Cox models with a ridge are compared with lifelines'; it has no exact elastic net and no
    discrete-time model, so that those are compared with our own fit of the pooled rows.
    """
    gaps = [
        _gap(consortium, arm, _coefficients(model), {"ridge": fitted.ridge[PROTOCOL], "l1": 0.0})
        for arm, model in fitted.models.items()
    ]
    for name, encoder in fitted.encoders.items():
        contributing = [x for x in consortium.studies.values() if x.contributes(name)]
        axes = contributing[0].designs.axes.get(name)
        beta = encoder.coefficients if axes is None else axes.T @ encoder.coefficients
        gaps.append(_gap(consortium, name, beta, _penalty(fitted, name)))
    return max(gaps)


def _coefficients(model: FusionModel) -> Floats:
    if isinstance(model, LogisticHazardModel):
        return np.concatenate([model.alpha, model.coefficients])
    return model.coefficients


@dataclass(frozen=True)
class _Pooled:
    """Inputs and outcome behind a fit, of every site that takes part in it."""

    x: Floats
    event: NDArray[np.bool_]
    time: Floats
    strata: NDArray[np.intp]


def _behind(consortium: Consortium, fit: str) -> _Pooled:
    parts = []
    for study in consortium.studies.values():
        taking_part = study.contributes(fit) if fit in study.plan.sums else study.trains
        if taking_part:
            parts.append(study.designs.design(fit))
    return _Pooled(
        x=np.concatenate([x for x, _ in parts]),
        event=np.concatenate([outcome.event for _, outcome in parts]),
        time=np.concatenate([outcome.time for _, outcome in parts]),
        strata=_labels([len(x) for x, _ in parts]),
    )


def _gap(
    consortium: Consortium, fit: str, coefficients: Floats, penalty: dict[str, float]
) -> float:
    pooled = _behind(consortium, fit)
    plan = next(iter(consortium.studies.values())).plan
    if fit in plan.arms and plan.n_baseline:
        expected = fit_logistic_hazard(
            pooled.x,
            pooled.event,
            pooled.time,
            edges_days=np.array(plan.edges_days),
            strata=pooled.strata,
            ridge=penalty["ridge"],
        ).candidate
    elif penalty["l1"] > 0.0:
        expected = fit_cox(
            pooled.x,
            pooled.event,
            pooled.time,
            strata=pooled.strata,
            ridge=penalty["ridge"],
            l1=penalty["l1"],
        ).candidate
    else:
        expected = _lifelines(pooled, penalty["ridge"])
    return float(np.abs(expected - coefficients).max())


def _lifelines(pooled: _Pooled, ridge: float) -> Floats:
    from lifelines import CoxPHFitter  # slow to import, and needed for this check only

    names = [f"x{i}" for i in range(pooled.x.shape[1])]
    frame = pd.DataFrame(pooled.x, columns=names).assign(
        event=pooled.event, time=pooled.time, strata=pooled.strata
    )
    spread = frame[names].std(ddof=1)
    varying = [c for c in names if spread[c] > 1e-12]
    # lifelines penalises coefficients of inputs that it scales itself; undo its scale.
    model = CoxPHFitter(penalizer=(ridge / spread[varying] ** 2).to_numpy())
    model.fit(
        frame[[*varying, "event", "time", "strata"]],
        duration_col="time",
        event_col="event",
        strata="strata",
        fit_options={"precision": 1e-14, "max_steps": 100},
    )
    return model.params_.reindex(names).fillna(0.0).to_numpy()
