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
    batches = trainer.fit_loop.epoch_loop.batch_progress
    return {
        "global_step": trainer.global_step,
        "epoch": trainer.current_epoch,
        "batches": [batches.total.ready, batches.current.ready, batches.is_last_batch],
        "lr": [_number(group["lr"]) for o in trainer.optimizers for group in o.param_groups],
        "last_lr": [
            [_number(lr) for lr in getattr(config.scheduler, "_last_lr", ())]
            for config in trainer.lr_scheduler_configs
        ],
    }


@contextmanager
def progressed_to(trainer: pl.Trainer, progress: dict[str, Any]) -> Iterator[None]:
    """Lets the trainer tell what it told at another moment, for losses with a schedule.

    Options of the optimizer are put back by whoever replays the step.

    Args:
        trainer: The trainer.
        progress: What :func:`progress_of` returned.
    """
    epoch_loop = trainer.fit_loop.epoch_loop
    steps = epoch_loop.automatic_optimization.optim_progress.optimizer.step.total
    epochs, batches = trainer.fit_loop.epoch_progress.current, epoch_loop.batch_progress
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    before = steps.completed, epochs.completed
    counts = batches.total.ready, batches.current.ready, batches.is_last_batch
    rates = [(s, s._last_lr) for s in schedulers if hasattr(s, "_last_lr")]
    groups = [group for o in trainer.optimizers for group in o.param_groups]
    try:
        steps.completed, epochs.completed = progress["global_step"], progress["epoch"]
        batches.total.ready, batches.current.ready, batches.is_last_batch = progress["batches"]
        for group, lr in zip(groups, progress["lr"], strict=False):  # more may have joined
            group["lr"] = lr
        for scheduler, last in zip(schedulers, progress["last_lr"], strict=True):
            if hasattr(scheduler, "_last_lr"):
                scheduler._last_lr = last
        yield
    finally:
        steps.completed, epochs.completed = before
        batches.total.ready, batches.current.ready, batches.is_last_batch = counts
        for scheduler, last in rates:
            scheduler._last_lr = last


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
