"""Data hyper-cleaning, §5.1 of Franceschi et al. (2017): which training labels are wrong?

Half of 5 000 training labels of MNIST are wrong. Each training example has a weight λ_i in [0, 1],
and Σ λ_i ≤ R. The weights are tuned by the loss on 5 000 validation examples: softmax regression is
trained by gradient descent from zero, λ moves along the hypergradient of the whole training
(reverse mode) and is projected, and so on. Examples with λ_i > 0 are kept; in the end softmax
regression is trained on them and the validation examples together. 10 000 further images are for
testing.

- Oracle: what has a wrong label is known.
- Baseline: all examples are kept.
- DH-R: the hyper-cleaner, ``UnrollK(k, restart=True)``.
- ``OnlineHPOCallback()``: chooses everything by itself, for weights in [0, 1] without R, in a
  single training of as many steps. Once with the paper's rule, and once keeping λ_i > ½.

    python examples/papers/hyper_cleaning.py --data-dir DATA
    python examples/papers/hyper_cleaning.py --data-dir DATA --scale paper   # better with a GPU

At ``--scale small`` the data are the paper's, but a training has 40 steps with momentum instead of
1 000 without, and λ moves 24 times instead of 500 times.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import lightning
import torch
from _data import batches, mnist
from _experiment import Experiment, parser, spread, table, trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_hpo import ExampleWeightMixin, L1Ball, OnlineHPOCallback, UnrollK

DEFAULT = "OnlineHPOCallback()"
# Nothing makes its weights sparse, as R does: most of a wrong label's are small, and not 0.
DEFAULT_HALF = "OnlineHPOCallback(), λ > ½"
# Accuracy in percent, and F1; the paper's table. DH-R is run for these R, of 5 000 examples.
PAPER: dict[str, tuple[str, str]] = {
    "Oracle": ("90.46", "1.0000"),
    "Baseline": ("87.74", "–"),
    "DH-1000": ("90.07", "0.9137"),
    "DH-1500": ("90.06", "0.9244"),
    "DH-2000": ("90.00", "0.9211"),
    "DH-2500": ("90.09", "0.9217"),
}
METHODS = [*PAPER, DEFAULT, DEFAULT_HALF]


class Scale(NamedTuple):
    """How much is done.

    Attributes:
        examples: N, for training and for validation; twice as many for testing.
        momentum: Of gradient descent.
        steps: Of gradient descent, for each update of λ.
        updates: Of λ.
        lam_rate: Its rate, see ``clean``.
        last: Steps of the last training.
    """

    examples: int
    momentum: float
    steps: int
    updates: int
    lam_rate: float
    last: int


SCALES = {
    "tiny": Scale(300, 0.9, 40, 6, 0.5, 60),
    "small": Scale(5000, 0.9, 40, 24, 1.5, 200),
    "paper": Scale(5000, 0.0, 1000, 500, 0.1, 2000),
}
# Rate times steps, over 1 − momentum: how far gradient descent goes with weights that sum to N, and
# in the last training.
DISTANCE, LAST_DISTANCE = 20.0, 200.0


# --------------------------------------------------------------------------------------------------
# Data and constraint
# --------------------------------------------------------------------------------------------------


class Data(NamedTuple):
    """Images and labels; ``wrong`` says which of the training labels are."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    wrong: Tensor


@cache
def sample_data(folder: Path, examples: int, seed: int) -> Data:
    """Draws the three sets from all 70 000 images, and replaces labels by one of the other nine.

    From all of them: those of MNIST's own test set are a little easier than the others.
    """
    draw = torch.Generator().manual_seed(seed)
    parts = [mnist(folder, part) for part in ("train", "test")]
    images, labels = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    order = torch.randperm(len(labels), generator=draw)[: 4 * examples]
    train, validation, test = order.split([examples, examples, len(order) - 2 * examples])
    wrong = torch.zeros(examples, dtype=torch.bool)
    wrong[torch.randperm(examples, generator=draw)[: examples // 2]] = True
    other = (labels[train] + torch.randint(1, 10, (examples,), generator=draw)) % 10
    return Data(
        (images[train], torch.where(wrong, other, labels[train])),
        (images[validation], labels[validation]),
        (images[test], labels[test]),
        wrong,
    )


class CappedL1Ball(L1Ball):
    """Vectors with 0 ≤ x_i ≤ 1 and Σ x_i ≤ ``radius``, projected by distance."""

    def project(self, raw: Tensor) -> Tensor:
        """Returns the nearest one: min(max(x − t, 0), 1), where t makes the sum right."""
        low, high = 0.0, float(raw.max())
        if float(raw.clamp(0, 1).sum()) <= self.radius:
            return raw.clamp(0, 1)
        for _ in range(50):  # bisection
            middle = (low + high) / 2
            is_low = float((raw - middle).clamp(0, 1).sum()) > self.radius
            low, high = (middle, high) if is_low else (low, middle)
        return (raw - high).clamp(0, 1)


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------


class SoftmaxRegression(lightning.LightningModule):
    """Trains on all examples in each step.

    They are buffers, and the loader only gives the signal to make a step: ``UnrollK`` keeps the
    batches of its window, and k copies of all images would be 16 MB each.
    """

    def __init__(self, images: Tensor, labels: Tensor, lr: float, momentum: float) -> None:
        super().__init__()
        self.linear = nn.Linear(images.shape[1], 10)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.register_buffer("images", images, persistent=False)
        self.register_buffer("labels", labels, persistent=False)
        self.options = {"lr": lr, "momentum": momentum}

    def losses(self) -> Tensor:
        return F.cross_entropy(self.linear(self.images), self.labels, reduction="none")

    def training_step(self, batch: Tensor) -> Tensor:
        return self.losses().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), **self.options)


class Cleaner(ExampleWeightMixin, SoftmaxRegression):
    """Softmax regression with a weight for each example."""

    def training_step(self, batch: Tensor) -> Tensor:
        return self.weighted_mean(self.losses(), torch.arange(len(self.labels), device=self.device))

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.linear(images), labels)


class Trace(Callback):
    """Keeps F1 after every update of λ."""

    def __init__(self, wrong: Tensor, every: int, threshold: float) -> None:
        self.wrong, self.every, self.threshold = wrong, every, threshold
        self.found: list[tuple[int, float]] = []

    def on_train_batch_end(self, trainer: lightning.Trainer, module: Any, *_: Any) -> None:
        if trainer.global_step % self.every == 0:
            score = f1(module.example_weights() <= self.threshold, self.wrong)
            self.found.append((trainer.global_step, round(score, 4)))


def fit(
    module: SoftmaxRegression,
    steps: int,
    scale: str,
    validation: tuple[Tensor, Tensor] | None = None,
    callbacks: Sequence[Callback] = (),
) -> None:
    """Trains for so many steps."""
    signal = DataLoader(torch.zeros(1).expand(steps), batch_size=None)
    loader = validation and batches(TensorDataset(*validation), len(validation[1]))
    accelerator = "auto" if scale == "paper" else "cpu"
    quiet = trainer(steps, callbacks, accelerator=accelerator, limit_val_batches=0)
    quiet.fit(module, signal, loader)


def clean(method: str, data: Data, options: argparse.Namespace) -> tuple[Tensor, Trace]:
    """Tunes the weights; returns them, and how F1 went.

    All R are treated alike in that weights start at R / N, and that both rates are in proportion:
    gradient descent goes equally far whatever the weights sum to, and λ moves by equal parts of
    R / N (its hypergradient is of the order of 1 / R).
    """
    scale, count = SCALES[options.scale], len(data.wrong)
    # The default has all weights at 1 when it starts.
    is_default = method in (DEFAULT, DEFAULT_HALF)
    share = 1.0 if is_default else float(method.removeprefix("DH-")) / 5000
    module = Cleaner(*data.train, rate(scale, DISTANCE, scale.steps) / share, scale.momentum)
    if is_default:
        module.register_example_weights(count)
        callback = OnlineHPOCallback()
    else:
        module.register_example_weights(count, share, constraint=CappedL1Ball(share * count))
        callback = OnlineHPOCallback(
            UnrollK(scale.steps, mode="reverse", restart=True),
            optimizer=lambda raw: torch.optim.SGD(raw, lr=scale.lam_rate * count * share**2),
        )
    trace = Trace(data.wrong, scale.steps, threshold_of(method))
    # Lightning calls callbacks in their order: λ moves before it is looked at.
    steps = scale.steps * scale.updates
    fit(module, steps, options.scale, data.validation, [callback, trace])
    return module.example_weights().detach().cpu(), trace


def threshold_of(method: str) -> float:
    """Returns the weight above which an example is kept."""
    return 0.5 if method == DEFAULT_HALF else 0.0


def rate(scale: Scale, distance: float, steps: int) -> float:
    """Returns the learning rate with which so many steps go so far."""
    return distance * (1 - scale.momentum) / steps


def train(cell: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Cleans, trains on what is kept, and tests."""
    scale = SCALES[options.scale]
    data = sample_data(options.data_dir, scale.examples, cell["seed"])
    trace: list[tuple[int, float]] = []
    if cell["method"] == "Oracle":
        found = data.wrong
    elif cell["method"] == "Baseline":
        found = torch.zeros_like(data.wrong)
    else:
        weights, watched = clean(cell["method"], data, options)
        found, trace = weights <= threshold_of(cell["method"]), watched.found
    last = SoftmaxRegression(
        torch.cat([data.train[0][~found], data.validation[0]]),
        torch.cat([data.train[1][~found], data.validation[1]]),
        rate(scale, LAST_DISTANCE, scale.last),
        scale.momentum,
    )
    fit(last, scale.last, options.scale)
    with torch.no_grad():
        right = last.linear.cpu()(data.test[0]).argmax(1) == data.test[1]
    return {
        "accuracy": 100 * right.float().mean().item(),
        "f1": f1(found, data.wrong),
        "kept": int((~found).sum()),
        "kept_wrong": int((~found & data.wrong).sum()),
        "trace": json.dumps(trace),
    }


def f1(found: Tensor, wrong: Tensor) -> float:
    """Returns the harmonic mean of precision and recall of what was found to be wrong."""
    found, wrong = found.cpu(), wrong.cpu()
    return 2 * int((found & wrong).sum()) / int(found.sum() + wrong.sum())


# --------------------------------------------------------------------------------------------------
# Report
# --------------------------------------------------------------------------------------------------


def rows_of(experiment: Experiment) -> list[list[str]]:
    """Makes the lines of the table."""
    lines = []
    for method in METHODS:
        found = {
            name: experiment.numbers(name, method=method)
            for name in ("accuracy", "f1", "kept", "kept_wrong", "seconds")
        }
        lines.append(
            [
                method,
                *PAPER.get(method, ("–", "–")),
                spread(found["accuracy"], ".2f"),
                "–" if method == "Baseline" else spread(found["f1"], ".4f"),
                *(f"{fmean(found[n]):.0f}" if found[n] else "–" for n in ("kept", "kept_wrong")),
                f"{fmean(found['seconds']):.0f}" if found["seconds"] else "–",
                str(len(found["f1"])),
            ]
        )
    return lines


def draw(experiment: Experiment) -> None:
    """Draws F1 over the updates, and the accuracies beside the paper's."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 4.6))
    for method in METHODS[2:]:
        traces = [json.loads(row["trace"]) for row in experiment.where(method=method)]
        if traces:
            steps = [step for step, _ in traces[0]]
            scores = zip(*([score for _, score in trace] for trace in traces), strict=True)
            left.plot(steps, [fmean(values) for values in scores], label=method)
    left.set(xlabel="step of gradient descent", ylabel="F1 of the wrong labels", ylim=(0, 1))
    for at, method in enumerate(METHODS):
        values = experiment.numbers("accuracy", method=method)
        right.plot(values, [at] * len(values), "o", color="C0", alpha=0.6, label="here")
        if method in PAPER:
            right.plot(float(PAPER[method][0]), at, "x", color="C1", markersize=9, label="paper")
    right.set(xlabel="test accuracy, %", yticks=range(len(METHODS)), yticklabels=METHODS)
    right.invert_yaxis()
    handles, labels = right.get_legend_handles_labels()
    by_label = dict(zip(labels, handles, strict=True))
    right.legend(by_label.values(), by_label.keys(), loc="center left")
    figure.legend(*left.get_legend_handles_labels(), loc="upper center", ncols=3)
    figure.tight_layout(rect=(0, 0, 1, 0.89))
    figure.savefig(experiment.output / f"{experiment.name}.png", dpi=110)


def main() -> None:
    options = parser(__doc__, seeds=3).parse_args()
    if options.scale == "tiny":
        options.seeds = 1
    experiment = Experiment(
        f"hyper_cleaning_{options.scale}", ("method", "seed"), train, options, options.output
    )
    # All methods of a seed, then the next: tables are complete early.
    experiment.run([{"method": m, "seed": s} for s in range(options.seeds) for m in METHODS])
    headers = [
        *("method", "paper: accuracy, %", "paper: F1", "accuracy, %", "F1"),
        *("kept", "wrong among them", "CPU seconds", "seeds"),
    ]
    experiment.report("Data hyper-cleaning", [table(headers, rows_of(experiment))])
    draw(experiment)


if __name__ == "__main__":
    main()
