r"""The late-fusion model: a log hazard per modality in, a log hazard and a survival curve out.

Models (:class:`CoxModel`, :class:`LogisticHazardModel`, :class:`GatedModel`) are what is
registered, loaded with :func:`read_model` and predicted with; estimators (:class:`CoxFusion`,
:class:`LogisticHazardFusion`, :class:`GatedFusion`) fit them to rows in one place. Their inputs are
one standardised log hazard and one absence flag per modality.

Absent modalities
-----------------
===============================  ==================================================================
the patient has                  the model
===============================  ==================================================================
all modalities                   predicts; the standard error is that of the coefficients
some, whichever                  predicts: an absent modality counts as average and its flag adds
                                 its own coefficient; the standard error also counts what the
                                 modality would have said
none                             gives NaN everywhere: an average would look like a prediction
===============================  ==================================================================

In a fit, a patient with no modality is left out, and one with some stands with the flags of the
others. A modality that a whole site lacks is fitted on the other sites; within that site its flag
is constant, which a model stratified by site does not see. A modality that nobody has, and a flag
that nobody raises, get coefficient 0; their variance is then that of the ridge as a prior.

The standard error :math:`s` of a patient with design :math:`x` and absent modalities :math:`A` is

.. math::

    s^2 = x^\top V x + \sum_{m \in A} \bigl(\hat\beta_m^2 + V_{mm}\bigr),

with :math:`V` the covariance of the coefficients: for each absent modality the variance of
:math:`\hat\beta_m Z` with :math:`Z` standardised. It takes modalities as independent. Where they
correlate positively, it is conservative for a single absent modality, because the others tell part
of it; with several absent it may be too narrow, because their parts then add up together. That
patients who lack a modality would have shown values of the same spread is assumed too.
"""

from fusion.late.estimators import (
    ESTIMATORS,
    RIDGES,
    CoxFusion,
    GatedFusion,
    LogisticHazardFusion,
    fit_late_fusion,
    survival_outcome,
)
from fusion.late.gated import (
    gated_log_hazard,
    gated_loss_gradient,
    initial_gated_weights,
    n_gated_weights,
)
from fusion.late.inputs import LinearEncoder, baseline_hazard, fusion_inputs, linear_inputs
from fusion.late.models import (
    CoxModel,
    FusionModel,
    GatedModel,
    LogisticHazardModel,
    read_model,
)

__all__ = [
    "ESTIMATORS",
    "RIDGES",
    "CoxFusion",
    "CoxModel",
    "FusionModel",
    "GatedFusion",
    "GatedModel",
    "LinearEncoder",
    "LogisticHazardFusion",
    "LogisticHazardModel",
    "baseline_hazard",
    "fit_late_fusion",
    "fusion_inputs",
    "gated_log_hazard",
    "gated_loss_gradient",
    "initial_gated_weights",
    "linear_inputs",
    "n_gated_weights",
    "read_model",
    "survival_outcome",
]
