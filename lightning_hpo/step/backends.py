"""By which backend products with the Hessian are formed."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from lightning_hpo._tensors import filled
from lightning_hpo.derivatives import (
    BACKENDS,
    Backend,
    FiniteDifference,
    LambdaDifference,
    is_missing_derivative,
)
from lightning_hpo.distributed import average_, world_size
from lightning_hpo.hyperparameters import Hyperparameter
from lightning_hpo.objectives import Moment
from lightning_hpo.step.training_map import TrainingMap

Result = TypeVar("Result")

_UNREPEATABLE = (
    "two replays of the same training_step give gradients that are {:.0%} apart: it draws random "
    "numbers of its own, from elsewhere than torch, NumPy and Python's random, or depends on state "
    "outside of the module (global variables, files, threads)"
)
_REPEATABLE = (
    "Draw from these, or from generators that are attributes of the module, and keep state there"
)
_NO_DOUBLE_BACKWARD = "an operator of this model has no double backward"


def settle(training: TrainingMap, moment: Moment, gradients: Sequence[Tensor | None]) -> str:
    """Decides by which backend products are formed, as far as the start of a training can tell.

    ``"auto"`` takes finite differences where the parameters are sharded, or where the kernels that
    exact backends need draw other random numbers than those of the training: inductor's dropout is
    not that of eager mode. Else it is decided at the first product. A step that no replay repeats
    is warned about.

    Args:
        training: What all steps of the training share.
        moment: A micro-batch, at the present θ.
        gradients: Its gradient, one per parameter, on the kernels of the training.

    Returns:
        The name of the backend, or still ``"auto"``.
    """
    if training.derivatives == "finite_difference":
        return training.derivatives
    if training.sharded:
        return fall_back("the parameters are sharded")
    theta = training.theta
    distance = _distance(training.objective.gradient(moment, theta, exact=True), gradients, theta)
    if not distance > 0.05:
        return _settled_by_value(training)
    again = _distance(training.objective.gradient(moment, theta), gradients, theta)
    if again > 0.05:
        # No backend helps: differences would divide by a small step what differs between replays.
        warnings.warn(
            f"OnlineHPOCallback: {_UNREPEATABLE.format(again)}, so that hypergradients belong to "
            f"another loss than that of the step. {_REPEATABLE}",
            stacklevel=2,
        )
        return training.derivatives
    reason = (
        "eager mode and the kernels that have second derivatives give another gradient "
        f"({distance:.0%} apart) than the training's own, which a replay on its own kernels does "
        "repeat: they draw other random numbers, as compiled code, fused attention and cuDNN do"
    )
    remedy = "under torch.compile, torch._inductor.config.fallback_random = True avoids that"
    if training.is_automatic:
        return fall_back(f"{reason}; {remedy}")
    warnings.warn(
        f"OnlineHPOCallback(derivatives={training.derivatives!r}): {reason}, so that "
        "hypergradients belong to other noise and dropout masks than the step. Use "
        f"derivatives='auto' or 'finite_difference'; {remedy}",
        stacklevel=2,
    )
    return training.derivatives


def _settled_by_value(training: TrainingMap) -> str:
    """Takes differences where a graph of the running statistics gives another gradient."""
    known = training.statistics
    if not (known and known.by_value):
        return training.derivatives
    if training.is_automatic:
        return fall_back(f"buffers are followed by value: {known.by_value_because}")
    warnings.warn(
        f"OnlineHPOCallback(derivatives={training.derivatives!r}): hypergradients miss how "
        f"buffers move, or belong to another loss: {known.by_value_because}. Use "
        "derivatives='auto' or 'finite_difference' with ClipR or UnrollK(mode='forward')",
        stacklevel=2,
    )
    return training.derivatives


def settle_statistics(
    training: TrainingMap,
    moment: Moment,
    gradients: Sequence[Tensor | None],
    validate: Callable[[], object],
) -> None:
    """Settles how running statistics are followed.

    Where eager mode draws other random numbers than the training, differences follow them by value.
    Where an operator has no derivative with respect to them, they are constants, with a warning.

    Args:
        training: What all steps of the training share.
        moment: A micro-batch, at the present θ.
        gradients: Its gradient, one per parameter, on the kernels of the training.
        validate: Takes the derivative of L_V with respect to them.
    """
    if not training.statistics:
        return
    reason = ""
    eager = None
    try:
        validate()
        eager = training.objective.gradient(moment, training.theta, statistics=True)
    except RuntimeError as error:
        if not is_missing_derivative(error):
            raise
        reason = f"an operator has no derivative with respect to them: {error}"
    found = gradients if reason else eager
    if _distance(found, gradients, training.theta) > 0.05:
        training.statistics.follow_by_value(
            "with a graph of what is written to them, the training loss has another gradient: "
            "training_step reads them after that, or eager mode draws other random numbers than "
            "compiled code, unless torch._inductor.config.fallback_random = True"
        )
    lost = torch.tensor(float(bool(reason)), device=training.theta[0].device)
    average_([lost])
    if lost > 0:
        training.statistics.follow(())
        warnings.warn(
            "OnlineHPOCallback takes the running statistics of normalization layers as constants, "
            f"because {reason or 'another rank does'}. Hypergradients miss how λ moves them",
            stacklevel=2,
        )


def _distance(
    found: Sequence[Tensor | None] | None,
    gradients: Sequence[Tensor | None],
    theta: Sequence[Tensor],
) -> float:
    """Returns how far a gradient is from that of the training, relative to it, on all ranks."""
    parts = [
        torch.stack([(a - b).norm(), b.norm()]).double()
        for a, b in zip(
            filled(found or [None] * len(theta), theta), filled(gradients, theta), strict=True
        )
    ]
    norms = torch.stack(parts).norm(dim=0)
    average_([norms])  # all ranks must come to the same decision
    difference, scale = norms.tolist()
    return difference / scale if scale else (math.inf if difference else 0.0)


def with_fallback(
    training: TrainingMap, multiply: Callable[[], Result], close: Callable[[], None]
) -> Result:
    """Forms a product; ``"auto"`` takes finite differences where an operator lacks a derivative.

    With the first product all ranks agree. Later, an operator that a rank has not met before makes
    that rank fall back by itself: its products are as good as those of the others, but no parts of
    them can be shared.

    Args:
        training: What all steps of the training share; what is found out is noted there.
        multiply: Forms the product by the backend of the moment.
        close: Ends the replay that another backend has begun.

    Raises:
        RuntimeError: If an operator lacks the derivative that a backend asked for by name needs.
    """
    is_first = training.derivatives == "auto"
    reason = ""
    try:
        result = multiply()
    except RuntimeError as error:
        if not is_missing_derivative(error):
            raise
        if not training.is_automatic:
            raise RuntimeError(
                f"OnlineHPOCallback(derivatives={training.derivatives!r}): an operator of this "
                f"model lacks the derivative that this backend needs ({error}). Use "
                "derivatives='auto' or 'finite_difference'"
            ) from error
        reason = f"{_NO_DOUBLE_BACKWARD}: {error}"
    if is_first and world_size() > 1:
        fallen = torch.tensor(float(bool(reason)), device=training.theta[0].device)
        average_([fallen])
        reason = reason or (_NO_DOUBLE_BACKWARD if fallen > 0 else "")
    elif reason:
        training.is_agreed = world_size() == 1
    if reason:
        close()
        training.derivatives = fall_back(reason)
        return multiply()
    if is_first:
        training.derivatives = "reverse"
    return result


def fall_back(reason: str) -> str:
    """Says once why finite differences are used, and returns their name."""
    warnings.warn(
        f"OnlineHPOCallback(derivatives='auto') uses finite differences, because {reason}",
        stacklevel=2,
    )
    return "finite_difference"


def make_backend(
    training: TrainingMap, names: Sequence[str], leading: int, *, theta_is_scratch: bool
) -> Backend:
    """Makes the backend for one replay.

    Args:
        training: What all steps of the training share.
        names: The λ that the loss is a function of.
        leading: How many parameters it is a function of; running statistics follow them.
        theta_is_scratch: Whether θ may come back changed by rounding.
    """
    hyperparameters = [training.hyperparameters[name] for name in names]
    steps = [training.difference_step(name) for name in names]
    backend: Backend
    if training.derivatives == "finite_difference":
        backend = FiniteDifference(
            rounding=training.objective.rounding,
            reach=[_reach(h) for h in hyperparameters if h.difference_step is None],
            theta_is_scratch=theta_is_scratch,
            leading=leading,
        )
    else:
        exact = "reverse" if training.derivatives == "auto" else training.derivatives
        backend = BACKENDS[exact]()
    is_smooth = all(step is None for step in steps)
    return backend if is_smooth else LambdaDifference(backend, steps)


def _reach(h: Hyperparameter) -> Tensor:
    """How far differences may move raw λ: until the value has changed by about a tenth."""
    value, rate = h.constraint.derivatives(h.raw.detach())
    distance = 0.1 * (value / rate).abs()
    is_known = torch.isfinite(distance) & (distance > 0)
    return torch.where(is_known, distance, math.inf)
