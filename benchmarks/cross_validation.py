"""Run a federated study on a real table again and again, and score every arm on held-out patients.

The benchmarks on real tables share it: they read their files into :class:`Patients`, and say what
the study is in a protocol. What is fitted is the code that a study runs, in this process.
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
from threadpoolctl import threadpool_limits

from flows.inputs import ModalityInputs, SiteInputs, harmonised, may_train
from flows.memory import fit_in_memory
from flows.protocol import ProtocolError
from flows.reference import arm_log_hazard, local_log_hazard, max_coefficient_gap
from fusion.federation import PROTOCOL, QuorumNotMet
from fusion.newton import ConvergenceError
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
    ridge
        Per encoder shared as sums, and for the fusion model as ``protocol``, the penalty that the
        federation chose on the training patients.
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
    ridge: Mapping[str, float]
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
    found = pd.DataFrame(index=table.index)
    for column in columns:
        found[column] = pd.to_numeric(table[column], errors="coerce").astype(np.float64)
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
        ridge=dict(fitted.ridge),
        rounds=max(fitted.fit_rounds.values()),
        max_coefficient_gap=max_coefficient_gap(consortium, fitted),
        cross_fitted=tuple(m for m, encoder in fitted.encoders.items() if encoder.cross_fitted),
        training_sites=_training_sites(fitted),
    )


def _training_sites(fitted: Fitted) -> tuple[str, ...]:
    # A site with few test events of a fold keeps its evaluation to itself, after the fits.
    stayed = ("", "below_minimum_events")
    return tuple(x.site for x in fitted.sites if x.trains and x.code in stayed)


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
    encoders = {
        site: trained[modality].encoder for site, trained in consortium.local.items() if trained
    }
    return {
        site: {
            other: inputs.spread(
                modality, encoder.log_hazard(inputs.modalities[modality].values)
            ).test
            for other, inputs in consortium.inputs.items()
        }
        for site, encoder in encoders.items()
        if encoder is not None
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


def options(description: str) -> argparse.ArgumentParser:
    """Command line that the benchmarks on real tables share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--folds", type=whole(2), default=5, help="of each repeat")
    parser.add_argument("--repeats", type=whole(1), default=1, help="of the cross-validation")
    parser.add_argument("--seed", type=whole(0), default=0, help="of splits and projections")
    parser.add_argument("--json", action="store_true", help="the only form there is")
    return parser


def whole(least: int) -> Callable[[str], int]:
    """Read an option that is a whole number from ``least``."""

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
        # The matrices are small: more threads in each product only wait for one another.
        with threadpool_limits(limits=1, user_api="blas"):
            found = study(parsed)
    except (DataError, ProtocolError, QuorumNotMet, ConvergenceError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found, indent=2))
    return 0
