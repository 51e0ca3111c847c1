"""In what two cohorts of a site differ, and how to undo what only a few patients make of it.

Patients are compared by facts (who they are, outcome, split, fold), which no protocol changes, and
by the values of their features, which another protocol changes for everybody. Column by column
however most values stay, and a column that one patient changes gives that patient away.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import TYPE_CHECKING, Final

import numpy as np

from modalities.cohort import assemble
from modalities.files import fingerprint

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from anndata import AnnData
    from mudata import MuData
    from numpy.typing import NDArray

    Patients = dict[str, list[str]]

_OUTCOME: Final = ("event", "time_days", "split", "fold_unit")


class FewChanged(ValueError):
    """A change of few patients that cannot be undone."""


def keyed(secret: bytes, purpose: str, text: str) -> str:
    """HMAC-SHA-256 of a text under the site's secret, one function per purpose."""
    return hmac.new(secret, f"snapshot {purpose}\0{text}".encode(), hashlib.sha256).hexdigest()


def keyed_patients(secret: bytes, cohort: MuData) -> Patients:
    """Per keyed id the keyed facts and the keyed values of all features."""
    values: dict[str, list[object]] = {x: [] for x in cohort.obs_names}
    for name, table in sorted(cohort.mod.items()):
        spec = str(table.uns["spec_fingerprint"])
        bags = table.obs["input_digest"].astype(str) if "bag" in table.obs else [""] * table.n_obs
        for patient, row, bag in zip(table.obs_names, _dense(table), bags, strict=True):
            if patient in values:
                digest = hashlib.sha256((row + 0.0).astype("<f8").tobytes())  # one zero
                values[patient].append([name, spec, bag, digest.hexdigest()])
    facts = zip(*(cohort.obs[column].tolist() for column in _OUTCOME), strict=True)
    return {
        keyed(secret, "patient", x): [
            keyed(secret, "facts", fingerprint([x, list(fact)])),
            keyed(secret, "values", fingerprint([x, values[x]])),
        ]
        for x, fact in zip(cohort.obs_names, facts, strict=True)
    }


def differing(
    one: Mapping[str, list[str]], other: Mapping[str, list[str]], *, facts_only: bool = False
) -> int:
    """Count patients who are in one cohort only, or differ in facts or, unless left out, values."""
    n = 1 if facts_only else 2
    return sum(x not in one or x not in other or one[x][:n] != other[x][:n] for x in {*one, *other})


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
    outcome = released[-1].obs[list(_OUTCOME)]
    tables = {}
    for name, table in draft.mod.items():
        ours = table[table.obs_names.isin(outcome.index)].copy()
        for old in reversed(released):
            if name in old.mod:
                ours = _settled_table(ours, old.mod[name], least)
        tables[name] = ours
    again = assemble(tables, outcome, protocol_fingerprint=str(draft.uns["protocol_fingerprint"]))
    if again.n_obs != len(outcome):
        raise FewChanged
    return again


def _settled_table(table: AnnData, old: AnnData, least: int) -> AnnData:
    came = table.obs_names.difference(old.obs_names)
    left = old.obs_names.difference(table.obs_names)
    if len(came) + len(left) >= least:
        return table  # as many stand behind the difference in each column
    if len(left):
        raise FewChanged
    table = table[~table.obs_names.isin(came)].copy()
    before = old[table.obs_names]
    was, is_ = (x.obs["input_digest"].astype(str).to_numpy() for x in (before, table))
    is_same_spec = table.uns["spec_fingerprint"] == before.uns["spec_fingerprint"]
    if "bag" in table.obs and is_same_spec and _is_few(int((was != is_).sum()), least):
        raise FewChanged
    names = [x for x in table.var_names if x in set(before.var_names)]
    now, then = _dense(table[:, names]), _dense(before[:, names])
    n_changed = (~((now == then) | (np.isnan(now) & np.isnan(then)))).sum(axis=0)
    few = [x for x, n in zip(names, n_changed, strict=True) if _is_few(n, least)]
    if few:
        values = _dense(table).copy()
        values[:, table.var_names.get_indexer(few)] = _dense(before[:, few])
        table.X = values
    return table


def _is_few(n: int, least: int) -> bool:
    return 0 < n < least


def _dense(table: AnnData) -> NDArray[np.floating]:
    found = table.X
    return np.asarray(found.toarray() if hasattr(found, "toarray") else found)
