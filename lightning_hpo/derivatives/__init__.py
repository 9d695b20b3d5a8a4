"""Derivatives of the training loss L(θ, λ); knows nothing of Lightning.

With H = ∂²L/∂θ² and B = ∂²L/∂θ∂λ, a :class:`Backend` makes two products, m directions at a time:

    tangent(u, e) = H u + B e        adjoint(u) = (H u, Bᵀ u)

- :class:`Reverse`, double backward: exact, and the cheapest of the exact ones.
- :class:`Forward`, forward-over-reverse: exact, and lean in memory.
- :class:`FiniteDifference`, central differences of the gradient: approximate, for every model.
- :class:`LambdaDifference` completes any of them for λ that act through random masks.

λ are raw here: what the loss does with them, constraints included, is its own matter. The examples
of this page go on from here, with H = λ I and B = θ:

    >>> def loss(theta, lam):
    ...     return 0.5 * lam[0] * theta[0].square().sum()
    >>> theta = [torch.tensor([1.0, 2.0], requires_grad=True)]
    >>> lam = [torch.tensor(0.5, requires_grad=True)]
"""

from lightning_hpo.derivatives._gradient import gradient, gradient_products
from lightning_hpo.derivatives.backend import Backend, is_missing_derivative
from lightning_hpo.derivatives.finite_difference import FiniteDifference
from lightning_hpo.derivatives.forward import Forward
from lightning_hpo.derivatives.lambda_difference import LambdaDifference
from lightning_hpo.derivatives.loss import Loss
from lightning_hpo.derivatives.reverse import Reverse

BACKENDS: dict[str, type[Reverse | Forward | FiniteDifference]] = {
    "reverse": Reverse,
    "forward": Forward,
    "finite_difference": FiniteDifference,
}
"""The backends by the names that the callback's argument ``derivatives`` knows them by."""

__docformat__ = "google"

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
