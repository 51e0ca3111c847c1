"""Words for what a record holds as names and codes: roles, refusals, kinds, arms."""

from __future__ import annotations

from typing import Any

from flows.record_values import EXTERNAL, LEFT
from fusion.federation import LOCAL_ENCODERS, LOCAL_ONLY, PROTOCOL
from fusion.federation.plan import PERSONALISED

COMPARED = (PROTOCOL, LOCAL_ONLY, PERSONALISED, LOCAL_ENCODERS)
ARM_WORDS = {
    PROTOCOL: "Federated",
    LOCAL_ONLY: "Local only",
    PERSONALISED: "Personalised",
    LOCAL_ENCODERS: "Federated with local encoders",
}
# Within a sentence, after "the federated model ... than".
RIVALS = {
    LOCAL_ONLY: "the models that sites train alone",
    PERSONALISED: "the models that sites personalise",
    LOCAL_ENCODERS: "a federated model on local encoders",
}
_REFERENCE_WORDS = {
    "federated": "Federated",
    "federated_local_encoders": "Federated with local encoders",
    "pooled": "Pooled rows, encoders included",
    "true_hazard": "The true hazard",
}
_CODES = {
    "below_minimum_patients": "too few training patients for its minimum counts",
    "below_minimum_events": "too few training events for its minimum counts",
    "too_many_inputs": "more inputs than its patients allow",
    "fold_too_small": "too few patients in a fold",
    "modality_absent": "it lacks a modality that was asked for",
    "wrong_protocol": "it approved another protocol",
    "wrong_run": "it was in another run",
    "malformed_request": "it could not read a request",
    "already_answered": "it was asked for something else than before that it tells but once",
    "rounds_spent": "it had answered as often as it allows",
    "small_cell": "a cell would have been too small",
    "site_error": "an error at the site, told in the site's own log",
    "unexpected_reply": "it answered with something else",
    "unreachable": "it could not be reached",
    "not_approved": "the site, or a quorum of sites, has not approved this very study",
    "replayed": "a message came again or out of order",
    "bad_signature": "a message was not signed by who sent it",
    "unknown_sender": "a message came from nobody in the consortium",
    "roster_too_small": "too few sites for a secure sum",
    "roster_changed": "the same sums were asked of other sites before",
    "bad_key": "no trusted key for the secure sum",
    "mask_spent": "a mask would have served twice",
    "overflow": "a sum was too large to hide",
    "budget_spent": "the privacy budget is spent",
    "withdrawn": "a patient was withdrawn, and the next cohort is not cut yet",
    "not_within_bounds": "its rows or sums are not what they can be",
}
_WORDS: dict[str, dict[Any, str]] = {
    "model": {
        "linear": "Linear Cox model of the table",
        "mlp": "Small neural network on the table",
        "gated_attention": "Gated attention over tiles",
        "mean_pooling": "Linear Cox model of the mean tile",
    },
    "sharing": {
        "local": "Nothing; each site's encoder stays there",
        "sums": "Summed gradients and curvatures; one encoder for all",
        "weights": "Averaged weights; one network for all",
    },
    "harmonise": {"none": "Left as they are", "site": "Removed at each site"},
    "fusion_kind": {
        "cox": "Cox model stratified by site",
        "logistic_hazard": "Logistic hazard in discrete time",
        "gated": "Gated network",
    },
    "sums": {
        "plain": "Sums are plain: the coordinator sees those of each site.",
        "secure_sum": "Sums are secure: the coordinator sees their total over sites only.",
    },
}
_MINIMUMS = {
    "patients": "Training patients of a site",
    "events": "Observed events of a site",
    "patients_per_input": "Patients per input of a fit",
    "cell": "Patients in a cell of a table",
    "test_events": "Test events of a site behind a measure",
    "pooled_patients": "Training patients over all sites",
    "snapshot": "Patients by which two released cohorts differ",
    "intervals": "Most intervals of the time grid",
}
# Of a site, what its own held-out patients or training sums say.
_ALARMS = {
    "below_chance": "patients at higher predicted hazard lived longer",
    "worse_than_own": "the federated model orders patients worse than the site's own",
    "unlike_the_others": "the federated model does much worse there than at the other sites",
    "unlike_in_training": "risk varies in its training rows not as the other sites' model says",
}
NONE_RELEASED = "no site could release it"


def word(section: str, value: Any) -> str:
    """Words for a setting of the protocol; the setting itself where there are none."""
    return _WORDS.get(section, {}).get(value, str(value).replace("_", " "))


def code_words(code: str) -> str:
    """Plain words for the code with which a site refused."""
    return _CODES.get(code, code.replace("_", " "))


def alarm_words(reason: str) -> str:
    """Plain words for why people should look at a site."""
    return _ALARMS.get(reason, reason.replace("_", " "))


def reference_name(arm: str) -> str:
    """Name of an arm of the comparison with pooled rows."""
    return _REFERENCE_WORDS.get(arm, arm.replace("_", " "))


def minimum_words(name: str) -> str:
    """Name of a minimum count."""
    return _MINIMUMS.get(name, name.replace("_", " "))


def why_no_training(site: dict[str, Any]) -> str:
    """Why a site has no training patients to show."""
    if site["role"] == LEFT:
        return "left the study"
    return "external: trains nothing" if site["role"] == EXTERNAL else "not told"


def why_no_test(site: dict[str, Any]) -> str:
    """Why a site's test patients are not shown."""
    return "left the study" if site["role"] == LEFT else "hidden: too few test events"


def why_no_figure(site: dict[str, Any], arm: str) -> str:
    """Why an arm has no figure at a site."""
    if site["role"] == LEFT or not site["n_test"]:
        return why_no_test(site)
    if site["role"] == EXTERNAL and arm != PROTOCOL:
        return "external: has no such model"
    return "the site could not release it"


def why_no_arm(arm: str) -> str:
    """Why an arm has no figure at all."""
    return NONE_RELEASED if arm == PROTOCOL else "no site has such a model, or could release it"


def fusion_sharing(kind: str) -> str:
    """Say what of the fusion model crosses a hospital's border."""
    return word("sharing", "weights" if kind == "gated" else "sums").replace("encoder", "model")
