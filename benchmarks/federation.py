"""What a federation costs as the consortium grows, and how near it comes to the true hazard.

Sites hold simulated tables of two modalities and answer in this process, with the bytes that a
network would carry. Nothing is trained but what sums give: encoders with cross-fitting, fusion,
baseline, evaluation.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time as clock
import tracemalloc
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from cross_validation import Figures, run, whole
from fedavg import rounds_against_fedavg

from flows.inputs import ModalityInputs, SiteInputs, site_rows
from flows.protocol import StudyProtocol, read_protocol
from flows.reference import Consortium, max_coefficient_gap
from fusion.evaluation import concordance_index, pair_counts
from fusion.federation import PROTOCOL, FederationPlan, InProcess, SiteStudy, Split, run_federation
from fusion.survival import fit_cox
from modalities.files import fingerprint

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from fusion.federation import Fitted, SiteRows, Transport

    Floats = NDArray[np.float64]

_MODALITIES = ("clinical", "measured")
_TEST_SHARE = 0.3
# Of the true log hazard: the best possible concordance is then about 0.75.
_SPREAD = 1.2
# A fold of 500 patients passes the minimum counts of a study, and so does one of 5,000.
_FEW_PATIENTS, _MANY_PATIENTS = 500, 5000


@dataclass(frozen=True)
class Simulated:
    """A consortium of tables, and the true log hazard of its patients; higher is worse."""

    protocol: StudyProtocol
    inputs: dict[str, SiteInputs]
    rows: dict[str, SiteRows]
    true_log_hazard: dict[str, Floats]

    @property
    def plan(self) -> FederationPlan:
        """What coordinator and sites agree on."""
        return self.protocol.plan(fingerprint([self.protocol.fingerprint(), sorted(self.inputs)]))

    def studies(self) -> dict[str, SiteStudy]:
        """Give the sites' parts in one run; a run asks them once."""
        plan = self.plan
        return {site: SiteStudy(plan, rows) for site, rows in self.rows.items()}


@dataclass(frozen=True)
class Replay:
    """Transport that gives the replies of an earlier run, so that no site works meanwhile."""

    sites: tuple[str, ...]
    replies: Mapping[bytes, Mapping[str, bytes]]

    def ask(self, payload: bytes, sites: Sequence[str]) -> dict[str, bytes]:
        """Reply as the sites did to the same request."""
        found = self.replies[payload]
        return {site: found[site] for site in sites}


@dataclass
class Recorded:
    """Transport that keeps every reply of the one beneath it."""

    beneath: Transport
    replies: dict[bytes, dict[str, bytes]]

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites."""
        return self.beneath.sites

    def ask(self, payload: bytes, sites: Sequence[str]) -> dict[str, bytes]:
        """Ask and keep the replies."""
        self.replies[payload] = self.beneath.ask(payload, sites)
        return self.replies[payload]


def protocol_of(n_inputs: int, *, seed: int) -> StudyProtocol:
    """Study two tables of ``n_inputs`` columns, shared as sums, with the defaults of a study."""
    names = [f"x{i}" for i in range(n_inputs)]
    linear = {"model": "linear", "sharing": "sums", "harmonise": "none", "max_inputs": n_inputs}
    return read_protocol(
        {
            "study": {
                "name": "federation",
                "data": "simulated",
                "horizon_days": 1095,
                "grid_days": [365, 1095, 1825],
                "seed": seed,
            },
            "modality": {
                "clinical": {"kind": "clinical", "numeric": names},
                "measured": {"kind": "tabular", "columns": names},
            },
            "encoder": dict.fromkeys(_MODALITIES, linear),
        }
    )


def simulate(n_sites: int, n_patients: int, *, n_inputs: int, seed: int) -> Simulated:
    """Draw sites of normal tables; their baseline hazards and case mix differ.

    Parameters
    ----------
    n_patients
        At each site.
    n_inputs
        Columns of each modality.
    """
    protocol = protocol_of(n_inputs, seed=seed)
    effects = np.random.default_rng((seed, 0)).normal(size=len(_MODALITIES) * n_inputs)
    effects *= _SPREAD / np.linalg.norm(effects)
    inputs, rows, truth = {}, {}, {}
    for i in range(n_sites):
        site = f"site-{i + 1:03d}"
        rng = np.random.default_rng((seed, 1, i))
        x = rng.normal(size=(n_patients, len(effects))) + rng.normal(0, 0.3, len(effects))
        truth[site] = x @ effects
        inputs[site] = _site_inputs(site, x, truth[site], rng)
        rows[site] = _with_local_columns(inputs[site], protocol)
    return Simulated(protocol, inputs, rows, truth)


def _site_inputs(site: str, x: Floats, log_hazard: Floats, rng: np.random.Generator) -> SiteInputs:
    n = len(x)
    days = 1500 * np.exp(rng.normal(0, 0.3)) * rng.exponential(np.exp(-log_hazard)) + 1
    censored = rng.uniform(200, 5000, n)
    everyone = np.arange(n)
    tables = np.split(x, len(_MODALITIES), axis=1)
    return SiteInputs(
        site=site,
        cohort=fingerprint([site, n]),
        patient_ids=everyone.astype(str),
        event=days <= censored,
        time=np.minimum(days, censored),
        train=everyone >= _TEST_SHARE * n,
        folds=everyone % 5,
        modalities={
            name: ModalityInputs(everyone, table)
            for name, table in zip(_MODALITIES, tables, strict=True)
        },
    )


def _with_local_columns(inputs: SiteInputs, protocol: StudyProtocol) -> SiteRows:
    """Rows with the log hazards of plain local fits: what is measured here is the federation."""
    rows = site_rows(inputs, {}, protocol)
    local = {}
    for name, table in rows.tables.items():
        fit = fit_cox(table.train, rows.train.event, rows.train.time, ridge=0.1)
        local[name] = Split(table.train @ fit.candidate, table.test @ fit.candidate)
    return replace(rows, local=local)


def measure(simulated: Simulated, *, repeats: int) -> Figures:
    """Cost of a run and accuracy of its model.

    Seconds are medians over repeats, of all parties and of the coordinator alone: it is run again
    on the recorded replies, so that neither its seconds nor its memory hold anything of a site.
    """
    plan, studies = simulated.plan, simulated.studies()
    recorded = Recorded(InProcess(studies), {})
    fitted = run_federation(plan, recorded)
    replay = Replay(recorded.sites, recorded.replies)
    whole_runs, coordinators = [], []
    for _ in range(repeats):  # in turn, so that a busy minute falls on both
        fresh = InProcess(simulated.studies())
        whole_runs.append(_seconds(partial(run_federation, plan, fresh)))
        coordinators.append(_seconds(partial(run_federation, plan, replay)))
    return {
        "wall_s": _median([wall for wall, _ in whole_runs]),
        "cpu_s": _median([cpu for _, cpu in whole_runs]),
        "coordinator_wall_s": _median([wall for wall, _ in coordinators]),
        "coordinator_cpu_s": _median([cpu for _, cpu in coordinators]),
        "coordinator_peak_mib": _peak_mib(partial(run_federation, plan, replay)),
        **_traffic(fitted),
        **accuracy(simulated, fitted, studies),
    }


def _seconds(work: Callable[[], Any]) -> tuple[float, float]:
    wall, cpu = clock.perf_counter(), clock.process_time()
    work()
    return clock.perf_counter() - wall, clock.process_time() - cpu


def _median(values: Sequence[float]) -> float:
    return round(statistics.median(values), 4)


def _peak_mib(work: Callable[[], Any]) -> float:
    tracemalloc.start()
    try:
        work()
        return round(tracemalloc.get_traced_memory()[1] / 2**20, 3)
    finally:
        tracemalloc.stop()


def _traffic(fitted: Fitted) -> Figures:
    sent = sum(x.bytes_sent for x in fitted.rounds)
    received = sum(x.bytes_received for x in fitted.rounds)
    asked = sum(x.n_sites for x in fitted.rounds)
    return {
        "rounds": len(fitted.rounds),
        "rounds_of_a_fit": max(fitted.fit_rounds.values()),
        "bytes": sent + received,
        "bytes_to_a_site_and_round": round(sent / asked, 1),
        "bytes_from_a_site_and_round": round(received / asked, 1),
    }


def accuracy(simulated: Simulated, fitted: Fitted, studies: Mapping[str, SiteStudy]) -> Figures:
    """How near the federated model is to the true hazard, on the test patients of all sites.

    ``agreement_with_truth`` is the share of pairs of one site that both put in the same order, and
    ``agreement_of_one_pooled_model`` that of a Cox model of all columns and all rows at once: what
    late fusion gives up. ``share_of_true_concordance`` is the model's concordance over that of the
    true hazard.
    """
    consortium = Consortium(simulated.protocol, simulated.inputs, studies, {})
    model = fitted.models[PROTOCOL]
    truth = {s: x[~simulated.inputs[s].train] for s, x in simulated.true_log_hazard.items()}
    scores = {s: x.test_log_hazard(PROTOCOL, model.coefficients) for s, x in studies.items()}
    found, best = (_concordance(x, studies) for x in (scores, truth))
    return {
        "agreement_with_truth": _agreement(scores, truth),
        "agreement_of_one_pooled_model": _agreement(_one_pooled_model(simulated), truth),
        "concordance": round(found, 4),
        "concordance_of_true_hazard": round(best, 4),
        "share_of_true_concordance": round(found / best, 4),
        "max_coefficient_gap": max_coefficient_gap(consortium, fitted),
        "cross_fitted": sorted(n for n, x in fitted.encoders.items() if x.cross_fitted),
    }


def _concordance(log_hazard: Mapping[str, Floats], studies: Mapping[str, SiteStudy]) -> float:
    tests = {site: study.rows.test for site, study in studies.items()}
    pairs = [pair_counts(x, tests[s].event, tests[s].time) for s, x in log_hazard.items()]
    return concordance_index(pairs).value


def _agreement(log_hazard: Mapping[str, Floats], truth: Mapping[str, Floats]) -> float:
    pairs = []
    for site, x in log_hazard.items():
        # A lower hazard is a longer time, all of them observed.
        order = np.argsort(np.argsort(-truth[site])) + 1.0
        pairs.append(pair_counts(x, np.ones(len(x), dtype=bool), order))
    return round(concordance_index(pairs).value, 4)


def _one_pooled_model(simulated: Simulated) -> dict[str, Floats]:
    """Per site the log hazard of its test patients by one Cox model of all columns and rows."""
    sites = list(simulated.inputs.values())
    columns = [np.column_stack([x.modalities[m].values for m in _MODALITIES]) for x in sites]
    fit = fit_cox(
        np.concatenate([c[x.train] for c, x in zip(columns, sites, strict=True)]),
        np.concatenate([x.event[x.train] for x in sites]),
        np.concatenate([x.time[x.train] for x in sites]),
        strata=np.repeat(np.arange(len(sites)), [int(x.train.sum()) for x in sites]),
    )
    return {x.site: c[~x.train] @ fit.candidate for c, x in zip(columns, sites, strict=True)}


def slopes(by_sites: Mapping[int, Figures]) -> dict[str, float]:
    """Fit log cost against log sites: 1 is proportional, 0 independent."""
    x = np.log(list(by_sites))
    names = ("wall_s", "cpu_s", "coordinator_cpu_s", "coordinator_peak_mib", "bytes")
    return {
        name: round(float(np.polyfit(x, np.log([f[name] for f in by_sites.values()]), 1)[0]), 3)
        for name in names
    }


def bytes_by_patients(n_sites: int, **drawn: int) -> Figures:
    """Traffic with few patients at each site, and with ten times as many."""
    found: Figures = {"sites": n_sites}
    for n_patients in (_FEW_PATIENTS, _MANY_PATIENTS):
        simulated = simulate(n_sites, n_patients, **drawn)
        fitted = run_federation(simulated.plan, InProcess(simulated.studies()))
        found[str(n_patients)] = _traffic(fitted)
    return found


def study(arguments: argparse.Namespace) -> Figures:
    """Run the benchmark that the command line asks for."""
    drawn = {"n_inputs": arguments.inputs, "seed": arguments.seed}
    by_sites = {
        n_sites: measure(simulate(n_sites, arguments.patients, **drawn), repeats=arguments.repeats)
        for n_sites in sorted(set(arguments.sites))
    }
    return {
        "benchmark": "federation",
        "patients_at_a_site": arguments.patients,
        "inputs": dict.fromkeys(_MODALITIES, arguments.inputs),
        "by_sites": by_sites,
        "log_log_slope": slopes(by_sites) if len(by_sites) > 1 else None,
        "bytes_by_patients": bytes_by_patients(min(by_sites), **drawn),
        "rounds_against_fedavg": rounds_against_fedavg(seed=arguments.seed),
    }


def _sites(text: str) -> list[int]:
    return [whole(2)(part) for part in text.split(",")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and print one JSON object."""
    parser = argparse.ArgumentParser(description="Cost and accuracy of simulated consortia.")
    parser.add_argument("--sites", type=_sites, default=[3, 10, 30, 100], help="as 3,10,30")
    parser.add_argument("--patients", type=whole(100), default=500, help="of each site")
    parser.add_argument("--inputs", type=whole(1), default=5, help="of each of two modalities")
    parser.add_argument("--repeats", type=whole(1), default=3, help="of timings; medians are shown")
    parser.add_argument("--seed", type=whole(0), default=0, help="of the simulation")
    parser.add_argument("--json", action="store_true", help="the only form there is")
    return run(parser, study, arguments)


if __name__ == "__main__":
    sys.exit(main())
