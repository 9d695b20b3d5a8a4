"""Lightning's trainer and its parts: in which state it appears, and what is not its own."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import RunningStage
from torch import Tensor

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


def progress_of(trainer: pl.Trainer) -> dict[str, Any]:
    """Returns what a step may ask the trainer about its progress and learning rates."""
    return {
        "counts": [getattr(owner, name) for owner, name in _counts(trainer)],
        "lr": [_number(group["lr"]) for o in trainer.optimizers for group in o.param_groups],
        "last_lr": [
            [_number(lr) for lr in getattr(config.scheduler, "_last_lr", ())]
            for config in trainer.lr_scheduler_configs
        ],
        "schedulers": [_plain(config.scheduler) for config in trainer.lr_scheduler_configs],
    }


@contextmanager
def progressed_to(trainer: pl.Trainer, progress: dict[str, Any]) -> Iterator[None]:
    """Lets the trainer tell what it told at another moment, for losses with a schedule.

    Options of the optimizer are put back by whoever replays the step.

    Args:
        trainer: The trainer.
        progress: What :func:`progress_of` returned.
    """
    counts = _counts(trainer)
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    before = [getattr(owner, name) for owner, name in counts]
    rates = [(s, s._last_lr) for s in schedulers if hasattr(s, "_last_lr")]
    plain = [_plain(s) for s in schedulers]
    groups = [group for o in trainer.optimizers for group in o.param_groups]
    try:
        for (owner, name), count in zip(counts, progress["counts"], strict=True):
            setattr(owner, name, count)
        for group, lr in zip(groups, progress["lr"], strict=False):  # more may have joined
            group["lr"] = lr
        for scheduler, last, numbers in zip(
            schedulers, progress["last_lr"], progress["schedulers"], strict=True
        ):
            vars(scheduler).update(numbers)
            if hasattr(scheduler, "_last_lr"):
                scheduler._last_lr = last
        yield
    finally:
        for (owner, name), count in zip(counts, before, strict=True):
            setattr(owner, name, count)
        for scheduler, last in rates:
            scheduler._last_lr = last
        for scheduler, numbers in zip(schedulers, plain, strict=True):
            vars(scheduler).update(numbers)


def one_batch_later(progress: dict[str, Any]) -> dict[str, Any]:
    """Returns the progress as it is one batch and one step later, in the same epoch."""
    step, *counts = progress["counts"]
    epochs, batches = counts[:_EPOCHS], counts[_EPOCHS:]
    batches = [count if isinstance(count, bool) else count + 1 for count in batches]
    return {**progress, "counts": [step + 1, *epochs, *batches]}


# So many of the counts are of epochs.
_EPOCHS = 5


def _counts(trainer: pl.Trainer) -> list[tuple[Any, str]]:
    """Returns where the loops count."""
    epoch_loop = trainer.fit_loop.epoch_loop
    batches, epochs = epoch_loop.batch_progress, trainer.fit_loop.epoch_progress
    return [
        (epoch_loop.automatic_optimization.optim_progress.optimizer.step.total, "completed"),
        *((part, "completed") for part in (epochs.total, epochs.current)),
        *((part, "processed") for part in (epochs.total, epochs.current)),
        # Steps get to see one that has been started, hooks before them do not.
        *((part, "ready") for part in (epochs.current, batches.total, batches.current)),
        *((part, "processed") for part in (batches.total, batches.current)),
        *((part, "completed") for part in (batches.total, batches.current)),
        (batches, "is_last_batch"),
        (epoch_loop, "_batches_that_stepped"),
    ]


def _plain(scheduler: Any) -> dict[str, Any]:
    """Returns the counts and numbers of a scheduler."""
    plain = (bool, int, float, str, type(None))
    return {name: value for name, value in vars(scheduler).items() if type(value) in plain}


def _number(lr: Any) -> Any:
    """Returns a learning rate as it is now; a schedule writes to one that is a tensor."""
    return lr.clone() if isinstance(lr, Tensor) else lr


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
