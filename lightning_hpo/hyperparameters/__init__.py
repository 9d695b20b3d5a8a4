"""What is tuned: hyperparameters and the constraints on them."""

from lightning_hpo.hyperparameters.categorical import (
    BernoulliHyperparameter,
    CategoricalHyperparameter,
    Softmax,
)
from lightning_hpo.hyperparameters.categorical import described as described
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
from lightning_hpo.hyperparameters.controller import IndependentController, LSTMController
from lightning_hpo.hyperparameters.hyperparameter import Hyperparameter, named_hyperparameters

__docformat__ = "google"

__all__ = [
    "BernoulliHyperparameter",
    "Box",
    "CategoricalHyperparameter",
    "Constraint",
    "Hyperparameter",
    "IndependentController",
    "Interval",
    "L1Ball",
    "LSTMController",
    "Positive",
    "Simplex",
    "Softmax",
    "Unconstrained",
    "UnitInterval",
    "named_hyperparameters",
]
