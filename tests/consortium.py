"""Sites with known rows, a study over them, and the same study on all rows in one place."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from lifelines import CoxPHFitter

from fusion import messages as m
from fusion.federation import (
    LOCAL_ENCODERS,
    FederationPlan,
    Fitted,
    InProcess,
    Outcome,
    SiteRows,
    SiteStudy,
    Split,
    run_federation,
    without,
)
from fusion.federation.masking import SiteIdentity
from fusion.keys import SigningKey
from fusion.late import fusion_inputs, linear_inputs
from fusion.privacy import MinimumCounts
from fusion.survival import cox_sums, fit_cox, moments

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

RUN = "1" * 64
N_RADIOLOGY, N_CLINICAL = 6, 4
SUMS = {
    "radiology": tuple(f"r{i}" for i in range(N_RADIOLOGY)),
    "clinical": tuple(f"c{i}" for i in range(N_CLINICAL)),
}
PLAN = FederationPlan(
    run=RUN,
    protocol="2" * 64,
    modalities=("pathology", "radiology", "clinical"),
    sums=SUMS,
    encoder_ridge={"radiology": (0.02,), "clinical": (0.05,)},
    fusion_ridge=(0.01,),
    n_folds=3,
    edges_days=(180.0, 365.0, 730.0, 1095.0, 1825.0),
    horizon_days=1095.0,
)
GRID = np.array(PLAN.edges_days)
EASY = replace(
    PLAN,
    minimum=MinimumCounts(
        patients=20, events=5, patients_per_input=1, cell=1, test_events=3, pooled_patients=50
    ),
)
ANY_CELL = replace(PLAN, minimum=MinimumCounts(cell=1))
DETAILED = {
    "subgroups": {"sex": ("female", "male"), "stage": ("I", "II", "III")},
    "treatments": ("surgery", "both"),
    "thresholds": (0.2, 0.4, 0.6),
}


def site_rows(n: int, seed: int, *, train: float = 0.7, absent: float = 0.2) -> SiteRows:
    """Rows of a site; `absent` of its patients lack radiology, half as many lack a slide."""
    rng = np.random.default_rng(seed)
    radiology = rng.normal(size=(n, N_RADIOLOGY)) * 2.0 + seed
    clinical = rng.normal(size=(n, N_CLINICAL)) + 50.0
    pathology = rng.normal(size=n)
    log_hazard = (
        (radiology - seed) @ np.linspace(-0.3, 0.3, N_RADIOLOGY)
        + clinical @ np.linspace(0.0, 0.5, N_CLINICAL)
        + 0.4 * pathology
    )
    died = np.ceil(rng.exponential(900.0 * np.exp(log_hazard.mean() - log_hazard)))
    lost = np.ceil(rng.uniform(200.0, 2500.0, n))
    event, time = died <= lost, np.minimum(died, lost)
    lacking = rng.random(n) < absent
    own = radiology[:, 0] * 0.3 + rng.normal(size=n)
    radiology[lacking] = own[lacking] = np.nan
    pathology[rng.random(n) < absent / 2] = np.nan
    k = int(n * train)
    folds = rng.integers(0, PLAN.n_folds, k)
    registry = clinical[:, -1] + rng.normal(size=n)

    def split(values: np.ndarray) -> Split:
        return Split(values[:k], values[k:])

    return SiteRows(
        cohort=f"{seed:064x}",
        train=Outcome(event[:k], time[:k]),
        test=Outcome(event[k:], time[k:]),
        folds=folds,
        tables={"radiology": split(radiology), "clinical": split(clinical)},
        local={"pathology": split(pathology), "radiology": split(own), "clinical": split(registry)}
        if k
        else {},
        subgroups={
            "sex": split(rng.integers(0, 2, n).astype(float)),
            "stage": split(np.where(rng.random(n) < 0.1, -1.0, rng.integers(0, 3, n))),
        },
        treatment=split(np.where(rng.random(n) < 0.05, -1.0, rng.integers(0, 2, n))),
    )


def large() -> dict[str, SiteRows]:
    """Three sites that train, one without scans, and one that only tests."""
    no_scans = site_rows(300, 2)
    no_scans.tables.pop("radiology")
    no_scans.local.pop("radiology")
    return {"site-01": site_rows(450, 1), "site-02": no_scans, "site-03": site_rows(400, 3),
            "site-04": site_rows(60, 4, train=0.0)}  # fmt: skip


def small(*sizes: int) -> dict[str, SiteRows]:
    """Sites that train, their folds too small for cross-fitting."""
    return {f"site-0{i}": site_rows(n, i) for i, n in enumerate(sizes or (210, 160, 140), 1)}


def raise_(error: Exception) -> None:
    """Let what goes wrong at a site end the test."""
    raise error


def keys_of(rows: dict[str, SiteRows]) -> dict[str, SigningKey]:
    """The same signing keys in every test."""
    return {site: SigningKey(site.encode().ljust(32, b".")) for site in rows}


def identities_of(rows: dict[str, SiteRows]) -> dict[str, SiteIdentity]:
    keys = keys_of(rows)
    trusted = {site: key.public for site, key in keys.items()}
    return {site: SiteIdentity(site, key, trusted) for site, key in keys.items()}


def studies_of(rows: dict[str, SiteRows], plan: FederationPlan) -> dict[str, SiteStudy]:
    identities = identities_of(rows)
    return {
        site: SiteStudy(plan, found, identity=identities[site], on_error=raise_)
        for site, found in rows.items()
    }


def run(rows: dict[str, SiteRows], plan: FederationPlan) -> Fitted:
    return run_federation(plan, InProcess(studies_of(rows, plan)))


class Flaky:
    """Carries messages to sites, and loses or spoils what one of them says from some round on."""

    def __init__(
        self,
        studies: dict[str, SiteStudy],
        site: str,
        at: Callable[[m.Message, int], bool],
        spoil: Callable[[bytes], bytes | None] = lambda _: None,
    ) -> None:
        self._inner, self._site, self._at, self._spoil = InProcess(studies), site, at, spoil
        self._n_sums, self.spoiled = 0, 0

    @property
    def sites(self) -> tuple[str, ...]:
        return self._inner.sites

    def ask(self, payload: bytes, sites: Sequence[str]) -> dict[str, bytes]:
        request = m.decode(payload)
        self._n_sums += isinstance(request, m.AskSums)
        replies = self._inner.ask(payload, sites)
        if self._site in replies and self._at(request, self._n_sums):
            self.spoiled += 1
            spoiled = self._spoil(replies.pop(self._site))
            if spoiled is not None:
                replies[self._site] = spoiled
        return replies


@dataclass
class Overheard:
    """Carries messages to sites, and keeps what was asked and answered."""

    inner: InProcess
    heard: list[tuple[m.Message, dict[str, m.Message]]] = field(default_factory=list)

    @property
    def sites(self) -> tuple[str, ...]:
        return self.inner.sites

    def ask(self, payload: bytes, sites: Sequence[str]) -> dict[str, bytes]:
        replies = self.inner.ask(payload, sites)
        self.heard.append((m.decode(payload), {s: m.decode(r) for s, r in replies.items()}))
        return replies


class Asker:
    """A coordinator by hand."""

    def __init__(self, rows: SiteRows, plan: FederationPlan = PLAN) -> None:
        self.plan = plan
        self.study = SiteStudy(plan, rows)

    def __call__(self, request: m.Message) -> m.Message:
        return m.decode(self.study.answer(m.encode(request)))

    def code(self, request: m.Message) -> str:
        reply = self(request)
        assert isinstance(reply, m.Refused), reply
        return reply.code

    def scaled(self) -> Asker:
        """Agree on scales, and on encoders without folds."""
        for designs in (tuple(self.plan.sums), self.plan.arms):
            found = self(m.AskMoments(self.plan.run, 1, designs))
            assert isinstance(found, m.DesignMoments), found
            scale = np.where(found.m2 > 0, np.sqrt(found.m2 / np.maximum(found.n, 1)), 1.0)
            told = m.SetScaling(self.plan.run, 2, designs, found.mean, scale)
            assert self(told) == m.Done()
            if designs == tuple(self.plan.sums):
                shape = (len(designs), N_RADIOLOGY)
                assert self(m.SetEncoders(self.plan.run, 3, designs, np.full(shape, 0.1))) == (
                    m.Done()
                )
        return self

    def gridded(self, *edges: float) -> Asker:
        """Agree on these edges, or on those that the site releases."""
        if not edges:
            reply = self(m.AskEdges(self.plan.run, 4, GRID))
            assert isinstance(reply, m.Edges), reply
            edges = tuple(GRID[np.append(reply.releasable, True)])
        assert self(m.SetGrid(self.plan.run, 4, np.array(edges))) == m.Done()
        return self

    def intervals(self, **change: Any) -> m.AskIntervals:
        arms = self.plan.arms
        ask = m.AskIntervals(self.plan.run, 9, arms, np.full((len(arms), 6), 0.1))
        return replace(ask, **change)

    def evaluation(self, **change: Any) -> m.AskEvaluation:
        arms, k = self.plan.arms, len(self.study.plan.edges_days)
        ask = m.AskEvaluation(
            self.plan.run, 9, arms, np.full((len(arms), 6), 0.1), np.full((len(arms), k), 1e-3),
            np.tile([-0.5, 0.5], (len(arms), 1)), np.full(6, 0.04),
        )  # fmt: skip
        return replace(ask, **change)


def ask_sums(*fits: str, width: int = N_RADIOLOGY, value: float = 0.0) -> m.AskSums:
    return m.AskSums(RUN, 5, fits, np.full((len(fits), width), value))


@dataclass(frozen=True)
class Stacked:
    """Rows of several sites: (n, p) inputs, outcome, and the site of each as its stratum."""

    x: Floats
    event: NDArray[np.bool_]
    time: Floats
    strata: NDArray[np.intp]

    def at(self, rows: NDArray[np.bool_]) -> Stacked:
        return Stacked(self.x[rows], self.event[rows], self.time[rows], self.strata[rows])

    def cox(self, ridge: float, l1: float = 0.0) -> Floats:
        """(p,) coefficients of the stratified Cox model."""
        return fit_cox(
            self.x, self.event, self.time, strata=self.strata, ridge=ridge, l1=l1
        ).candidate

    def lifelines(self, ridge: float) -> Floats:
        """(p,) the same from lifelines."""
        names = [f"x{i}" for i in range(self.x.shape[1])]
        frame = pd.DataFrame(self.x, columns=names)
        spread = frame.std(ddof=1)
        varying = [x for x in names if spread[x] > 1e-12]
        frame = frame[varying].assign(event=self.event, time=self.time, strata=self.strata)
        # lifelines penalises coefficients of inputs that it scales itself.
        model = CoxPHFitter(penalizer=(ridge / spread[varying] ** 2).to_numpy())
        options = {"precision": 1e-14, "max_steps": 200}
        model.fit(frame, "time", "event", strata="strata", fit_options=options)
        return np.asarray(model.params_.reindex(names).fillna(0.0))


class Pooled:
    """The same study on all rows in one place, written without messages."""

    def __init__(
        self,
        rows: dict[str, SiteRows],
        plan: FederationPlan,
        *,
        folds: bool,
        ridge: dict[str, float] | None = None,
    ) -> None:
        self.plan, self.folds = plan, folds
        self.ridge = {x: plan.ridges(x)[0] for x in plan.sums} if ridge is None else ridge
        self.sites = {s: r for s, r in rows.items() if len(r.train)}
        self.encoders = {x: self.encode(x) for x in plan.sums}

    def having(self, modality: str) -> list[str]:
        return [s for s, r in self.sites.items() if modality in r.tables]

    def table(self, modality: str) -> tuple[Stacked, NDArray[np.int64], Any]:
        """Standardised rows of a shared table, NaN where absent, their folds and moments."""
        of = [self.sites[s] for s in self.having(modality)]
        table = np.concatenate([r.tables[modality].train for r in of])
        seen = moments(table)
        stacked = Stacked(
            linear_inputs(table, seen.mean, seen.scale),
            np.concatenate([r.train.event for r in of]),
            np.concatenate([r.train.time for r in of]),
            np.repeat(np.arange(len(of)), [len(r.train) for r in of]),
        )
        return stacked, np.concatenate([r.folds for r in of]), seen

    def encode(self, modality: str) -> dict[str, Any]:
        rows, fold, seen = self.table(modality)
        present = ~np.isnan(rows.x).all(axis=1)

        def fit(which: NDArray[np.bool_]) -> Floats:
            share = self.plan.l1_ratio.get(modality, 0.0)
            ridge = self.ridge[modality]
            return rows.at(which).cox(ridge * (1 - share), ridge * share)

        coefficients = fit(present)
        scores = rows.x @ coefficients
        if self.folds:
            for k in range(self.plan.n_folds):
                scores[fold == k] = rows.x[fold == k] @ fit(present & (fold != k))
        column = {s: scores[rows.strata == i] for i, s in enumerate(self.having(modality))}
        return {"coefficients": coefficients, "columns": column, "mean": seen.mean,
                "scale": seen.scale}  # fmt: skip

    def columns(self, arm: str) -> dict[str, Floats]:
        """Per site the (n_train, m) modality log hazards of an arm, NaN where absent."""
        found = {}
        for site, rows in self.sites.items():
            nothing = np.full(len(rows.train), np.nan)
            parts = []
            for modality in self.plan.modalities:
                local = rows.local[modality].train if modality in rows.local else nothing
                shared = arm != LOCAL_ENCODERS and modality in self.plan.sums
                column = self.encoders[modality]["columns"].get(site, nothing) if shared else local
                parts.append(nothing if arm == without(modality) else column)
            found[site] = np.column_stack(parts)
        return found

    def fusion_rows(self, arm: str) -> tuple[Stacked, Any]:
        """Inputs of an arm's fusion model, and the moments that scale them."""
        columns = np.concatenate(list(self.columns(arm).values()))
        seen = moments(columns)
        x = fusion_inputs(columns, seen.mean, seen.scale)
        for at, modality in enumerate(self.plan.modalities):
            if arm == without(modality):
                x[:, len(self.plan.modalities) + at] = 0.0
        sites = self.sites.values()
        stacked = Stacked(
            x,
            np.concatenate([r.train.event for r in sites]),
            np.concatenate([r.train.time for r in sites]),
            np.repeat(np.arange(len(sites)), [len(r.train) for r in sites]),
        )
        return stacked, seen


@dataclass
class LinearNetwork:
    """A shared network without hidden layers: its loss is the partial likelihood's, per event.

    Attributes
    ----------
    values
        (n_train + n_test, p) inputs, NaN in the row of a patient without the modality.
    outcome
        Of the training rows.
    """

    values: Floats
    outcome: Outcome

    @property
    def present(self) -> NDArray[np.bool_]:
        return np.asarray(~np.isnan(self.values).any(axis=1))

    def loss_gradient(self, weights: Floats, rows: NDArray[np.intp]) -> tuple[float, Floats]:
        sums = cox_sums(
            self.values[rows], self.outcome.event[rows], self.outcome.time[rows], weights
        )
        return -sums.log_likelihood / sums.n_events, -sums.gradient / sums.n_events

    def log_hazard(self, weights: Floats) -> Floats:
        return np.asarray(self.values @ weights)
