"""Table 3 of the online-HPO paper: the dropout of an LSTM that models language.

Section 4.3: an LSTM on the words of the Penn Treebank; one keep probability for all of its dropout
(before, between and after the layers) is tuned. Perplexities of held-out words with early stopping
(the best over the training) and without (the last); the gap between the two is the paper's measure
of stability. Its appendix B.2 draws the losses over the keep probability while it changes.

    python examples/papers/penn_treebank.py --data-dir DATA                 # one layer of 96
    python examples/papers/penn_treebank.py --data-dir DATA --scale paper   # two layers of 650

Only the valid and test parts of the treebank are at hand. So the network is trained on the test
part; the first half of the valid part is what the keep probability is tuned on, and perplexities
are those of the second half. ``--scale paper`` trains on DATA/ptb/ptb.train.txt where it is there.
``--scale small`` also knows only the 1 000 most frequent words, and takes 8 000 words of each part.

The paper does not give the network (here the "medium" one of TensorFlow's old tutorial on this data
set), how long it trains, where the keep probability starts, nor its learning rate (``RATES``). The
LSTM starts anew in each window of words: the paper's probably goes on from one to the next, but
hypergradients take a state that is carried from step to step for a constant.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from math import exp
from pathlib import Path
from statistics import fmean
from typing import Any

import lightning
import torch
from _data import batches, penn_treebank
from _experiment import Experiment, Row, parser, table, trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from lightning_hpo import T1T2, ClipR, DropoutMixin, OnlineHPOCallback, UnrollK
from lightning_hpo.estimators import Estimator


@dataclass(frozen=True)
class Scale:
    """The size of everything."""

    layers: int
    width: int
    length: int
    steps: int
    decay_steps: int
    grid: tuple[float, ...]
    starts: tuple[float, ...]
    kinds: int | None = None
    words: int | None = None


SCALES = {
    "tiny": Scale(1, 8, 5, 24, 4, (0.3, 0.5, 0.7), (0.5,), kinds=15, words=1000),
    "small": Scale(
        1, 96, 20, 800, 16, (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9), (0.3, 0.6, 0.9), 1000, 8000
    ),
    # The tutorial's network; the paper's figures show 250 000 steps and its decay.
    "paper": Scale(
        2, 650, 35, 250_000, 5000, (0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6), (0.3, 0.6, 0.9)
    ),
}
EVALUATIONS = 25
FIXED, DEFAULT = "Fixed", "OnlineHPOCallback()"
METHODS: dict[str, Callable[[], Estimator]] = {
    "Unroll1-gTgV": lambda: T1T2(scale_by_lr=False),
    "Unroll1": lambda: T1T2(),
    "Unroll5": lambda: UnrollK(5),
    "Unroll10": lambda: UnrollK(10),
    "Clip5": lambda: ClipR(5.0),
    "Clip10": lambda: ClipR(10.0),
    "Clip20": lambda: ClipR(20.0),
    "Clip5, c / 10": lambda: ClipR(5.0),
    "Clip20, decay=0.99": lambda: ClipR(20.0, decay=0.99),
}
RATES = {"Unroll1-gTgV": 0.1, "Unroll": 1.0, "Clip5, c / 10": 0.01, "Clip": 0.1}
"""c, by the first letters of the method: the logit of λ moves with the rate c η."""
LINES: dict[str, tuple[str, ...]] = {
    **{name: (name,) for name in METHODS if name != "Clip5, c / 10"},
    "Clip5, LR scale in {1.0, 0.1}": ("Clip5", "Clip5, c / 10"),
    DEFAULT: (DEFAULT,),
}
"""The lines of the table below the fixed ones: over which methods each is the mean."""
PAPER: dict[str, tuple[float, float, float]] = {
    "Fixed λ, below the best": (84.9, 85.2, 0.4),
    "Fixed λ, the best": (84.3, 86.3, 2.3),
    "Fixed λ, above the best": (85.5, 88.2, 3.1),
    "Unroll1-gTgV": (85.6, 95.8, 11.9),
    "Unroll1": (86.1, 92.6, 7.6),
    "Unroll5": (84.3, 89.1, 5.6),
    "Unroll10": (84.2, 87.4, 3.8),
    "Clip5": (83.2, 83.8, 0.8),
    "Clip10": (83.1, 83.7, 0.7),
    "Clip20": (84.2, 84.7, 0.6),
    "Clip5, LR scale in {1.0, 0.1}": (83.7, 84.4, 0.8),
}
"""Table 3: with early stopping, without, and the gap in percent; fixed are 0.35, 0.40 and 0.45."""
DRAWN = ("Unroll1-gTgV", "Unroll1", "Unroll5", "Clip5", "Clip20, decay=0.99", DEFAULT)


class LanguageModel(DropoutMixin, lightning.LightningModule):
    """An LSTM with one keep probability, on the logit scale."""

    def __init__(self, kinds: int, scale: Scale, keep: float) -> None:
        super().__init__()
        self.scale = scale
        between = 0.5 if scale.layers > 1 else 0.0
        self.embed = nn.Embedding(kinds, scale.width)
        self.before = nn.Dropout(0.5)
        self.rnn = nn.LSTM(scale.width, scale.width, scale.layers, dropout=between)
        self.after = nn.Dropout(0.5)
        self.head = nn.Linear(scale.width, kinds)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -0.05, 0.05)
        self.register_dropout(init=keep)

    def forward(self, words: Tensor) -> Tensor:
        hidden, _ = self.rnn(self.before(self.embed(words)))
        logits: Tensor = self.head(self.after(hidden))
        return logits

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        (windows,) = batch
        words = windows.T  # time first
        logits = self(words[:-1])
        # The tutorial sums over the steps of a window; learning rate and clipping are made for it.
        loss = F.cross_entropy(logits.flatten(0, 1), words[1:].flatten())
        return self.scale.length * loss

    validation_step = training_step

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, self.scale.decay_steps, 0.95)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


class Curve(Callback):
    """Notes the keep probability and the loss of the words to report, evenly over the training."""

    def __init__(self, steps: int, report: TensorDataset) -> None:
        self.every = max(1, steps // EVALUATIONS)
        self.report = report
        self.points: list[tuple[int, float, float]] = []

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        if trainer.global_step % self.every == 0:
            loss = loss_of(module, self.report)
            self.points.append((trainer.global_step, module.keep().item(), loss))


@torch.no_grad()
def loss_of(module: LanguageModel, data: TensorDataset) -> float:
    """Returns the mean cross-entropy of a word, without dropout."""
    module.eval()
    losses = [
        module.training_step(batch, 0).item() / module.scale.length for batch in batches(data, 100)
    ]
    module.train()
    return fmean(losses)


def load(options: argparse.Namespace) -> tuple[list[TensorDataset], int]:
    """Returns windows of training, held-out and report words, and how many words are known."""
    scale = SCALES[options.scale]
    has_train = (Path(options.data_dir) / "ptb" / "ptb.train.txt").exists()
    part = "train" if options.scale == "paper" and has_train else "test"
    train, valid, kinds = penn_treebank(options.data_dir, part, scale.kinds)
    half = len(valid) // 2
    parts = (x[: scale.words] for x in (train, valid[:half], valid[half:]))
    length = scale.length
    return [TensorDataset(x.unfold(0, length + 1, length)) for x in parts], kinds


def train(cell: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Trains from one keep probability with one method."""
    method, scale = cell["method"], SCALES[options.scale]
    (data, held_out, report), kinds = load(options)
    lightning.seed_everything(cell["seed"], verbose=False)
    module = LanguageModel(kinds, scale, cell["start"])
    curve = Curve(scale.steps, report)
    callbacks: list[Callback] = [curve]
    if method == DEFAULT:
        callbacks.append(OnlineHPOCallback())
    elif method in METHODS:
        rate = next(rate for name, rate in RATES.items() if method.startswith(name))
        callbacks.append(
            OnlineHPOCallback(
                METHODS[method](),
                optimizer=lambda raw: torch.optim.SGD(raw, lr=rate),
                scale_lr_with_model=True,
                warmup_steps=scale.steps // 10,
                derivatives="finite_difference",
            )
        )
    lightning_trainer = trainer(
        scale.steps, callbacks, accelerator="cpu", limit_val_batches=0, gradient_clip_val=5.0
    )
    lightning_trainer.fit(module, batches(data, 20, shuffle=True), batches(held_out, 20))
    losses = [loss for _, _, loss in curve.points]
    return {
        "best": exp(min(losses)),
        "last": exp(losses[-1]),
        "held out": exp(loss_of(module, held_out)),
        "train": exp(loss_of(module, data)),
        "keep": module.keep().item(),
        "curve": json.dumps([[float(f"{x:.5g}") for x in point] for point in curve.points]),
    }


def cells(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Lists all cells, those of the grid first."""
    scale = SCALES[options.scale]
    found = [(FIXED, keep) for keep in scale.grid]
    found += [(method, start) for start in scale.starts for method in [*METHODS, DEFAULT]]
    seeds = range(options.seeds)
    return [{"method": m, "start": start, "seed": s} for s in seeds for m, start in found]


def line(name: str, rows: list[Row]) -> list[str]:
    """Makes a line of the table: the paper's figures, and ours."""
    paper = PAPER.get(name.split(":")[0])
    known = ["–"] * 3 if paper is None else [f"{paper[0]}", f"{paper[1]}", f"{paper[2]:+.1f} %"]
    if not rows:
        return [name, *known, *["–"] * 5, "0"]
    best, last, held_out = (
        fmean(float(row[column]) for row in rows) for column in ("best", "last", "held out")
    )
    keeps = sorted(float(row["keep"]) for row in rows)
    keep = " … ".join(dict.fromkeys(f"{x:.2f}" for x in (keeps[0], keeps[-1])))
    numbers = [f"{best:.1f}", f"{last:.1f}", f"{100 * (last / best - 1):+.1f} %"]
    return [name, *known, *numbers, f"{held_out:.1f}", keep, str(len(rows))]


def lines_of(experiment: Experiment) -> list[list[str]]:
    """Makes the table: the best fixed keep probability with its neighbours, and the methods."""
    by_keep = {k: experiment.where(method=FIXED, start=k) for k in experiment.options.grid}
    # The best one is that of the held-out words, as for the methods; not of those to report.
    score = {k: fmean(float(r["held out"]) for r in rows) for k, rows in by_keep.items() if rows}
    lines = []
    if score:
        grid = sorted(score)
        best = grid.index(min(grid, key=lambda k: score[k]))
        for shift, place in ((-1, "below the best"), (0, "the best"), (1, "above the best")):
            if 0 <= best + shift < len(grid):
                keep = grid[best + shift]
                lines.append(line(f"Fixed λ, {place}: {keep}", by_keep[keep]))
    for name, methods in LINES.items():
        lines.append(line(name, [row for m in methods for row in experiment.where(method=m)]))
    return lines


def draw(experiment: Experiment) -> None:
    """Draws the loss over the keep probability while both change, as in appendix B.2."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(2, 3, figsize=(11, 6.5), sharex=True, sharey=True)
    fixed = sorted((float(r["start"]), float(r["last"])) for r in experiment.where(method=FIXED))
    lowest = []
    for axes, method in zip(panels.flat, DRAWN, strict=True):
        axes.plot(*zip(*fixed, strict=True), ":", color="gray", label="fixed, at the end")
        for color, start in enumerate(experiment.options.starts):
            for row in experiment.where(method=method, start=start, seed=0):
                _, keeps, losses = zip(*json.loads(row["curve"]), strict=True)
                values = [exp(loss) for loss in losses]
                lowest.append(min(values))
                style = {"color": f"C{color}", "label": f"from {start}"}
                axes.plot(keeps, values, linewidth=1, marker=".", markersize=3, **style)
                axes.plot(keeps[-1], values[-1], "o", color=f"C{color}")
        axes.set(title=method, xlim=(0, 1))
    if lowest:
        panels[0, 0].set_ylim(0.96 * min(lowest), 1.6 * min(lowest))
    for axes in panels[-1]:
        axes.set_xlabel("keep probability")
    for axes in panels[:, 0]:
        axes.set_ylabel("perplexity (disc: the end)")
    panels[0, 0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(experiment.output / f"{experiment.name}.png", dpi=90)


def main() -> None:
    options = parser(__doc__, seeds=1).parse_args()
    options.grid, options.starts = SCALES[options.scale].grid, SCALES[options.scale].starts
    experiment = Experiment(
        f"penn_treebank_{options.scale}",
        ("method", "start", "seed"),
        train,
        options,
        options.output,
    )
    experiment.run(cells(options))
    ours = ("early stopping", "last", "gap")
    headers = ["method", *(f"paper: {c}" for c in ours), *ours, "held out", "λ at the end", "cells"]
    experiment.report("LSTM on the Penn Treebank", [table(headers, lines_of(experiment))])
    draw(experiment)


if __name__ == "__main__":
    main()
