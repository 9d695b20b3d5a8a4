"""Hyperparameters that tune themselves during a single PyTorch Lightning training."""

# The callback
from lightning_hpo.callback import OnlineHPOCallback

# How hypergradients are estimated
from lightning_hpo.estimators import T1T2, ClipR, Estimator, UnrollK

# What is tuned
from lightning_hpo.hyperparameters import (
    Constraint,
    Hyperparameter,
    Interval,
    Positive,
    Unconstrained,
    UnitInterval,
    named_hyperparameters,
)

# Regularizers
from lightning_hpo.regularizers import L2Mixin

__version__ = "0.1.0"

__all__ = [
    "T1T2",
    "ClipR",
    "Constraint",
    "Estimator",
    "Hyperparameter",
    "Interval",
    "L2Mixin",
    "OnlineHPOCallback",
    "Positive",
    "Unconstrained",
    "UnitInterval",
    "UnrollK",
    "named_hyperparameters",
]
