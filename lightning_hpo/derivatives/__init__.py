"""Derivatives of the training loss; knows nothing of Lightning."""

from lightning_hpo.derivatives.finite_difference import one_sided_differences
from lightning_hpo.derivatives.gradient import gradient
from lightning_hpo.derivatives.joint_hvp import BACKENDS, Loss, is_missing_derivative, joint_hvp

__all__ = [
    "BACKENDS",
    "Loss",
    "gradient",
    "is_missing_derivative",
    "joint_hvp",
    "one_sided_differences",
]
