"""Against what people use today: one training that tunes itself, or searches of 30 trainings.

Five tasks; the same model, data, initial weights and batches for every method of a seed. Ours is
one training with ``OnlineHPOCallback()`` as it is, from a sensible start and from a bad one. The
others:

- random search, TPE, and TPE with Hyperband pruning, of Optuna (Akiba et al. 2019; Bergstra et al.
  2011; Li et al. 2018),
- population-based training (Jaderberg et al. 2017), its published rule written here on top of
  Lightning: the worst fifth copies the best fifth ten times per training, and explores,
- marginal-likelihood training of laplace-torch (Immer et al. 2021), where a task has an L2 strength
  per layer, or is a regression: it needs no held-out data, and is one training too.

What is compared is the loss on all held-out examples at the end of a training, as a function of
how many trainings were spent; searches show the best so far. The test loss is that of the same
training.

    pip install -e ".[examples,compare]"
    python examples/papers/compare.py --data-dir DATA
    python examples/papers/compare.py --data-dir DATA --scale tiny      # a glance

Methods whose package is not there are left out, and that is said.
"""

from __future__ import annotations

import argparse
import json
import math
from importlib.util import find_spec
from statistics import median
from typing import Any

from _compare_peers import NEEDS, PEERS
from _compare_tasks import TASKS, Lit, Task, fix, loader, make, start_of
from _experiment import Experiment, Row, note, parser, table
from torch.utils.data import RandomSampler

from lightning_hpo import ClipR, OnlineHPOCallback, named_hyperparameters

BUDGETS = (1, 2, 5, 10, 20, 30)
SEARCHES = [method for method in PEERS if method != "marginal likelihood"]
OURS = {"ours, sensible start": "sensible", "ours, bad start": "bad"}
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
        "curve": [
            (seconds / plain_seconds, seconds, *problem.losses(), callback.history[-1].values)
        ],
        "gradients": gradients(problem.module, callback),
        "alone": plain.losses()[0],
        "plain_seconds": plain_seconds,
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
    empty = {"gradients": math.nan, "alone": math.nan, "plain_seconds": math.nan}
    if method in OURS:
        results = ours(task, options, seed, OURS[method])
    else:
        results = {"curve": PEERS[method](task, options, seed), **empty}
    curve = [
        [*(float(f"{x:.5g}") for x in line), {n: float(f"{x:.3g}") for n, x in values.items()}]
        for *line, values in results["curve"]
    ]
    return results | {"curve": json.dumps(curve)}


def cells(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Lists all cells, seed by seed: tables can be made of the first seeds."""
    missing = {package for package in NEEDS.values() if find_spec(package) is None}
    for package in sorted(missing):
        left_out = [method for method, needed in NEEDS.items() if needed == package]
        note(f"left out, since {package} is not installed: {', '.join(left_out)}")
    return [
        {"task": task, "method": method, "seed": seed}
        for seed in range(options.seeds)
        for method in [*OURS, *PEERS]
        for task in TASKS
        if NEEDS.get(method) not in missing
        and (method != "marginal likelihood" or task in HAS_PRIOR)
    ]


# ------------------------------------------------------------------------------ tables and picture


def best_at(row: Row, budget: float) -> list[Any] | None:
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
    """Returns the budgets that a search of these options comes to."""
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
    """Returns the CPU seconds of a training of which nothing is tuned."""
    rows = [row for method in OURS for row in experiment.where(task=name, method=method)]
    return median([float(row["plain_seconds"]) for row in rows] or [math.nan])


def summary_tables(experiment: Experiment) -> list[str]:
    """Returns ours beside the best search with 20 trainings: what came out, and what it cost."""
    budget = min(20, experiment.options.budget)
    losses, costs = [], []
    for name in TASKS:
        peers = {m: experiment.where(task=name, method=m) for m in SEARCHES}
        found = {m: at(rows, budget) for m, rows in peers.items() if rows}
        found = {m: values for m, values in found.items() if values}
        for method, which in OURS.items():
            rows = experiment.where(task=name, method=method)
            if not rows or not found:
                continue
            best = min(found, key=lambda m: median(found[m]))
            mine = median(at(rows, math.inf))
            least = [needed(peers[m], mine) for m in found]
            line = [f"{median(map(float, (row['alone'] for row in rows))):.3f}"]
            line += [middle(at(rows, math.inf)), f"{median(at(rows, math.inf, 3)):.3f}"]
            line += [best, middle(found[best]), f"{median(at(peers[best], budget, 3)):.3f}"]
            line += [f"{100 * (mine / median(found[best]) - 1):+.1f} %", min(least, key=as_number)]
            losses.append([name, which, *line])
            line = [f"{median(float(row['gradients']) for row in rows):.2f}"]
            line += [f"{median(at(rows, math.inf, 0)):.2f}", f"{median(at(rows, math.inf, 1)):.1f}"]
            spent = (json.loads(row["curve"]) for row in peers[best])
            seconds = median(max(line[1] for line in c if line[0] <= budget + 1e-6) for c in spent)
            costs.append([name, which, *line, f"{seconds:.1f}"])
    headers = ["task", "start", "left alone", "ours", "ours: test", f"best with {budget} trainings"]
    headers += ["its loss", "its test", "ours over it", "trainings that searches need for ours"]
    cost_headers = ["task", "start", "gradients per step", "trainings (CPU time)", "CPU s, ours"]
    cost_headers += [f"CPU s, best with {budget}"]
    return [table(headers, losses), table(cost_headers, costs)]


def as_number(text: str) -> float:
    """Returns the number of trainings that a text says; more than the last is most."""
    return math.inf if text.startswith(">") else float(text)


COLORS = dict(zip([*OURS, *PEERS], [f"C{k}" for k in (0, 3, 7, 1, 2, 4, 5)], strict=True))


def draw(experiment: Experiment) -> None:
    """Draws for each task the best held-out loss so far over the budget."""
    import matplotlib.pyplot as plt

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
            options = {"color": COLORS[method], "label": method}
            if method == "population-based":
                options |= {"marker": "D", "markersize": 4, "markevery": 100, "linestyle": "--"}
            axes.step(x, mid, where="post", **options)
            axes.fill_between(x, low, high, step="post", color=COLORS[method], alpha=0.15, lw=0)
            seen += [mid[-1], mid[min(len(mid) - 1, 20)]]
        for method in OURS:
            rows = experiment.where(task=name, method=method)
            if rows:
                values = at(rows, math.inf)
                points(axes, median(at(rows, math.inf, 0)), values, method, "o")
                seen += [min(values), max(values)]
        bottom, top = min(seen, default=0), max(seen, default=1)
        room = 0.25 * (top - bottom)
        last = max(budgets[-1], *axes.get_xlim())
        axes.set(xscale="log", xlim=(0.9, 1.1 * last), ylim=(bottom - room, top + room))
        axes.set(xlabel="trainings spent", ylabel="best held-out loss so far")
        axes.set_title(TASKS[name].title.replace(": ", ":\n"), fontsize=10)
        shown = budgets_of(experiment.options)
        axes.set_xticks(shown, labels=map(str, shown))
        axes.minorticks_off()
    legend = {}
    for axes in grid.flat:
        handles, labels = axes.get_legend_handles_labels()
        legend |= dict(zip(labels, handles, strict=True))
    grid.flat[-1].axis("off")
    grid.flat[-1].legend(legend.values(), legend.keys(), loc="center", frameon=False)
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
    tables = summary_tables(experiment)
    for name, task in TASKS.items():
        for title, column in (("held-out", 2), ("test", 3)):
            text = task_table(experiment, name, column)
            tables.append(f"## {task.title}: {title} loss\n\n{text}")
    experiment.report("Against searches", tables)
    draw(experiment)


if __name__ == "__main__":
    main()
