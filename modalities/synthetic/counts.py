"""RNA: integer counts of genes, some of which belong to pathways that follow the latent factors."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from modalities.files import replacing
from modalities.synthetic.truth import (
    COUNTS_STREAM,
    Patients,
    patient_rng,
    site_rng,
    study_rng,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

N_GENES = 600

_SET_SIZES = {
    "proliferation": 20,
    "hypoxia": 18,
    "immune_response": 20,
    "emt": 16,
    "angiogenesis": 15,
    "dna_repair": 18,
    "metabolism": 17,
    "differentiation": 16,
}
_SITE_SD = 0.35
_DISPERSION = 0.25
_MEDIAN_DEPTH = 120_000.0


def _gene_names() -> list[str]:
    return [f"GENE{number:04d}" for number in range(1, N_GENES + 1)]


def _gene_sets() -> Mapping[str, tuple[str, ...]]:
    # Every fourth gene, so that the sets do not lie side by side.
    spread = _gene_names()[::4]
    ends = np.cumsum(list(_SET_SIZES.values()))
    return MappingProxyType(
        {
            name: tuple(spread[end - size : end])
            for (name, size), end in zip(_SET_SIZES.items(), ends, strict=True)
        }
    )


GENE_SETS: Mapping[str, tuple[str, ...]] = _gene_sets()
"""Pathway to its genes; the sets are disjoint."""

# Rows: pathways. Columns: proliferation, hypoxia, immune evasion.
_MIXING = np.array(
    [
        [0.90, 0.10, 0.00],
        [0.10, 0.90, 0.00],
        [0.00, 0.00, -0.90],
        [0.20, 0.45, 0.45],
        [0.00, 0.70, 0.20],
        [0.70, 0.00, 0.10],
        [0.45, 0.50, 0.00],
        [-0.45, 0.00, -0.50],
    ]
)


def pathway_activity(
    observed: NDArray[np.float64], noise: NDArray[np.float64]
) -> NDArray[np.float64]:
    """(n, 8) activity of each pathway of ``GENE_SETS``, about unit variance.

    Parameters
    ----------
    observed
        (n, 3) observed omics factors.
    noise
        (n, 8) standard normal, what is particular to a pathway.
    """
    own = np.sqrt(np.maximum(1.0 - (_MIXING**2).sum(axis=1), 0.1))
    return observed @ _MIXING.T + own * noise


def draw_counts(seed: int, patients: Patients) -> NDArray[np.int64]:
    """(n, 600) negative-binomial counts of one site's patients.

    Parameters
    ----------
    seed
        Seed of the simulation.
    patients
        The patients, all of whom get counts.
    """
    rngs = [
        patient_rng(seed, patients.site, index, stream=COUNTS_STREAM) for index in patients.indices
    ]
    noise = np.stack([rng.standard_normal(len(GENE_SETS) + 1) for rng in rngs])
    activity = pathway_activity(patients.observed["omics"], noise[:, 1:])
    log_share = activity @ _loadings(seed) + _log_baseline(seed)
    log_share += site_rng(seed, patients.site, stream=COUNTS_STREAM).normal(0.0, _SITE_SD, N_GENES)
    share = np.exp(log_share)
    depth = _MEDIAN_DEPTH * np.exp(0.35 * noise[:, :1])
    mean = depth * share / share.sum(axis=1, keepdims=True)
    shape = 1.0 / _DISPERSION
    return np.stack(
        [
            rng.poisson(row / shape * rng.standard_gamma(shape, N_GENES))
            for rng, row in zip(rngs, mean, strict=True)
        ]
    )


def _log_baseline(seed: int) -> NDArray[np.float64]:
    return study_rng(seed, stream=COUNTS_STREAM).normal(0.0, 1.2, N_GENES)


def _loadings(seed: int) -> NDArray[np.float64]:
    """(8, 600) log expression per unit of a pathway's activity; zero outside its set."""
    drawn = study_rng(seed, stream=COUNTS_STREAM + 8).uniform(0.2, 0.5, N_GENES)
    column = {gene: number for number, gene in enumerate(_gene_names())}
    loadings = np.zeros((len(GENE_SETS), N_GENES))
    for row, genes in enumerate(GENE_SETS.values()):
        columns = [column[gene] for gene in genes]
        loadings[row, columns] = drawn[columns]
    return loadings


def write_counts(target: Path, seed: int, patients: Patients) -> None:
    """Write the counts of one site as AnnData: patients by genes, integers, sparse.

    Parameters
    ----------
    target
        The ``.h5ad`` to write.
    seed
        Seed of the simulation.
    patients
        The patients of the site that have counts.
    """
    # Not at the top: the processes that draw images never need these, and they take seconds.
    import anndata as ad
    import pandas as pd
    from scipy.sparse import csr_matrix

    table = ad.AnnData(
        X=csr_matrix(draw_counts(seed, patients).astype(np.int32)),
        obs=pd.DataFrame(index=pd.Index(patients.patient_ids, dtype=str)),
        var=pd.DataFrame(index=pd.Index(_gene_names(), dtype=str)),
    )
    with replacing(target) as temporary:
        table.write_h5ad(temporary)
