"""Whether forward-over-reverse sees all of the training loss."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_hpo._lightning import MisconfigurationException
from lightning_hpo.derivatives import is_missing_derivative
from lightning_hpo.objectives import Moment
from lightning_hpo.step.network import Network
from lightning_hpo.step.training_map import TrainingMap

_PROJECTIONS = 4
_REMEDY = "Use derivatives='auto'"


def check_forward(training: TrainingMap, moment: Moment, *, uses_hessian: bool) -> None:
    """Compares products of ``derivatives="forward"`` with those of double backward, once.

    Dual tensors stand for θ and λ wherever the module reaches them. Code in TorchScript and forward
    derivatives of the step's own may lose them. Costs three products for θ and, where λ act in the
    loss, three for these.

    Args:
        training: What all steps of the training share.
        moment: A micro-batch, at the present θ.
        uses_hessian: Whether products with H are asked for.

    Raises:
        MisconfigurationException: If they differ, or the product cannot be formed.
        RuntimeError: If an operator lacks a forward derivative.
    """
    if training.derivatives != "forward":
        return
    generator = torch.Generator().manual_seed(0)

    def random(like: Tensor) -> Tensor:
        return torch.randn((1, *like.shape), generator=generator, dtype=torch.float64).to(like)

    lam = [
        name
        for name, h in training.hyperparameters.items()
        if name in training.in_loss and h.difference_step is None
    ]
    u = [random(p.detach()) for p in training.theta]
    asked: list[list[str]] = [[]] * uses_hessian + [lam] * bool(lam)
    for names in asked:
        try:
            found = _product(training, moment, u, names)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if isinstance(error.__cause__, RuntimeError) and is_missing_derivative(error.__cause__):
                raise  # which names the operator
            message = " ".join(str(error).split())[:200]
            raise MisconfigurationException(
                "OnlineHPOCallback(derivatives='forward'): training_step does not run on dual "
                f"tensors ({type(error).__name__}: {message}); it may take derivatives of its own, "
                f"or with respect to parameters that it gets elsewhere. {_REMEDY}"
            ) from error
        try:
            truth, again = (_product(training, moment, u, names, "reverse") for _ in range(2))
            size, limit = float(truth.norm()), _tolerance(training) * float(truth.norm())
            distance, noise = float((found - truth).norm()), float((again - truth).norm())
            if not distance > limit or noise > limit:
                continue  # a step that no replay repeats is warned about elsewhere
            # With hooks that change gradients the derivative is not symmetric; forward is right.
            differences = _product(training, moment, u, names, "finite_difference")
        except RuntimeError:
            return  # there is nothing to compare with
        if float((found - differences).norm()) > max(0.05 * size, limit):
            raise MisconfigurationException(
                "OnlineHPOCallback(derivatives='forward'): its product with the Hessian is "
                f"{distance / (size or 1):.0%} away from that of double backward. Code in "
                "TorchScript loses dual tensors, and hooks on parameters are not called for them. "
                f"{_REMEDY}, or 'finite_difference' where hooks change gradients"
            )


def _product(
    training: TrainingMap,
    moment: Moment,
    u: list[Tensor],
    names: list[str],
    derivatives: str = "forward",
) -> Tensor:
    """Returns Bᵀ u over the λ of these names; without names projections of H u, by a backend.

    A few numbers per parameter have the distances of whole products, but for the luck of the draw,
    and no product is kept.
    """
    statistics = training.statistics.zeros(1)
    training.derivatives, before = derivatives, training.derivatives
    try:
        with Network(training, moment, names) as network:
            if names:
                _, _, lam = network.adjoint(u, statistics, theta_part=False)
                return torch.cat([part.flatten().double() for part in lam.values()])
            products, _ = network.tangent(u, {}, statistics)
    finally:
        training.derivatives = before
    generator = torch.Generator().manual_seed(1)
    dots = []
    for product in products:
        for _ in range(_PROJECTIONS):
            weights = torch.randn(product.shape, generator=generator, dtype=product.dtype)
            dots.append((product * weights.to(product.device)).sum().double())
    return torch.stack(dots)


def _tolerance(training: TrainingMap) -> float:
    dtypes = {t.dtype for t in training.theta}
    is_half = training.objective.rounding is not None or dtypes & {torch.float16, torch.bfloat16}
    return 0.2 if is_half else 0.01
