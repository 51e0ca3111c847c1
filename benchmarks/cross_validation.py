"""Run a federated study on a real table again and again, and score every arm on held-out patients.

Both benchmarks share it: they read their files into :class:`Patients`, and say what the study is in
a protocol. What is fitted is the code that a study runs, in this process.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from rich.console import Console
from rich.progress import track

from flows.inputs import ModalityInputs, SiteInputs, harmonised, may_train
from flows.memory import fit_in_memory
from flows.reference import arm_log_hazard, local_log_hazard, max_coefficient_gap
from fusion.evaluation import NoComparablePairs, PairCounts, concordance_index, pair_counts
from fusion.federation import PROTOCOL, QuorumNotMet
from fusion.survival import ConvergenceError
from modalities.cohort import DataError
from modalities.files import fingerprint

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from flows.protocol import StudyProtocol
    from flows.reference import Consortium
    from fusion.federation import Fitted

    Floats = NDArray[np.float64]
    Flags = NDArray[np.bool_]

_DIGITS = 6  # of a printed concordance
Figures = dict[str, Any]


@dataclass(frozen=True)
class Patients:
    """All patients of a benchmark in one order.

    Attributes
    ----------
    site, event, time
        (n,) name of the site, True where the event was observed, days.
    tables
        Per modality an (n, p) table, NaN for a missing cell; a row of NaN where the patient lacks
        the modality.
    """

    site: NDArray[np.str_]
    event: Flags
    time: Floats
    tables: Mapping[str, Floats]


@dataclass(frozen=True)
class Split:
    """One partition: ``train`` (n,) True for training patients, the others are the test."""

    repeat: int
    train: Flags


@dataclass(frozen=True)
class Scored:
    """Log hazards of the test patients of one split, higher is worse, NaN where there is none.

    Attributes
    ----------
    rows
        (n_test,) which patients they are.
    arms, modalities
        Per arm, and per modality the consortium's encoder alone: (n_test,).
    local
        Per site that trained a model, that model on the test patients of all sites: (n_test,).
    rounds
        Most sums that any fit took.
    max_coefficient_gap
        Largest difference to an independent library's fit of the pooled rows.
    cross_fitted
        Modalities whose log hazards were out-of-fold when fused.
    training_sites
        Sites above the minimum counts.
    """

    repeat: int
    rows: NDArray[np.intp]
    arms: Mapping[str, Floats]
    modalities: Mapping[str, Floats]
    local: Mapping[str, Floats]
    rounds: int
    max_coefficient_gap: float
    cross_fitted: tuple[str, ...]
    training_sites: tuple[str, ...]


def read_text(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """Read a CSV file that has these columns, and perhaps others, as text; NaN is missing.

    Raises
    ------
    DataError
        If the file is missing or no CSV table, has no row, or lacks a column.
    """
    try:
        table = pd.read_csv(path, dtype=str)
    except FileNotFoundError:
        raise DataError("missing_file", f"{path.name}: found no such file, needed a CSV") from None
    except (OSError, ValueError):
        raise DataError("unreadable", f"{path.name}: needed a CSV table in UTF-8") from None
    for column in columns:
        if column not in table.columns:
            raise DataError("missing_column", f"{path.name}: needed a column {column!r}")
    if table.empty:
        raise DataError("empty", f"{path.name}: found no row, needed one per patient")
    return table


def numbers(table: pd.DataFrame, columns: Sequence[str], *, source: str) -> pd.DataFrame:
    """Turn columns of text into numbers; NaN is missing.

    Raises
    ------
    DataError
        If a cell is no finite number.
    """
    found = table[list(columns)].apply(pd.to_numeric, errors="coerce").astype(np.float64)
    for column in columns:
        if (found[column].isna() & table[column].notna()).any() or np.isinf(found[column]).any():
            raise DataError("not_a_number", f"{source}: column {column!r}: needed numbers only")
    return found


def deal_folds(
    patients: Patients, n_folds: int, seed: Sequence[int], *, rows: NDArray[np.intp]
) -> NDArray[np.int64]:
    """(n,) fold of each patient: those of each site, events first, are dealt in turn.

    Parameters
    ----------
    rows
        Who is dealt; the others get fold 0.

    Raises
    ------
    DataError
        If there are fewer patients than folds.
    """
    if len(rows) < n_folds:
        raise DataError("too_few", f"patients: found {len(rows)}, needed at least one per fold")
    shuffle = np.random.default_rng(seed).random(len(rows))
    dealt = np.lexsort((shuffle, ~patients.event[rows], patients.site[rows]))
    folds = np.zeros(len(patients.time), dtype=np.int64)
    folds[rows[dealt]] = np.arange(len(rows)) % n_folds
    return folds


def cross_validation(patients: Patients, *, n_folds: int, repeats: int, seed: int) -> list[Split]:
    """Hold every patient out once per repeat; folds are stratified by site and event."""
    everyone = np.arange(len(patients.time))
    return [
        Split(repeat, folds != fold)
        for repeat in range(repeats)
        for folds in [deal_folds(patients, n_folds, (seed, repeat), rows=everyone)]
        for fold in range(n_folds)
    ]


def run_splits(
    patients: Patients, protocol: StudyProtocol, splits: Sequence[Split]
) -> list[Scored]:
    """Fit and score one split after the other, with a bar on standard error in a terminal."""
    shown = track(
        splits,
        description=protocol.study.name,
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
    return [fit_split(patients, protocol, split) for split in shown]


def fit_split(patients: Patients, protocol: StudyProtocol, split: Split) -> Scored:
    """Fit every arm on the training patients and score the test patients."""
    rows, inputs = site_inputs(patients, protocol, split)
    consortium, fitted = fit_in_memory(protocol, inputs)
    test = {site: rows[site][~found.train] for site, found in inputs.items()}
    order = np.concatenate(list(test.values()))

    def joined(by_site: Mapping[str, Floats]) -> Floats:
        return np.concatenate([by_site[site] for site in test])

    return Scored(
        repeat=split.repeat,
        rows=order,
        arms={arm: joined(x) for arm, x in arm_log_hazard(consortium, fitted).items()},
        modalities=_modality_log_hazard(consortium, joined),
        local={site: joined(x) for site, x in _local_log_hazard(consortium).items()},
        rounds=max(fitted.fit_rounds.values()),
        max_coefficient_gap=max_coefficient_gap(consortium, fitted),
        cross_fitted=tuple(m for m, encoder in fitted.encoders.items() if encoder.cross_fitted),
        training_sites=_training_sites(fitted),
    )


def _training_sites(fitted: Fitted) -> tuple[str, ...]:
    return tuple(outcome.site for outcome in fitted.sites if outcome.trains)


def _modality_log_hazard(
    consortium: Consortium, joined: Callable[[Mapping[str, Floats]], Floats]
) -> dict[str, Floats]:
    columns = {s: study.columns(PROTOCOL).test for s, study in consortium.studies.items()}
    return {
        modality: joined({site: found[:, column] for site, found in columns.items()})
        for column, modality in enumerate(consortium.protocol.modalities)
    }


def _local_log_hazard(consortium: Consortium) -> dict[str, dict[str, Floats]]:
    if len(consortium.protocol.modalities) > 1:
        return local_log_hazard(consortium)
    # With one modality there is nothing to fuse, and fusing the out-of-fold log hazards of a few
    # events can turn the model's sign, which would flatter the consortium.
    (modality,) = consortium.protocol.modalities
    return {
        site: {
            other: inputs.spread(
                modality, trained[modality].encoder.log_hazard(inputs.modalities[modality].values)
            ).test
            for other, inputs in consortium.inputs.items()
        }
        for site, trained in consortium.local.items()
        if modality in trained and trained[modality].encoder is not None
    }


def site_inputs(
    patients: Patients, protocol: StudyProtocol, split: Split
) -> tuple[dict[str, NDArray[np.intp]], dict[str, SiteInputs]]:
    """Per site the patients that take part in a split, and what its encoders read.

    A site below its minimum counts takes part with its test patients only.
    """
    seed = (protocol.study.seed, split.repeat, 1)
    folds = deal_folds(patients, protocol.fusion.folds, seed, rows=np.flatnonzero(split.train))
    taking_part, inputs = {}, {}
    for site in sorted(set(patients.site.tolist())):
        rows = np.flatnonzero(patients.site == site)
        if not may_train(patients.event[rows[split.train[rows]]], protocol):
            rows = rows[~split.train[rows]]
        if len(rows):
            taking_part[site] = rows
            inputs[site] = _one_site(patients, protocol, split, site=site, rows=rows, folds=folds)
    return taking_part, inputs


def _one_site(
    patients: Patients,
    protocol: StudyProtocol,
    split: Split,
    *,
    site: str,
    rows: NDArray[np.intp],
    folds: NDArray[np.int64],
) -> SiteInputs:
    train = split.train[rows]
    modalities = {}
    for name in protocol.modalities:
        table = patients.tables[name][rows]
        has = np.flatnonzero(~np.isnan(table).all(axis=1))
        if len(has):
            values = harmonised(table[has], protocol.encoder[name], train=train[has])
            modalities[name] = ModalityInputs(has, values)
    return SiteInputs(
        site=site,
        cohort=fingerprint([site, rows.tolist()]),
        patient_ids=rows.astype(str),
        event=patients.event[rows],
        time=patients.time[rows],
        train=train,
        folds=folds[rows],
        modalities=modalities,
    )


def report(
    patients: Patients, protocol: StudyProtocol, scored: Sequence[Scored], *, arms: Sequence[str]
) -> Figures:
    """Give what a benchmark prints: who took part, how each arm does, how the fits went.

    Pairs are formed between test patients of one split, and added over the splits of a repeat, in
    which every patient is scored once. With several repeats, estimates and their intervals are
    averaged, so that repeating narrows no interval.
    """
    training = {site for one in scored for site in one.training_sites}
    repeats = [[s for s in scored if s.repeat == r] for r in sorted({s.repeat for s in scored})]
    found: Figures = {
        "sites": {site: _site_counts(patients, site, training) for site in _names(patients)},
        "lowered_minimums": list(protocol.privacy.lowered()),
        "ridge_per_patient": {
            "encoders": {name: protocol.encoder[name].ridge for name in protocol.modalities},
            "fusion": protocol.fusion.ridge,
        },
    }
    for arm in arms:
        found[arm] = _figures(patients, repeats, lambda s, arm=arm: s.arms[arm])
    found["local"] = _local_figures(patients, repeats)
    if len(protocol.modalities) > 1:
        found["by_modality"] = {
            name: _modality_figures(patients, repeats, name) for name in protocol.modalities
        }
    return found | {
        "cross_fitted": sorted({m for one in scored for m in one.cross_fitted}),
        "rounds": max(one.rounds for one in scored),
        "max_coefficient_gap": max(one.max_coefficient_gap for one in scored),
    }


def _names(patients: Patients) -> list[str]:
    return sorted(set(patients.site.tolist()))


def _site_counts(patients: Patients, site: str, training: set[str]) -> Figures:
    rows = patients.site == site
    return {
        "patients": int(rows.sum()),
        "events": int(patients.event[rows].sum()),
        "trains": site in training,
    }


def _figures(
    patients: Patients, repeats: Sequence[Sequence[Scored]], pick: Callable[[Scored], Floats]
) -> Figures:
    """Concordance over all pairs, over pairs within sites, and as the mean over sites."""
    by_site = {
        site: [[_pairs(patients, s, pick(s), site=site) for s in splits] for splits in repeats]
        for site in _names(patients)
    }
    within = [[p for of in by_site.values() for p in of[r]] for r in range(len(repeats))]
    estimates = {site: _estimate(pairs) for site, pairs in by_site.items()}
    return {
        "pooled_test": _estimate([[_pairs(patients, s, pick(s)) for s in x] for x in repeats]),
        "within_site": _estimate(within),
        "site_mean": _mean([e["value"] for e in estimates.values() if e]),
        "by_site": {site: e["value"] if e else None for site, e in estimates.items()},
    }


def _pairs(
    patients: Patients, one: Scored, log_hazard: Floats, *, site: str | None = None
) -> PairCounts:
    scored = ~np.isnan(log_hazard)
    if site is not None:
        scored &= patients.site[one.rows] == site
    rows = one.rows[scored]
    return pair_counts(log_hazard[scored], patients.event[rows], patients.time[rows])


def _estimate(repeats: Sequence[Sequence[PairCounts]]) -> dict[str, float] | None:
    found = []
    for pairs in repeats:
        try:
            found.append(concordance_index(pairs))
        except NoComparablePairs:
            return None
    return {
        name: round(float(np.mean([getattr(e, name) for e in found])), _DIGITS)
        for name in ("value", "standard_error", "low", "high")
    }


def _mean(values: Sequence[float]) -> float | None:
    return round(float(np.mean(values)), _DIGITS) if values else None


def _local_figures(patients: Patients, repeats: Sequence[Sequence[Scored]]) -> Figures:
    """Each site's own model: on the test patients of all sites, and on its own.

    The first is a mean over the models, of their concordance over all pairs and within sites.
    """
    trained = {site for splits in repeats for one in splits for site in one.local}

    def of_model(site: str) -> Figures:
        return _figures(patients, repeats, lambda s: s.local.get(site, _nothing(s)))

    models = {site: of_model(site) for site in sorted(trained)}
    own = _figures(patients, repeats, lambda s: _own_log_hazard(patients, s))
    values = {
        name: {site: found[name]["value"] for site, found in models.items() if found[name]}
        for name in ("pooled_test", "within_site")
    }
    return {
        "pooled_test": {
            "value": _mean(list(values["pooled_test"].values())),
            "by_model": values["pooled_test"],
        },
        "within_all_sites": {
            "value": _mean(list(values["within_site"].values())),
            "by_model": values["within_site"],
        },
        **{name: own[name] for name in ("within_site", "site_mean", "by_site")},
        "no_local_model": [site for site in _names(patients) if site not in trained],
    }


def _nothing(one: Scored) -> Floats:
    return np.full(len(one.rows), np.nan)


def _own_log_hazard(patients: Patients, one: Scored) -> Floats:
    """(n_test,) log hazard of each patient by the model of the patient's own site."""
    found = _nothing(one)
    for site, log_hazard in one.local.items():
        own = patients.site[one.rows] == site
        found[own] = log_hazard[own]
    return found


def _modality_figures(
    patients: Patients, repeats: Sequence[Sequence[Scored]], name: str
) -> Figures:
    """One modality alone, on the patients who have it."""
    found = _figures(patients, repeats, lambda s: s.modalities[name])
    has = ~np.isnan(patients.tables[name]).all(axis=1)
    kept = {key: found[key] for key in ("within_site", "pooled_test")}
    return {"patients": int(has.sum()), **kept}


def options(description: str, *, default_folds: int = 5) -> argparse.ArgumentParser:
    """Command line that both benchmarks share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--folds", type=_whole(2), default=default_folds, help="of each repeat")
    parser.add_argument("--repeats", type=_whole(1), default=1, help="of the cross-validation")
    parser.add_argument("--seed", type=_whole(0), default=0, help="of splits and projections")
    return parser


def _whole(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"found {text!r}, needed a number from {least}")
        return int(text)

    return parse


def run(
    parser: argparse.ArgumentParser,
    study: Callable[[argparse.Namespace], Figures],
    arguments: Sequence[str] | None = None,
) -> int:
    """Print a benchmark's figures as one JSON object; 2 with one sentence where it cannot run."""
    parsed = parser.parse_args(arguments)
    try:
        found = study(parsed)
    except (DataError, QuorumNotMet, ConvergenceError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found, indent=2))
    return 0
