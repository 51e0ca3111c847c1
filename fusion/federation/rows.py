"""What the federation needs of a site's patients; none of it ever leaves the site."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Outcome:
    """Outcome of some patients: ``event`` (n,) True where observed, ``time`` (n,) in days."""

    event: Flags
    time: Floats

    def __len__(self) -> int:
        return len(self.time)


@dataclass(frozen=True)
class Split:
    """Values of the training rows and of the test rows, each (n, ...)."""

    train: Floats
    test: Floats

    @property
    def as_test(self) -> Split:
        """All rows as test rows."""
        return Split(self.train[:0], np.concatenate([self.train, self.test]))


class SharedNetwork(Protocol):
    """One modality's network over a site's rows, its weights one flat vector from outside."""

    @property
    def present(self) -> Flags:
        """(n_train + n_test,) which rows have the modality, training rows first."""

    def loss_gradient(self, weights: Floats, rows: NDArray[np.intp]) -> tuple[float, Floats]:
        """Mean loss per event over these rows, and its gradient."""

    def log_hazard(self, weights: Floats) -> Floats:
        """(n_train + n_test,) log hazards, higher is worse, NaN where the modality is absent."""


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
    networks
        Per modality in the plan's ``networks``.
    subgroups
        Per variable of the plan: (n,) code of each row's level as a float; -1 where unknown.
    treatment
        (n,) code of each row's treatment; -1 where unknown; None where the site has no record.
    """

    cohort: str
    train: Outcome
    test: Outcome
    folds: NDArray[np.int64]
    tables: dict[str, Split]
    local: dict[str, Split]
    networks: Mapping[str, SharedNetwork] = field(default_factory=dict)
    subgroups: dict[str, Split] = field(default_factory=dict)
    treatment: Split | None = None

    def as_external(self) -> SiteRows:
        """Give the same site as if it had never trained: all rows test, no encoder of its own."""
        return SiteRows(
            cohort=self.cohort,
            train=Outcome(self.train.event[:0], self.train.time[:0]),
            test=Outcome(
                np.concatenate([self.train.event, self.test.event]),
                np.concatenate([self.train.time, self.test.time]),
            ),
            folds=self.folds[:0],
            tables={name: table.as_test for name, table in self.tables.items()},
            local={},
            networks=self.networks,
            subgroups={name: codes.as_test for name, codes in self.subgroups.items()},
            treatment=None if self.treatment is None else self.treatment.as_test,
        )
