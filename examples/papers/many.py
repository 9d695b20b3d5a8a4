"""Ten thousand hyperparameters and more in one training: an L2 per weight, a weight per example.

Luketina et al. (2016, section 4) say that T1–T2 could tune many more hyperparameters than was
possible before, and that these might overfit the images held out for them. Both are looked at here,
on MNIST:

- an L2 strength for each weight of a network that learns from few images;
- a weight between 0 and 1 for each training image, where 40 % of the labels are the next digit's.

One tuned training stands beside random search in the same space, beside random search over one
value that all share, and beside what else held-out images are good for: to be trained on. The test
images play no part in any of this.

    python examples/papers/many.py --data-dir DATA

The cost is CPU time, in trainings with fixed values. Of random search, the numbers are the exact
means over all choices of so many of its draws, of the one with the lowest held-out loss.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, comb
from statistics import fmean
from typing import Any

import lightning
import torch
from _data import batches, mnist
from _experiment import Experiment, parser, spread, table, trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from lightning_hpo import T1T2, ExampleWeightMixin, Hyperparameter, OnlineHPOCallback, Positive

STRENGTHS, EXAMPLES = "an L2 per weight", "a weight per example"
FIXED, PLAIN, DEFAULT = "fixed", "T1T2()", "OnlineHPOCallback()"
EVERY = "OnlineHPOCallback(every_n_steps=1)"
EACH, SHARED = "random search, each", "random search, one for all"
ADDED, ORACLE = "fixed, held-out images added", "fixed, right labels only (oracle)"
METHODS = {
    STRENGTHS: (FIXED, PLAIN, DEFAULT, ADDED),
    # Every 10 steps, which is the default's choice, an example is seen only twice.
    EXAMPLES: (FIXED, PLAIN, DEFAULT, EVERY, ADDED, ORACLE),
}
# All methods have the same space. Strengths start in its middle, and random search draws them
# uniformly on a log scale; weights start at 1, and it draws them from [0, 1].
RANGE = (1e-6, 1.0)
START = {STRENGTHS: 1e-3, EXAMPLES: 1.0}
WRONG = 0.4
BATCH = 100
# Rates of T1–T2's λ-optimizer, Adam: of the logarithms of strengths, and of weights.
HYPER_RATE = {STRENGTHS: 0.01, EXAMPLES: 0.01}


@dataclass(frozen=True)
class Scale:
    """How large an experiment is."""

    train: dict[str, int]
    held_out: int
    width: int
    steps: dict[str, int]
    draws: int  # of random search


SCALES = {
    "tiny": Scale({STRENGTHS: 100, EXAMPLES: 200}, 100, 20, {STRENGTHS: 60, EXAMPLES: 60}, 2),
    "small": Scale(
        {STRENGTHS: 500, EXAMPLES: 10_000}, 1000, 100, {STRENGTHS: 1500, EXAMPLES: 2000}, 8
    ),
    "paper": Scale(
        {STRENGTHS: 500, EXAMPLES: 50_000}, 5000, 1000, {STRENGTHS: 5000, EXAMPLES: 20_000}, 32
    ),
}


class Classifier(lightning.LightningModule):
    """A network with one hidden layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(784, width), nn.ReLU(), nn.Linear(width, 10))

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class PenalizedWeights(Classifier):
    """A λ for each weight: ½ Σ λ w² is added to the loss. Biases have none."""

    def __init__(self, width: int, values: Tensor) -> None:
        super().__init__(width)
        self.lam = Hyperparameter(values, Positive(*RANGE))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels, _ = batch
        weights = torch.cat([self.net[k].weight.flatten() for k in (0, 2)])
        return F.cross_entropy(self.net(images), labels) + 0.5 * (self.lam() @ weights.square())


class WeighedExamples(ExampleWeightMixin, Classifier):
    """A λ for each training example: the weight of its loss."""

    def __init__(self, width: int, values: Tensor) -> None:
        super().__init__(width)
        self.register_example_weights(len(values), values, name="lam")

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels, index = batch
        losses = F.cross_entropy(self.net(images), labels, reduction="none")
        return self.weighted_mean(losses, index)


@dataclass
class Data:
    """The images of a training; ``is_wrong`` says which labels of ``train`` are."""

    train: TensorDataset
    is_wrong: Tensor
    held_out: TensorDataset
    test: TensorDataset


def load(part: str, seed: int, options: argparse.Namespace) -> Data:
    """Draws the images of a training, and wrong labels where these are to be found."""
    scale = SCALES[options.scale]
    images, labels = mnist(options.data_dir, "train")
    draw = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=draw)
    count = scale.train[part]
    own, other = order[:count], order[count : count + scale.held_out]
    is_wrong = torch.rand(count, generator=draw) < (WRONG if part == EXAMPLES else 0.0)
    targets = torch.where(is_wrong, (labels[own] + 1) % 10, labels[own])
    return Data(
        TensorDataset(images[own], targets),
        is_wrong,
        TensorDataset(images[other], labels[other]),
        TensorDataset(*mnist(options.data_dir, "test")),
    )


def values_of(cell: dict[str, Any], count: int, is_wrong: Tensor) -> Tensor:
    """Returns the λ that a training starts with."""
    part, method = cell["part"], cell["method"]
    if method not in (EACH, SHARED):
        values = torch.full((count,), START[part])
        return torch.where(is_wrong, 0.0, values) if method == ORACLE else values
    draw = torch.Generator().manual_seed(1000 * cell["seed"] + cell["draw"])
    found = torch.rand(count if method == EACH else 1, generator=draw).expand(count).clone()
    low, high = RANGE
    return low * (high / low) ** found if part == STRENGTHS else found


def callbacks(part: str, method: str) -> list[Callback]:
    """Makes what tunes; nothing for fixed values."""
    if method == PLAIN:
        rate = HYPER_RATE[part]
        return [OnlineHPOCallback(T1T2(), optimizer=lambda raw: torch.optim.Adam(raw, lr=rate))]
    if method == EVERY:
        return [OnlineHPOCallback(every_n_steps=1)]
    return [OnlineHPOCallback()] if method == DEFAULT else []


def train(cell: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Trains once."""
    part, method = cell["part"], cell["method"]
    scale = SCALES[options.scale]
    data = load(part, cell["seed"], options)
    images, labels = data.train.tensors
    if method == ADDED:
        images, labels = (
            torch.cat(pair) for pair in zip(data.train.tensors, data.held_out.tensors, strict=True)
        )
    count = scale.width * (784 + 10) if part == STRENGTHS else len(labels)
    lightning.seed_everything(cell["seed"], verbose=False)
    make = PenalizedWeights if part == STRENGTHS else WeighedExamples
    module = make(scale.width, values_of(cell, count, data.is_wrong))
    loader = batches(TensorDataset(images, labels, torch.arange(len(labels))), BATCH, shuffle=True)
    begin = time.process_time()
    # There is no validation by Lightning: the callback draws the held-out batches itself.
    trainer(scale.steps[part], callbacks(part, method), limit_val_batches=0).fit(
        module, loader, batches(data.held_out, BATCH)
    )
    cost = time.process_time() - begin
    held_out, _ = evaluate(module, data.held_out)
    test, accuracy = evaluate(module, data.test)
    lam = module.lam.value.cpu()
    if part == STRENGTHS:
        told = lam.log10().quantile(torch.tensor([0.05, 0.95])).tolist()
    elif method == ADDED:
        told = [1.0, 1.0]
    else:
        told = [lam[data.is_wrong].mean().item(), lam[~data.is_wrong].mean().item()]
    return {
        "λ": count,
        "fit": cost,
        "held-out": held_out,
        "test": test,
        "accuracy": accuracy,
        "low": told[0],
        "high": told[1],
    }


@torch.no_grad()
def evaluate(module: Classifier, data: TensorDataset) -> tuple[float, float]:
    """Returns cross-entropy, and accuracy in per cent."""
    images, labels = data.tensors
    logits = module.net.cpu()(images)
    right = (logits.argmax(1) == labels).float().mean()
    return F.cross_entropy(logits, labels).item(), 100 * right.item()


# --------------------------------------------------------------------------------------------------
# Tables and pictures
# --------------------------------------------------------------------------------------------------

Numbers = dict[str, float]
COLUMNS = ("cost", "held-out", "test", "accuracy", "low", "high")


def numbers(experiment: Experiment, part: str, method: str, seed: int) -> list[Numbers]:
    """Returns what these trainings gave, with the cost in trainings with fixed values."""
    units = experiment.numbers("fit", part=part, method=FIXED, seed=seed)
    rows = experiment.where(part=part, method=method, seed=seed) if units else []
    cells = [{name: float(row[name]) for name in ("fit", *COLUMNS[1:])} for row in rows]
    return [cell | {"cost": cell["fit"] / units[0]} for cell in cells]


def best_of(rows: Sequence[Numbers], count: int) -> Numbers:
    """Returns what the best by held-out loss of so many of these is like, on the average."""
    ranked = sorted(rows, key=lambda row: row["held-out"])
    total = comb(len(ranked), count)
    # One is the best of those drawn where all others come from behind it.
    parts = [comb(len(ranked) - 1 - k, count - 1) / total for k in range(len(ranked))]
    found = {
        name: sum(part * row[name] for part, row in zip(parts, ranked, strict=True))
        for name in COLUMNS
    }
    return found | {"cost": float(count)}


def searched(experiment: Experiment, part: str, method: str, count: int) -> list[Numbers]:
    """Returns the best of so many draws, for each seed that has as many."""
    each = [numbers(experiment, part, method, seed) for seed in range(experiment.options.seeds)]
    return [best_of(rows, count) for rows in each if len(rows) >= count]


def trained(experiment: Experiment, part: str, method: str) -> list[Numbers]:
    """Returns the training of each seed."""
    seeds = range(experiment.options.seeds)
    return [row for seed in seeds for row in numbers(experiment, part, method, seed)]


def results(experiment: Experiment, part: str) -> str:
    """Makes the table of one part."""
    draws = SCALES[experiment.options.scale].draws
    found = {method: trained(experiment, part, method) for method in METHODS[part]}
    lines = [(method, rows) for method, rows in found.items() if method != ORACLE]
    costs = [fmean(row["cost"] for row in found[m]) for m in (PLAIN, DEFAULT) if found[m]]
    budgets = {min(draws, ceil(cost)) for cost in costs}
    for method in (EACH, SHARED):
        for count in sorted(budgets):
            rows = searched(experiment, part, method, count)
            lines.append((f"{method}: best of {count}", rows))
    lines += [(method, rows) for method, rows in found.items() if method == ORACLE]
    every = next((row["λ"] for row in experiment.where(part=part, method=FIXED)), "–")
    texts = []
    for name, rows in lines:
        if not rows:
            continue
        many = "0" if name in (FIXED, ADDED, ORACLE) else "1" if SHARED in name else every
        columns = {c: [row[c] for row in rows] for c in COLUMNS}
        held_out = "(trained on)" if name == ADDED else spread(columns["held-out"])
        told = [fmean(columns[c]) for c in ("low", "high")]
        texts.append([name, many, f"{fmean(columns['cost']):.1f}", held_out])
        texts[-1] += [spread(columns["test"]), spread(columns["accuracy"], ".1f")]
        texts[-1] += [f"{told[0]:.2f}, {told[1]:.2f}"]
    about = "log10 λ: 5 %, 95 %" if part == STRENGTHS else "mean weight: wrong, right labels"
    headers = ["method", "λ tuned", "CPU time, plain trainings", "held-out loss", "test loss"]
    return table([*headers, "test accuracy, %", about], texts)


COLORS = {
    PLAIN: "#c97a06",
    DEFAULT: "#1f5fbf",
    EVERY: "#5b9bd5",
    EACH: "#6b7280",
    SHARED: "#111827",
}


def draw(experiment: Experiment) -> None:
    """Draws the losses over the cost: random search as curves, tuned trainings as points."""
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(2, 2, figsize=(9.5, 7), layout="constrained", sharex=True)
    for line, part in zip(grid, METHODS, strict=True):
        for axes, column in zip(line, ("held-out", "test"), strict=True):
            for method in (EACH, SHARED):
                counts = range(1, SCALES[experiment.options.scale].draws + 1)
                found = [searched(experiment, part, method, count) for count in counts]
                points = [
                    (count, fmean(row[column] for row in rows))
                    for count, rows in zip(counts, found, strict=True)
                    if rows
                ]
                axes.plot(*zip(*points, strict=True), color=COLORS[method], label=method)
            for method in METHODS[part]:
                rows = trained(experiment, part, method)
                if method in COLORS and rows:
                    where = [[row[name] for row in rows] for name in ("cost", column)]
                    axes.plot(*where, "o", color=COLORS[method], label=method)
                elif rows and (column == "test" or method != ADDED):
                    style = {FIXED: "-", ADDED: "--", ORACLE: ":"}[method]
                    height = fmean(row[column] for row in rows)
                    axes.axhline(
                        height, color="#c8373d", linestyle=style, label=method, linewidth=1
                    )
            axes.set(title=part[0].upper() + part[1:], ylabel=f"{column} loss", xscale="log")
    for axes in grid[-1]:
        axes.set_xlabel("CPU time, in trainings with fixed values")
        axes.set_xticks([1, 2, 4, 8], ["1", "2", "4", "8"])
        axes.set_xticks([], minor=True)
    entries = {}
    for axes in grid.flat:
        entries |= dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    figure.legend(entries.values(), entries, loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(experiment.output / f"{experiment.name}.png", dpi=90)


def main() -> None:
    options = parser(__doc__, seeds=3).parse_args()
    if options.scale == "tiny":
        options.seeds = min(options.seeds, 2)
    keys = ("part", "method", "draw", "seed")
    experiment = Experiment(f"many_{options.scale}", keys, train, options, options.output)
    draws = dict.fromkeys((EACH, SHARED), SCALES[options.scale].draws)
    experiment.run(
        {"part": part, "method": method, "draw": k, "seed": seed}
        for seed in range(options.seeds)
        for part, methods in METHODS.items()
        for method in (*methods, EACH, SHARED)
        for k in range(draws.get(method, 1))
    )
    tables = [f"## {part[0].upper()}{part[1:]}\n\n{results(experiment, part)}" for part in METHODS]
    experiment.report("Ten thousand hyperparameters and more", tables)
    draw(experiment)


if __name__ == "__main__":
    main()
