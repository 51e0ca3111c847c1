"""What the federation needs of a site's patients; none of it ever leaves the site."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Outcome:
    """Outcome of some patients: ``event`` (n,) True where observed, ``time`` (n,) in days."""

    event: NDArray[np.bool_]
    time: Floats

    def __len__(self) -> int:
        return len(self.time)


@dataclass(frozen=True)
class Split:
    """Values of the training rows and of the test rows, each (n, ...)."""

    train: Floats
    test: Floats


@dataclass(frozen=True)
class SiteRows:
    """Everything that the federation needs of a site. No row of it ever leaves.

    Attributes
    ----------
    cohort
        Digest of the cohort under the site's own secret, 64 hex digits.
    train, test
        Outcomes; a site below its training minimum has test rows only.
    folds
        (n_train,) fold of each training row.
    tables
        Per modality in the plan's ``sums``: harmonised (n, p) inputs; a row of NaN where the
        patient lacks the modality.
    local
        Per modality: (n,) log hazard of the site's own encoder, out-of-fold on the training rows;
        NaN where the patient lacks the modality, absent where the site trained no encoder.
    """

    cohort: str
    train: Outcome
    test: Outcome
    folds: NDArray[np.int64]
    tables: dict[str, Split]
    local: dict[str, Split]
