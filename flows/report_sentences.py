"""What a report says in sentences: each follows from the numbers, and claims no more."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from flows.report_words import RIVALS, alarm_words, code_words
from flows.shown import Shown, listed, missing, pointer
from fusion.federation import LOCAL_ENCODERS, LOCAL_ONLY, PROTOCOL
from fusion.federation.plan import without

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_ARM = pointer("results", "arms", PROTOCOL)
_DEFAULT_TILE_ENCODER = "tf_efficientnet_lite0"
# Below it, a validation says little of calibration: Collins, Ogundimu and Altman, Statistics in
# Medicine 35 (2016) 214-226.
_FEW_EVENTS = 100
_VERDICTS = {
    "arm": ("the federated model ranks better", "it ranks worse", "not told apart"),
    "modality": ("it adds", "the model is better without it", "no clear gain or loss"),
}


def side(shown: Shown, at: str, *, of: float) -> int | None:
    """Side of a value on which an interval lies: 1 above, -1 below, 0 across; None for no interval.

    Parameters
    ----------
    at
        JSON pointer to an estimate.
    of
        The value.
    """
    low, high = shown.get(f"{at}/low"), shown.get(f"{at}/high")
    if low is None or high is None:
        return None
    return int(low > of) - int(high < of)


def verdict(shown: Shown, at: str, *, kind: str = "arm") -> Markup:
    """Say in a few words on which side of zero a difference lies."""
    found = side(shown, at, of=0.0)
    if found is None:
        return missing("no figure")
    above, below, across = _VERDICTS[kind]
    return Markup("{}").format({1: above, -1: below, 0: across}[found])


def findings(shown: Shown) -> list[Markup]:
    """Results in sentences, for the summary."""
    parts: list[Callable[[Shown], Iterator[Markup]]] = [
        _discrimination, _against_rivals, _calibrated, _at_left_out_sites,
    ]  # fmt: skip
    return [sentence for part in parts for sentence in part(shown)]


def _discrimination(shown: Shown) -> Iterator[Markup]:
    at = f"{_ARM}/concordance"
    if shown.get(at) is None:
        yield Markup("No site could release a figure of discrimination.")
        return
    yield Markup("Concordance was {} (a half is chance).").format(shown.estimate(at))


def _against_rivals(shown: Shown) -> Iterator[Markup]:
    for arm in (LOCAL_ONLY, LOCAL_ENCODERS):
        at = pointer("results", "arms", arm, "difference")
        found = side(shown, at, of=0.0)
        if found is None:
            continue
        words = {
            1: "The federated model ranked patients better than {}, by {}.",
            -1: "The federated model ranked patients worse than {}, by {}.",
            0: "The federated model and {} were not told apart: they differ by {}, with zero in "
            "the interval.",
        }[found]
        yield Markup(words).format(RIVALS[arm], shown.difference(at))


def _calibrated(shown: Shown) -> Iterator[Markup]:
    ratio, slope = f"{_ARM}/observed_expected", f"{_ARM}/calibration_slope"
    if shown.get(ratio) is not None:
        yield Markup("Observed over expected events were {}.").format(shown.estimate(ratio, ".2f"))
    if shown.get(slope) is not None:
        yield Markup("The calibration slope was {}.").format(shown.estimate(slope, ".2f"))


def _at_left_out_sites(shown: Shown) -> Iterator[Markup]:
    at = "/results/left_out_pooled"
    if shown.get(at) is not None:
        yield Markup("At sites left out of the fitting, concordance was {}.").format(
            shown.estimate(at)
        )


def alarms(shown: Shown) -> list[Markup]:
    """Name each site that people have to look at, and why, in the order of the record."""
    at = [pointer("results", "alarms", i) for i in range(len(shown.get("/results/alarms") or []))]
    return [
        Markup("{}: {} (z {}).").format(
            shown.text(f"{x}/site"),
            alarm_words(shown.get(f"{x}/reason")),
            shown.number(f"{x}/z", ".1f", why="not finite"),
        )
        for x in at
    ]


def calibration_in_words(shown: Shown) -> Markup:
    """Say what calibration in the large and the slope mean, each by its interval."""
    ratio, slope = f"{_ARM}/observed_expected", f"{_ARM}/calibration_slope"
    level = {
        1: "More events were seen than expected: predicted risks are too low on the whole.",
        -1: "Fewer events were seen than expected: predicted risks are too high on the whole.",
        0: "The interval of observed over expected events includes one: no miscalibration on the "
        "whole is seen.",
        None: "Calibration on the whole has no figure, as no site could release it.",
    }[side(shown, ratio, of=1.0)]
    spread = {
        1: "The slope is above one: predictions differ too little between patients.",
        -1: "The slope is below one: predictions are too extreme, as after overfitting.",
        0: "The interval of the slope includes one.",
        None: "The slope has no figure, as no site could release it.",
    }[side(shown, slope, of=1.0)]
    return Markup("{} {}").format(level, spread)


def decision_in_words(shown: Shown) -> Markup:
    """Name the thresholds at which the model is worth more than both simple rules."""
    at = "/results/net_benefit"
    shares = shown.get(f"{at}/thresholds") or []
    better = [
        i
        for i in range(len(shares))
        if all(
            (low := shown.get(f"{at}/{part}/low/{i}")) is not None and low > 0.0
            for part in ("model", "gain")
        )
    ]
    if not better:
        return Markup(
            "At no threshold is the model worth more, beyond chance, than both treating everybody "
            "and treating nobody."
        )
    named = listed([shown.number(f"{at}/thresholds/{i}", "percent") for i in better])
    return Markup(
        "The intervals put the model above both treating everybody and treating nobody at {}."
    ).format(named)


def conclusions(shown: Shown) -> list[Markup]:
    """Conclude, in neutral words, from the sides on which intervals lie."""
    sentences = [_ranking_in_words(shown), calibration_in_words(shown)]
    if _sites_differ(shown):
        sentences.append(Markup("Sites differ in what predicts the outcome, more than by chance."))
    sentences.append(Markup("That using the model improves care is not shown here."))
    return sentences


def _ranking_in_words(shown: Shown) -> Markup:
    chance = {
        1: "The model ranks patients it has not seen better than chance",
        -1: "The model ranks patients it has not seen worse than chance",
        0: "Whether the model ranks patients better than chance is not shown",
        None: "How the model ranks patients is not known",
    }[side(shown, f"{_ARM}/concordance", of=0.5)]
    local = {
        1: "and better than what sites reach alone.",
        -1: "and worse than what sites reach alone.",
        0: "and a gain over what sites reach alone is not shown.",
        None: "and there is no comparison with what sites reach alone.",
    }[side(shown, pointer("results", "arms", LOCAL_ONLY, "difference"), of=0.0)]
    return Markup("{}, {}").format(chance, local)


def _sites_differ(shown: Shown) -> bool:
    p_value = shown.get("/results/heterogeneity/test/p_value")
    return p_value is not None and p_value < 0.05


def limitations(shown: Shown) -> list[Markup]:
    """Name what weakens the run, from its own facts; then what holds for every run."""
    parts: list[Callable[[Shown], Iterator[Markup]]] = [
        _of_the_data, _of_the_sites, _of_validation, _of_the_encoders, _of_the_fusion,
        _of_every_run,
    ]  # fmt: skip
    return [sentence for part in parts for sentence in part(shown)]


def _of_the_data(shown: Shown) -> Iterator[Markup]:
    data = shown.get("/protocol/study/data")
    if data == "simulated":
        yield Markup("The data are simulated; nothing here is about patients.")
    if shown.get("/lowered_minimums"):
        yield Markup(
            "Minimum counts are lowered, which only simulated and public data allow: {}. With the "
            "usual ones some figures would be hidden."
        ).format(shown.items("/lowered_minimums"))
    if 0 < shown.get("/totals/n_test_events") < _FEW_EVENTS:
        yield Markup(
            "There are {} events among the test patients; below a hundred, calibration and "
            "differences between models are known only roughly."
        ).format(shown.number("/totals/n_test_events"))


def _of_the_sites(shown: Shown) -> Iterator[Markup]:
    for i, site in enumerate(shown.get("/sites")):
        if site["code"]:
            yield Markup("{} left the study: {}.").format(
                shown.text(pointer("sites", i, "site")), code_words(site["code"])
            )
    if shown.get("/totals/n_hidden_sites"):
        yield Markup(
            "{} of the sites had too few test events to tell how the model does there."
        ).format(shown.number("/totals/n_hidden_sites"))
    if _sites_differ(shown):
        yield Markup(
            "Sites differ in the coefficients (p {}); one model for all is a compromise."
        ).format(shown.number("/results/heterogeneity/test/p_value", "p"))
    if shown.get("/protocol/federation/sums") == "plain":
        yield Markup(
            "Sums are plain: the coordinator sees each site's, and has to be trusted with them."
        )


def _of_validation(shown: Shown) -> Iterator[Markup]:
    local = [x for x, spec in shown.get("/protocol/encoder").items() if spec["sharing"] == "local"]
    external = shown.get("/totals/n_external_sites")
    validated = external or shown.get("/results/left_out_pooled") is not None
    if not validated:
        yield Markup(
            "No site is external: how the model does at a hospital that it does not know is not "
            "shown."
        )
    if local and validated:
        yield Markup(
            "Validation at other sites is without {}, whose encoders never leave a site: patients "
            "there count as lacking it."
        ).format(listed(local))


def _of_the_encoders(shown: Shown) -> Iterator[Markup]:
    fitted = shown.get("/encoders")
    optimistic = [x for x, encoder in fitted.items() if not encoder["cross_fitted"]]
    if optimistic:
        yield Markup(
            "{}: fitted without out-of-fold predictions, as some site's folds are too small; the "
            "fusion model saw these log hazards more optimistic than they are and may weigh them "
            "too much."
        ).format(listed(optimistic))
    by_default = [
        name
        for name, spec in shown.get("/protocol/modality").items()
        if spec.get("encoder") == _DEFAULT_TILE_ENCODER
    ]
    if by_default:
        yield Markup(
            "{}: tiles are embedded by a network trained on everyday photographs, which is there "
            "to try things out and is no pathology model."
        ).format(listed(by_default))
    if shown.get("/networks") or shown.get("/fusion_kind") == "gated":
        yield Markup(
            "A network was trained by averaging weights; such weights can tell who was trained on."
        )


def _of_the_fusion(shown: Shown) -> Iterator[Markup]:
    idle = [
        x
        for x in shown.get(pointer("models", PROTOCOL, "modalities"))
        if side(shown, pointer("results", "arms", without(x), "difference"), of=0.0) == 0
    ]
    if idle:
        yield Markup(
            "Whether leaving out {} makes the model worse is not shown by these test patients."
        ).format(Markup(", or leaving out ").join(idle))
    if any(not term["varies"] for term in shown.get(pointer("models", PROTOCOL, "terms"))):
        yield Markup(
            "A term that never varied in training has no weight; a patient in whom it does is "
            "outside what the model has seen."
        )
    yield Markup(
        "Coefficients are shrunk by a ridge; their intervals describe the penalised fit and not "
        "the choice of the ridge."
    )


def _of_every_run(shown: Shown) -> Iterator[Markup]:
    yield Markup(
        "The split into training and test patients is one of many; intervals are for the test "
        "patients given the fitted model."
    )
    yield Markup("Intervals take each site's censoring curve as known.")
    yield Markup("Nothing is adjusted for the number of comparisons and subgroups.")
    if shown.get("/results/treatment"):
        yield Markup("Treatments were not assigned at random, so that no effect is estimated.")


def ridge_of(shown: Shown, name: str) -> Markup:
    """Penalty of an encoder, or of the fusion model as ``protocol``, and out of how many."""
    at = pointer("results", "ridge", name)
    if shown.get(at) is None:
        sharing = shown.get(pointer("protocol", "encoder", name, "sharing"))
        return missing("chosen at each site" if sharing == "local" else "not recorded")
    tried = pointer("protocol", "fusion", "ridge")
    if name != PROTOCOL:
        tried = pointer("protocol", "encoder", name, "ridge")
    penalties = shown.get(tried)
    value = shown.number(at, "g")
    if not isinstance(penalties, list) or len(penalties) < 2:
        return Markup("{}, given").format(value)
    candidates = listed([shown.number(f"{tried}/{i}", "g") for i in range(len(penalties))])
    return Markup('{} <span class="why">of {}</span>').format(value, candidates)


def cross_fitting_of(shown: Shown, name: str) -> Markup:
    """Whether the fusion model saw out-of-fold log hazards of a modality."""
    encoder: dict[str, Any] | None = shown.get(pointer("encoders", name))
    if encoder is not None:
        return Markup("yes") if encoder["cross_fitted"] else Markup("no, folds are too small")
    if shown.get(pointer("protocol", "encoder", name, "sharing")) == "local":
        return Markup("yes")  # a site cross-fits its own encoders always
    return missing("not recorded")


def inputs_of(shown: Shown, name: str) -> Markup:
    """Name the inputs of a modality, where the protocol or the consortium's encoder has names."""
    kind = shown.get(pointer("protocol", "modality", name, "kind"))
    fitted = pointer("encoders", name, "inputs")
    projected = any(x.startswith("projection_") for x in shown.get(fitted) or ())
    for at in (pointer("protocol", "encoder", name, "inputs"), fitted):
        if shown.get(at) and not (at == fitted and projected):
            return shown.items(at)
    found = Markup("tiles of slides") if kind == "pathology" else Markup("all that it extracts")
    return found + Markup(", randomly projected") if projected else found
