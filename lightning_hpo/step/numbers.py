"""Which λ act on the loss through numbers, where autograd sees nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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
