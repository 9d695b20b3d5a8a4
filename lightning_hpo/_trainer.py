"""Lightning's trainer and its parts: in which state it appears, and what is not its own."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import RunningStage

from lightning_hpo._lightning import package_of


@contextmanager
def stage(trainer: pl.Trainer, running: RunningStage) -> Iterator[None]:
    """Lets the trainer appear in another stage, for hooks that ask."""
    before = trainer.state.stage
    trainer.state.stage = package_of(trainer).trainer.states.RunningStage(running.value)
    try:
        yield
    finally:
        trainer.state.stage = before


@contextmanager
def counted_as(trainer: pl.Trainer, global_step: int, epoch: int) -> Iterator[None]:
    """Lets ``global_step`` and ``current_epoch`` read as they did, for losses with a schedule."""
    loop = trainer.fit_loop.epoch_loop.automatic_optimization
    total = loop.optim_progress.optimizer.step.total
    epochs = trainer.fit_loop.epoch_progress.current
    before = total.completed, epochs.completed
    total.completed, epochs.completed = global_step, epoch
    try:
        yield
    finally:
        total.completed, epochs.completed = before


def overrides(owner: Any, hook: str, *kinds: type) -> bool:
    """Whether a hook of an object, its own or its class's, is none of the given classes."""
    inherited = getattr(type(owner), hook, None)
    return hook in vars(owner) or all(inherited is not getattr(k, hook, None) for k in kinds)


def is_foreign(plugin: Any) -> bool:
    """Whether a plugin or strategy is not one of Lightning itself."""
    return not type(plugin).__module__.startswith(
        ("lightning.", "lightning_fabric.", "pytorch_lightning.")
    )


def length(trainer: pl.Trainer) -> float:
    """Returns the ``global_step`` at which a training will end, by its epochs or steps at most.

    ``inf`` where that is not known. Unlike ``trainer.estimated_stepping_batches`` it loads nothing.
    """
    steps = math.inf if trainer.max_steps in (-1, None) else float(trainer.max_steps)
    if trainer.max_epochs in (-1, None):
        return steps
    each = trainer.num_training_batches / trainer.accumulate_grad_batches
    return min(steps, math.inf if math.isinf(each) else math.ceil(each) * trainer.max_epochs)
