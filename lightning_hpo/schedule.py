"""The learning rates of the steps to come, from copies of a training's schedulers."""

from __future__ import annotations

import copy
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_hpo._lightning import classes
from lightning_hpo._trainer import overrides

UNKNOWN_LENGTH = 10_000
"""The steps that a training is taken to have left where nothing says when it ends."""

MOST_EVALUATIONS = 100_000
"""How often schedulers are stepped at most; further steps count by the mean of those before."""

Group = dict[str, Any]


def steps_left(trainer: pl.Trainer) -> tuple[int, bool]:
    """Returns the number of optimizer steps to come, the present one included.

    Returns:
        The number, and whether it is known: an endless training has :data:`UNKNOWN_LENGTH`.
    """
    total = trainer.estimated_stepping_batches
    if not 0 < total < math.inf:
        return UNKNOWN_LENGTH, False
    return max(1, int(total) - trainer.global_step), True


def total_rates(
    trainer: pl.Trainer, optimizer: torch.optim.Optimizer, rate: Callable[[Group], float]
) -> list[float]:
    """Sums the rate of each parameter group over the optimizer steps to come.

    Copies of the schedulers go through the training as Lightning would step them. Taken as constant
    are learning rates that the training itself decides on: ``ReduceLROnPlateau``, an override of
    ``lr_scheduler_step``, manual optimization, schedulers that cannot be copied.

    Args:
        trainer: The trainer, at a step of the training or before the first.
        optimizer: One of its optimizers.
        rate: The rate of a group, a function of its options.

    Returns:
        One sum per parameter group.
    """
    groups, schedulers = _copies(trainer, optimizer)
    steps, _ = steps_left(trainer)
    totals = [0.0] * len(groups)
    done = evaluations = 0

    def count(times: int) -> None:
        nonlocal done
        done += times
        for i, group in enumerate(groups):
            totals[i] += times * rate(group)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the copy of an optimizer is never stepped
        for times, due in _stretches(trainer, schedulers):
            count(min(times, steps - done))
            if done == steps or evaluations >= MOST_EVALUATIONS:
                break
            try:
                for scheduler in due:
                    scheduler.step()
            except ValueError:
                break  # OneCycleLR ends before the training does
            evaluations += len(due)
    return [total * steps / done for total in totals]


def _copies(
    trainer: pl.Trainer, optimizer: torch.optim.Optimizer
) -> tuple[list[Group], list[tuple[Any, str, int]]]:
    """Returns the groups without their parameters, and what changes them as the training goes on.

    Returns:
        The groups, and for each scheduler a copy, its interval and its frequency.
    """
    module = trainer.lightning_module
    shadow = torch.optim.SGD([torch.zeros(1)], lr=0.0)
    shadow.defaults = dict(optimizer.defaults)
    shadow.param_groups = [
        copy.deepcopy({name: value for name, value in group.items() if name != "params"})
        | {"params": []}
        for group in optimizer.param_groups
    ]
    configs = [c for c in trainer.lr_scheduler_configs if c.scheduler.optimizer is optimizer]
    followed = [c for c in configs if not c.reduce_on_plateau]
    copies = []
    # A schedule may be a method of the module, which is not copied along with it.
    shared = {id(each): each for each in (trainer, module)} | {id(optimizer): shadow}
    try:
        if module.automatic_optimization and not overrides(
            module, "lr_scheduler_step", *classes("LightningModule")
        ):
            copies = [
                (copy.deepcopy(c.scheduler, dict(shared)), c.interval, c.frequency)
                for c in followed
            ]
    except (TypeError, RuntimeError, AttributeError, copy.Error):
        copies = []  # it holds something that cannot be copied
    if followed and not copies:
        for group in shadow.param_groups:  # at first they may be those of a warm-up
            group["lr"] = group.get("initial_lr", group["lr"])
    return shadow.param_groups, copies


def _stretches(
    trainer: pl.Trainer, schedulers: list[tuple[Any, str, int]]
) -> Iterator[tuple[int, list[Any]]]:
    """Yields stretches of steps of the same rates, each with the schedulers that are due after it.

    Lightning steps those of the interval ``"step"`` with the optimizer, and counts their frequency
    in batches of the epoch.
    """
    if not schedulers:
        yield sys.maxsize, []
    accumulated: int = trainer.accumulate_grad_batches
    batches = trainer.num_training_batches
    epoch: int = trainer.current_epoch
    first = max(trainer.fit_loop.epoch_loop.batch_idx, 0) // accumulated
    by_step = [(s, frequency) for s, interval, frequency in schedulers if interval == "step"]
    while math.isfinite(batches):
        windows = math.ceil(batches / accumulated)
        epoch += 1
        ended = [s for s, interval, f in schedulers if interval == "epoch" and epoch % f == 0]
        if not by_step:
            yield windows - first, ended
        else:
            for window in range(first, windows):
                batch = min((window + 1) * accumulated, int(batches))
                due = [s for s, frequency in by_step if batch % frequency == 0]
                yield 1, due + (ended if window + 1 == windows else [])
        first = 0
    if not by_step:
        yield sys.maxsize, []
    batch = first * accumulated
    while True:  # an epoch without an end
        batch += accumulated
        yield 1, [s for s, frequency in by_step if batch % frequency == 0]
