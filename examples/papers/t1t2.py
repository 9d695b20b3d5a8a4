"""The T1–T2 paper's figures: regularization tuned while networks train, and trained again with it.

Luketina et al. (2016), §3.1, tune the standard deviations of Gaussian noise at the input (n0) and
before the hidden layers (n1), or n0 and an L2 strength (l2), from random starts. Per setup and
start there are three trainings: with the values fixed at the start, with T1–T2 from there, and with
the values fixed at those that T1–T2 ended with (a rerun). Beside T1–T2 as the paper has it stands
``OnlineHPOCallback()``, which chooses for itself.

    python examples/papers/t1t2.py --data-dir DATA                  # 6 setups, 5 starts each
    python examples/papers/t1t2.py --data-dir DATA --scale paper    # the paper's networks: a GPU

It makes one table for each way of tuning, and three pictures: figures 1 and 7 (maps of a grid, and
the ways that λ took), 2 and 3 (one training in time), 4 to 6 (scatter plots). Where the paper has
SVHN, figures 2 and 3 have MNIST here.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from statistics import correlation, median
from typing import Any

import lightning
import torch
from _data import batches, cifar, mnist
from _experiment import Experiment, parser, table, trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from lightning_hpo import (
    T1T2,
    GaussianNoiseMixin,
    L2Mixin,
    OnlineHPOCallback,
    fixed_values,
    freeze,
)

FIXED, OURS, DEFAULT = "fixed", "T1T2()", "OnlineHPOCallback()"
BATCH = 100  # §3, of T1 and of T2
EVERY = {"tiny": 5, "small": 5, "paper": 10}  # steps between two updates of λ, §2.2
# The λ-optimizer's rates, of noise and of the logarithm of L2 strengths. The paper moves λ by plain
# gradient descent, in its larger networks by Adam with 1e-3 for noise. Small trainings have a
# hundredth of its updates: there they were chosen, see RESULTS.md.
RATES = {"tiny": (0.01, 0.1), "small": (0.01, 0.1), "paper": (0.001, 0.01)}
# Of the starts, and of the grid; of L2, log₁₀ of the strength. The paper does not give them.
INTERVALS = {"n0": (0.0, 1.0), "n1": (0.0, 1.0), "l2": (-6.0, -1.0)}
POINTS = 30  # of a curve
ERRORS = (8, 10, 12, 15, 20, 30, 50, 60, 70, 90)  # percent, at the ticks of the scatter plots

# --------------------------------------------------------------------------------------------------
# Setups
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setup:
    """A network with its regularizers and its training set: one color of the scatter plots.

    Attributes:
        name: Of the network.
        data: ``"MNIST"`` or ``"CIFAR-10"``.
        second: What is tuned beside n0: ``"l2"``, or ``"n1"`` with batch normalization (§3).
        tied: Whether the second is one number, or one for each layer.
        layers: Widths of the hidden layers; of convolutions channels, width of the kernel, stride.
        size: Training images (T1).
        steps: Of the optimizer.
        held_out: Images in T2.
        pooled: Whether convolutions of stride 2 are a stride of 1 and a max-pooling instead.
    """

    name: str
    data: str
    second: str
    tied: bool
    layers: tuple[Any, ...]
    size: int
    steps: int
    held_out: int = 5000
    pooled: bool = False

    @property
    def rate(self) -> float:
        """Adam's learning rate, annealed to 0 (§3)."""
        return 1e-3 if self.data == "MNIST" else 2e-3

    @property
    def label(self) -> str:
        """What it is called in tables."""
        tied = "" if self.tied else " per layer"
        return f"{self.data}, {self.name}, {self.size} images: n0, {self.second}{tied}"


def all_cnn(*channels: int) -> tuple[tuple[int, int, int], ...]:
    """Returns All-CNN-C's pattern: convolutions of 3×3, the third of each width with stride 2."""
    wide = [(c, 3, 2 if i == 2 else 1) for c in channels for i in range(3)]
    return (*wide, (channels[-1], 3, 1), (channels[-1], 1, 1))


SHALLOW, DEEP = (1000, 1000, 1000), (4000, 2000, 1000, 500, 250)
SMALL_CNN = ((8, 3, 2), (32, 3, 2), (64, 3, 1), (64, 1, 1))
SETUPS = {
    # The paper's networks and lengths (250 epochs); 5 000 of the 25 000 CIFAR images here are T2.
    "paper": [
        Setup("1000³", "MNIST", "l2", True, SHALLOW, 55_000, 137_500),
        Setup("1000³", "MNIST", "n1", True, SHALLOW, 55_000, 137_500),
        Setup("4000…250", "MNIST", "l2", False, DEEP, 55_000, 137_500),
        Setup("4000…250", "MNIST", "n1", False, DEEP, 55_000, 137_500),
        Setup("All-CNN", "CIFAR-10", "l2", True, all_cnn(96, 192), 20_000, 50_000),
        Setup("max-pool", "CIFAR-10", "n1", True, all_cnn(96, 192), 20_000, 50_000, pooled=True),
    ],
    "small": [
        Setup("100³", "MNIST", "l2", True, (100, 100, 100), 1000, 700),
        Setup("100³", "MNIST", "n1", True, (100, 100, 100), 1000, 700),
        Setup("200…25", "MNIST", "l2", False, (200, 100, 50, 25), 500, 500),
        Setup("200…25", "MNIST", "n1", False, (200, 100, 50, 25), 500, 500),
        Setup("All-CNN", "CIFAR-10", "l2", True, SMALL_CNN, 1000, 700),
        Setup("max-pool", "CIFAR-10", "n1", True, SMALL_CNN, 1000, 500, pooled=True),
    ],
}
SETUPS["tiny"] = [
    replace(s, layers=(20, 20) if s.data == "MNIST" else ((4, 3, 2),), size=200, steps=20)
    for s in (SETUPS["small"][i] for i in (0, 1, 4))
]
GRID = {"tiny": 2, "small": 5, "paper": 8}  # values on each axis of a map
MAPS = (0, 1)  # the setups of figures 1 and 7 …
SHOWN = {"tiny": 0, "small": 2, "paper": 2}  # … and of figures 2 and 3
OTHER = 100  # added to the seed of a start, for another training with the same values

# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------


class Classifier(GaussianNoiseMixin, L2Mixin, lightning.LightningModule):
    """A network of ReLUs with two kinds of regularization.

    Args:
        setup: What network, and what acts.
        n0: The standard deviation of the noise at the input.
        second: That before each further layer, or the decimal logarithm of the L2 strength.
    """

    def __init__(self, setup: Setup, n0: float, second: float) -> None:
        super().__init__()
        self.setup = setup
        self.net = nn.Sequential(*layers(setup))
        weighted = [
            f"net.{i}" for i, m in enumerate(self.net) if isinstance(m, nn.Linear | nn.Conv2d)
        ]
        self.register_noise(n0, name="n0")
        if setup.second == "n1":
            self.register_noise(second, at=weighted[1:], name="n1", tied=setup.tied)
        else:
            self.register_l2(10**second, granularity="model" if setup.tied else "layer")

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    validation_step = training_step

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.setup.rate)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, self.setup.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def layers(setup: Setup) -> Iterator[nn.Module]:
    """Makes the network's layers."""
    normalized = setup.second == "n1"
    if setup.data == "MNIST":
        width = 28 * 28
        for other in setup.layers:
            yield nn.Linear(width, other)
            if normalized:
                yield nn.BatchNorm1d(other)
            yield nn.ReLU()
            width = other
        yield nn.Linear(width, 10)
        return
    width = 3
    for other, kernel, stride in setup.layers:
        yield nn.Conv2d(width, other, kernel, 1 if setup.pooled else stride, padding=kernel // 2)
        if normalized:
            yield nn.BatchNorm2d(other)
        yield nn.LeakyReLU(0.1) if setup.pooled else nn.ReLU()
        if setup.pooled and stride > 1:
            yield nn.MaxPool2d(stride)
        width = other
    yield nn.Conv2d(width, 10, 1)
    yield nn.AdaptiveAvgPool2d(1)
    yield nn.Flatten()


@cache
def images(folder: Path, data: str, small: bool) -> list[tuple[Tensor, Tensor]]:
    """Returns the training and the test images, preprocessed as in §3, and their labels."""
    if data == "MNIST":
        (x, y), (test_x, test_y) = (mnist(folder, part) for part in ("train", "test"))
        return [(x - x.mean(0), y), (test_x - x.mean(0), test_y)]
    found = []
    for part in ("train", "test"):
        x, y = cifar(folder, part)
        x = (F.avg_pool2d(x, 2) if small else x).flatten(1)
        x = x - x.mean(1, keepdim=True)
        found.append((x / x.std(1, keepdim=True).clamp(min=1e-3), y))
    # Whitening: all directions of pixels get the same variance, those with almost none excepted.
    center = found[0][0].mean(0)
    variances, directions = torch.linalg.eigh((found[0][0] - center).T.cov())
    whiten = directions * (variances + 0.1).rsqrt() @ directions.T
    side = 16 if small else 32
    return [(((x - center) @ whiten).unflatten(1, (3, side, side)), y) for x, y in found]


def load(setup: Setup, options: argparse.Namespace, seed: int) -> list[TensorDataset]:
    """Returns T1, T2 and the test images; T1 and T2 are drawn anew for each seed (§3)."""
    (x, y), test = images(options.data_dir, setup.data, options.scale != "paper")
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    held_out = min(setup.held_out, len(y) // 2)
    t1, t2 = order[: setup.size], order[-held_out:]
    return [TensorDataset(x[t1], y[t1]), TensorDataset(x[t2], y[t2]), TensorDataset(*test)]


def tuning(setup: Setup, scale: str) -> OnlineHPOCallback:
    """Makes T1–T2: λ moves by Adam, noise and L2 strengths at rates of their own."""
    noise, strength = RATES[scale]

    def optimizer(raw: list[Tensor]) -> torch.optim.Optimizer:
        rest = noise if setup.second == "n1" else strength
        groups = [{"params": raw[:1], "lr": noise}, {"params": raw[1:], "lr": rest}]
        return torch.optim.Adam(groups)

    return OnlineHPOCallback(T1T2(), optimizer, every_n_steps=EVERY[scale])


class Curves(Callback):
    """Keeps costs and errors on T1, T2 and the test images, at ``POINTS`` steps."""

    def __init__(self, sets: Sequence[TensorDataset], steps: int) -> None:
        self.sets = sets
        self.every = max(1, steps // POINTS)
        self.found: list[list[float]] = []

    def on_train_batch_end(self, trainer: lightning.Trainer, module: Any, *_: Any) -> None:
        if trainer.global_step % self.every == 0:
            numbers = [n for data in self.sets for n in evaluate(module, data)]
            self.found.append([trainer.global_step, *(round(n, 5) for n in numbers)])


@torch.no_grad()
def evaluate(module: Classifier, data: TensorDataset) -> tuple[float, float]:
    """Returns cross-entropy and error (in percent)."""
    was_training = module.training
    module.eval()
    parts = [
        (module.net(x.to(module.device)), y.to(module.device))
        for x, y in zip(*(t.split(1000) for t in data.tensors), strict=True)
    ]
    module.train(was_training)
    logits, labels = torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])
    error = 100 * (logits.argmax(1) != labels).float().mean().item()
    return F.cross_entropy(logits, labels).item(), error


def values_at(cell: dict[str, Any], options: argparse.Namespace) -> tuple[float, float]:
    """Returns n0 and the second value (log l2) of a cell: drawn, or from the grid."""
    setup = SETUPS[options.scale][cell["setup"]]
    bounds = INTERVALS["n0"], INTERVALS[setup.second]
    if cell["start"].startswith("grid"):
        parts = [int(i) / (GRID[options.scale] - 1) for i in cell["start"].split()[1:]]
    else:
        draws = torch.Generator().manual_seed(1000 * cell["setup"] + int(cell["start"]))
        parts = torch.rand(2, generator=draws).tolist()
    n0, second = (
        float(f"{low + part * (high - low):.3g}")
        for part, (low, high) in zip(parts, bounds, strict=True)
    )
    return n0, second


def fit(
    setup: Setup,
    cell: dict[str, Any],
    options: argparse.Namespace,
    callbacks: Sequence[Callback] = (),
    fixed: dict[str, Any] | None = None,
) -> Classifier:
    """Trains from the values of the cell, or with others fixed."""
    t1, t2, _ = load(setup, options, cell["seed"])
    lightning.seed_everything(cell["seed"], verbose=False)
    module = Classifier(setup, *values_at(cell, options))
    if fixed is not None:
        freeze(module, fixed)
    fitting = trainer(setup.steps, callbacks, limit_val_batches=0)
    fitting.fit(module, batches(t1, BATCH, shuffle=True), batches(t2, BATCH))
    return module


def train(cell: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Trains with the values of the cell fixed; or tunes them, and trains with those found."""
    setup = SETUPS[options.scale][cell["setup"]]
    sets = load(setup, options, cell["seed"])
    is_ours = cell["method"] == OURS
    callback = tuning(setup, options.scale) if is_ours else OnlineHPOCallback()
    curves = Curves(sets if cell["setup"] == SHOWN[options.scale] else [], setup.steps)
    is_fixed = cell["method"] == FIXED
    module = fit(setup, cell, options, [curves] if is_fixed else [callback, curves])
    found = fixed_values(module)
    rerun: float | str = ""
    if not is_fixed:
        rerun = evaluate(fit(setup, cell, options, fixed=found), sets[2])[1]
    updates = callback.history[:: max(1, len(callback.history) // POINTS)]
    way = [[update.step, *map(_short, update.values.values())] for update in updates]
    n0, second = values_at(cell, options)
    loss, error = evaluate(module, sets[2])
    return {
        "n0": n0,
        "second": second,
        "loss": loss,
        "error": error,
        "held-out error": evaluate(module, sets[1])[1],
        "rerun error": rerun,
        "found": json.dumps({name: _short(value) for name, value in found.items()}),
        "way": json.dumps(way),
        "curves": json.dumps(curves.found),
    }


def _short(value: Any) -> float:
    return float(f"{value:.4g}")


def cells(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Lists all trainings: from each start, the start with another seed, and the grids."""
    found: list[dict[str, Any]] = []
    for k in range(options.seeds):
        for i in range(len(SETUPS[options.scale])):
            cell = {"setup": i, "start": str(k), "seed": k}
            found += [{**cell, "method": method} for method in (FIXED, OURS, DEFAULT)]
            found.append({**cell, "seed": OTHER + k, "method": FIXED})
        if k == min(1, options.seeds - 1):  # there are pictures before all starts are done
            found += [
                {"setup": i, "start": f"grid {a} {b}", "seed": 0, "method": FIXED}
                for i in MAPS
                for a, b in product(range(GRID[options.scale]), repeat=2)
            ]
    return found


# --------------------------------------------------------------------------------------------------
# Table
# --------------------------------------------------------------------------------------------------


@dataclass
class Change:
    """Test errors from one start, in percent: with its values, and what tuning makes of them."""

    setup: Setup
    start: float
    other: float  # with its values, and another seed
    tuned: float
    rerun: float
    held_out: float  # on T2, of the tuned training
    noise: float = 0.0


def changes(experiment: Experiment, method: str) -> list[Change]:
    """Returns one for each start of which all trainings are there."""
    found = []
    for i, setup in enumerate(SETUPS[experiment.options.scale]):
        group = []
        for k in range(experiment.options.seeds):
            fixed = [
                experiment.numbers("error", setup=i, start=k, seed=seed, method=FIXED)
                for seed in (k, OTHER + k)
            ]
            tuned = [
                experiment.numbers(column, setup=i, start=k, method=method)
                for column in ("error", "rerun error", "held-out error")
            ]
            if all([*fixed, *tuned]):
                group.append(Change(setup, *(numbers[0] for numbers in fixed + tuned)))
        for change in group:
            change.noise = 3 * median(abs(c.start - c.other) for c in group)
        found += group
    return found


def rank_correlation(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Returns Spearman's correlation: Pearson's, of the ranks; equal values share their ranks."""
    ranks = [[sum(v < u for v in vs) + sum(v <= u for v in vs) for u in vs] for vs in (xs, ys)]
    return correlation(*ranks) if all(len(set(r)) > 1 for r in ranks) else math.nan


HEADERS = (
    "",
    "starts",
    "median error, %: at the start",
    "tuned",
    "rerun",
    "largest change: tuned",
    "rerun",
    "noise",
    "worse than noise: tuned",
    "rerun",
    "rerun better",
    "rank correlation: tuned, rerun",
    "T2, test",
)
STATEMENTS = (
    *("the paper", "–", "–", "–", "–", "–", "–", "–", "–", "none performs poorly"),
    *("in most cases", "strong", "strong; on MNIST no structure"),
)


def line(name: str, group: Sequence[Change]) -> list[str]:
    """Makes a line of the table."""
    start, tuned, rerun, held_out, noise = (
        [getattr(change, name) for change in group]
        for name in ("start", "tuned", "rerun", "held_out", "noise")
    )
    worse = [[b - a for a, b in zip(start, after, strict=True)] for after in (tuned, rerun)]
    return [
        name,
        str(len(group)),
        *(f"{median(errors):.2f}" for errors in (start, tuned, rerun)),
        *(f"{max(differences):+.2f}" for differences in worse),
        f"{noise[0]:.2f}" if len(set(noise)) == 1 else "–",
        *(str(sum(d > n for d, n in zip(each, noise, strict=True))) for each in worse),
        str(sum(b < a for a, b in zip(tuned, rerun, strict=True))),
        f"{rank_correlation(tuned, rerun):.2f}",
        f"{rank_correlation(held_out, tuned):.2f}",
    ]


def lines(experiment: Experiment) -> list[Sequence[str]]:
    """Makes the table: each way of tuning with each setup, and with all of a data set."""
    result: list[Sequence[str]] = [STATEMENTS]
    setups = SETUPS[experiment.options.scale]
    for method in (OURS, DEFAULT):
        found = changes(experiment, method)
        groups = {setup.label: [c for c in found if c.setup == setup] for setup in setups}
        for data in dict.fromkeys(setup.data for setup in setups):
            groups[f"{data}, all"] = [c for c in found if c.setup.data == data]
        result += [line(f"{method}: {name}", group) for name, group in groups.items() if group]
    return result


# --------------------------------------------------------------------------------------------------
# Pictures
# --------------------------------------------------------------------------------------------------


def draw_maps(experiment: Experiment, plt: Any) -> Any:
    """Draws figures 1 and 7: test loss, with the ways of λ, and test error, over the grids."""
    figure, all_axes = plt.subplots(len(MAPS), 2, figsize=(10, 4 * len(MAPS)))
    for i, row in zip(MAPS, all_axes, strict=True):
        setup = SETUPS[experiment.options.scale][i]
        for axes, column in zip(row, ("loss", "error"), strict=True):
            found = [r for r in experiment.where(setup=i) if r["start"].startswith("grid")]
            grid = {(float(r["n0"]), float(r["second"])): float(r[column]) for r in found}
            xs, ys = (sorted({key[k] for key in grid}) for k in (0, 1))
            if min(len(xs), len(ys)) < 2:
                continue  # not trained yet
            levels = [[math.log10(grid.get((x, y), math.nan)) for x in xs] for y in ys]
            colors = axes.pcolormesh(xs, ys, levels, shading="nearest", cmap="viridis_r")
            name = "test loss" if column == "loss" else "test error, %"
            figure.colorbar(colors, label=f"log₁₀ of the {name}")
            axes.plot(*min(grid, key=lambda key: grid[key]), "ro", fillstyle="none", markersize=11)
            second = "log₁₀ of the L2 strength" if setup.second == "l2" else "hidden noise n1"
            axes.set(xlabel="input noise n0", ylabel=second, title=f"{setup.label}\n{name}")
        for result in experiment.where(setup=i, method=OURS):
            points = [point[1:3] for point in json.loads(result["way"])]
            points.append(list(json.loads(result["found"]).values()))
            if setup.second == "l2":
                points = [(x, math.log10(y)) for x, y in points]
            ways = [*zip((float(result["n0"]), float(result["second"])), *points, strict=True)]
            row[0].plot(*ways, color="black", linewidth=1.2)
            row[0].plot(ways[0][0], ways[1][0], "ws", markeredgecolor="black")
            row[0].plot(ways[0][-1], ways[1][-1], "w*", markeredgecolor="black", markersize=13)
    figure.supxlabel("□ start   ☆ end of T1–T2   ○ best of the grid", fontsize="medium")
    return figure


def draw_evolution(experiment: Experiment, plt: Any) -> Any:
    """Draws figures 2 and 3: the start that is in the middle when left alone, so and tuned."""
    i = SHOWN[experiment.options.scale]
    setup = SETUPS[experiment.options.scale][i]
    pairs = [
        (fixed, tuned)
        for tuned in experiment.where(setup=i, method=OURS)
        for fixed in experiment.where(
            setup=i, method=FIXED, start=tuned["start"], seed=tuned["seed"]
        )
    ]
    if not pairs:
        return None  # not trained yet
    pairs.sort(key=lambda pair: float(pair[0]["loss"]))
    fixed, tuned = pairs[len(pairs) // 2]
    figure, all_axes = plt.subplots(2, 3, figsize=(12, 6), sharex=True)
    for row, result, name in zip(all_axes, (fixed, tuned), ("fixed", "tuned"), strict=True):
        steps, *curves = zip(*json.loads(result["curves"]), strict=True)
        for k, part in enumerate(("T1", "T2", "test")):
            row[0].plot(steps, curves[2 * k + 1], label=part)
            row[1].plot(steps, curves[2 * k], label=part)
        row[0].set(ylabel=f"error, %, {name}")
        row[1].set(ylabel=f"cross-entropy, {name}", yscale="log")
        row[0].legend()
    for upper, lower in all_axes.T[:2]:
        lower.sharey(upper)
        upper.autoscale()
    steps, *ways = zip(*json.loads(tuned["way"]), strict=True)
    for name, way in zip(json.loads(tuned["found"]), ways, strict=True):
        all_axes[0 if name == "n0" else 1][2].plot(steps, way, label=name)
    all_axes[0][2].set(ylabel="input noise n0, tuned")
    all_axes[1][2].set(ylabel="strengths, tuned", yscale="log")
    all_axes[1][2].legend(fontsize="small")
    figure.supxlabel("step")
    figure.suptitle(setup.label)
    return figure


def draw_scatter(experiment: Experiment, plt: Any) -> Any:
    """Draws figures 4 to 6."""
    all_found = changes(experiment, OURS)
    kinds = list(dict.fromkeys(change.setup.data for change in all_found))
    figure, all_axes = plt.subplots(len(kinds), 3, figsize=(12, 4.2 * len(kinds)), squeeze=False)
    names = {
        "start": "test error, %, of the start",
        "tuned": "test error, %, of T1–T2",
        "rerun": "test error, %, of the rerun",
        "held_out": "error on T2, %, of T1–T2",
    }
    for data, row in zip(kinds, all_axes, strict=True):
        found = [change for change in all_found if change.setup.data == data]
        pairs = (("start", "rerun"), ("tuned", "rerun"), ("held_out", "tuned"))
        for axes, (x, y) in zip(row, pairs, strict=True):
            for k, setup in enumerate(
                s for s in SETUPS[experiment.options.scale] if s.data == data
            ):
                group = [c for c in found if c.setup == setup]
                points = [[getattr(change, name) for change in group] for name in (x, y)]
                axes.plot(*points, "os^D"[k], alpha=0.8, label=setup.label)
            axes.axline(
                (found[0].tuned, found[0].tuned), slope=1, color="gray", linestyle=":", linewidth=1
            )
            axes.set(xlabel=names[x], ylabel=names[y], title=data, xscale="log", yscale="log")
            for axis in (axes.xaxis, axes.yaxis):  # a few that fail are far from the others
                low, high = axis.get_view_interval()
                axis.set_ticks([e for e in ERRORS if low < e < high], minor=False)
                axis.set_ticks([], minor=True)
                axis.set_major_formatter("{x:.0f}")
        row[2].legend(fontsize="x-small", loc="upper left")
    return figure


def draw(experiment: Experiment) -> None:
    """Draws all pictures."""
    import matplotlib.pyplot as plt

    plt.rcParams["figure.constrained_layout.use"] = True
    pictures = {"maps": draw_maps, "evolution": draw_evolution, "scatter": draw_scatter}
    for what, function in pictures.items():
        figure = function(experiment, plt)
        if figure is not None:
            figure.savefig(experiment.output / f"{experiment.name}_{what}.png", dpi=80)
            plt.close(figure)


def main() -> None:
    options = parser(__doc__, seeds=5).parse_args()
    if options.scale == "tiny":
        options.seeds = min(options.seeds, 2)
    keys = ("setup", "method", "start", "seed")
    experiment = Experiment(f"t1t2_{options.scale}", keys, train, options, options.output)
    experiment.run(cells(options))
    experiment.report("T1–T2", [table(HEADERS, lines(experiment))])
    if changes(experiment, OURS):
        draw(experiment)


if __name__ == "__main__":
    main()
