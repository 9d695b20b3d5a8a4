"""Derivatives of the training loss; knows nothing of Lightning."""

from lightning_hpo.derivatives.finite_difference import one_sided_differences
from lightning_hpo.derivatives.gradient import gradient, gradient_products
from lightning_hpo.derivatives.joint_hvp import BACKENDS, Loss, is_missing_derivative, joint_hvp
from lightning_hpo.derivatives.reverse import GradientGraph

__all__ = [
    "BACKENDS",
    "GradientGraph",
    "Loss",
    "gradient",
    "gradient_products",
    "is_missing_derivative",
    "joint_hvp",
    "one_sided_differences",
]
