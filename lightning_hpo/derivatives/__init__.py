"""Derivatives of the training loss; knows nothing of Lightning."""

from lightning_hpo.derivatives.backend import Backend, is_missing_derivative
from lightning_hpo.derivatives.finite_difference import FiniteDifference
from lightning_hpo.derivatives.forward import Forward
from lightning_hpo.derivatives.gradient import gradient, gradient_products
from lightning_hpo.derivatives.lambda_difference import LambdaDifference
from lightning_hpo.derivatives.loss import Loss
from lightning_hpo.derivatives.reverse import Reverse

BACKENDS: dict[str, type[Reverse | Forward | FiniteDifference]] = {
    "reverse": Reverse,
    "forward": Forward,
    "finite_difference": FiniteDifference,
}
"""The backends by the names that the callback's argument ``derivatives`` knows them by."""

__all__ = [
    "BACKENDS",
    "Backend",
    "FiniteDifference",
    "Forward",
    "LambdaDifference",
    "Loss",
    "Reverse",
    "gradient",
    "gradient_products",
    "is_missing_derivative",
]
