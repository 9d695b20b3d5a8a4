"""Which λ act on the loss where autograd sees nothing: through numbers, or by another path."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_hpo._tensors import filled, widened
from lightning_hpo.hyperparameters import Hyperparameter
from lightning_hpo.objectives import Moment
from lightning_hpo.step.training_map import TrainingMap


def read_as_numbers(training: TrainingMap, moment: Moment) -> frozenset[str]:
    """Names the λ with a difference step that the training step reads, though no gradient says so.

    A drop rate that is passed to a function is a number: autograd does not see that the loss
    depends on it, but differences over λ do. Costs a gradient where there are λ of this kind that
    are not yet known to act.

    Args:
        training: What all steps of the training share.
        moment: A micro-batch, at the present θ.
    """
    by_name = training.hyperparameters.items()
    unseen = {
        name: h
        for name, h in by_name
        if h.difference_step is not None and name not in training.in_loss
    }
    if not unseen:
        return frozenset()
    with _calls(unseen) as called:
        # Compiled code may not know of hooks that come after it.
        training.objective.gradient(moment, training.theta, exact=True)
    return frozenset(called)


def warn_of_other_paths(
    training: TrainingMap, moment: Moment, gradients: Sequence[Tensor | None]
) -> None:
    """Warns of λ whose raw tensor the step also reads where nothing can take its place.

    Replays put other tensors in the place of raw λ wherever the module reaches them, views of them
    too. A global variable keeps the original: what depends on it is missed. Here the original moves
    alone, which must change nothing. Costs a gradient, where any λ acts in the loss, and one per
    such λ where it does change.

    Args:
        training: What all steps of the training share.
        moment: A micro-batch, at the present θ.
        gradients: Its gradient over θ.
    """
    known = {name: training.hyperparameters[name] for name in sorted(training.in_loss)}
    raws = {  # that of a choice stands in the factor that replays add to the loss
        name: h.raw for name, h in known.items() if not h.is_policy
    }
    if not raws or not _depends(training, moment, gradients, list(raws.values())):
        return
    found = list(raws)
    if not training.sharded:  # all ranks must take the same number of gradients
        if _depends(training, moment, gradients, []):
            return  # no replay repeats the step, which is warned about elsewhere
        found = [n for n, raw in raws.items() if _depends(training, moment, gradients, [raw])]
    warnings.warn(
        f"OnlineHPOCallback: training_step reads the raw tensor of {found} by another path than "
        "the module, such as a global variable, and hypergradients miss what acts through it. Call "
        "the Hyperparameter where its value is needed, or keep the tensor as an attribute of the "
        "module",
        stacklevel=2,
    )


def _depends(
    training: TrainingMap,
    moment: Moment,
    gradients: Sequence[Tensor | None],
    raws: Sequence[Tensor],
) -> bool:
    """Whether the gradient over θ changes where raw tensors move that others stand for."""
    leaves = training.objective.leaves()
    before = [raw.clone() for raw in raws]
    try:
        for raw in raws:
            raw += 0.3 * (1 + raw.abs())
        found = training.objective.gradient(moment, training.theta, leaves)
    finally:
        for raw, value in zip(raws, before, strict=True):
            raw.copy_(value)
    theta = training.theta
    if found is None:
        return True
    for a, b in zip(filled(found[: len(theta)], theta), filled(gradients, theta), strict=True):
        a, b = widened(a), widened(b)
        if float((a - b).norm()) > 1e4 * torch.finfo(a.dtype).eps * float(b.norm()):
            return True
    return False


class _Called:
    """The names of those that were called; not put back after a replay, as a plain set would be."""

    def __init__(self) -> None:
        self.names: set[str] = set()


@contextmanager
def _calls(hyperparameters: dict[str, Hyperparameter]) -> Iterator[set[str]]:
    """Collects the names of those that are called."""
    called = _Called()

    def watch(name: str, h: Hyperparameter) -> Any:
        return h.register_forward_hook(lambda *_: called.names.add(name))

    handles = [watch(name, h) for name, h in hyperparameters.items()]
    try:
        yield called.names
    finally:
        for handle in handles:
            handle.remove()
