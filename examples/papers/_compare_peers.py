"""What compare.py compares with: searches, population-based training, marginal likelihood.

Each function makes its trainings for one task and one seed, and returns their losses. Packages are
imported where they are used, so that one that is not there is missed by its own method only.
"""

from __future__ import annotations

import argparse
import math
import random
import time
import warnings
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning
import torch
from _compare_tasks import (
    L2,
    Axis,
    Problem,
    Task,
    Values,
    cosine,
    evaluate,
    fix,
    loader,
    make,
    start_of,
)
from lightning.pytorch.callbacks import Callback
from torch.nn import functional as F
from torch.utils.data import RandomSampler

# Of population-based training. Jaderberg et al. take 10 to 80 members, truncation selection of 20 %
# and factors of 0.8 and 1.2; a quarter of the copied strengths is drawn anew, as in Ray Tune.
POPULATION, ROUNDS, QUANTILE, RESAMPLE = 10, 10, 0.2, 0.25
# Of Hyperband: trials are looked at after each ninth of a training; one third of them goes on.
PIECES, REDUCTION = 9, 3
# Of marginal-likelihood training: how often strengths move, and by how many steps each time.
LOOKS, HYPERSTEPS = 20, 50

Curve = list[tuple[float, float, float, float, Values]]
"""For each training that came to its end: trainings spent so far (pruned ones are parts of one),
CPU seconds so far, its held-out loss, its test loss, and its strengths."""


def search(
    task: Task,
    options: argparse.Namespace,
    seed: int,
    propose: Callable[[], tuple[Any, Values]],
    report: Callable[[Any, tuple[float, float] | None], None],
    watch: Callable[[Any, Problem], list[Callback]] = lambda trial, problem: [],
) -> Curve:
    """Trains with one proposal after another until the budget is spent."""
    curve: Curve = []
    spent = seconds = 0.0
    while spent < options.budget - 1e-9:
        trial, values = propose()
        problem = make(task, values, seed, options.scale, options.data_dir)
        fix(problem.module, values)
        watchers = watch(trial, problem)
        seconds += problem.fit(watchers)
        part = sum(watcher.part for watcher in watchers) if watchers else 1.0
        spent += part
        losses = problem.losses() if part == 1.0 else None
        report(trial, losses)
        if losses is not None:
            curve.append((spent, seconds, *losses, values))
    return curve


def random_search(task: Task, options: argparse.Namespace, seed: int) -> Curve:
    draws = random.Random(seed)

    def propose() -> tuple[None, Values]:
        return None, {name: axis.draw(draws) for name, axis in task.axes.items()}

    return search(task, options, seed, propose, lambda trial, losses: None)


class Pruning(Callback):
    """Tells a trial the held-out loss after each ninth of a training, and stops if it has to."""

    def __init__(self, trial: Any, problem: Problem) -> None:
        self.trial = trial
        self.problem = problem
        self.part = 1.0

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        steps = self.problem.steps
        piece = PIECES * trainer.global_step // steps
        is_first = piece > PIECES * (trainer.global_step - 1) // steps
        if is_first and piece < PIECES:
            self.trial.report(evaluate(self.problem.module, self.problem.held_out), piece)
            if self.trial.should_prune():
                self.part = trainer.global_step / steps
                trainer.should_stop = True


def tpe(task: Task, options: argparse.Namespace, seed: int, *, pruned: bool = False) -> Curve:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        study_name=f"{seed}",  # Hyperband divides trials by it
        sampler=optuna.samplers.TPESampler(seed=seed),
        pruner=optuna.pruners.HyperbandPruner(1, PIECES, REDUCTION) if pruned else None,
    )

    def propose() -> tuple[Any, Values]:
        trial = study.ask()
        axes = task.axes.items()
        return trial, {n: trial.suggest_float(n, a.low, a.high, log=a.log) for n, a in axes}

    def report(trial: Any, losses: tuple[float, float] | None) -> None:
        if losses is None:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        elif math.isfinite(losses[0]):
            study.tell(trial, losses[0])
        else:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)

    watch = (lambda trial, problem: [Pruning(trial, problem)]) if pruned else lambda *_: []
    return search(task, options, seed, propose, report, watch)


@dataclass
class Member:
    """One of a population: a training, which goes on with its optimizer, and its strengths."""

    problem: Problem
    values: dict[str, float]
    losses: tuple[float, float] = (math.nan, math.nan)

    def __post_init__(self) -> None:
        fix(self.problem.module, self.values)
        made = self.problem.module.configure_optimizers()
        self.optimizer: torch.optim.Optimizer = made[0][0]
        self.problem.module.configure_optimizers = lambda: made  # type: ignore[method-assign]

    def become(self, other: Member, axes: Mapping[str, Axis], draws: random.Random) -> None:
        """Copies another's weights and strengths, and explores around these."""
        self.problem.module.load_state_dict(other.problem.module.state_dict())
        self.optimizer.load_state_dict(deepcopy(other.optimizer.state_dict()))
        self.values = {
            name: axis.draw(draws)
            if draws.random() < RESAMPLE
            else axis.clip(other.values[name] * draws.choice([0.8, 1.2]))
            for name, axis in axes.items()
        }
        fix(self.problem.module, self.values)
        for group in self.optimizer.param_groups:
            group["weight_decay"] = self.problem.module.weight_decay


def populations(task: Task, options: argparse.Namespace, seed: int) -> Curve:
    """Trains one population after another; each is known when all of it has come to its end."""
    curve: Curve = []
    seconds = 0.0
    size = min(POPULATION, options.budget)
    rounds = min(ROUNDS, options.budget)
    few = max(1, round(QUANTILE * size))
    for count in range(1, options.budget // size + 1):
        draws = random.Random(f"{seed} {count}")
        members = []
        for _ in range(size):
            values = {name: axis.draw(draws) for name, axis in task.axes.items()}
            problem = make(task, values, seed, options.scale, options.data_dir)
            members.append(Member(problem, values))
        for i in range(rounds):
            steps = members[0].problem.steps
            for member in members:
                part = steps * (i + 1) // rounds - steps * i // rounds
                seconds += member.problem.fit(steps=part)
                member.losses = member.problem.losses()
            if i < rounds - 1:
                members.sort(key=lambda m: m.losses[0] if math.isfinite(m.losses[0]) else math.inf)
                for member in members[-few:]:
                    member.become(draws.choice(members[:few]), task.axes, draws)
        curve += [(count * size, seconds, *m.losses, m.values) for m in members]
    return curve


def marginal_likelihood(task: Task, options: argparse.Namespace, seed: int) -> Curve:
    """Trains once with laplace-torch: per layer a Gaussian prior, by its marginal likelihood.

    A precision of p is an L2 of p / n for n examples (times 2 σ² in a regression). It cannot tune a
    decoupled weight decay: there it has Adam and L2 per layer in the gradient instead.
    """
    from laplace.marglik_training import marglik_training

    problem = make(task, start_of(task, "sensible"), seed, options.scale, options.data_dir)
    is_regression = problem.module.loss is F.mse_loss
    count = len(problem.train)
    epochs = max(1, problem.steps * problem.batch // count)
    optimizer = dict(problem.module.optimizer.keywords)  # type: ignore[attr-defined]
    begin = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found, net, _, _ = marglik_training(
            problem.module.net,
            loader(problem.train, RandomSampler(problem.train), problem.batch),
            "regression" if is_regression else "classification",
            optimizer_cls=torch.optim.Adam if is_regression else torch.optim.SGD,
            optimizer_kwargs=optimizer,
            scheduler_cls=torch.optim.lr_scheduler.LambdaLR,
            scheduler_kwargs={"lr_lambda": partial(cosine, steps=problem.steps)},
            n_epochs=epochs,
            n_hypersteps=HYPERSTEPS,
            marglik_frequency=max(1, epochs // LOOKS),
            prior_prec_init=L2.sensible * count,
        )
    seconds = time.process_time() - begin
    problem.module.net = net
    names = [name for name, _ in net.named_parameters()]
    noise = 2 * float(found.sigma_noise) ** 2 if is_regression else 1.0
    strengths = (noise * found.prior_precision / count).tolist()
    return [(1.0, seconds, *problem.losses(), dict(zip(names, strengths, strict=True)))]


PEERS: dict[str, Callable[[Task, argparse.Namespace, int], Curve]] = {
    "random search": random_search,
    "TPE": tpe,
    "TPE + Hyperband": partial(tpe, pruned=True),
    "population-based": populations,
    "marginal likelihood": marginal_likelihood,
}
NEEDS = {"TPE": "optuna", "TPE + Hyperband": "optuna", "marginal likelihood": "laplace"}
