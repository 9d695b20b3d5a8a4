"""A secondary task, learning rate and momentum tuned in real time (Franceschi et al. 2017, §5.3).

The paper classifies phones of TIMIT, and learns an embedding of their context beside it; the second
loss has a weight ρ. During a single training ρ, the learning rate η and the momentum μ are tuned by
forward-mode hypergradients (RTHO). TIMIT cannot be had freely, so this keeps the structure and
takes other data: 1 000 labeled images of MNIST. The secondary target is an embedding of the image,
which another network has learned from 10 000 other images, as the paper's embedding of the context
was learned before: 32 standardized numbers, its last hidden layer. A linear layer predicts them
from the last hidden layer of ours; half their mean square error is the second loss.

- Vanilla: ρ = 0, η = 0.075, μ = 0.5.
- RS: random search, ρ ~ U(0, 4), η ~ Exp(0.1), μ ~ U(0, 1); the best by its validation accuracy of
  as many trainings as fit into the CPU time of RTHO.
- RTHO: from Vanilla's η and μ, and ρ = 1.6; ``ClipR(radius=inf)``.
- RTHO-NT, "null teacher": from ρ = 0 and η = μ = 1e-6. At 0 nothing would be trained, and the
  optimizer would keep no momentum, so that there would be no derivatives.
- ``OnlineHPOCallback()``: as RTHO, but it chooses everything by itself.

    python examples/papers/secondary_task.py --data-dir DATA
    python examples/papers/secondary_task.py --data-dir DATA --scale paper
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import lightning
import torch
from _data import batches, mnist
from _experiment import Experiment, Row, parser, spread, table, trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from lightning_hpo import ClipR, Hyperparameter, Interval, LossWeightMixin, OnlineHPOCallback

DEFAULT = "OnlineHPOCallback()"
# Accuracy in percent, and minutes; the paper's table (on TIMIT).
PAPER: dict[str, tuple[str, str]] = {
    "Vanilla": ("59.81", "12"),
    "RS": ("60.36", "300"),
    "RTHO": ("61.97", "164"),
    "RTHO-NT": ("61.38", "289"),
}
METHODS = [*PAPER, DEFAULT]
# ρ, η and μ at the start, from the paper.
STARTS: dict[str, tuple[float, float, float]] = {
    "Vanilla": (0.0, 0.075, 0.5),
    "RTHO": (1.6, 0.075, 0.5),
    "RTHO-NT": (0.0, 1e-6, 1e-6),
    DEFAULT: (1.6, 0.075, 0.5),
}
# Of random search; about as many as fit into the time of RTHO.
TRIALS = 8
BATCH = 100
EMBEDDING = 32
CHECKS = 20


class Scale(NamedTuple):
    """Images for training, validation and the embedding, the width of the layers, and steps."""

    train: int
    validation: int
    others: int
    width: int
    steps: int


SCALES = {
    "tiny": Scale(200, 200, 500, 20, 40),
    "small": Scale(1000, 1000, 10_000, 100, 1000),
    "paper": Scale(5000, 5000, 40_000, 400, 20_000),
}


@cache
def sample_data(folder: Path, scale: Scale, seed: int) -> list[TensorDataset]:
    """Draws labeled images for training and validation, and takes all for testing."""
    draw = torch.Generator().manual_seed(seed)
    images, labels = mnist(folder, "train")
    order = torch.randperm(len(labels), generator=draw)
    sizes = [scale.train, scale.validation, scale.others]
    train, validation, others = order[: sum(sizes)].split(sizes)
    embed = learn_embedding(images[others], labels[others], seed)
    return [
        TensorDataset(images[train], labels[train], embed(images[train])),
        TensorDataset(images[validation], labels[validation]),
        TensorDataset(*mnist(folder, "test")),
    ]


def learn_embedding(images: Tensor, labels: Tensor, seed: int) -> Callable[[Tensor], Tensor]:
    """Trains a network to tell digits apart; returns its last hidden layer, standardized."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        hidden = nn.Sequential(nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, EMBEDDING), nn.Tanh())
        net = nn.Sequential(hidden, nn.Linear(EMBEDDING, 10))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        for _ in range(500):
            draw = torch.randint(len(labels), (BATCH,))
            optimizer.zero_grad()
            F.cross_entropy(net(images[draw]), labels[draw]).backward()
            optimizer.step()

    @torch.no_grad()
    def embed(images: Tensor) -> Tensor:
        found = hidden(images)
        return (found - found.mean(0)) / found.std(0)

    return embed


class Classifier(LossWeightMixin, lightning.LightningModule):
    """A network with two heads."""

    def __init__(self, width: int, rho: float, eta: float, mu: float) -> None:
        super().__init__()
        self.options = {"lr": eta, "momentum": mu}
        self.hidden = nn.Sequential(
            nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
        )
        self.digit, self.context = nn.Linear(width, 10), nn.Linear(width, EMBEDDING)
        self.register_loss_weights({"context": rho})

    def forward(self, images: Tensor) -> Tensor:
        return self.digit(self.hidden(images))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, digit, context = batch
        features = self.hidden(images)
        return self.weighted_loss(
            F.cross_entropy(self.digit(features), digit),
            context=F.mse_loss(self.context(features), context) / 2,
        )

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, digit = batch
        return F.cross_entropy(self(images), digit)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), **self.options)


class Watch(Callback):
    """Evaluates so many times, and keeps ρ, η and μ."""

    def __init__(self, data: Sequence[TensorDataset], every: int, start: Sequence[float]) -> None:
        self.data, self.every = data, every
        self.values = list(start)
        self.tuned: OnlineHPOCallback | None = None
        self.checks: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: lightning.Trainer, module: Any, *_: Any) -> None:
        if trainer.global_step % self.every:
            return
        if self.tuned is not None and self.tuned.history:
            names = ("loss_weights.context", "optimizer.lr", "optimizer.momentum")
            self.values = [float(self.tuned.history[-1].values[name]) for name in names]
        validation, validation_accuracy = evaluate(module, self.data[1])
        _, accuracy = evaluate(module, self.data[2])
        self.checks.append(
            {
                "step": trainer.global_step,
                "validation": round(validation, 5),
                "validation_accuracy": round(validation_accuracy, 3),
                "accuracy": round(accuracy, 3),
                **{k: float(f"{v:.4g}") for k, v in zip(("ρ", "η", "μ"), self.values, strict=True)},
            }
        )


@torch.no_grad()
def evaluate(module: Classifier, data: TensorDataset) -> tuple[float, float]:
    """Returns cross-entropy, and accuracy in percent."""
    images, labels = (tensor.to(module.device) for tensor in data.tensors)
    logits = module(images)
    accuracy = 100 * (logits.argmax(1) == labels).float().mean().item()
    return F.cross_entropy(logits, labels).item(), accuracy


def make_callback(method: str, eta: float, mu: float) -> OnlineHPOCallback:
    """Makes what tunes all three."""
    if method == DEFAULT:
        return OnlineHPOCallback(optimizer_hyperparameters=["lr", "momentum"])
    # As in the paper all three are tuned on their own scale, and kept from being negative. Adam
    # with a learning rate of 0.005 is that of the authors' published code.
    return OnlineHPOCallback(
        ClipR(radius=math.inf),
        optimizer=lambda raw: torch.optim.Adam(raw, lr=0.005),
        every_n_steps=5,
        optimizer_hyperparameters={
            "lr": Hyperparameter(eta, Interval(1e-6, 10.0)),
            "momentum": Hyperparameter(mu, Interval(1e-6, 0.9999)),
        },
    )


def start_of(cell: dict[str, Any]) -> tuple[float, float, float]:
    """Returns ρ, η and μ at the start."""
    if cell["method"] != "RS":
        return STARTS[cell["method"]]
    draw = random.Random(f"{cell['seed']} {cell['trial']}")
    return draw.uniform(0, 4), draw.expovariate(1 / 0.1), draw.uniform(0, 1)


def train(cell: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Makes one training."""
    scale = SCALES[options.scale]
    data = sample_data(options.data_dir, scale, cell["seed"])
    lightning.seed_everything(cell["seed"], verbose=False)
    start = start_of(cell)
    module = Classifier(scale.width, *start)
    watch = Watch(data, scale.steps // CHECKS, start)
    callbacks: list[Callback] = [watch]
    if cell["method"] not in ("Vanilla", "RS"):
        watch.tuned = make_callback(cell["method"], *start[1:])
        callbacks = [watch.tuned, watch]
    draws = RandomSampler(data[0], replacement=True, num_samples=BATCH * scale.steps)
    loader = DataLoader(data[0], batch_size=None, sampler=BatchSampler(draws, BATCH, False))
    accelerator = "auto" if options.scale == "paper" else "cpu"
    quiet = trainer(scale.steps, callbacks, accelerator=accelerator, limit_val_batches=0)
    quiet.fit(module, loader, batches(data[1], 500))
    last = watch.checks[-1]
    best = max(watch.checks, key=lambda check: check["validation_accuracy"])
    return {
        **{f"last_{name}": value for name, value in last.items()},
        "best_accuracy": best["accuracy"],
        "best_validation_accuracy": best["validation_accuracy"],
        "checks": json.dumps(watch.checks, ensure_ascii=False),
    }


# --------------------------------------------------------------------------------------------------
# Report
# --------------------------------------------------------------------------------------------------


def chosen(experiment: Experiment, method: str) -> list[tuple[Row, float]]:
    """Returns for each seed the training that counts, and its CPU seconds with all that led to it.

    For random search that is the best by validation accuracy of those that fit into the time of
    RTHO, with the same seed.
    """
    if method != "RS":
        return [(row, float(row["seconds"])) for row in experiment.where(method=method)]
    result = []
    for row in experiment.where(method="RTHO"):
        found = sorted(
            experiment.where(method="RS", seed=row["seed"]), key=lambda row: int(row["trial"])
        )
        time, fitting = 0.0, []
        for trial in found:
            if time + float(trial["seconds"]) > float(row["seconds"]) and fitting:
                break
            time += float(trial["seconds"])
            fitting.append(trial)
        if fitting:
            best = max(fitting, key=lambda row: float(row["best_validation_accuracy"]))
            result.append((best, time))
    return result


def rows_of(experiment: Experiment) -> list[list[str]]:
    """Makes the lines of the table."""
    lines = []
    for method in METHODS:
        found = chosen(experiment, method)
        columns = {
            name: [float(row[name]) for row, _ in found]
            for name in ("best_accuracy", "last_accuracy", "last_ρ", "last_η", "last_μ")
        }
        lines.append(
            [
                method,
                *PAPER.get(method, ("–", "–")),
                *(spread(columns[name], ".2f") for name in ("best_accuracy", "last_accuracy")),
                f"{fmean(time for _, time in found):.1f}" if found else "–",
                *(
                    f"{min(values):.2g} … {max(values):.2g}" if values else "–"
                    for values in list(columns.values())[2:]
                ),
                str(len(found)),
            ]
        )
    return lines


def draw(experiment: Experiment) -> None:
    """Draws accuracy, ρ, η and μ over the training."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(9.5, 6), sharex=True)
    panels = {"accuracy": "test accuracy, %", "ρ": "ρ", "η": "learning rate η", "μ": "momentum μ"}
    for color, method in enumerate(METHODS):
        for count, (row, _) in enumerate(chosen(experiment, method)):
            checks = json.loads(row["checks"])
            for ax, name in zip(axes.flat, panels, strict=True):
                ax.plot(
                    [check["step"] for check in checks],
                    [check[name] for check in checks],
                    color=f"C{color}",
                    label=method if count == 0 else None,
                    linewidth=1.2,
                )
    for ax, label in zip(axes.flat, panels.values(), strict=True):
        ax.set_ylabel(label)
    for ax in axes[1]:
        ax.set_xlabel("step")
    ends = [float(row["last_accuracy"]) for m in METHODS for row, _ in chosen(experiment, m)]
    axes[0, 0].set_ylim(min([*ends, 95.0]) - 4, max([*ends, 0.0]) + 1)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=len(METHODS))
    figure.tight_layout(rect=(0, 0, 1, 0.95))
    figure.savefig(experiment.output / f"{experiment.name}.png", dpi=110)


def cells(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Lists all cells."""
    found = []
    for seed in range(options.seeds):
        for method in METHODS:
            trials = (2 if options.scale == "tiny" else TRIALS) if method == "RS" else 1
            found += [{"method": method, "seed": seed, "trial": i} for i in range(trials)]
    return found


def main() -> None:
    options = parser(__doc__, seeds=3).parse_args()
    if options.scale == "tiny":
        options.seeds = 1
    experiment = Experiment(
        f"secondary_task_{options.scale}",
        ("method", "seed", "trial"),
        train,
        options,
        options.output,
    )
    experiment.run(cells(options))
    headers = [
        *("method", "paper: accuracy, %", "paper: minutes"),
        *("accuracy, %, early stopping", "accuracy, %, at the end", "CPU seconds"),
        *("ρ at the end", "η", "μ", "seeds"),
    ]
    experiment.report("Secondary task", [table(headers, rows_of(experiment))])
    draw(experiment)


if __name__ == "__main__":
    main()
