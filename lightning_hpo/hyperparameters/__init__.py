"""What is tuned: hyperparameters and the constraints on them."""

from lightning_hpo.hyperparameters.constraints import (
    Constraint,
    Interval,
    Positive,
    Unconstrained,
    UnitInterval,
)
from lightning_hpo.hyperparameters.hyperparameter import Hyperparameter, named_hyperparameters

__all__ = [
    "Constraint",
    "Hyperparameter",
    "Interval",
    "Positive",
    "Unconstrained",
    "UnitInterval",
    "named_hyperparameters",
]
