"""Against what people use today: one training that tunes itself, or a search of up to 30 trainings.

Five tasks; the same model, data, initial weights and batches for every method of a seed. Ours is one
training with ``OnlineHPOCallback()`` as it is, from a sensible start and from a bad one. The others:

- random search, TPE, and TPE with Hyperband pruning, of Optuna (Akiba et al. 2019; Bergstra et al.
  2011; Li et al. 2018),
- population-based training (Jaderberg et al. 2017), its published rule written here on top of
  Lightning: the worst fifth copies the best fifth ten times per training, and explores,
- marginal-likelihood training of laplace-torch (Immer et al. 2021), where a task has an L2 strength
  per layer, or is a regression: it needs no held-out data, and is one training too.

What is compared is the loss on all held-out examples at the end of a training, as a function of how
many trainings were spent; searches show the best so far. The test loss is that of the same training.

    pip install -e ".[examples,compare]"
    python examples/papers/compare.py --data-dir DATA
    python examples/papers/compare.py --data-dir DATA --scale tiny      # a glance

Methods whose package is not there are left out, and that is said.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
import warnings
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from statistics import median
from typing import Any

import lightning
import torch
from _compare_tasks import (
    L2,
    TASKS,
    Axis,
    Lit,
    Problem,
    Task,
    Values,
    cosine,
    evaluate,
    fix,
    loader,
    make,
)
from _experiment import Experiment, Row, note, parser, table
from lightning.pytorch.callbacks import Callback
from torch.nn import functional as F
from torch.utils.data import RandomSampler

from lightning_hpo import ClipR, OnlineHPOCallback, named_hyperparameters

BUDGETS = (1, 2, 5, 10, 20, 30)
# Of population-based training. Jaderberg et al. take 10 to 80 members, truncation selection of 20 %
# and factors of 0.8 and 1.2; a quarter of the copied strengths is drawn anew, as in Ray Tune.
POPULATION, ROUNDS, QUANTILE, RESAMPLE = 10, 10, 0.2, 0.25
# Of Hyperband: trials are looked at after each ninth of a training; one third of them goes on.
PIECES, REDUCTION = 9, 3
# Of marginal-likelihood training: how often strengths move, and by how many steps each time.
LOOKS, HYPERSTEPS = 20, 50

Curve = list[list[float]]
"""For each training that came to its end: trainings spent so far (pruned ones are parts of one),
CPU seconds so far, its held-out loss, and its test loss."""


def start_of(task: Task, which: str) -> dict[str, float]:
    return {name: getattr(axis, which) for name, axis in task.axes.items()}


def search(
    task: Task,
    options: argparse.Namespace,
    seed: int,
    propose: Callable[[], tuple[Any, Values]],
    report: Callable[[Any, list[float] | None], None],
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
        losses = problem.losses() if part == 1 else None
        report(trial, losses)
        if losses is not None:
            curve.append([spent, seconds, *losses])
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
        piece, before = (
            PIECES * n // steps for n in (trainer.global_step, trainer.global_step - 1)
        )
        if before < piece < PIECES:
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

    def report(trial: Any, losses: list[float] | None) -> None:
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
    """One of a population: its training, which goes on with the same optimizer, and its strengths."""

    problem: Problem
    values: dict[str, float]
    losses: list[float] = field(default_factory=list)

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
        curve += [[count * size, seconds, *member.losses] for member in members]
    return curve


def marginal_likelihood(task: Task, options: argparse.Namespace, seed: int) -> Curve:
    """Trains once with laplace-torch: per layer a Gaussian prior, by its marginal likelihood.

    A precision of p is an L2 of p / n for n examples. It cannot tune a decoupled weight decay:
    there it has Adam and L2 per layer in the gradient instead.
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
        _, net, _, _ = marglik_training(
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
    problem.module.net = net
    return [[1.0, time.process_time() - begin, *problem.losses()]]


OURS = {"ours, sensible start": "sensible", "ours, bad start": "bad"}
PEERS: dict[str, Callable[[Task, argparse.Namespace, int], Curve]] = {
    "random search": random_search,
    "TPE": tpe,
    "TPE + Hyperband": partial(tpe, pruned=True),
    "population-based": populations,
    "marginal likelihood": marginal_likelihood,
}
NEEDS = {"TPE": "optuna", "TPE + Hyperband": "optuna", "marginal likelihood": "laplace"}
# Where there is an L2 strength per layer, or a regression, and no dropout.
HAS_PRIOR = ("mnist", "diabetes")


def ours(task: Task, options: argparse.Namespace, seed: int, which: str) -> dict[str, Any]:
    """Trains with the start's strengths left alone, then once more with the callback."""
    start = start_of(task, which)
    plain = make(task, start, seed, options.scale, options.data_dir)
    fix(plain.module, start)
    plain_seconds = plain.fit()

    problem = make(task, start, seed, options.scale, options.data_dir)
    prefix = "optimizer."
    callback = OnlineHPOCallback(
        dataloader=loader(problem.held_out, RandomSampler(problem.held_out), problem.batch),
        optimizer_hyperparameters=[n[len(prefix) :] for n in task.axes if n.startswith(prefix)],
    )
    seconds = problem.fit([callback])
    return {
        "curve": [[seconds / plain_seconds, seconds, *problem.losses()]],
        "gradients": gradients(problem.module, callback),
        "alone": plain.losses()[0],
        "plain_seconds": plain_seconds,
        "found": {n: float(f"{v:.3g}") for n, v in callback.history[-1].values.items()},
    }


def gradients(module: Lit, callback: OnlineHPOCallback) -> float:
    """Returns gradients per step of the training: its own, and those that updates take.

    Each takes a validation gradient, two gradients for a dropout rate or for what else acts in the
    loss, and with tangents a product with the Hessian, about three gradients, for each strength.
    """
    strategy = callback.strategy
    assert strategy is not None
    known = named_hyperparameters(module)
    each = 1
    for _, estimator, names in strategy.assigned:
        each += sum(2 for name in names if name.startswith("keep"))
        if isinstance(estimator, ClipR):
            each += 3 * len(names)
        elif any(name in known and name.startswith("noise") for name in names):
            each += 2
    return 1 + each / strategy.every_n_steps


def train(cell: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Runs a whole search, or one training of ours."""
    task, method, seed = TASKS[cell["task"]], cell["method"], cell["seed"]
    empty = {"gradients": math.nan, "alone": math.nan, "plain_seconds": math.nan, "found": {}}
    if method in OURS:
        results = ours(task, options, seed, OURS[method])
    else:
        results = {"curve": PEERS[method](task, options, seed), **empty}
    curve = [[float(f"{number:.5g}") for number in line] for line in results["curve"]]
    return results | {"curve": json.dumps(curve), "found": json.dumps(results["found"])}


def cells(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Lists all cells, seed by seed: tables can be made of the first seeds."""
    missing = {package for package in NEEDS.values() if find_spec(package) is None}
    for package in sorted(missing):
        left_out = [method for method, needed in NEEDS.items() if needed == package]
        note(f"left out, since {package} is not installed: {', '.join(left_out)}")
    return [
        {"task": task, "method": method, "seed": seed}
        for seed in range(options.seeds)
        for task in TASKS
        for method in [*OURS, *PEERS]
        if NEEDS.get(method) not in missing
        and (method != "marginal likelihood" or task in HAS_PRIOR)
    ]


# ------------------------------------------------------------------------------ tables and picture


def best_at(row: Row, budget: float) -> list[float] | None:
    """Returns the line of the best training that this budget has paid for, if there is one."""
    lines = [line for line in json.loads(row["curve"]) if line[0] <= budget + 1e-6]
    lines = [line for line in lines if math.isfinite(line[2])]
    return min(lines, key=lambda line: line[2], default=None)


def at(rows: list[Row], budget: float, column: int = 2) -> list[float]:
    """Returns a column of the best lines of all seeds; none where one has no line yet."""
    found = [best_at(row, budget) for row in rows]
    return [] if None in found else [line[column] for line in found if line is not None]


def middle(values: list[float]) -> str:
    """Returns the median and the range over seeds."""
    if not values:
        return "–"
    return f"{median(values):.3f} ({min(values):.3f}–{max(values):.3f})"


def needed(rows: list[Row], loss: float) -> str:
    """Returns after how many trainings the median over seeds is as low as a loss."""
    budgets = sorted({line[0] for row in rows for line in json.loads(row["curve"])})
    for budget in budgets:
        values = at(rows, budget)
        if values and median(values) <= loss:
            return f"{budget:.3g}"
    return f"> {budgets[-1]:.0f}" if budgets else "–"


def budgets_of(options: argparse.Namespace) -> list[int]:
    return [budget for budget in BUDGETS if budget <= options.budget]


def task_table(experiment: Experiment, name: str, column: int) -> str:
    """Returns the held-out (2) or test (3) losses of one task: a line for each method."""
    budgets = budgets_of(experiment.options)
    lines = []
    for method in [*OURS, *PEERS]:
        rows = experiment.where(task=name, method=method)
        if not rows:
            continue
        if method in OURS or method == "marginal likelihood":
            cost = median(json.loads(row["curve"])[0][0] for row in rows)
            # laplace-torch's cost is in CPU seconds of our plain training, as ours is.
            if method not in OURS:
                cost = median(at(rows, math.inf, 1)) / plain_seconds(experiment, name)
            line = [f"{cost:.2f}", middle(at(rows, math.inf, column)), *[""] * len(budgets)]
        else:
            line = ["1 … 30", "", *(middle(at(rows, budget, column)) for budget in budgets)]
        lines.append([method, *line])
    return table(["method", "trainings", "one run", *map(str, budgets)], lines)


def plain_seconds(experiment: Experiment, name: str) -> float:
    return median(
        second for m in OURS for second in experiment.numbers("plain_seconds", task=name, method=m)
    )


def summary_table(experiment: Experiment) -> str:
    """Returns for each task and start ours beside the best search with 20 trainings."""
    budget = min(20, experiment.options.budget)
    lines = []
    for name in TASKS:
        peers = {m: experiment.where(task=name, method=m) for m in PEERS}
        losses = {m: median(v) for m, rows in peers.items() if rows and (v := at(rows, budget))}
        losses.pop("marginal likelihood", None)
        for method, which in OURS.items():
            rows = experiment.where(task=name, method=method)
            if not rows or not losses:
                continue
            best = min(losses, key=lambda m: losses[m])
            mine = median(at(rows, math.inf))
            cost, seconds, test = (median(at(rows, math.inf, k)) for k in (0, 1, 3))
            alone, steps = (
                median(map(float, (r[c] for r in rows))) for c in ("alone", "gradients")
            )
            least = [needed(found, mine) for m, found in peers.items() if m in losses]
            lines.append(
                [
                    name,
                    which,
                    f"{alone:.3f}",
                    f"{mine:.3f}",
                    f"{test:.3f}",
                    f"{cost:.2f}",
                    f"{steps:.2f}",
                    f"{seconds:.1f}",
                    best,
                    f"{losses[best]:.3f}",
                    f"{median(at(peers[best], budget, 3)):.3f}",
                    f"{median(at(peers[best], budget, 1)):.1f}",
                    f"{100 * (mine / losses[best] - 1):+.1f} %",
                    min(least, key=lambda text: float(text.lstrip("> ")) + text.startswith(">")),
                ]
            )
    headers = ["task", "start", "left alone", "ours: held out", "test", "trainings (CPU)"]
    headers += ["gradients per step", "CPU s", f"best search with {budget}", "held out", "test"]
    return table([*headers, "CPU s", "ours over it", "trainings it takes to match ours"], lines)


COLORS = dict(zip([*OURS, *PEERS], [f"C{k}" for k in (0, 3, 7, 1, 2, 4, 5)], strict=True))


def draw(experiment: Experiment) -> None:
    """Draws for each task the best held-out loss so far over the budget."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        note("no picture: matplotlib is not there")
        return
    figure, grid = plt.subplots(2, 3, figsize=(12, 7), layout="constrained")
    budgets = [1 + k / 10 for k in range(10 * experiment.options.budget - 9)]
    for axes, name in zip(grid.flat, TASKS, strict=False):
        seen = []
        for method in PEERS:
            rows = experiment.where(task=name, method=method)
            found = [(budget, v) for budget in budgets if rows and (v := at(rows, budget))]
            if not found:
                continue
            x = [budget for budget, _ in found]
            if method == "marginal likelihood":
                cost = median(at(rows, math.inf, 1)) / plain_seconds(experiment, name)
                points(axes, cost, found[0][1], method, "s")
                seen.append(median(found[0][1]))
                continue
            low, mid, high = ([of(v) for _, v in found] for of in (min, median, max))
            axes.step(x, mid, where="post", color=COLORS[method], label=method)
            axes.fill_between(x, low, high, step="post", color=COLORS[method], alpha=0.15, lw=0)
            seen += [mid[-1], mid[min(len(mid) - 1, 20)]]
        for method in OURS:
            rows = experiment.where(task=name, method=method)
            if rows:
                values = at(rows, math.inf)
                points(axes, median(at(rows, math.inf, 0)), values, method, "o")
                seen += [min(values), max(values)]
        bottom, top = min(seen), max(seen)
        room = 0.25 * (top - bottom)
        axes.set(xscale="log", xlim=(0.9, 1.1 * budgets[-1]), ylim=(bottom - room, top + room))
        axes.set(xlabel="trainings spent", ylabel="best held-out loss so far")
        axes.set_title(TASKS[name].title.replace(": ", ":\n"), fontsize=10)
        shown = budgets_of(experiment.options)
        axes.set_xticks(shown, labels=map(str, shown))
        axes.minorticks_off()
    handles = {h: label for a in grid.flat for h, label in zip(*a.get_legend_handles_labels())}  # noqa: B905
    unique = {label: handle for handle, label in handles.items()}
    grid.flat[-1].axis("off")
    grid.flat[-1].legend(unique.values(), unique.keys(), loc="center", frameon=False)
    figure.savefig(experiment.output / f"{experiment.name}.png", dpi=90)


def points(axes: Any, x: float, values: list[float], label: str, marker: str) -> None:
    """Draws a method that is one training: median and range over seeds."""
    mid = median(values)
    ends = [[mid - min(values)], [max(values) - mid]]
    options = {"capsize": 3, "color": COLORS[label], "zorder": 5}
    axes.errorbar([x], [mid], yerr=ends, fmt=marker, label=label, **options)


def main() -> None:
    arguments = parser(__doc__, seeds=5)
    arguments.add_argument("--budget", type=int, default=30, help="trainings of a search")
    options = arguments.parse_args()
    if options.scale == "tiny":
        options.budget = min(options.budget, 3)
    keys = ("task", "method", "seed")
    experiment = Experiment(f"compare_{options.scale}", keys, train, options, options.output)
    experiment.run(cells(options))
    tables = [summary_table(experiment)]
    for name, task in TASKS.items():
        for title, column in (("held-out", 2), ("test", 3)):
            text = task_table(experiment, name, column)
            tables.append(f"## {task.title}: {title} loss\n\n{text}")
    experiment.report("Against searches", tables)
    draw(experiment)


if __name__ == "__main__":
    main()
