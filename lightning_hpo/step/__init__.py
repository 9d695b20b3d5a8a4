"""One training step as a map s' = Φ(s, clip(g), λ), and its derivative, for estimators."""

from lightning_hpo.step.effect import Effect
from lightning_hpo.step.space import Space
from lightning_hpo.step.step import Step
from lightning_hpo.step.tangents import Tangents
from lightning_hpo.step.training_map import TrainingMap
from lightning_hpo.step.validation import ExpectedValidation, ValidationGradient

__docformat__ = "google"

__all__ = [
    "Effect",
    "ExpectedValidation",
    "Space",
    "Step",
    "Tangents",
    "TrainingMap",
    "ValidationGradient",
]
