"""What is tuned: hyperparameters and the constraints on them."""

from lightning_hpo.hyperparameters.constraints import (
    Box,
    Constraint,
    Interval,
    L1Ball,
    Positive,
    Simplex,
    Unconstrained,
    UnitInterval,
)
from lightning_hpo.hyperparameters.hyperparameter import Hyperparameter, named_hyperparameters
from lightning_hpo.hyperparameters.values import fixed_values, freeze

__all__ = [
    "Box",
    "Constraint",
    "Hyperparameter",
    "Interval",
    "L1Ball",
    "Positive",
    "Simplex",
    "Unconstrained",
    "UnitInterval",
    "fixed_values",
    "freeze",
    "named_hyperparameters",
]
