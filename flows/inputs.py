"""From a site's cohort to what encoders and federation read: inputs per modality, rows, columns."""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from flows.shared import shared_networks
from flows.subgroups import level_codes
from fusion.encoder_inputs import pool_bags, take
from fusion.federation import Outcome, SiteRows, Split
from modalities.clinical import ClinicalSpec
from modalities.cohort import TRAIN, DataError, rows_of
from modalities.harmonise import fit_site_scaler
from modalities.pathology import PathologySpec, read_bag

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from mudata import MuData
    from numpy.typing import NDArray

    from flows.protocol import StudyProtocol
    from fusion.encoder_inputs import Inputs
    from fusion.encoder_spec import EncoderSpec
    from fusion.encoders import FittedEncoder

    Floats = NDArray[np.float64]


@dataclass(frozen=True)
class ModalityInputs:
    """Inputs of one modality's encoder for the patients of a site who have it.

    Attributes
    ----------
    rows
        (n,) row of each patient in the site's cohort.
    values
        (n, p) harmonised table, NaN for missing cells; or n bags of (n_tiles, dim).
    """

    rows: NDArray[np.intp]
    values: Inputs


@dataclass(frozen=True)
class SiteInputs:
    """One site's patients as encoders read them; the rows never leave the site.

    Attributes
    ----------
    site
        Opaque name.
    cohort
        Digest of the cohort under the site's secret.
    patient_ids, event, time
        (n,) pseudonyms and outcome, in the order of the cohort.
    train
        (n,) True for training rows; all False at a site below its training minimum.
    folds
        (n,) fold of each patient.
    modalities
        Inputs of each modality that the site has.
    subgroups
        Per variable of the protocol, (n,) code of each patient's level; -1 where unknown.
    treatment
        (n,) code of each patient's treatment; -1 where unknown, None where none is compared.
    """

    site: str
    cohort: str
    patient_ids: NDArray[np.str_]
    event: NDArray[np.bool_]
    time: Floats
    train: NDArray[np.bool_]
    folds: NDArray[np.int64]
    modalities: Mapping[str, ModalityInputs]
    subgroups: Mapping[str, Floats] = field(default_factory=dict)
    treatment: Floats | None = None

    @property
    def trains(self) -> bool:
        """Whether the site has training rows."""
        return bool(self.train.any())

    def outcome(self, rows: NDArray[np.bool_]) -> Outcome:
        """Outcome of the chosen rows."""
        return Outcome(self.event[rows], self.time[rows])

    def spread(self, modality: str, values: Floats) -> Split:
        """Put values of the patients who have a modality in their rows, NaN in the others'."""
        whole = np.full((len(self.time), *values.shape[1:]), np.nan)
        whole[self.modalities[modality].rows] = values
        return Split(whole[self.train], whole[~self.train])


@dataclass(frozen=True)
class LocalEncoder:
    """What training one modality at one site gave.

    Attributes
    ----------
    encoder
        Refitted on all training patients; None where the modality was left out, or where only its
        log hazards were read.
    log_hazard
        (n,) per patient who has the modality: out-of-fold on training rows, the refitted encoder's
        on test rows.
    reason
        Why the modality was left out, in words that name no patient.
    """

    encoder: FittedEncoder | None
    log_hazard: Floats
    reason: str = ""


def site_inputs(
    cohort: MuData, protocol: StudyProtocol, *, site: str, features: Path, secret: bytes
) -> SiteInputs:
    """Read a cohort as one site's inputs under a protocol.

    Parameters
    ----------
    features
        Folder that the cohort's bag references count from.
    secret
        Of the site; keys the cohort digest that may leave.
    """
    event = cohort.obs["event"].to_numpy(dtype=bool)
    in_training = (cohort.obs["split"] == TRAIN).to_numpy()
    train = in_training & may_train(event[in_training], protocol)
    modalities = {}
    for name in protocol.modalities:
        if name in cohort.mod and cohort.mod[name].n_obs > 0:
            table_rows = rows_of(cohort, name)
            rows = np.flatnonzero(table_rows >= 0)
            modalities[name] = _modality_inputs(
                cohort, name, protocol, rows=rows, train=train, features=features
            )
    return SiteInputs(
        site=site,
        cohort=keyed_digest(secret, str(cohort.uns["cohort_digest"])),
        patient_ids=cohort.obs_names.to_numpy(dtype=str),
        event=event,
        time=cohort.obs["time_days"].to_numpy(dtype=np.float64),
        train=train,
        folds=folds_of(cohort.obs["fold_unit"].to_numpy(), protocol.fusion.folds),
        modalities=modalities,
        **_levels(cohort, protocol),
    )


def _levels(cohort: MuData, protocol: StudyProtocol) -> dict[str, Any]:
    """Codes of subgroups and treatment, from the registry's covariates as they were read."""
    spec = protocol.modality[protocol.clinical]
    assert isinstance(spec, ClinicalSpec)
    if protocol.clinical not in cohort.mod:
        return {}
    covariates = np.full((cohort.n_obs, len(spec.feature_names)), np.nan)
    at = rows_of(cohort, protocol.clinical)
    table = cohort.mod[protocol.clinical][:, list(spec.feature_names)].X
    covariates[at >= 0] = np.asarray(table, dtype=np.float64)[at[at >= 0]]
    asked = protocol.evaluation
    return {
        "subgroups": {
            variable: level_codes(spec, covariates, variable, cuts)
            for variable, cuts in asked.subgroups.items()
        },
        "treatment": level_codes(spec, covariates, asked.treatment, ())
        if asked.treatment
        else None,
    }


def may_train(event: NDArray[np.bool_], protocol: StudyProtocol) -> bool:
    """Whether these training patients pass the minimum counts of the fusion model."""
    refusal = protocol.privacy.refuses(
        n_patients=len(event), n_events=int(event.sum()), n_inputs=2 * len(protocol.modalities)
    )
    return refusal is None


def folds_of(units: Floats, n_folds: int) -> NDArray[np.int64]:
    """Cut keyed numbers in [0, 1) into folds."""
    return np.minimum((units * n_folds).astype(np.int64), n_folds - 1)


def keyed_digest(secret: bytes, digest: str) -> str:
    """HMAC-SHA-256 of a digest under the site's secret: the only form in which one may leave."""
    return hmac.new(secret, digest.encode(), hashlib.sha256).hexdigest()


def _modality_inputs(
    cohort: MuData,
    name: str,
    protocol: StudyProtocol,
    *,
    rows: NDArray[np.intp],
    train: NDArray[np.bool_],
    features: Path,
) -> ModalityInputs:
    values = raw_inputs(cohort, name, protocol, rows=rows, features=features)
    if isinstance(values, np.ndarray):
        table = values.astype(np.float64, copy=False)
        values = harmonised(table, protocol.encoder[name], train=train[rows])
    return ModalityInputs(rows, values)


def raw_inputs(
    cohort: MuData,
    name: str,
    protocol: StudyProtocol,
    *,
    rows: NDArray[np.intp],
    features: Path,
) -> Inputs:
    """Read the table of some patients who have a modality, or their bags; nothing is scaled."""
    table = cohort.mod[name][cohort.obs_names[rows]]
    if isinstance(protocol.modality[name], PathologySpec):
        return [_patient_bag(str(text), features) for text in table.obs["bag"]]
    wanted = list(protocol.encoder_inputs(name)) or list(table.var_names)
    return np.asarray(table[:, wanted].X, dtype=np.float64)


def harmonised(values: Floats, spec: EncoderSpec, *, train: NDArray[np.bool_]) -> Floats:
    """Remove a site's location and scale, as its encoder's spec says.

    The scaler sees features only, never outcomes: those of the training rows, or of all rows at a
    site that does not train.
    """
    if spec.harmonise == "none":
        return values
    return fit_site_scaler(values[train] if train.any() else values).transform(values)


def _patient_bag(references: str, features: Path) -> NDArray[np.float32]:
    bags = [read_bag(features / reference).features for reference in references.split(";")]
    return np.concatenate(bags).astype(np.float32, copy=False)


def train_local(inputs: SiteInputs, modality: str, spec: EncoderSpec, *, seed: int) -> LocalEncoder:
    """Train one modality's encoder on one site's rows, out-of-fold and then on all of them.

    Parameters
    ----------
    spec
        Of the protocol; its sharing plays no part here.
    seed
        Of the protocol; the modality and the site do not change it.
    """
    found = inputs.modalities.get(modality)
    if found is None or not inputs.trains:
        reason = "no patient has it" if inputs.trains else "the site is below its training minimum"
        return LocalEncoder(None, np.zeros(0), reason)
    # Torch takes seconds to import, and only a fit should wait for it.
    from fusion.training import TooFewEvents, TrainingDiverged, cross_fit, fit_encoder

    train = np.flatnonzero(inputs.train[found.rows])
    rows = found.rows[train]
    outcome = (inputs.event[rows], inputs.time[rows])
    try:
        fitted = cross_fit(take(found.values, train), *outcome, inputs.folds[rows], spec, seed=seed)
        encoder = fit_encoder(take(found.values, train), *outcome, spec, seed=seed)
    except (TooFewEvents, TrainingDiverged, ValueError) as error:
        return LocalEncoder(None, np.full(len(found.rows), np.nan), str(error))
    log_hazard = encoder.log_hazard(found.values)
    log_hazard[train] = fitted.out_of_fold
    return LocalEncoder(encoder, log_hazard)


def site_rows(
    inputs: SiteInputs, local: Mapping[str, LocalEncoder], protocol: StudyProtocol
) -> SiteRows:
    """Give the federation its rows: projected tables for sums, columns of local encoders."""
    tables = {}
    for name in protocol.sums_inputs():
        if name in inputs.modalities:
            tables[name] = inputs.spread(name, shared_table(inputs, name, protocol))
    return SiteRows(
        cohort=inputs.cohort,
        train=inputs.outcome(inputs.train),
        test=inputs.outcome(~inputs.train),
        folds=inputs.folds[inputs.train],
        tables=tables,
        local={
            name: inputs.spread(name, found.log_hazard)
            for name, found in local.items()
            if not found.reason
        },
        networks=shared_networks(inputs, protocol),
        subgroups={name: _cut(inputs, codes) for name, codes in inputs.subgroups.items()},
        treatment=None if inputs.treatment is None else _cut(inputs, inputs.treatment),
    )


def _cut(inputs: SiteInputs, codes: Floats) -> Split:
    return Split(codes[inputs.train], codes[~inputs.train])


def shared_table(inputs: SiteInputs, modality: str, protocol: StudyProtocol) -> Floats:
    """(n, k) inputs of a consortium encoder, randomly projected where there are too many.

    Embeddings share one scale, so that bags are averaged and projected first and harmonised then;
    the columns of a table do not, and come harmonised.
    """
    found = inputs.modalities[modality]
    if isinstance(found.values, np.ndarray):
        projection = protocol.projection(modality, found.values.shape[1])
        if projection is None:
            return np.asarray(found.values, dtype=np.float64)
        return np.asarray(np.nan_to_num(found.values, nan=0.0) @ projection)
    means = pool_bags(found.values)
    needed = protocol.encoder[modality].max_inputs
    if means.shape[1] < needed:
        raise DataError(
            "too_few_dimensions",
            f"encoder.{modality}.max_inputs: found {needed}, needed at most the "
            f"{means.shape[1]} dimensions of its tile embeddings",
        )
    projection = protocol.projection(modality, means.shape[1])
    projected = means if projection is None else means @ projection
    train = inputs.train[found.rows]
    return harmonised(projected, protocol.encoder[modality], train=train)
