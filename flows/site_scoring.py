"""From a site's patients to the columns of a fusion model, as the study itself made them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np

from flows.inputs import (
    ModalityInputs,
    SiteInputs,
    harmonised,
    keyed_digest,
    may_train,
    raw_inputs,
    shared_table,
)
from flows.loading import about_encoder, encoder_key
from flows.registered_model import PredictionRefused
from flows.shared import shared_networks
from flows.snapshots import COHORT, FEATURES, contributed
from fusion.late import linear_inputs
from fusion.survival import moments
from modalities.cohort import TRAIN, DataError, read_cohort, rows_of
from modalities.pathology import PathologySpec

if TYPE_CHECKING:
    from pathlib import Path

    from mudata import MuData
    from numpy.typing import NDArray

    from flows.protocol import StudyProtocol
    from flows.registered_model import StudyModel
    from fusion.encoder_inputs import Inputs
    from fusion.encoders import FittedEncoder
    from infra.settings import SiteSettings

    Floats = NDArray[np.float64]
    _Scored: TypeAlias = tuple[Floats, Floats, tuple[str, ...]]

FAR_Z: Final = 5.0
_NAMED_INPUTS: Final = 3
_NONE_RELEASED: Final = "this site has released no cohort under the model's protocol"


@dataclass(frozen=True)
class Basis:
    """The rows that set a site's location and scale.

    Attributes
    ----------
    cohort, features
        What the site released, and the folder that its bag references count from.
    fit
        (n,) which of its rows set location and scale: those in training, or all at a site that does
        not train.
    trains
        Whether some row is in training.
    of_run
        Whether this is what went into the model's run.
    """

    cohort: MuData
    features: Path
    fit: NDArray[np.bool_]
    trains: bool
    of_run: bool


def find_basis(
    settings: SiteSettings, model: StudyModel, cohort: MuData, features: Path
) -> tuple[Basis, list[str]]:
    """Find the rows that the site brought to the model's run, or the nearest that there are.

    Parameters
    ----------
    cohort, features
        Taken where the site has released none under the model's protocol.

    Returns
    -------
    tuple
        The rows, and what a reader of the risks should know of them.
    """
    released = contributed(settings, model.run, protocol=model.fingerprint)
    if released is not None:
        found, of_run = released
        note = (
            "the cohort that this site brought to the model's run is not here; location and scale "
            f"are those of snapshot {found.number}"
        )
        basis = _prepared(read_cohort(found.cohort), found.features, model, of_run=of_run)
        return basis, [] if of_run else [note]
    try:
        draft = read_cohort(settings.path(COHORT))
    except DataError:
        draft = None
    if draft is not None and str(draft.uns.get("protocol_fingerprint")) == model.fingerprint:
        basis = _prepared(draft, settings.path(FEATURES), model, of_run=False)
        return basis, [f"{_NONE_RELEASED}; location and scale are those of its latest cohort"]
    note = f"{_NONE_RELEASED}; those who are scored set their own location and scale"
    everybody = np.ones(cohort.n_obs, dtype=bool)
    return Basis(cohort, features, everybody, trains=False, of_run=False), [note]


def _prepared(cohort: MuData, features: Path, model: StudyModel, *, of_run: bool) -> Basis:
    in_training = (cohort.obs["split"] == TRAIN).to_numpy()
    event = cohort.obs["event"].to_numpy(dtype=bool)
    trains = bool(in_training.any() and may_train(event[in_training], model.protocol))
    fit = in_training if trains else np.ones(cohort.n_obs, dtype=bool)
    return Basis(cohort, features, fit, trains, of_run)


class SiteScorer:
    """Turns each modality of a site's patients into its log hazard, as the study did.

    Parameters
    ----------
    cohort, features
        The patients, and the folder that their bag references count from.
    basis
        As from :func:`find_basis`.

    Attributes
    ----------
    settings, cohort, features
        As given.
    notes
        What a reader of the risks should know, in sentences that name no patient.
    """

    def __init__(
        self,
        settings: SiteSettings,
        model: StudyModel,
        basis: Basis,
        cohort: MuData,
        features: Path,
    ) -> None:
        self.notes: list[str] = []
        self.settings, self.cohort, self.features = settings, cohort, features
        self._model, self._basis = model, basis
        self._z: dict[str, tuple[NDArray[np.intp], Floats, tuple[str, ...]]] = {}

    @property
    def protocol(self) -> StudyProtocol:
        """Of the model."""
        return self._model.protocol

    def column(self, name: str) -> Floats:
        """(n,) log hazard of a modality, NaN where it is absent or cannot be encoded."""
        rows = np.flatnonzero(rows_of(self.cohort, name) >= 0)
        whole = np.full(self.cohort.n_obs, np.nan)
        if len(rows) == 0:
            return whole
        scored = self._scored(name, self._raw(name, rows))
        if scored is not None:
            whole[rows], z, names = scored
            self._z[name] = (rows, z, names if len(names) == z.shape[1] else ())
        return whole

    def present(self, name: str) -> NDArray[np.bool_]:
        """(n,) which patients have an input of a modality: a bag, or some value of a table."""
        there = rows_of(self.cohort, name) >= 0
        if there.any() and not isinstance(self.protocol.modality[name], PathologySpec):
            values = np.asarray(self._raw(name, np.flatnonzero(there)))
            there[there] = ~np.isnan(values).all(axis=1)
        return there

    def tile_log_hazards(self, name: str, bag: NDArray[np.float32]) -> Floats | None:
        """(n_tiles,) log hazard of a patient all of whose tiles were like one of these.

        A linear encoder of mean tiles says of a patient the mean of these, exactly. None for an
        encoder that is not one.
        """
        if self.protocol.encoder[name].sharing != "sums":
            return None
        scored = self._summed(name, [tile[None] for tile in bag])
        return None if scored is None else scored[0]

    def _raw(self, name: str, rows: NDArray[np.intp]) -> Inputs:
        return raw_inputs(self.cohort, name, self.protocol, rows=rows, features=self.features)

    def _scored(self, name: str, values: Inputs) -> _Scored | None:
        """Give log hazards, the inputs in standard deviations, and the inputs' names."""
        sharing = self.protocol.encoder[name].sharing
        score = {"sums": self._summed, "weights": self._averaged, "local": self._local}[sharing]
        return score(name, values)

    def _summed(self, name: str, values: Inputs) -> _Scored | None:
        encoder = self._model.encoders.get(name)
        if encoder is None:
            self._without(name, "the study could not fit one")
            return None
        inputs, n_behind = self._inputs(name, values)
        table = shared_table(inputs, name, self.protocol)
        mean, scale, length = encoder.mean, encoder.scale, 1.0
        if self._private:
            found = moments(table[:n_behind])
            mean, scale = found.mean, np.where(found.scale > 0, found.scale, 1.0)
            length = float(np.linalg.norm(encoder.coefficients)) or 1.0
        z = linear_inputs(table, mean, scale)
        log_hazard = np.asarray(z[n_behind:] @ encoder.coefficients) / length
        return log_hazard, _of_patients(z, table, n_behind), encoder.inputs

    def _averaged(self, name: str, values: Inputs) -> _Scored | None:
        weights = self._model.networks.get(name)
        if weights is None:
            self._without(name, "the study could not fit one")
            return None
        inputs, n_behind = self._inputs(name, values)
        prepared = shared_networks(inputs, self.protocol)[name]
        log_hazard = prepared.log_hazard(weights)[n_behind:]
        if not isinstance(prepared.values, np.ndarray):
            return log_hazard, np.zeros((len(log_hazard), 0)), ()
        table = np.asarray(prepared.values, dtype=np.float64)
        names = self.protocol.encoder_inputs(name)
        return log_hazard, _of_patients(table, table, n_behind), names

    def _local(self, name: str, values: Inputs) -> _Scored | None:
        encoder, why = self._read_own(name)
        if encoder is None:
            self._without(name, why)
            return None
        if why:
            self.notes.append(why)
        z, names = np.zeros((len(values), 0)), self.protocol.encoder_inputs(name)
        if isinstance(values, np.ndarray):
            inputs, n_behind = self._inputs(name, values)
            table = np.asarray(inputs.modalities[name].values, dtype=np.float64)
            learned = encoder.preparation
            z = _of_patients((table - learned.mean) * learned.gain, table, n_behind)
            values = table[n_behind:]
        log_hazard = encoder.log_hazard(values)
        if self._private:
            log_hazard = self._scaled_here(name, log_hazard)
        return log_hazard, z, names

    def _scaled_here(self, name: str, log_hazard: Floats) -> Floats:
        """Scale by what the encoder said of the site's own rows, as sites do under a budget."""
        said = np.load(self.settings.path("encoders", name, "log_hazard.npy"))
        rows = np.flatnonzero(rows_of(self._basis.cohort, name) >= 0)
        if len(said) != len(rows):
            raise PredictionRefused(
                f"{name}: found this site's encoder trained on another cohort than the model saw, "
                "needed the same under a privacy budget; run the study again"
            )
        own = moments(said[self._basis.fit[rows]][:, None])
        return np.asarray((log_hazard - own.mean[0]) / (own.scale[0] or 1.0))

    @property
    def _private(self) -> bool:
        return self.protocol.differential_privacy.is_on

    def _without(self, name: str, why: str) -> None:
        self.notes.append(f"{name} counts as missing, because there is no encoder of it: {why}")

    def _inputs(self, name: str, values: Inputs) -> tuple[SiteInputs, int]:
        """Put patients behind the rows whose location and scale they get; say how many these are.

        A study reads its test patients in the same way, behind those in training.
        """
        protocol, basis = self.protocol, self._basis
        there = np.flatnonzero((rows_of(basis.cohort, name) >= 0) & basis.fit)
        parts: list[Any] = [values]
        if len(there):
            self._check_alike(name)
            before = raw_inputs(basis.cohort, name, protocol, rows=there, features=basis.features)
            parts.insert(0, before)
        elif protocol.encoder[name].harmonise == "site":
            self.notes.append(
                f"{name}: nobody in the cohort that this site released has it; the patients who "
                "are scored set their own location and scale"
            )
        n = len(there) + len(values)
        behind = np.arange(n) < len(there)
        whole: Inputs = [bag for part in parts for bag in part]
        if isinstance(values, np.ndarray):
            whole = harmonised(np.concatenate(parts), protocol.encoder[name], train=behind)
        inputs = SiteInputs(
            site=self.settings.name,
            cohort="",
            patient_ids=np.arange(n).astype(str),
            event=np.zeros(n, dtype=bool),
            time=np.ones(n),
            train=behind,
            folds=np.zeros(n, dtype=np.int64),
            modalities={name: ModalityInputs(np.arange(n), whole)},
        )
        return inputs, len(there)

    def _check_alike(self, name: str) -> None:
        protocol = self.protocol
        if isinstance(protocol.modality[name], PathologySpec) or protocol.encoder_inputs(name):
            return
        here, there = self.cohort.mod[name].var_names, self._basis.cohort.mod[name].var_names
        if list(here) != list(there):
            raise PredictionRefused(
                f"cohort: {name}: found other columns than the {len(there)} that the encoder was "
                "trained on, needed the same; extract it as before"
            )

    def own_encoder(self, name: str) -> FittedEncoder | None:
        """Read the site's own encoder of a modality; None where it has none that may be used."""
        return self._read_own(name)[0]

    def _read_own(self, name: str) -> tuple[FittedEncoder | None, str]:
        """Read the site's own encoder, with a doubt about it; or None, and why."""
        from fusion.encoders import FittedEncoder  # torch takes seconds to import

        folder = self.settings.path("encoders", name)
        about = about_encoder(folder)
        if about is None or not about["trained"]:
            why = "this site has trained none; run `consilium site train`"
            return None, str(about["reason"]) if about and about["reason"] else why
        try:
            encoder = FittedEncoder.from_bytes((folder / "encoder.safetensors").read_bytes())
        except (OSError, ValueError):
            return None, "its file is damaged; run `consilium site train`"
        if encoder.spec != self.protocol.encoder[name]:
            return None, "this site's own is of another study"
        key = keyed_digest(self.settings.key, str(self._basis.cohort.uns["cohort_digest"]))
        if about["key"] == encoder_key(key, self.protocol, name):
            return encoder, ""
        return encoder, (
            f"{name}: this site's own encoder was trained on another cohort, or by other code, "
            "than the model saw"
        )

    def extrapolations(self, columns: Floats) -> list[str]:
        """Say for each patient which inputs are far outside of what was trained on.

        Parameters
        ----------
        columns
            (n, m) log hazards, of all modalities of the model.
        """
        fusion = self._model.fusion
        said: list[list[str]] = [[] for _ in range(self.cohort.n_obs)]
        for at, name in enumerate(fusion.modalities):
            rows, z, names = self._z.get(name, (np.zeros(0, dtype=np.intp), np.zeros((0, 0)), ()))
            for row, far in zip(rows, np.abs(z) > FAR_Z, strict=True):
                if far.any():
                    said[row].append(f"{name}: {_far_inputs(far, names)}")
            standard = (columns[:, at] - fusion.mean[at]) / fusion.scale[at]
            for row in np.flatnonzero(np.abs(standard) > FAR_Z):
                said[row].append(f"{name}: its log hazard")
        return ["; ".join(parts) for parts in said]


def _of_patients(z: Floats, table: Floats, n_behind: int) -> Floats:
    """(n, p) standard deviations of the patients; 0 where a column only tells two values apart."""
    return np.where(_indicators(table), 0.0, z)[n_behind:]


def _indicators(whole: Floats) -> NDArray[np.bool_]:
    """(p,) which columns only tell two values apart: their rare level is no far value."""
    distinct = [len(np.unique(np.round(x[~np.isnan(x)], 9))) for x in whole.T]
    return np.isin(whole, (0.0, 1.0)).all(axis=0) | (np.array(distinct) == 2)


def _far_inputs(flags: NDArray[np.bool_], names: tuple[str, ...]) -> str:
    n = int(flags.sum())
    if not names or names[0].startswith("projection_"):
        return f"{n} input{'s' if n > 1 else ''}"
    far = [x for x, one in zip(names, flags, strict=True) if one]
    more = f" and {n - _NAMED_INPUTS} more" if n > _NAMED_INPUTS else ""
    return ", ".join(far[:_NAMED_INPUTS]) + more
