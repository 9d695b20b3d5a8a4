"""Estimators of the hypergradient: one method per file."""

from lightning_hpo.estimators.base import Estimate, Estimator
from lightning_hpo.estimators.clip import ClipR
from lightning_hpo.estimators.implicit import Implicit, SolverOutcome
from lightning_hpo.estimators.policy_gradient import PolicyGradient
from lightning_hpo.estimators.policy_gradient import serves_choices as serves_choices
from lightning_hpo.estimators.t1t2 import T1T2
from lightning_hpo.estimators.unroll import UnrollK

__docformat__ = "google"

__all__ = [
    "T1T2",
    "ClipR",
    "Estimate",
    "Estimator",
    "Implicit",
    "PolicyGradient",
    "SolverOutcome",
    "UnrollK",
]
