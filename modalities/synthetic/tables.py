"""Ready-made features of a site, for simulations that need many patients and no raw files."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from modalities.synthetic.counts import GENE_SETS, pathway_activity
from modalities.synthetic.truth import (
    MODALITIES,
    TABLE_STREAM,
    Patients,
    patient_rng,
    site_rng,
    study_rng,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

_N_IMAGE_FEATURES = 12
_FEATURE_NAMES = {
    "pathology": tuple(f"pathology_{number:02d}" for number in range(1, _N_IMAGE_FEATURES + 1)),
    "radiology": tuple(f"radiology_{number:02d}" for number in range(1, _N_IMAGE_FEATURES + 1)),
    "omics": tuple(GENE_SETS),
}
_N_NUISANCES = 4
_SIGNAL_SHARE, _NUISANCE_SHARE = 0.22, 0.66
_SHIFT_SD, _SCALE_SD = 0.6, 0.2


def feature_names(modality: str) -> tuple[str, ...]:
    """Names of the columns of a modality's table."""
    return _FEATURE_NAMES[modality]


def draw_tables(seed: int, patients: Patients) -> dict[str, NDArray[np.float64]]:
    """Draw every modality's features: noisy linear mixtures of its factors, shifted by the site.

    Parameters
    ----------
    seed
        Seed of the simulation.
    patients
        Patients of one site.

    Returns
    -------
    tables
        Modality to (n, p) features, for patients who lack the modality too.
    """
    widths = [len(_FEATURE_NAMES[modality]) for modality in MODALITIES]
    n_noise, n_nuisances = sum(widths), _N_NUISANCES * len(MODALITIES)
    drawn = np.stack(
        [
            patient_rng(seed, patients.site, index, stream=TABLE_STREAM).standard_normal(
                n_noise + n_nuisances
            )
            for index in patients.indices
        ]
    )
    noise, nuisances = np.split(drawn, [n_noise], axis=1)
    site = site_rng(seed, patients.site, stream=TABLE_STREAM)
    shift = site.normal(0.0, _SHIFT_SD, sum(widths))
    scale = np.exp(site.normal(0.0, _SCALE_SD, sum(widths)))
    parts = np.split(noise, np.cumsum(widths)[:-1], axis=1)
    clean = [
        _mixture(seed, modality, (patients.observed[modality], nuisance, part))
        for modality, nuisance, part in zip(
            MODALITIES, np.split(nuisances, len(MODALITIES), axis=1), parts, strict=True
        )
    ]
    values = np.concatenate(clean, axis=1) * scale + shift
    return dict(zip(MODALITIES, np.split(values, np.cumsum(widths)[:-1], axis=1), strict=True))


def _mixture(
    seed: int,
    modality: str,
    parts: tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]],
) -> NDArray[np.float64]:
    """(n, p) features out of a modality's factors, of nuisances without prognosis, and of noise.

    The nuisances vary more than the factors do, as in real images: a model has to learn from many
    patients which directions to look along.
    """
    observed, nuisance, noise = parts
    if modality == "omics":
        return pathway_activity(observed, noise)
    rng = study_rng(seed, stream=TABLE_STREAM + 8 * (1 + MODALITIES.index(modality)))
    signal = observed @ _loadings(rng, observed.shape[1], noise.shape[1])
    other = nuisance @ _loadings(rng, nuisance.shape[1], noise.shape[1])
    own = 1.0 - _SIGNAL_SHARE - _NUISANCE_SHARE
    return np.sqrt(_SIGNAL_SHARE) * signal + np.sqrt(_NUISANCE_SHARE) * other + np.sqrt(own) * noise


def _loadings(rng: np.random.Generator, n_factors: int, n_features: int) -> NDArray[np.float64]:
    drawn = rng.standard_normal((n_factors, n_features))
    return drawn / np.linalg.norm(drawn, axis=0)
