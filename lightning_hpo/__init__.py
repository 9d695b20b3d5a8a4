"""Hyperparameters that tune themselves during a single PyTorch Lightning training.

:class:`OnlineHPOCallback` tunes every :class:`Hyperparameter` of a module while it trains. Mixins
and layers of this package bring some (:class:`L2Mixin`, :class:`DropoutMixin` …); your own act
wherever ``training_step`` uses them.

Eight words, with their symbols:

    hyperparameter   λ     what is tuned: raw λ is moved, value = constraint(raw) acts
    weights          θ     what the optimizer trains; s is its state, η its learning rate
    losses    L_T, L_V     of a training batch, with penalties; of a held-out one, without
    step             Φ     the optimizer's: s' = Φ(s, g, λ) with the gradient g of L_T
    hypergradient          dL_V/d(raw λ), through all steps that an estimator looks back on
    tangent          y     dθ/d(raw λ), carried forward from step to step
    adjoint          α     dL_V/dθ_t, carried back from the last step
    H, B                   ∂²L_T/∂θ² and ∂²L_T/∂θ∂λ: how λ and θ move the gradient

Values that you give, and read in ``value`` and :func:`fixed_values`, are in their own units;
derivatives, learning rates of λ and radii of tangents are in those of raw λ (see
:class:`Constraint`).

Papers, as docstrings name them:

- Luketina et al. (2016): Scalable Gradient-Based Tuning of Continuous Regularization
  Hyperparameters. :class:`T1T2`.
- Franceschi et al. (2017): Forward and Reverse Gradient-Based Hyperparameter Optimization.
  :class:`UnrollK`, and :class:`ClipR` with an infinite radius.
- The online-HPO paper: Online Hyper-Parameter Optimization, anonymous. :class:`ClipR`, and the
  derivative of dropout in :class:`TunableDropout`.
- Fioravanti: Online hyper-parameters optimization. :class:`GaussianNoise`.
- Adam & Lorraine (2018): More Efficient Stochastic Hyperparameter Optimization.
  :class:`PolicyGradient`, :class:`LSTMController`.

Others are named by authors and year.

The examples on these pages go on from here, with an ordinary module, its data, and a Trainer that
keeps quiet; those of methods go on from that of their class:

    >>> from functools import partial
    >>> import lightning
    >>> import torch
    >>> from torch import nn
    >>> from torch.nn import functional as F
    >>> from torch.utils.data import DataLoader, TensorDataset
    >>> from lightning_hpo import *
    >>> class LitModel(lightning.LightningModule):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.net = nn.Sequential(
    ...             nn.Linear(4, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3)
    ...         )
    ...
    ...     def training_step(self, batch, batch_idx):
    ...         x, y = batch
    ...         return F.cross_entropy(self.net(x), y)
    ...
    ...     def validation_step(self, batch, batch_idx):
    ...         x, y = batch
    ...         return F.cross_entropy(self.net(x), y)
    ...
    ...     def configure_optimizers(self):
    ...         return torch.optim.SGD(self.parameters(), lr=0.1)
    >>> examples = TensorDataset(torch.randn(192, 4), torch.randint(3, (192,)))
    >>> train_set, validation_set = torch.utils.data.random_split(examples, [128, 64])
    >>> train_loader = DataLoader(train_set, batch_size=32, shuffle=True)
    >>> validation_loader = DataLoader(validation_set, batch_size=32)
    >>> Trainer = partial(
    ...     lightning.Trainer,
    ...     max_epochs=5,
    ...     accelerator="cpu",
    ...     logger=False,
    ...     enable_checkpointing=False,
    ...     enable_progress_bar=False,
    ...     enable_model_summary=False,
    ... )
    >>> class Tuned(L2Mixin, LitModel):  # what is added to have something tuned
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.register_l2()
"""

# The reference has a page for this package, and one for each of these.
from lightning_hpo import (
    auto,
    derivatives,
    estimators,
    hyperparameters,
    monitoring,
    regularizers,
    signal_to_noise,
    step,
    strategy,
)

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

__version__ = "0.2.0"

__docformat__ = "google"

__all__ = [  # noqa: RUF022 - in the order of the reference
    "OnlineHPOCallback",
    # What is tuned
    "L2Mixin",
    "L1Mixin",
    "DropoutMixin",
    "GaussianNoiseMixin",
    "LossWeightMixin",
    "ExampleWeightMixin",
    "with_mixins",
    "TunableDropout",
    "GaussianNoise",
    "LabelSmoothing",
    "IndexedDataset",
    "keep_probability",
    "Hyperparameter",
    "CategoricalHyperparameter",
    "BernoulliHyperparameter",
    "IndependentController",
    "LSTMController",
    "named_hyperparameters",
    # Within which bounds, and on which scale
    "Positive",
    "UnitInterval",
    "Interval",
    "Unconstrained",
    "Box",
    "Simplex",
    "L1Ball",
    "Constraint",
    # After the run
    "fixed_values",
    "freeze",
    # How hypergradients are estimated
    "T1T2",
    "ClipR",
    "UnrollK",
    "Implicit",
    "PolicyGradient",
    "Estimator",
    # Pages of their own
    "auto",
    "derivatives",
    "estimators",
    "hyperparameters",
    "monitoring",
    "regularizers",
    "signal_to_noise",
    "step",
    "strategy",
]
