"""Whether forward-over-reverse sees all of the training loss."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_hpo._lightning import MisconfigurationException
from lightning_hpo._tensors import rows
from lightning_hpo.derivatives import is_missing_derivative
from lightning_hpo.objectives import Moment
from lightning_hpo.step.network import Network
from lightning_hpo.step.training_map import TrainingMap

_REMEDY = "Use derivatives='auto'"


def check_forward(training: TrainingMap, moment: Moment) -> None:
    """Compares products of ``derivatives="forward"`` with those of double backward, once.

    Dual tensors stand for θ and λ wherever the module reaches them. Code in TorchScript and forward
    derivatives of the step's own may lose them. Costs three products for θ and, where λ act in the
    loss, three for these.

    Args:
        training: What all steps of the training share.
        moment: A micro-batch, at the present θ.

    Raises:
        MisconfigurationException: If they differ, or the product cannot be formed.
        RuntimeError: If an operator lacks a forward derivative.
    """
    if training.derivatives != "forward":
        return
    generator = torch.Generator().manual_seed(0)

    def random(like: Tensor) -> Tensor:
        return torch.randn((1, *like.shape), generator=generator, dtype=torch.float64).to(like)

    lam = {
        name: random(h.raw.cpu())
        for name, h in training.hyperparameters.items()
        if name in training.in_loss and h.difference_step is None
    }
    theta = [random(p.detach()) for p in training.theta]
    for u, e in ((theta, {}), *([(None, lam)] if lam else [])):
        try:
            found = _product(training, moment, u, e)
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
            truth, again = (_product(training, moment, u, e, "reverse") for _ in range(2))
            size, limit = float(truth.norm()), _tolerance(training) * float(truth.norm())
            distance, noise = float((found - truth).norm()), float((again - truth).norm())
            if not distance > limit or noise > limit:
                continue  # a step that no replay repeats is warned about elsewhere
            # With hooks that change gradients the derivative is not symmetric; forward is right.
            differences = _product(training, moment, u, e, "finite_difference")
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
    u: list[Tensor] | None,
    e: dict[str, Tensor],
    derivatives: str = "forward",
) -> Tensor:
    """Returns H u + B e, by a backend, as one vector."""
    statistics = training.statistics.zeros(1)
    training.derivatives, before = derivatives, training.derivatives
    try:
        with Network(training, moment, list(e)) as network:
            products, _ = network.tangent(u, e, statistics)
    finally:
        training.derivatives = before
    return torch.cat([rows(t)[0].double() for t in products])


def _tolerance(training: TrainingMap) -> float:
    dtypes = {t.dtype for t in training.theta}
    is_half = training.objective.rounding is not None or dtypes & {torch.float16, torch.bfloat16}
    return 0.2 if is_half else 0.01
