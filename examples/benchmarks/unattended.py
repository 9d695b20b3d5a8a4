"""Which configuration of OnlineHPOCallback tunes unattended? Many tasks, good and bad starts.

Each cell is one training of a task (see _tasks.py) from one start, with one seed:

- ``fixed``: hyperparameters stay where they are; nine values make the grid that others are held to,
  and the start left alone is there too.
- ``noise``: the best value of the grid times 0.995 and 1.005. A smaller change says nothing.
- ``random``: values drawn at random over the range of the grid; the best of n is random search.
- ``oracle``: knows the best value of the grid, and moves there from the start in a straight line on
  the raw scale: the limit of any method that tunes in a single training.
- the configurations below.

Regret is the held-out loss over that of the grid's best, minus 1; cost is processor time over that
of a plain training of the same task. Results are appended to DIR/results.csv as they come: the
script can be stopped (Ctrl-C) and goes on where it was. Tables and pictures come from that file.

    python examples/benchmarks/unattended.py --output DIR --data-dir DATA
    python examples/benchmarks/unattended.py --output DIR --tasks digits-l2 --configurations t1t2
    python examples/benchmarks/unattended.py --output DIR --report

Tasks of the split "held_back" are for the final table; nothing is developed on them.
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import math
import os
import random
import signal
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import lightning
import torch
from _common import describe, environment, note, silent_trainer
from _tasks import TASKS, Lit, Problem, Task, Values
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from lightning_hpo import (
    T1T2,
    ClipR,
    OnlineHPOCallback,
    fixed_values,
    freeze,
    named_hyperparameters,
)

# --------------------------------------------------------------------------------------------------
# Configurations
# --------------------------------------------------------------------------------------------------


def adam(rate: float) -> Callable[[list[Tensor]], torch.optim.Optimizer]:
    """Makes a λ-optimizer."""
    return lambda raw: torch.optim.Adam(raw, lr=rate)


def default(steps: int, **common: Any) -> Callback:
    return OnlineHPOCallback(**common)


def t1t2(steps: int, **common: Any) -> Callback:
    return OnlineHPOCallback(T1T2(), **common)


def t1t2_every_10(steps: int, **common: Any) -> Callback:
    return OnlineHPOCallback(T1T2(), adam(0.05), every_n_steps=10, **common)


def clip_stride_10(steps: int, **common: Any) -> Callback:
    estimator = ClipR(20.0, decay=0.99, stride=10)
    return OnlineHPOCallback(estimator, adam(0.05), every_n_steps=10, **common)


def finds_start(steps: int, **common: Any) -> Callback:
    """Puts options of the optimizer where ``"auto"`` starts them, and leaves them there."""
    return OnlineHPOCallback(T1T2(), every_n_steps=steps + 1, **common)


# Each makes a callback from the length of the training in steps; the held-out data, and the options
# of the optimizer that are tuned, come as keywords.
CONFIGURATIONS: dict[str, Callable[..., Callback]] = {
    "default": default,
    "t1t2": t1t2,
    "t1t2 every 10": t1t2_every_10,
    "clip stride 10": clip_stride_10,
}
# The part of the training in which an oracle moves.
ORACLES = {"oracle 1/4": 1 / 4, "oracle 1/20": 1 / 20}
ALL = ["fixed", "noise", "random", *ORACLES, *CONFIGURATIONS]

NOISE = {"0.995": 0.995, "1.005": 1.005}
DRAWS = 16
# A training that has cost as much as so many plain ones is stopped: that is no online method.
LIMIT = 30.0

# --------------------------------------------------------------------------------------------------
# One cell
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One training; what it is called in the file of results."""

    task: str
    seed: int
    configuration: str
    start: str


@dataclass(frozen=True)
class Job:
    """A cell with all that a process needs to train it.

    Args:
        cell: Its name.
        values: Where the hyperparameters start.
        target: Where an oracle goes.
        data_dir: The folder of data.
        limit: Processor time after which the training is stopped.
    """

    cell: Cell
    values: Values
    target: Values
    data_dir: Path | None
    limit: float


class Oracle(Callback):
    """Moves hyperparameters to values that are known to be good, in a straight line on raw scales.

    Args:
        start: The first values.
        target: The last.
        steps: In so many steps.
    """

    def __init__(self, start: Values, target: Values, steps: float) -> None:
        self.start, self.target, self.steps = start, target, steps
        self.lines: dict[str, tuple[Tensor, Tensor]] = {}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        known = named_hyperparameters(pl_module)
        for name, value in self.target.items():
            if name.startswith("optimizer."):
                ends = torch.tensor([self.start[name], value]).log().unbind()
            else:
                h = known[name]
                end = h.constraint.inverse(torch.as_tensor(value, dtype=h.raw.dtype))
                ends = h.raw.clone(), end
            self.lines[name] = ends

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, i: int) -> None:
        known = named_hyperparameters(pl_module)
        for name, (start, end) in self.lines.items():
            raw = torch.lerp(start, end, min(i / self.steps, 1.0))
            if name.startswith("optimizer."):
                set_option(trainer, name.removeprefix("optimizer."), raw.exp().item())
            else:
                known[name].raw.copy_(raw)


def set_option(trainer: Any, option: str, value: float) -> None:
    """Changes an option of the optimizer, under its schedule if that is the learning rate."""
    for group in trainer.optimizers[0].param_groups:
        group[option] = value
    if option == "lr":
        schedule = trainer.lr_scheduler_configs[0].scheduler
        schedule.base_lrs = [value] * len(schedule.base_lrs)
        for group, factor in zip(schedule.optimizer.param_groups, schedule.lr_lambdas, strict=True):
            group["lr"] = value * factor(schedule.last_epoch)


class Deadline(Callback):
    """Stops a training that takes too much processor time."""

    def __init__(self, seconds: float) -> None:
        self.end = time.process_time() + seconds
        self.passed = False

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if time.process_time() > self.end:
            self.passed = trainer.should_stop = True


def fit(module: Lit, train: DataLoader, steps: int, callbacks: Sequence[Callback]) -> float:
    """Trains in silence; returns the processor time."""
    trainer = silent_trainer(accelerator="cpu", max_steps=steps, callbacks=list(callbacks))
    begin = time.process_time()
    trainer.fit(module, train)
    return time.process_time() - begin


@torch.no_grad()
def evaluate(module: Lit, data: TensorDataset) -> float:
    """Returns the mean loss over all of a set."""
    module.eval()
    total = 0.0
    for batch in zip(*(tensor.split(500) for tensor in data.tensors), strict=True):
        total += module.validation_step(list(batch), 0).item() * len(batch[0])
    return total / len(data)


def prepare(job: Job) -> Problem:
    """Makes the training of a cell, with its hyperparameters frozen or free at their values."""
    lightning.seed_everything(job.cell.seed, verbose=False)
    task = TASKS[job.cell.task]
    problem = task.make(job.values, job.cell.seed, job.data_dir)
    own = {n: v for n, v in job.values.items() if not n.startswith("optimizer.") and v != "auto"}
    freeze(problem.module, expand(problem.module, own))
    for h in named_hyperparameters(problem.module).values():
        h.frozen = job.cell.configuration not in CONFIGURATIONS
        h.is_initial = True  # as if it had been made so
    return problem


def expand(module: Lit, values: Values) -> dict[str, Any]:
    """Gives all elements of a hyperparameter the same value where there is only one."""
    raws = {name: h.raw for name, h in named_hyperparameters(module).items()}
    return {
        name: [value] * raws[name].numel()
        if raws[name].dim() and not isinstance(value, list)
        else value
        for name, value in values.items()
    }


def make_callbacks(job: Job, problem: Problem) -> list[Callback]:
    """Makes what tunes the hyperparameters of a cell."""
    configuration = job.cell.configuration
    if configuration in ORACLES:
        return [Oracle(job.values, job.target, ORACLES[configuration] * problem.steps)]
    names = [f"optimizer.{option}" for option in TASKS[job.cell.task].options]
    options = {
        name.removeprefix("optimizer."): "auto" if job.values[name] == "auto" else None
        for name in names
    }
    if configuration not in CONFIGURATIONS and "auto" not in options.values():
        return []
    size = problem.train.sampler.batch_size  # type: ignore[union-attr]
    draws = BatchSampler(RandomSampler(problem.held_out), size, drop_last=True)
    held_out = DataLoader(problem.held_out, batch_size=None, sampler=draws)
    make = CONFIGURATIONS.get(configuration, finds_start)
    return [make(problem.steps, dataloader=held_out, optimizer_hyperparameters=options)]


def run(job: Job) -> dict[str, Any]:
    """Trains a cell; returns its line of the file of results."""
    row = {
        "task": job.cell.task,
        "seed": job.cell.seed,
        "configuration": job.cell.configuration,
        "start": job.cell.start,
    }
    deadline = Deadline(job.limit)
    try:
        problem = prepare(job)
        callbacks = make_callbacks(job, problem)
        seconds = fit(problem.module, problem.train, problem.steps, [*callbacks, deadline])
    except Exception as error:
        return row | {"status": f"failed: {describe(error)}"}
    validation, test = (evaluate(problem.module, d) for d in (problem.held_out, problem.test))
    status = "ok" if math.isfinite(validation) else "nan"
    return row | {
        "validation": f"{validation:.6g}",
        "test": f"{test:.6g}",
        "seconds": f"{seconds:.3f}",
        "parameters": sum(p.numel() for p in problem.module.parameters()),
        "status": "slow" if deadline.passed else status,
        "final": json.dumps(summarize(problem.module, job)),
    }


def summarize(module: Lit, job: Job) -> dict[str, Any]:
    """Returns the last values; of many, the smallest, the mean and the largest."""
    found = {**job.values, **(job.target if job.cell.configuration in ORACLES else {})}
    found |= fixed_values(module)
    if job.cell.configuration in CONFIGURATIONS and "optimizer.lr" in found:
        found["optimizer.lr"] *= job.values["optimizer.lr"]  # found as a scale on the schedule
    for name, value in found.items():
        if isinstance(value, list) and len(value) > 10:
            found[name] = [min(value), sum(value) / len(value), max(value)]
    return {
        name: [float(f"{v:.4g}") for v in value]
        if isinstance(value, list)
        else float(f"{value:.4g}")
        for name, value in found.items()
    }


def start_worker() -> None:
    """Makes a process fit to measure: one thread, silence, everything loaded that loads late."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says when to stop
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    for configuration in ("fixed", "default"):
        job = Job(Cell("digits-l2", 0, configuration, ""), {"l2": 1e-3}, {}, None, math.inf)
        problem = prepare(job)
        fit(problem.module, problem.train, 20, make_callbacks(job, problem))


# --------------------------------------------------------------------------------------------------
# All cells
# --------------------------------------------------------------------------------------------------

FIELDS = ("task", "seed", "configuration", "start", "validation", "test", "seconds", "parameters")
FIELDS += ("status", "final")


class Results:
    """The lines of the file, by cell; a later line replaces an earlier one.

    Args:
        path: Of the file. It is made with the first line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[Cell, dict[str, str]] = {}
        if path.exists():
            with path.open(newline="") as file:
                for row in csv.DictReader(file):
                    self._add(row)

    def _add(self, row: Mapping[str, Any]) -> None:
        names = ("task", "configuration", "start")
        task, configuration, start = (str(row[name]) for name in names)
        cell = Cell(task, int(row["seed"]), configuration, start)
        self.rows[cell] = {field: str(row.get(field, "")) for field in FIELDS}

    def append(self, row: Mapping[str, Any]) -> None:
        """Adds a line, to the file too."""
        self._add(row)
        is_new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            if is_new:
                writer.writeheader()
            writer.writerow(row)

    def loss(self, cell: Cell, kind: str = "validation") -> float:
        """Returns the loss of a cell; infinity where there is none, or too late."""
        row = self.rows[cell]
        value = float(row[kind]) if row["status"] == "ok" else math.inf
        return value if math.isfinite(value) else math.inf

    def best(self, task: Task, seed: int) -> Cell | None:
        """Returns the best cell of the grid, or None where the grid is not complete."""
        cells = [Cell(task.name, seed, "fixed", name) for name in task.grid()]
        if not all(cell in self.rows for cell in cells):
            return None
        return min(cells, key=self.loss)

    def plain_seconds(self, task: Task) -> float:
        """Returns the median processor time of the plain trainings of a task."""
        grid = task.grid()
        times = [
            float(row["seconds"])
            for cell, row in self.rows.items()
            if cell.task == task.name and cell.configuration == "fixed" and cell.start in grid
            if row["seconds"]
        ]
        return median(times) if times else math.nan


def list_jobs(
    configuration: str, task: Task, seed: int, results: Results, data_dir: Path | None
) -> Iterable[Job]:
    """Lists the cells of a configuration that can be run now."""
    plain = results.plain_seconds(task)
    make = partial(
        Job, target={}, data_dir=data_dir, limit=math.inf if math.isnan(plain) else LIMIT * plain
    )

    def cell(start: str) -> Cell:
        return Cell(task.name, seed, configuration, start)

    starts = task.starts()
    best = results.best(task, seed)
    if configuration == "fixed":
        alone = dict(task.left_alone()[start] for start in starts)
        for name, values in (task.grid() | alone).items():
            yield make(cell(name), values)
    elif configuration == "random":
        generator = random.Random(f"{task.name} {seed}")
        for draw in range(DRAWS):
            values = task.at([generator.uniform(-2, 2) for _ in task.axes])
            yield make(cell(f"draw {draw:02}"), task.expanded(values))
    elif configuration in CONFIGURATIONS:
        for name, values in starts.items():
            yield make(cell(name), values)
    elif best is not None:
        target = task.grid()[best.start]
        if configuration == "noise":
            for name, factor in NOISE.items():
                yield make(cell(name), scaled(target, factor))
        else:
            for name, values in starts.items():
                if name != "auto":
                    yield make(cell(name), values, target=target)


def scaled(values: Values, factor: float) -> Values:
    """Multiplies all values, lists of them too."""
    return {
        name: [factor * v for v in value] if isinstance(value, list) else factor * value
        for name, value in values.items()
    }


def run_all(jobs: Sequence[Job], results: Results, workers: int) -> bool:
    """Trains what is not in the results yet; returns whether it came to the end."""
    jobs = [job for job in jobs if job.cell not in results.rows]
    if not jobs:
        return True
    begin = time.monotonic()
    pool = ProcessPoolExecutor(workers, get_context("spawn"), start_worker)
    futures = [pool.submit(run, job) for job in jobs]
    try:
        for count, future in enumerate(as_completed(futures), 1):
            row = future.result()
            results.append(row)
            left = (time.monotonic() - begin) / count * (len(jobs) - count)
            print(
                f"{count:5}/{len(jobs)}  {line(row, results)}  ({left / 60:.0f} min left)",
                flush=True,
            )
    except KeyboardInterrupt:
        note("stopping; trainings under way are finished first")
        pool.shutdown(cancel_futures=True)
        for future in futures:
            if future.done() and not future.cancelled():
                row = future.result()
                if Cell(row["task"], row["seed"], row["configuration"], row["start"]) not in (
                    results.rows
                ):
                    results.append(row)
        return False
    pool.shutdown()
    return True


def line(row: Mapping[str, Any], results: Results) -> str:
    """Describes a cell that is done."""
    name = f"{row['task']:16} seed {row['seed']}  {row['configuration']:14} {row['start']:9}"
    if row["status"] != "ok":
        return f"{name} {row['status']}"
    best = results.best(TASKS[row["task"]], row["seed"])
    loss = float(row["validation"])
    regret = f" ({loss / results.loss(best) - 1:+.1%})" if best else ""
    return f"{name} {loss:.4f}{regret}, {float(row['seconds']):.1f} s"


# --------------------------------------------------------------------------------------------------
# Reports
# --------------------------------------------------------------------------------------------------

GROUPS = {
    "auto and sensible starts": ("auto", "sensible"),
    "two decades off": ("low", "high"),
    "the paper's starts, 1e-6 … 1e-1": tuple(f"1e{k}" for k in range(-6, 0)),
}
LARGE = 100_000
WORSE = 1.03


@dataclass
class Outcome:
    """A cell in the terms of the tables.

    Args:
        regret: On the held-out data; infinite where a training came to nothing.
        test: On the test data.
        cost: In plain trainings.
        is_large: Whether the network has 10⁵ parameters or more.
        is_worse: Whether the start left alone does better by more than 3 %.
    """

    regret: float
    test: float
    cost: float
    is_large: bool
    is_worse: bool


def judge(cell: Cell, results: Results) -> Outcome | None:
    """Compares a cell with the grid, and with its start left alone."""
    task = TASKS.get(cell.task)
    best = results.best(task, cell.seed) if task else None
    if task is None or best is None:
        return None
    row, loss = results.rows[cell], results.loss(cell)
    alone = Cell(task.name, cell.seed, "fixed", task.left_alone().get(cell.start, [""])[0])
    return Outcome(
        loss / results.loss(best) - 1,
        results.loss(cell, "test") / results.loss(best, "test") - 1,
        float(row["seconds"] or "nan") / results.plain_seconds(task),
        int(results.rows[best]["parameters"]) >= LARGE,
        alone in results.rows and loss > WORSE * results.loss(alone),
    )


def collect(
    configuration: str, starts: Sequence[str], tasks: Sequence[Task], results: Results
) -> list[Outcome]:
    """Returns the outcomes of a configuration; for "fixed", those of the starts left alone."""
    found = []
    for task in tasks:
        alone = task.left_alone()
        for start in starts:
            name = alone.get(start, [""])[0] if configuration == "fixed" else start
            for seed in sorted({cell.seed for cell in results.rows}):
                cell = Cell(task.name, seed, configuration, name)
                outcome = judge(cell, results) if cell in results.rows else None
                if outcome is not None:
                    found.append(outcome)
    return found


def search(count: int, tasks: Sequence[Task], results: Results) -> list[Outcome]:
    """Returns the outcomes of random search with so many trainings, each draw used once."""
    found = []
    for task in tasks:
        for seed in sorted({cell.seed for cell in results.rows}):
            cells = [Cell(task.name, seed, "random", f"draw {k:02}") for k in range(DRAWS)]
            if not all(cell in results.rows for cell in cells):
                continue
            for first in range(0, DRAWS, count):
                outcome = judge(min(cells[first : first + count], key=results.loss), results)
                if outcome is not None:
                    outcome.cost = count
                    found.append(outcome)
    return found


def at_rank(values: Iterable[float], part: float) -> float:
    """Returns the value that this part of the values does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(part * len(ordered)) - 1)] if ordered else math.nan


def middle(values: Iterable[float]) -> str:
    """Formats a median of costs."""
    known = [value for value in values if not math.isnan(value)]
    return f"{median(known):.2f}" if known else "–"


def percent(value: float) -> str:
    """Formats a regret."""
    return "–" if math.isnan(value) else "∞" if math.isinf(value) else f"{100 * value:+.1f} %"


def summary_row(name: str, outcomes: Sequence[Outcome]) -> str:
    """Formats one line of the table of configurations."""
    regrets = [outcome.regret for outcome in outcomes]
    cells = [
        name,
        str(len(outcomes)),
        percent(at_rank(regrets, 0.5)),
        percent(at_rank(regrets, 0.9)),
        percent(max(regrets)),
        percent(at_rank([outcome.test for outcome in outcomes], 0.5)),
        str(sum(outcome.is_worse for outcome in outcomes)),
        middle(outcome.cost for outcome in outcomes if not outcome.is_large),
        middle(outcome.cost for outcome in outcomes if outcome.is_large),
    ]
    return f"| {' | '.join(cells)} |"


def report_configurations(tasks: Sequence[Task], results: Results) -> Iterable[str]:
    """Yields a table for each group of starts."""
    for group, starts in GROUPS.items():
        yield f"\n{group}:\n"
        yield (
            "| configuration | cells | median regret | nine of ten | worst | median on test data | "
            "> 3 % worse than left alone | cost, small | cost, large |"
        )
        yield "|---|---|---|---|---|---|---|---|---|"
        for configuration in ("fixed", *ORACLES, *configurations_in(results)):
            outcomes = collect(configuration, starts, tasks, results)
            name = "start left alone" if configuration == "fixed" else configuration
            if outcomes:
                yield summary_row(name, outcomes)
    yield "\nRandom search:\n"
    yield "| trainings | cells | median regret | nine of ten | worst | median on test data |"
    yield "|---|---|---|---|---|---|"
    for count in counts():
        outcomes = search(count, tasks, results)
        if outcomes:
            yield "|".join(summary_row(str(count), outcomes).split("|")[:7]) + "|"


def configurations_in(results: Results) -> list[str]:
    """Lists what the file has results of, also where it is no longer among the configurations."""
    others = [cell.configuration for cell in results.rows]
    names = dict.fromkeys([*CONFIGURATIONS, *others])
    return [name for name in names if name not in ("fixed", "noise", "random", *ORACLES)]


def counts() -> list[int]:
    """Lists the sizes of random search."""
    return [2**k for k in range(DRAWS.bit_length())]


def report_tasks(tasks: Sequence[Task], results: Results) -> Iterable[str]:
    """Yields a table of the tasks: what they are, how much depends on λ, and their noise."""
    yield (
        "| task | | λ | parameters | plain, s | noise | best, decades | best loss | on test data | "
        "sensible | low | high |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|---|"
    for task in tasks:
        bests = {
            seed: best
            for seed in sorted({cell.seed for cell in results.rows})
            if (best := results.best(task, seed)) is not None
        }
        if not bests:
            continue
        regrets = {
            start: median(outcome.regret for outcome in outcomes) if outcomes else math.nan
            for start in ("sensible", "low", "high")
            for outcomes in [collect("fixed", [start], [task], results)]
        }
        noise = [abs(outcome.regret) for outcome in collect("noise", list(NOISE), [task], results)]
        cells = [
            task.name,
            task.description,
            str(len(task.axes)),
            results.rows[next(iter(bests.values()))]["parameters"],
            f"{results.plain_seconds(task):.1f}",
            f"{max(noise):.2%}" if noise else "–",
            ", ".join(best.start for best in bests.values()),
            ", ".join(f"{results.loss(best):.4f}" for best in bests.values()),
            ", ".join(f"{results.loss(best, 'test'):.4f}" for best in bests.values()),
            *(percent(regret) for regret in regrets.values()),
        ]
        yield f"| {' | '.join(cells)} |"


def report_by_task(tasks: Sequence[Task], results: Results) -> Iterable[str]:
    """Yields the median regret of each task and configuration: near starts, far starts."""
    names = ["fixed", *ORACLES, *configurations_in(results)]
    yield f"| task | {' | '.join(names)} |"
    yield "|---" * (len(names) + 1) + "|"
    for task in tasks:
        cells = []
        for name in names:
            medians = [
                percent(at_rank([o.regret for o in collect(name, starts, [task], results)], 0.5))
                for starts in list(GROUPS.values())[:2]
            ]
            cells.append(" / ".join(medians))
        yield f"| {task.name} | {' | '.join(cells)} |"


def report(tasks: Sequence[Task], results: Results, output: Path) -> None:
    """Writes report.md and a picture for each split."""
    lines = ["# Tuning unattended", "", environment("cpu", 1)]
    for split in dict.fromkeys(task.split for task in tasks):
        chosen = [task for task in tasks if task.split == split]
        lines += [f"\n## {split}\n", *report_tasks(chosen, results)]
        lines += report_configurations(chosen, results)
        lines += ["\nMedian regret by task (auto and sensible / two decades off):\n"]
        lines += report_by_task(chosen, results)
        plot(chosen, results, output / f"{split}.png")
    text = "\n".join(lines) + "\n"
    (output / "report.md").write_text(text)
    print(text)


def plot(tasks: Sequence[Task], results: Results, path: Path) -> None:
    """Draws regret against cost: the median as a point, a bar up to nine of ten cells."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(GROUPS), figsize=(15, 5), sharey=True)
    for ax, (group, starts) in zip(axes, GROUPS.items(), strict=True):
        found = {f"random search, {n}": search(n, tasks, results) for n in counts()}
        found |= {
            "left alone" if name == "fixed" else name: collect(name, starts, tasks, results)
            for name in ("fixed", *ORACLES, *configurations_in(results))
        }
        for k, (name, outcomes) in enumerate(found.items()):
            if outcomes:
                draw(ax, name, outcomes, "gray" if k < len(counts()) else f"C{k % 10}")
        ax.set_xscale("log", base=2)
        ax.set_yscale("symlog", linthresh=0.05)
        ax.set_yticks([-0.05, 0, 0.05, 0.2, 1, 5, 20], ["−5 %", 0, "5 %", "20 %", "1", "5", "20"])
        ax.set_ylim(-0.1, 30)
        ax.axhline(0, color="black", linewidth=0.8)
        ax.set_xlabel("cost / plain training")
        ax.set_title(group, fontsize=10)
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("regret: median, and nine of ten cells")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def draw(ax: Any, name: str, outcomes: Sequence[Outcome], color: str) -> None:
    """Draws one point with its bar; what is infinite ends at the upper edge."""
    regrets = [outcome.regret for outcome in outcomes]
    y, top = (min(at_rank(regrets, part), 30) for part in (0.5, 0.9))
    costs = [outcome.cost for outcome in outcomes if not math.isnan(outcome.cost)]
    x = median(costs) if costs else 1.0
    ax.plot([x, x], [y, top], color=color, linewidth=1)
    ax.plot([x], [y], "o", color=color, markersize=5)
    ax.annotate(name, (x, y), (4, 3), textcoords="offset points", size=7, color=color)


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for all that is written")
    parser.add_argument("--data-dir", type=Path, help="folder with MNIST, cifar10 and ptb")
    parser.add_argument("--split", choices=("develop", "held_back", "all"), default="develop")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, help="default: all of the split")
    parser.add_argument("--configurations", nargs="+", choices=ALL, default=ALL)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    parser.add_argument("--report", action="store_true", help="only make the reports again")
    return parser.parse_args()


def choose(options: argparse.Namespace) -> list[Task]:
    """Returns the tasks asked for, without those whose data are missing."""
    tasks = [
        task
        for task in TASKS.values()
        if (task.name in options.tasks if options.tasks else options.split in (task.split, "all"))
    ]
    if options.report:
        return tasks
    folder = options.data_dir
    missing = [t for t in tasks if t.data and not (folder and (folder / t.data).is_dir())]
    for task in missing:
        note(f"left out: {task.name} needs the folder {task.data} in --data-dir")
    return [task for task in tasks if task not in missing]


def main() -> None:
    options = parse()
    options.output.mkdir(parents=True, exist_ok=True)
    results = Results(options.output / "results.csv")
    tasks = choose(options)
    if not options.report:
        # The grid first: what an oracle aims at, and the cost of a plain training, come from it.
        for phase in (["fixed"], [name for name in options.configurations if name != "fixed"]):
            jobs = [
                job
                for seed in options.seeds
                for name in phase
                if name in options.configurations
                for task in tasks
                for job in list_jobs(name, task, seed, results, options.data_dir)
            ]
            if not run_all(jobs, results, options.workers):
                return
    report(tasks, results, options.output)


if __name__ == "__main__":
    main()
