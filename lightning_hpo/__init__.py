"""Hyperparameters that tune themselves during a single PyTorch Lightning training."""

# The callback
from lightning_hpo.callback import OnlineHPOCallback

# How hypergradients are estimated
from lightning_hpo.estimators import (
    T1T2,
    ClipR,
    Estimator,
    Implicit,
    PolicyGradient,
    UnrollK,
)

# What is tuned
from lightning_hpo.hyperparameters import (
    BernoulliHyperparameter,
    Box,
    CategoricalHyperparameter,
    Constraint,
    Hyperparameter,
    IndependentController,
    Interval,
    L1Ball,
    LSTMController,
    Positive,
    Simplex,
    Unconstrained,
    UnitInterval,
    named_hyperparameters,
)

# Regularizers: mixins for LightningModules, and the layers that they use
from lightning_hpo.regularizers import (
    DropoutMixin,
    ExampleWeightMixin,
    GaussianNoise,
    GaussianNoiseMixin,
    IndexedDataset,
    L1Mixin,
    L2Mixin,
    LabelSmoothing,
    LossWeightMixin,
    TunableDropout,
    keep_probability,
    with_mixins,
)

# After the run
from lightning_hpo.values import fixed_values, freeze

__version__ = "0.1.0"

__all__ = [
    "T1T2",
    "BernoulliHyperparameter",
    "Box",
    "CategoricalHyperparameter",
    "ClipR",
    "Constraint",
    "DropoutMixin",
    "Estimator",
    "ExampleWeightMixin",
    "GaussianNoise",
    "GaussianNoiseMixin",
    "Hyperparameter",
    "Implicit",
    "IndependentController",
    "IndexedDataset",
    "Interval",
    "L1Ball",
    "L1Mixin",
    "L2Mixin",
    "LSTMController",
    "LabelSmoothing",
    "LossWeightMixin",
    "OnlineHPOCallback",
    "PolicyGradient",
    "Positive",
    "Simplex",
    "TunableDropout",
    "Unconstrained",
    "UnitInterval",
    "UnrollK",
    "fixed_values",
    "freeze",
    "keep_probability",
    "named_hyperparameters",
    "with_mixins",
]
