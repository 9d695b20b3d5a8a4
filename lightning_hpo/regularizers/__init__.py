"""Regularizers with tunable strengths: one file each, with its layer and its mixin."""

from lightning_hpo.regularizers._with_mixins import with_mixins
from lightning_hpo.regularizers.dropout import DropoutMixin
from lightning_hpo.regularizers.example_weight import ExampleWeightMixin, IndexedDataset
from lightning_hpo.regularizers.l1 import L1Mixin, L1Penalty
from lightning_hpo.regularizers.l2 import L2Mixin, L2Penalty
from lightning_hpo.regularizers.label_smoothing import LabelSmoothing
from lightning_hpo.regularizers.loss_weight import LossWeightMixin
from lightning_hpo.regularizers.noise import GaussianNoise, GaussianNoiseMixin
from lightning_hpo.regularizers.penalty import Penalty, PenaltyMixin
from lightning_hpo.regularizers.stacked_rnn import StackedRNN
from lightning_hpo.regularizers.tunable_dropout import TunableDropout, keep_probability

__docformat__ = "google"

__all__ = [
    "DropoutMixin",
    "ExampleWeightMixin",
    "GaussianNoise",
    "GaussianNoiseMixin",
    "IndexedDataset",
    "L1Mixin",
    "L1Penalty",
    "L2Mixin",
    "L2Penalty",
    "LabelSmoothing",
    "LossWeightMixin",
    "Penalty",
    "PenaltyMixin",
    "StackedRNN",
    "TunableDropout",
    "keep_probability",
    "with_mixins",
]
