"""One training step as a map s' = Φ(s, clip(g), λ), and its derivative, for estimators.

An estimator gets a :class:`Space` when a training starts, a :class:`Step` at each optimizer step
that it asks for, and a :class:`ValidationGradient` at each update. The examples of this page are
estimators, and train with this:

    >>> def train(estimator):
    ...     callback = OnlineHPOCallback(estimator, every_n_steps=20)
    ...     Trainer(callbacks=[callback]).fit(Tuned(), train_loader, validation_loader)
"""

from lightning_hpo.step.effect import Effect
from lightning_hpo.step.space import Space
from lightning_hpo.step.step import Step
from lightning_hpo.step.tangents import Tangents
from lightning_hpo.step.training_map import TrainingMap as TrainingMap
from lightning_hpo.step.validation import ExpectedValidation as ExpectedValidation
from lightning_hpo.step.validation import ValidationGradient

__docformat__ = "google"

__all__ = [
    "Effect",
    "Space",
    "Step",
    "Tangents",
    "ValidationGradient",
]
