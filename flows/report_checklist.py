"""The items of TRIPOD+AI in our own short words, and what a run can say to each.

References
----------
Collins et al., TRIPOD+AI statement: updated guidance for reporting clinical prediction models that
use regression or machine learning methods, BMJ 385 (2024) e078378.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Item:
    """One item of the checklist.

    Attributes
    ----------
    places
        Sections of the page that answer it, by anchor.
    authors
        What a run cannot know and the authors add; empty for nothing.
    """

    number: str
    asks: str
    places: tuple[str, ...] = ()
    authors: str = ""

    @property
    def state(self) -> str:
        """Who answers the item."""
        if not self.places:
            return "○ To be completed by the authors"
        return "◐ In part" if self.authors else "● On this page"


CHECKLIST: dict[str, tuple[Item, ...]] = {
    "Title and abstract": (
        Item("1", "Title: development or evaluation of a multivariable model, whom it is for, the "
             "outcome", ("summary",), "name the target population in the title"),
        Item("2", "Abstract, by the checklist for abstracts", ("summary",),
             "setting, registration and funding"),
    ),
    "Introduction": (
        Item("3a", "Context in health care, purpose, reason, and models that exist", (),
             "the clinical question and earlier models"),
        Item("3b", "Whom the model is for, when in the care pathway, and who uses it", (),
             "population, moment and user"),
        Item("3c", "Known inequalities in health between groups", (), "what is known of them"),
        Item("4", "Objectives: development, validation, or both", ("summary", "methods"),
             "the aims as planned"),
    ),
    "Methods": (
        Item("5a",
             "Sources of the data for development and for evaluation, and whom they represent",
             ("participants",), "what each registry is, and why it was used"),
        Item("5b", "Dates of accrual and end of follow-up", (), "dates; they stay at the sites"),
        Item("6a", "Setting, number and location of centres", ("participants",),
             "setting and location; names of sites are opaque here"),
        Item("6b", "Who was eligible", (), "criteria"),
        Item("6c", "Treatments received, and how they were handled", ("treatment",),
             "treatments in the cohort and at baseline"),
        Item("7", "Preparation and checks of the data, and whether alike across groups",
             ("predictors", "methods"), "curation before the files reached the extractors"),
        Item("8a", "The outcome, its time horizon, and how and when it was assessed",
             ("predictors",), "how the sites assessed it, and whether alike in all groups"),
        Item("8b", "Who assessed an outcome that needs judgement", (), "assessors"),
        Item("8c", "Blinding of the assessment of the outcome", (), "blinding"),
        Item("9a", "How predictors were chosen before modelling", ("predictors",),
             "the reasons for them"),
        Item("9b", "Every predictor, and how and when it was measured",
             ("predictors", "reproducibility"), "measurement at the sites"),
        Item("9c", "Who judged a predictor that needs judgement", (), "readers and contours"),
        Item("10", "How the sample size was arrived at, for development and for evaluation",
             ("participants",), "a calculation, or why the size suffices"),
        Item("11", "Missing data, and reasons for leaving data out", ("methods", "participants"),
             "reasons for missing values"),
        Item("12a", "How the data were used, and how they were divided", ("participants",
             "methods")),
        Item("12b", "How predictors were handled: form, scale, transformation",
             ("predictors", "methods", "model")),
        Item("12c", "Type of model and why, all steps of building it, tuning, internal validation",
             ("methods",), "why this type"),
        Item("12d", "Differences between clusters in parameters and in performance, how quantified",
             ("heterogeneity", "performance", "left-out")),
        Item("12e", "Measures and plots of performance, and how models were compared",
             ("performance", "comparison", "decision")),
        Item("12f", "Updating of the model after evaluation, such as recalibration", ("model",),
             "any recalibration at a site"),
        Item("12g", "How predictions were computed in the evaluation", ("model",)),
        Item("13", "Methods against class imbalance, why, and recalibration after them",
             ("methods",),
             "state if any were applied to the data beforehand; the run applies none"),
        Item("14", "What was done for fairness, and why", ("subgroups",), "reasons and choices"),
        Item("15", "What the model puts out, and how thresholds were chosen",
             ("model", "performance", "decision"), "the clinical reason for the thresholds"),
        Item("16", "How development and evaluation data differ", ("participants", "left-out"),
             "differences in setting and eligibility"),
        Item("17", "Ethical approval, and consent or its waiver", (), "committees and consent"),
    ),
    "Open science": (
        Item("18a", "Funding and the funder's part", (), "funding"),
        Item("18b", "Conflicts of interest", (), "declarations"),
        Item("18c", "Where the protocol is", ("reproducibility",),
             "where it is published; the fingerprint identifies it"),
        Item("18d", "Registration", (), "register and number, or that there is none"),
        Item("18e", "Availability of the data", ("reproducibility",),
             "how to ask a site; rows never leave it"),
        Item("18f", "Availability of the code", ("reproducibility",),
             "where the code is published"),
    ),
    "Patient and public involvement": (
        Item("19", "How patients and the public took part, or that they did not", (),
             "involvement"),
    ),
    "Results": (
        Item("20a", "Flow of participants, with and without the outcome, and follow-up",
             ("participants", "performance"),
             "patients before they reached a cohort; follow-up time"),
        Item("20b", "Characteristics overall and by source, with missing data", ("participants",),
             "a table of characteristics from each site"),
        Item("20c", "Predictors and outcome in the evaluation beside the development data",
             ("participants",), "distributions of the main predictors"),
        Item("21", "Participants and events in each analysis", ("participants", "model",
             "subgroups")),
        Item("22", "The model in full, so that others can predict with it", ("model",
             "reproducibility"),
             "terms of access; encoders that stay at a site cannot be given"),
        Item("23a", "Performance with intervals, in subgroups too", ("performance", "subgroups")),
        Item("23b", "Differences in performance between clusters",
             ("performance", "heterogeneity", "left-out")),
        Item("24", "Results of any updating", (), "recalibration at sites, if any"),
    ),
    "Discussion": (
        Item("25", "What the results mean, fairness included, beside earlier studies", ("summary",),
             "the reading in context"),
        Item("26", "Limitations, and what they do to bias and generalisability", ("limitations",),
             "those of the data and the setting"),
        Item("27a", "What to do with poor or missing input when the model is used", ("methods",),
             "handling in practice"),
        Item("27b", "What users have to do, and what they need to know", (),
             "handling and expertise"),
        Item("27c", "Next steps, and where the model would apply", (), "further research"),
    ),
}  # fmt: skip
