"""Figures 1 to 4 of Fioravanti's report: input noise and L2 of an MLP on MNIST, tuned by T1–T2.

Section III of the report trains three multilayer perceptrons by Adam, from random values of two
hyperparameters: log10 of the L2 strength in [−5.5, −2.5], and the standard deviation of the noise
at the input in [0, 0.8]. Each start is trained three times: with the values fixed, with T1–T2 from
there, and with the values fixed to those that it has found. ``OnlineHPOCallback()`` does the same.

    python examples/papers/fioravanti.py --data-dir DATA                 # widths / 10, 5 000 images
    python examples/papers/fioravanti.py --data-dir DATA --scale paper    # for a GPU

The report gives neither learning rates, decays, the length of a training, nor the split of the
images; ``SCALES`` and the constants above it say what is used here. T1–T2 is that of Luketina et
al. (2016), eq. 3, with the derivative of Adam's step in the place of the learning rate. The
report's eq. 5 leaves Adam out; and its eq. 6 for the noise is, read literally, the derivative of a
validation loss that has noise itself, which is cheaper and is always in favour of less noise.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import log10
from pathlib import Path
from statistics import mean, median, quantiles
from typing import Any

import lightning
import torch
from _data import batches, mnist
from _experiment import Experiment, parser, table, trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from lightning_hpo import T1T2, GaussianNoiseMixin, L2Mixin, OnlineHPOCallback, fixed_values

# Section III.
SIZES = {
    "shallow": (1000, 1000, 1000),
    "medium": (2000, 1000, 1000, 500),
    "deep": (4000, 2000, 1000, 500, 250),
}
LOG_L2 = (-5.5, -2.5)
NOISE = (0.0, 0.8)
# Section IV.
PAPER = ("100", "–", "–", "~3 %", "–", "20%", "58%", "all")
PAPER_SECONDS = (15.14, 16.99)
# Luketina et al., section 3: batches of 100 for both, Adam on θ with an annealed rate of 1e-3.
BATCH = 100
RATE = 1e-3
# Rates of λ at the start, of log λ and of the noise; they fall as that of θ does.
HYPER_RATES = (0.05, 0.02)
# The report does not say from where on an error is unacceptable, and what is near the diagonal.
UNACCEPTABLE = 1.5  # times the median error of the reruns of the same network
NEAR = 1.2  # the larger of two errors over the smaller

FIXED, PLAIN, DEFAULT = "fixed", "T1T2()", "OnlineHPOCallback()"
SPARSE = "T1T2(), every 10 steps"
TUNED = (PLAIN, DEFAULT)


@dataclass(frozen=True)
class Scale:
    """How large an experiment is."""

    divisor: int  # of the widths
    train: int
    held_out: int
    epochs: int
    repeats: int  # of time measurements
    timed: int  # epochs that are timed


SCALES = {
    "tiny": Scale(40, 300, 200, 4, 1, 1),
    "small": Scale(10, 5_000, 2_000, 20, 3, 2),
    "paper": Scale(1, 50_000, 10_000, 30, 3, 2),
}


class Classifier(L2Mixin, GaussianNoiseMixin, lightning.LightningModule):
    """A perceptron with noise at its input and one L2 strength for all weights."""

    def __init__(self, widths: Sequence[int], l2: float, noise: float, steps: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise((784, *widths)):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.Linear(widths[-1], 10))
        self.steps = steps
        self.register_l2(init=l2)
        self.register_noise(init=noise)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    validation_step = training_step

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.Adam(self.parameters(), lr=RATE)
        falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": falling, "interval": "step"}}


def move_lam(raw: list[Tensor]) -> torch.optim.Optimizer:
    """Makes the λ-optimizer of T1–T2: Adam with a rate for each of the two."""
    groups = [{"params": [r], "lr": rate / RATE} for r, rate in zip(raw, HYPER_RATES, strict=True)]
    return torch.optim.Adam(groups)


CALLBACKS: dict[str, Callable[[], list[Callback]]] = {
    FIXED: list,
    PLAIN: lambda: [OnlineHPOCallback(T1T2(), move_lam, scale_lr_with_model=True)],
    SPARSE: lambda: [
        OnlineHPOCallback(T1T2(), move_lam, every_n_steps=10, scale_lr_with_model=True)
    ],
    DEFAULT: lambda: [OnlineHPOCallback()],
}


def load(folder: Path, scale: Scale) -> tuple[TensorDataset, TensorDataset, TensorDataset]:
    """Returns what is trained on, held out, and tested on: the same for all trainings."""
    images, labels = mnist(folder, "train")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    parts = order[: scale.train], order[scale.train : scale.train + scale.held_out]
    train, held_out = (TensorDataset(images[part], labels[part]) for part in parts)
    return train, held_out, TensorDataset(*mnist(folder, "test"))


def start_of(size: str, start: int) -> tuple[float, float]:
    """Draws the L2 strength and the noise that a training starts with."""
    draw = torch.Generator().manual_seed(1000 * list(SIZES).index(size) + start)
    (low, high), (least, most) = LOG_L2, NOISE
    first, second = torch.rand(2, generator=draw, dtype=torch.float64).tolist()
    return 10 ** (low + (high - low) * first), least + (most - least) * second


def fit(
    options: argparse.Namespace, size: str, values: tuple[float, float], callbacks: list[Callback]
) -> Classifier:
    """Trains a network from these values."""
    scale = SCALES[options.scale]
    train, held_out, _ = load(options.data_dir, scale)
    loader = batches(train, BATCH, shuffle=True)
    steps = scale.epochs * len(loader)
    module = Classifier([width // scale.divisor for width in SIZES[size]], *values, steps)
    # There is no validation by Lightning: the callback draws the held-out batches itself.
    trainer(steps, callbacks, limit_val_batches=0).fit(module, loader, batches(held_out, BATCH))
    return module


@torch.no_grad()
def evaluate(module: Classifier, options: argparse.Namespace) -> tuple[float, float]:
    """Returns the cross-entropy of the held-out images, and the error in per cent on the test."""
    _, held_out, test = load(options.data_dir, SCALES[options.scale])
    net = module.net.cpu().eval()
    images, labels = held_out.tensors
    loss = F.cross_entropy(net(images), labels).item()
    images, labels = test.tensors
    wrong = torch.cat([net(part).argmax(1) for part in images.split(1000)]) != labels
    return loss, 100 * wrong.float().mean().item()


def train(cell: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Trains from a start; if that tunes, trains again with the values found."""
    start = start_of(cell["size"], cell["start"])
    callbacks = CALLBACKS[cell["method"]]()
    lightning.seed_everything(cell["start"], verbose=False)
    module = fit(options, cell["size"], start, callbacks)
    held_out, error = evaluate(module, options)
    path, again = [start], ("", "")
    if callbacks:
        path += [(r.values["l2"], r.values["noise"]) for r in callbacks[0].history]
        found = fixed_values(module)
        lightning.seed_everything(cell["start"], verbose=False)
        again = evaluate(fit(options, cell["size"], (found["l2"], found["noise"]), []), options)
    thin = [*path[: -1 : max(1, len(path) // 50)], path[-1]]
    return {
        "held-out": held_out,
        "error": error,
        "rerun held-out": again[0],
        "rerun error": again[1],
        "path": json.dumps([[round(n, 4), round(log10(l2), 3)] for l2, n in thin]),
    }


def now() -> float:
    """Returns CPU time; with a GPU, which works on while the host waits, time as it passes."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


class Clock(Callback):
    """Keeps the CPU time of the epochs after the first, then stops the training."""

    def __init__(self, epochs: int) -> None:
        self.left = epochs
        self.begin = 0.0
        self.seconds: list[float] = []

    def on_train_epoch_start(self, trainer: lightning.Trainer, module: Any) -> None:
        self.begin = now()

    def on_train_epoch_end(self, trainer: lightning.Trainer, module: Any) -> None:
        if trainer.current_epoch > 0:
            self.seconds.append(now() - self.begin)
        trainer.should_stop = len(self.seconds) == self.left


def measure(cell: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Times an epoch of each method, one after the other; each is told its whole length."""
    start = start_of(cell["size"], cell["repeat"])
    seconds = {}
    for method in (FIXED, PLAIN, SPARSE, DEFAULT):
        clock = Clock(SCALES[options.scale].timed)
        fit(options, cell["size"], start, [*CALLBACKS[method](), clock])
        seconds[method] = mean(clock.seconds)
    return seconds


# --------------------------------------------------------------------------------------------------
# Tables and pictures
# --------------------------------------------------------------------------------------------------


def errors(experiment: Experiment, size: str, method: str) -> list[list[float]]:
    """Returns the errors with the starts fixed, of the tuned runs, and of the reruns."""
    fixed = {row["start"]: row["error"] for row in experiment.where(size=size, method=FIXED)}
    rows = experiment.where(size=size, method=method)
    found = [(fixed[r["start"]], r["error"], r["rerun error"]) for r in rows if r["start"] in fixed]
    return [[float(triple[k]) for triple in found] for k in range(3)]


def share(flags: Sequence[bool]) -> str:
    return f"{sum(flags) / len(flags):.0%} ({sum(flags)} of {len(flags)})"


def near(one: Sequence[float], other: Sequence[float]) -> str:
    return share([max(pair) <= NEAR * min(pair) for pair in zip(one, other, strict=True)])


def results(experiment: Experiment) -> str:
    """Makes the table of errors: figures 2 and 3."""
    headers = ["network", "method", "starts", "error, fixed start: median, worst"]
    headers += ["tuned run", "rerun", "unacceptable starts", "… mended by tuning"]
    headers += ["start near rerun (fig. 2)", "tuned run near rerun (fig. 3)"]
    lines = [["all", "T1–T2, report", *PAPER]]
    for size in SIZES:
        found = {method: errors(experiment, size, method) for method in TUNED}
        reruns = [error for _, _, rerun in found.values() for error in rerun]
        for method, (fixed, tuned, rerun) in found.items():
            if not fixed:
                continue
            bound = UNACCEPTABLE * median(reruns)
            mended = [f > bound >= r for f, r in zip(fixed, rerun, strict=True)]
            cells = [f"{median(e):.2f} %, {max(e):.2f} %" for e in (fixed, tuned, rerun)]
            cells += [share([f > bound for f in fixed]), share(mended)]
            cells += [near(fixed, rerun), near(tuned, rerun)]
            lines.append([size, method, str(len(fixed)), *cells])
    return table(headers, lines)


def ends(experiment: Experiment) -> str:
    """Makes the table of where λ ends: figure 1."""
    lines = []
    for size in SIZES:
        for method in (FIXED, *TUNED):
            found = experiment.where(size=size, method=method)
            if len(found) > 1:
                last = [json.loads(row["path"])[-1] for row in found]
                cells = []
                for values in zip(*last, strict=True):
                    first, middle, third = quantiles(values, n=4, method="inclusive")
                    cells.append(f"{middle:.2f} ({first:.2f} … {third:.2f})")
                loss = median(float(row["held-out"]) for row in found)
                lines.append([size, "starts" if method == FIXED else method, *cells[::-1]])
                lines[-1].append(f"{loss:.4f}")
    headers = ["network", "method", "log10 L2: median (quartiles)", "noise: median (quartiles)"]
    return table([*headers, "held-out loss: median"], lines)


def costs(timed: Experiment) -> str:
    """Makes the table of times: figure 4."""
    before, after = PAPER_SECONDS
    paper = f"{after:.2f} s, +{100 * (after / before - 1):.2f} %"
    lines = [["all", "report", f"{before:.2f} s", paper, "–", "–"]]
    for size in SIZES:
        rows = timed.where(size=size)
        if not rows:
            continue
        plain = [float(row[FIXED]) for row in rows]
        cells = [f"{median(plain):.2f} s"]
        for method in (PLAIN, SPARSE, DEFAULT):
            own = [float(row[method]) for row in rows]
            more = median(o / p - 1 for o, p in zip(own, plain, strict=True))
            cells.append(f"{median(own):.2f} s, {100 * more:+.0f} %")
        lines.append([size, "here", *cells])
    return table(["network", "", "fixed", PLAIN, SPARSE, DEFAULT], lines)


COLORS = {FIXED: "#9ca3af", PLAIN: "#c97a06", SPARSE: "#e5b567", DEFAULT: "#1f5fbf"}


def draw(experiment: Experiment, timed: Experiment) -> None:
    """Draws the four figures into two files."""
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(
        len(TUNED), 3, figsize=(9, 2.7 * len(TUNED)), sharex=True, sharey=True
    )
    for line, method in zip(grid, TUNED, strict=True):
        for axes, size in zip(line, SIZES, strict=True):
            for row in experiment.where(size=size, method=method):
                noise, log_l2 = zip(*json.loads(row["path"]), strict=True)
                axes.plot(noise, log_l2, color=COLORS[method], alpha=0.4, linewidth=1)
                axes.plot(noise[0], log_l2[0], ".", color="gray", markersize=4)
                axes.plot(noise[-1], log_l2[-1], "o", color=COLORS[method], markersize=5)
            axes.set_title(f"{size}, {method}", fontsize=9)
    for axes in grid[-1]:
        axes.set_xlabel("input noise")
    for axes in grid[:, 0]:
        axes.set_ylabel("log10 L2")
    save(figure, experiment, "trajectories")

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(10.5, 4))
    for size, marker in zip(SIZES, "os^", strict=True):
        for method in TUNED:
            fixed, tuned, rerun = errors(experiment, size, method)
            style = {"color": COLORS[method], "alpha": 0.7, "s": 22, "marker": marker}
            left.scatter(fixed, rerun, label=f"{size}, {method}", **style)
            middle.scatter(tuned, rerun, **style)
    for axes, what in ((left, "with the start fixed"), (middle, "of the tuned run")):
        low = min(*axes.get_xlim(), *axes.get_ylim())
        high = max(*axes.get_xlim(), *axes.get_ylim())
        axes.plot((low, high), (low, high), color="gray", linewidth=1)
        axes.set(xlim=(low, high), ylim=(low, high), aspect="equal")
        axes.set(xlabel=f"test error {what}, %", ylabel="test error with tuned values fixed, %")
    for k, method in enumerate(COLORS):
        for i, size in enumerate(SIZES):
            seconds, plain = (timed.numbers(name, size=size) for name in (method, FIXED))
            if seconds:
                ratio = median(own / p for own, p in zip(seconds, plain, strict=True))
                name = None if i else f"time: {method}"
                right.bar(i + 0.2 * k, ratio, 0.18, color=COLORS[method], label=name)
    report = PAPER_SECONDS[1] / PAPER_SECONDS[0]
    right.axhline(report, color="black", linestyle=":", linewidth=1, label="time: T1–T2, report")
    right.set_xticks([i + 0.3 for i in range(len(SIZES))], SIZES)
    right.set_ylabel("CPU time of an epoch / fixed λ")
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    save(figure, experiment, "errors")


def save(figure: Any, experiment: Experiment, what: str) -> None:
    figure.set_layout_engine("constrained")
    figure.savefig(experiment.output / f"{experiment.name}_{what}.png", dpi=90)


def main() -> None:
    options = parser(__doc__, seeds=8).parse_args()
    if options.scale == "tiny":
        options.seeds = min(options.seeds, 2)
    name, folder = f"fioravanti_{options.scale}", options.output
    experiment = Experiment(name, ("size", "method", "start"), train, options, folder)
    timed = Experiment(f"{name}_time", ("size", "repeat"), measure, options, folder)
    repeats = range(SCALES[options.scale].repeats)
    done = timed.run({"size": size, "repeat": k} for k in repeats for size in SIZES)
    if done:
        experiment.run(
            {"size": size, "method": method, "start": start}
            for start in range(options.seeds)
            for size in SIZES
            for method in (FIXED, *TUNED)
        )
    tables = [results(experiment), ends(experiment), costs(timed)]
    experiment.report("Input noise and L2 on MNIST", tables)
    draw(experiment, timed)


if __name__ == "__main__":
    main()
