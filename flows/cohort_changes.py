"""In what two cohorts of a site differ, and how to undo what only a few patients make of it.

Patients are compared by facts (who they are, outcome, split, fold), which no protocol changes, and
by the values of their features, which another protocol changes for everybody. Column by column
however most values stay, and a column that one patient changes gives that patient away.
"""

from __future__ import annotations

import hashlib
import hmac
from collections import Counter
from typing import TYPE_CHECKING, Final

import numpy as np

from modalities.cohort import TEST, TRAIN, assemble
from modalities.files import fingerprint

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from anndata import AnnData
    from mudata import MuData
    from numpy.typing import NDArray
    from pandas import Index

    Patients = dict[str, list[str]]

_OUTCOME: Final = ("event", "time_days", "split", "fold_unit")


class FewChanged(ValueError):
    """A change of few patients that cannot be undone."""


def keyed(secret: bytes, purpose: str, text: str) -> str:
    """HMAC-SHA-256 of a text under the site's secret, one function per purpose."""
    return hmac.new(secret, f"snapshot {purpose}\0{text}".encode(), hashlib.sha256).hexdigest()


def keyed_patients(secret: bytes, cohort: MuData) -> Patients:
    """Per keyed id the keyed facts, the keyed values of all features, and the modalities there."""
    values: dict[str, list[object]] = {x: [] for x in cohort.obs_names}
    modalities: dict[str, list[str]] = {x: [] for x in cohort.obs_names}
    for name, table in sorted(cohort.mod.items()):
        spec = str(table.uns["spec_fingerprint"])
        bags = table.obs["input_digest"].astype(str) if "bag" in table.obs else [""] * table.n_obs
        for patient, row, bag in zip(table.obs_names, _dense(table), bags, strict=True):
            if patient in values:
                digest = hashlib.sha256((row + 0.0).astype("<f8").tobytes())  # one zero
                values[patient].append([name, spec, bag, digest.hexdigest()])
                if not np.isnan(row).all():
                    modalities[patient].append(name)
    # Whole numbers come back from the disk as such, unless one patient's has a fraction.
    times = cohort.obs["time_days"].astype(float)
    outcome = cohort.obs.assign(time_days=times)
    facts = zip(*(outcome[column].tolist() for column in _OUTCOME), strict=True)
    return {
        keyed(secret, "patient", x): [
            keyed(secret, "facts", fingerprint([x, list(fact)])),
            keyed(secret, "values", fingerprint([x, values[x]])),
            " ".join(modalities[x]),
        ]
        for x, fact in zip(cohort.obs_names, facts, strict=True)
    }


def differing(
    one: Mapping[str, list[str]], other: Mapping[str, list[str]], *, facts_only: bool = False
) -> int:
    """Count patients who are in one cohort only, or differ in facts or, unless left out, values."""
    n = 1 if facts_only else 2
    return sum(x not in one or x not in other or one[x][:n] != other[x][:n] for x in {*one, *other})


def few_behind_a_sum(
    one: Mapping[str, list[str]], other: Mapping[str, list[str]], *, least: int
) -> bool:
    """Whether two cohorts differ by some patients, but fewer than ``least`` with some modality."""
    behind: Counter[str] = Counter()
    for x in {*one, *other}:
        if x in one and x in other and one[x][0] == other[x][0]:
            continue
        behind.update({"", *(name for of in (one, other) if x in of for name in of[x][2].split())})
    return any(_is_few(n, least) for n in behind.values())


def settled(draft: MuData, released: Sequence[MuData], *, least: int) -> MuData:
    """Give the features of a draft to the patients and outcomes of what was released before.

    Where fewer than ``least`` patients differ in a column from a released cohort, which may be of
    another protocol, the column stays as it was there.

    Parameters
    ----------
    released
        Cohorts of the very same patients and outcomes, the last one released last.

    Raises
    ------
    FewChanged
        If a patient has no features any more, or a few have lost a modality or have other slides.
    """
    outcome = released[-1].obs[list(_OUTCOME)].astype({"time_days": float})
    tables = {}
    for name, table in draft.mod.items():
        ours = table[table.obs_names.isin(outcome.index)].copy()
        for old in reversed(released):
            if name in old.mod:
                for members in (outcome.index[outcome["split"] == x] for x in (TRAIN, TEST)):
                    ours = _settled_part(ours, old.mod[name], members, least)
        tables[name] = ours
    again = assemble(tables, outcome, protocol_fingerprint=str(draft.uns["protocol_fingerprint"]))
    if again.n_obs != len(outcome):
        raise FewChanged
    return again


def _settled_part(table: AnnData, old: AnnData, members: Index, least: int) -> AnnData:
    """Settle the rows of some patients; sums are of the training or of the test patients."""
    ours, theirs = (x.obs_names.intersection(members) for x in (table, old))
    came, left = ours.difference(theirs), theirs.difference(ours)
    if len(came) + len(left) >= least:
        return table  # as many stand behind the difference in each column
    if len(left):
        raise FewChanged
    table = table[~table.obs_names.isin(came)].copy()
    before, after = old[theirs], table[theirs]
    was, is_ = (x.obs["input_digest"].astype(str).to_numpy() for x in (before, after))
    is_same_spec = table.uns["spec_fingerprint"] == before.uns["spec_fingerprint"]
    if "bag" in table.obs and is_same_spec and _is_few(int((was != is_).sum()), least):
        raise FewChanged
    names = [x for x in table.var_names if x in set(before.var_names)]
    now, then = _dense(after[:, names]), _dense(before[:, names])
    changed = ~((now == then) | (np.isnan(now) & np.isnan(then)))
    few = np.array([_is_few(n, least) for n in changed.sum(axis=0)], dtype=bool)
    rows, columns = (
        found.get_indexer(x) for found, x in ((table.obs_names, theirs), (table.var_names, names))
    )
    values = _dense(table).copy()
    values[np.ix_(rows, columns[few])] = then[:, few]
    table.X = values
    if is_same_spec:
        # Not even the cohort's digest tells of a change that is not there.
        digests = table.obs["input_digest"].astype(str).to_numpy()
        digests[rows] = np.where((changed & ~few).any(axis=1), is_, was)
        table.obs["input_digest"] = digests
    return table


def _is_few(n: int, least: int) -> bool:
    return 0 < n < least


def _dense(table: AnnData) -> NDArray[np.floating]:
    found = table.X
    return np.asarray(found.toarray() if hasattr(found, "toarray") else found)
