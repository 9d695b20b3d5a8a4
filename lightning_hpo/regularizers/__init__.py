"""Regularizers with tunable strengths: one file each, with its layer and its mixin."""

from lightning_hpo.regularizers.l2 import L2Mixin, L2Penalty
from lightning_hpo.regularizers.penalty import Penalty, PenaltyMixin

__all__ = ["L2Mixin", "L2Penalty", "Penalty", "PenaltyMixin"]
