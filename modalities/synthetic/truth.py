"""What is true of simulated patients: latent factors, registry rows, outcome and log hazard."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import ndtr

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

MODALITIES = ("pathology", "radiology", "omics")
STAGES = ("I", "II", "III", "IV")
TREATMENTS = ("surgery", "chemoradiation", "immunotherapy")

FACTORS: Mapping[str, tuple[str, ...]] = {
    "pathology": ("cellularity", "lymphocytes"),
    "radiology": ("tumour_size", "heterogeneity", "spicularity"),
    "omics": ("proliferation", "hypoxia", "immune_evasion"),
}
"""Latent factors (standard normal, independent) that each modality shows."""

WEIGHTS: Mapping[str, float] = {
    "cellularity": 0.58,
    "lymphocytes": -0.52,
    "tumour_size": 0.50,
    "heterogeneity": 0.48,
    "spicularity": 0.42,
    "proliferation": 0.52,
    "hypoxia": 0.44,
    "immune_evasion": 0.46,
    "age_decade": 0.32,
    "stage": 0.52,
    "male": 0.20,
    "chemoradiation": 0.15,
    "immunotherapy": -0.20,
}
"""Log hazard per unit: a factor's standard deviation, ten years of age, one stage, or yes."""

SLIDE_STREAM, SCAN_STREAM, COUNTS_STREAM, TABLE_STREAM = 1, 2, 3, 4
"""Purposes of random streams; each writer draws from its own."""

_PATIENT_STREAM = 0
_BASELINE_STREAM = 15
_SITE_STREAM = 16
_STUDY_STREAM = 32

_FACTOR_NAMES = tuple(name for names in FACTORS.values() for name in names)
_N_FACTORS = len(_FACTOR_NAMES)
_OTHER_DRAWS = ("age", "sex", "stage", "treatment", "event", "dropout", "follow_up", "missing")

_RELIABILITY = 0.90
_MISSING_SHARE = 0.25
_STAGE_CUMULATIVE = (0.28, 0.55, 0.83)
_SHAPE = 1.2
_YEAR_DAYS = 365.25
_MEDIAN_YEARS = 3.3
_DROPOUT_PER_YEAR = 0.03
_FOLLOW_UP_YEARS = (4.0, 9.0)
_MEAN_AGE_YEARS = 63.0
_MEAN_STAGE = 1.34


def patient_rng(seed: int, site: int, patient: int, *, stream: int) -> np.random.Generator:
    """Random stream of one purpose for one patient, independent of every other patient's.

    Parameters
    ----------
    seed, site, patient
        Seed of the simulation; indices of the site and of the patient within it, from 0.
    stream
        What the numbers are for.
    """
    # Without a spawn key numpy pads entropy with zeros: patient 0 would share the site's stream.
    source = np.random.SeedSequence([seed, site, patient], spawn_key=(stream,))
    return np.random.Generator(np.random.PCG64(source))


def site_rng(seed: int, site: int, *, stream: int) -> np.random.Generator:
    """Random stream of one purpose for what is particular to one site (stain, scanner, batch)."""
    source = np.random.SeedSequence([seed, site], spawn_key=(_SITE_STREAM + stream,))
    return np.random.Generator(np.random.PCG64(source))


def study_rng(seed: int, *, stream: int) -> np.random.Generator:
    """Random stream of one purpose for what all sites have in common (loadings of features)."""
    source = np.random.SeedSequence([seed], spawn_key=(_STUDY_STREAM + stream,))
    return np.random.Generator(np.random.PCG64(source))


@dataclass(frozen=True)
class Patients:
    """Simulated patients of one site, in the order of ``indices``.

    Attributes
    ----------
    site
        Index of the site, from 0.
    indices
        Indices of the patients within the site, from 0.
    observed
        Modality to (n, number of its factors) factors as the raw data show them: the latent factor
        with measurement noise, unit variance.
    factors
        (n, 8) latent factors, in the order of ``FACTORS``.
    log_hazard
        (n,) true log hazard; higher is worse.
    event
        (n,) True where death was observed.
    time_days
        (n,) days to death or last contact, at least 1.
    age_years, male, stage, treatment
        (n,) registry covariates; ``stage`` and ``treatment`` index ``STAGES`` and ``TREATMENTS``.
    missing
        (n,) index into ``MODALITIES`` of the one modality that a patient lacks, or -1.
    """

    site: int
    indices: tuple[int, ...]
    observed: Mapping[str, NDArray[np.float64]]
    factors: NDArray[np.float64]
    log_hazard: NDArray[np.float64]
    event: NDArray[np.bool_]
    time_days: NDArray[np.int64]
    age_years: NDArray[np.int64]
    male: NDArray[np.bool_]
    stage: NDArray[np.int64]
    treatment: NDArray[np.int64]
    missing: NDArray[np.int64]

    @property
    def patient_ids(self) -> list[str]:
        """Pseudonyms, which say the site and a running number only."""
        return [f"S{self.site + 1:02d}-{index + 1:04d}" for index in self.indices]

    def has(self, modality: str) -> NDArray[np.bool_]:
        """(n,) True where a patient has data of ``modality``."""
        return self.missing != MODALITIES.index(modality)


def draw_patients(seed: int, site: int, indices: Sequence[int]) -> Patients:
    """Draw patients of one site; each depends on the seed, the site and its own index alone.

    Parameters
    ----------
    seed
        Seed of the simulation.
    site
        Index of the site, from 0.
    indices
        Indices of the patients within the site, from 0.
    """
    n_draws = 2 * _N_FACTORS + len(_OTHER_DRAWS)
    normals = np.stack(
        [
            patient_rng(seed, site, index, stream=_PATIENT_STREAM).standard_normal(n_draws)
            for index in indices
        ]
    )
    factors, noise = normals[:, :_N_FACTORS], normals[:, _N_FACTORS : 2 * _N_FACTORS]
    uniform = dict(zip(_OTHER_DRAWS, ndtr(normals[:, 2 * _N_FACTORS :]).T, strict=True))
    age_z = normals[:, 2 * _N_FACTORS + _OTHER_DRAWS.index("age")]
    covariates = _covariates(seed, site, age_z, uniform)
    log_hazard = _log_hazard(factors, covariates)
    event, time_days = _outcome(seed, site, log_hazard, uniform)
    missing = np.floor(uniform["missing"] / _MISSING_SHARE * len(MODALITIES)).astype(np.int64)
    return Patients(
        site=site,
        indices=tuple(indices),
        observed=_observe(factors, noise),
        factors=factors,
        log_hazard=log_hazard,
        event=event,
        time_days=time_days,
        age_years=covariates["age_years"],
        male=covariates["male"].astype(np.bool_),
        stage=covariates["stage"],
        treatment=covariates["treatment"],
        missing=np.where(missing < len(MODALITIES), missing, -1),
    )


def _observe(
    factors: NDArray[np.float64], noise: NDArray[np.float64]
) -> dict[str, NDArray[np.float64]]:
    seen = np.sqrt(_RELIABILITY) * factors + np.sqrt(1.0 - _RELIABILITY) * noise
    ends = np.cumsum([len(FACTORS[modality]) for modality in MODALITIES])
    return dict(zip(MODALITIES, np.split(seen, ends[:-1], axis=1), strict=True))


def _covariates(
    seed: int, site: int, age_z: NDArray[np.float64], uniform: Mapping[str, NDArray[np.float64]]
) -> dict[str, NDArray[np.int64]]:
    older_years = site_rng(seed, site, stream=_PATIENT_STREAM).normal(0.0, 2.0)
    age = np.clip(np.round(_MEAN_AGE_YEARS + older_years + 10.0 * age_z), 25, 90)
    stage = np.searchsorted(_STAGE_CUMULATIVE, uniform["stage"])
    # Late stages are operated on less often.
    surgery = 0.65 - 0.15 * stage
    treatment = np.where(
        uniform["treatment"] < surgery, 0, np.where(uniform["treatment"] < surgery + 0.2, 1, 2)
    )
    return {
        "age_years": age.astype(np.int64),
        "male": (uniform["sex"] < 0.5).astype(np.int64),
        "stage": stage.astype(np.int64),
        "treatment": treatment.astype(np.int64),
    }


def _log_hazard(
    factors: NDArray[np.float64], covariates: Mapping[str, NDArray[np.int64]]
) -> NDArray[np.float64]:
    columns = {
        **dict(zip(_FACTOR_NAMES, factors.T, strict=True)),
        "age_decade": (covariates["age_years"] - _MEAN_AGE_YEARS) / 10.0,
        "stage": covariates["stage"] - _MEAN_STAGE,
        "male": covariates["male"],
        "chemoradiation": covariates["treatment"] == TREATMENTS.index("chemoradiation"),
        "immunotherapy": covariates["treatment"] == TREATMENTS.index("immunotherapy"),
    }
    return np.sum([WEIGHTS[name] * column for name, column in columns.items()], axis=0)


def _outcome(
    seed: int,
    site: int,
    log_hazard: NDArray[np.float64],
    uniform: Mapping[str, NDArray[np.float64]],
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Weibull deaths with a baseline of the site's own, random drop-out and an end of follow-up."""
    log_baseline = site_rng(seed, site, stream=_BASELINE_STREAM).normal(0.0, 0.25)
    relative = np.exp(log_hazard + log_baseline)
    death = _MEDIAN_YEARS * (-np.log(uniform["event"]) / np.log(2.0) / relative) ** (1.0 / _SHAPE)
    dropout = -np.log(uniform["dropout"]) / _DROPOUT_PER_YEAR
    first, last = _FOLLOW_UP_YEARS
    censoring = np.minimum(dropout, first + (last - first) * uniform["follow_up"])
    days = np.ceil(np.minimum(death, censoring) * _YEAR_DAYS).astype(np.int64)
    return death <= censoring, np.maximum(days, 1)


@dataclass(frozen=True)
class Truth:
    """What a simulation knows and no model may see: for scoring only.

    Attributes
    ----------
    seed
        Seed of the simulation.
    factors
        Names of the latent factors.
    weights
        Log hazard per unit of each factor and covariate, the same at every site.
    log_hazard
        Site to patient id to true log hazard; higher is worse.
    """

    seed: int
    factors: tuple[str, ...]
    weights: Mapping[str, float]
    log_hazard: Mapping[str, Mapping[str, float]]


def truth_of(seed: int, patients: Mapping[str, Patients]) -> Truth:
    """Truth of a simulation whose sites hold ``patients``."""
    return Truth(
        seed=seed,
        factors=_FACTOR_NAMES,
        weights=dict(WEIGHTS),
        log_hazard={
            site: dict(zip(rows.patient_ids, map(float, rows.log_hazard), strict=True))
            for site, rows in patients.items()
        },
    )


def truth_text(truth: Truth) -> str:
    """Content of ``truth.json``."""
    content = {
        "seed": truth.seed,
        "factors": list(truth.factors),
        "weights": dict(truth.weights),
        "log_hazard": {site: dict(rows) for site, rows in truth.log_hazard.items()},
    }
    return json.dumps(content, indent=1) + "\n"


def read_truth(folder: Path) -> Truth:
    """Read the truth of the consortium that :func:`simulate` wrote into ``folder``.

    Raises
    ------
    ValueError
        If the folder holds no readable ``truth.json``.
    """
    try:
        content = json.loads((folder / "truth.json").read_text())
        return Truth(
            seed=content["seed"],
            factors=tuple(content["factors"]),
            weights=content["weights"],
            log_hazard=content["log_hazard"],
        )
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(
            "truth: found no readable truth.json, needed a folder that a simulation finished; "
            "simulate into it first"
        ) from None
