"""Table 2 of the online-HPO paper: the L2 strength of an MNIST network, from six starts.

Section 4.2: a fully connected 100-100-100-10 network, 75 % of 60 000 images for training and 25 %
held out; one λ starts at 1e-6, 1e-5, …, 1e-1. Losses are cross-entropies on the held-out images,
with early stopping (the best over the training) and without (the last); the gap between the two is
the paper's measure of stability. Its appendix B.1 draws both losses over λ while they change.

    python examples/papers/mnist_l2.py --data-dir DATA                 # 2 500 steps
    python examples/papers/mnist_l2.py --data-dir DATA --scale paper   # 80 000 steps
    python examples/papers/mnist_l2.py --data-dir DATA --tpe           # needs the extra compare

The paper does not give its batches (here 100), its decaying learning rate (here a cosine from 0.1
to 0), its λ learning rates (``RATES``), nor how λ is represented: see ``ExponentiatedGradient``.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from statistics import fmean
from typing import Any

import lightning
import torch
from _data import batches, mnist
from _experiment import Experiment, Row, parser, table, trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from lightning_hpo import T1T2, ClipR, Interval, L2Mixin, OnlineHPOCallback, UnrollK
from lightning_hpo.estimators import Estimator

STARTS = [float(f"1e{k}") for k in range(-6, 0)]
STEPS = {"tiny": 40, "small": 2500, "paper": 80_000}
IMAGES = {"tiny": 800, "small": 16_000, "paper": 60_000}
EVALUATIONS = 40
FIXED, DEFAULT = "Fixed λ", "OnlineHPOCallback()"
TPE, TRAININGS, SEARCHES = "Optuna's TPE", (len(STARTS), 20), range(3)
"""Searches differ in the draws of λ alone: each training has the seed of those of the grid."""
METHODS: dict[str, Callable[[], Estimator]] = {
    "Unroll1-gTgV": lambda: T1T2(scale_by_lr=False),
    "Unroll1": lambda: T1T2(),
    "Unroll5": lambda: UnrollK(5),
    "Unroll10": lambda: UnrollK(10),
    "Clip5": lambda: ClipR(5.0),
    "Clip10": lambda: ClipR(10.0),
    "Clip20": lambda: ClipR(20.0),
    "Clip20, decay=0.99": lambda: ClipR(20.0, decay=0.99),
}
RATES = {"Unroll1-gTgV": 2.0, "Unroll": 30.0, "Clip": 1.0}
"""c, by the first letters of the method: λ moves with the rate c η."""
PAPER = {
    FIXED: ("71.6", "73.3", "+2.4%"),
    "Unroll1-gTgV": ("71.9", "73.2", "+1.8%"),
    "Unroll1": ("73.0", "73.6", "+0.8%"),
    "Unroll5": ("73.7", "74.3", "+0.8%"),
    "Unroll10": ("73.6", "74.8", "+1.6%"),
    "Clip5": ("71.9", "73.0", "+1.5%"),
    "Clip10": ("71.4", "72.7", "+1.8%"),
    "Clip20": ("70.8", "71.8", "+1.4%"),
}
LOSSES = ("best", "last", "test")
DRAWN = ["Unroll1-gTgV", "Unroll1", "Unroll5", "Clip5"]


class ExponentiatedGradient(torch.optim.Optimizer):
    """Plain gradient steps on log λ that follow the derivative with respect to λ itself."""

    def __init__(self, raw: Iterable[Tensor], lr: float) -> None:
        super().__init__(raw, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for lam in group["params"]:
                lam *= torch.exp(-group["lr"] * lam.grad)


class LitClassifier(L2Mixin, lightning.LightningModule):
    def __init__(self, l2: float, steps: int, paper: bool) -> None:
        super().__init__()
        sizes = [784, 100, 100, 100]
        hidden = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
        self.net = nn.Sequential(*hidden, nn.Linear(100, 10))
        self.steps = steps
        self.register_l2(init=l2, constraint=Interval(1e-9, 1.0) if paper else None)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    validation_step = training_step

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


class Curve(Callback):
    """Notes λ and the losses, evenly over the training."""

    def __init__(self, steps: int, train: TensorDataset, held_out: TensorDataset) -> None:
        self.every = max(1, steps // EVALUATIONS)
        # A part of the training images is enough for its loss.
        self.sets = [held_out.tensors, [tensor[:5000] for tensor in train.tensors]]
        self.points: list[tuple[int, float, float, float]] = []

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        if trainer.global_step % self.every == 0:
            held_out, train = (cross_entropy(module, *data) for data in self.sets)
            self.points.append((trainer.global_step, module.l2().item(), held_out, train))


@torch.no_grad()
def cross_entropy(module: LitClassifier, images: Tensor, labels: Tensor) -> float:
    return F.cross_entropy(module.net(images), labels).item()


def load(options: argparse.Namespace) -> list[TensorDataset]:
    """Returns the training, held-out and test images, standardised by the first."""
    images, labels = (x[: IMAGES[options.scale]] for x in mnist(options.data_dir, "train"))
    cut = len(labels) * 3 // 4
    mean, std = images[:cut].mean(), images[:cut].std()
    test = mnist(options.data_dir, "test")
    parts = [(images[:cut], labels[:cut]), (images[cut:], labels[cut:]), test]
    return [TensorDataset((x - mean) / std, y) for x, y in parts]


def train(cell: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Trains from one start with one method."""
    method, steps = cell["method"], STEPS[options.scale]
    if method == TPE:
        return search(cell, options)
    data, held_out, test = load(options)
    lightning.seed_everything(cell["seed"], verbose=False)
    module = LitClassifier(cell["start"], steps, paper=method in METHODS)
    curve = Curve(steps, data, held_out)
    callbacks: list[Callback] = [curve]
    if method == DEFAULT:
        callbacks.append(OnlineHPOCallback())
    elif method in METHODS:
        rate = next(rate for name, rate in RATES.items() if method.startswith(name))
        callbacks.append(
            OnlineHPOCallback(
                METHODS[method](),
                optimizer=lambda raw: ExponentiatedGradient(raw, lr=rate),
                warmup_steps=steps // 10,
                scale_lr_with_model=True,
            )
        )
    lightning_trainer = trainer(steps, callbacks, accelerator="cpu", limit_val_batches=0)
    lightning_trainer.fit(module, batches(data, 100, shuffle=True), batches(held_out, 100))
    losses = [loss for _, _, loss, _ in curve.points]
    return {
        "best": min(losses),
        "last": losses[-1],
        "test": cross_entropy(module, *test.tensors),
        "l2": module.l2().item(),
        "curve": json.dumps([[float(f"{x:.5g}") for x in point] for point in curve.points]),
    }


def search(cell: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Lets Optuna choose λ within the range of the grid; the curve has the best one so far."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=cell["start"]))
    best: dict[str, Any] = {"last": math.inf}
    bests = []
    for _ in range(max(TRAININGS)):
        trial = study.ask()
        l2 = trial.suggest_float("l2", STARTS[0], STARTS[-1], log=True)
        found = train(cell | {"method": FIXED, "start": l2}, options)
        study.tell(trial, found["last"])
        best = min(best, found, key=lambda results: results["last"])
        bests.append({name: best[name] for name in (*LOSSES, "l2")})
    return best | {"curve": json.dumps(bests)}


# --------------------------------------------------------------------------------------------------
# Tables and pictures
# --------------------------------------------------------------------------------------------------


def cells(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Lists all cells, start by start."""
    methods = [FIXED, DEFAULT] if options.tpe else [FIXED, *METHODS, DEFAULT]
    starts = STARTS[::5] if options.scale == "tiny" else STARTS
    pairs: list[tuple[str, float]] = [(method, start) for start in starts for method in methods]
    pairs += [(TPE, number) for number in SEARCHES] if options.tpe else []
    return [
        {"method": method, "start": start, "seed": seed}
        for seed in range(options.seeds)
        for method, start in pairs
    ]


def losses_of(rows: Sequence[Row]) -> list[str]:
    """Makes the cells of some trainings: losses with and without early stopping, and the rest."""
    if not rows:
        return ["–"] * 7
    best, last, test = ([1e3 * float(row[name]) for row in rows] for name in LOSSES)
    ends = [float(row["l2"]) for row in rows]
    span = f"{min(ends):.1e}" if min(ends) == max(ends) else f"{min(ends):.1e} … {max(ends):.1e}"
    gap = 100 * (fmean(last) / fmean(best) - 1)
    means = [f"{fmean(values):.1f}" for values in (best, last)]
    return [*means, f"{gap:+.1f}%", f"{max(last):.1f}", f"{fmean(test):.1f}", span, str(len(rows))]


def rows_of(experiment: Experiment) -> list[list[str]]:
    """Makes the lines of the table: the paper's figures, and ours."""
    fixed = [experiment.where(method=FIXED, start=start) for start in STARTS]
    found = [rows for rows in fixed if rows]
    # The grid search takes the λ whose training ends best.
    best = min(found, key=lambda rows: fmean(float(row["last"]) for row in rows), default=[])
    lines = [
        [f"{FIXED}, best of the grid", *PAPER[FIXED], *losses_of(best)],
        [f"{FIXED}, as it starts", *["–"] * 3, *losses_of([row for rows in fixed for row in rows])],
    ]
    for method in [*METHODS, DEFAULT]:
        paper = PAPER.get(method, ("–",) * 3)
        lines.append([method, *paper, *losses_of(experiment.where(method=method))])
    searches = [json.loads(row["curve"]) for row in experiment.where(method=TPE)]
    for count in TRAININGS if searches else ():
        found = [{name: str(x) for name, x in bests[count - 1].items()} for bests in searches]
        lines.append([f"{TPE}, best of {count}", *["–"] * 3, *losses_of(found)])
    return lines


def starts_table(experiment: Experiment) -> str:
    """Makes a table of the last loss, and of the last λ, from each start."""
    lines = []
    for method in [FIXED, *METHODS, DEFAULT]:
        line = [method]
        for start in STARTS:
            rows = experiment.where(method=method, start=start)
            ends = ", ".join(f"{float(row['l2']):.0e}" for row in rows)
            line.append(
                f"{fmean(1e3 * float(r['last']) for r in rows):.1f} ({ends})" if rows else "–"
            )
        lines.append(line)
    return table(["last loss (last λ)", *(f"from {start:.0e}" for start in STARTS)], lines)


def draw(experiment: Experiment) -> None:
    """Draws held-out and training losses over λ while both change, as appendix B.1 does."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(DRAWN), 3, figsize=(10, 2.3 * len(DRAWN)), squeeze=False)
    every = STEPS[experiment.options.scale] // EVALUATIONS
    limits = (0.02, 3) if experiment.options.scale == "small" else None
    moments = [every * round(part * EVALUATIONS) for part in (0.2, 0.5, 1.0)]
    for method, line in zip(DRAWN, axes, strict=True):
        curves = [json.loads(row["curve"]) for row in experiment.where(method=method)]
        for moment, panel in zip(moments, line, strict=True):
            for number, (name, color) in enumerate((("held out", "C3"), ("training", "C0"))):
                for curve in curves:
                    points = [(p[1], p[2 + number]) for p in curve if p[0] <= moment]
                    lams, losses = zip(*points, strict=True)
                    panel.plot(lams, losses, color=color, linewidth=0.8, alpha=0.6)
                    panel.plot(lams[-1], losses[-1], "o", color=color, markersize=4)
                panel.plot([], [], "o-", color=color, label=name)
            panel.set(xscale="log", yscale="log", xlim=(1e-9, 1), ylim=limits)
            panel.set_title(f"{method}, {moment} steps", fontsize=9)
    for panel in axes[-1]:
        panel.set_xlabel("λ")
    for panel in axes[:, 0]:
        panel.set_ylabel("cross-entropy")
    axes[0, 0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(experiment.output / f"{experiment.name}.png", dpi=72)


def main() -> None:
    options_parser = parser(__doc__, seeds=1)
    options_parser.add_argument(
        "--tpe", action="store_true", help="Optuna's TPE instead of the paper's methods"
    )
    options = options_parser.parse_args()
    name = f"mnist_l2_{options.scale}"
    experiment = Experiment(name, ("method", "start", "seed"), train, options, options.output)
    experiment.run(cells(options))
    paper = ["paper: early stopping", "paper: last", "paper: gap"]
    ours = ["early stopping", "last", "gap", "worst last", "test", "last λ", "trainings"]
    tables = [table(["method", *paper, *ours], rows_of(experiment)), starts_table(experiment)]
    experiment.report("MNIST, L2: cross-entropy × 1000, means over the starts of λ", tables)
    if not options.tpe:
        draw(experiment)


if __name__ == "__main__":
    main()
