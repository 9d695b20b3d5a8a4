"""Architecture and learning rate chosen in one training, and retrained from scratch.

A network of three hidden layers shares its weights between all choices of activations, widths and
a skip connection; the learning rate is one of four as well: 13 824 combinations. One training
learns which are best on held-out data (Adam & Lorraine 2018); the most probable ones are then
trained anew. ENAS (Pham et al. 2018) leaves the response gradient out: it cannot choose the
learning rate, which has no other effect on the held-out loss, and keeps the 0.03 of the module.

    python examples/benchmarks/architectures.py             # three seeds, under two minutes
    python examples/benchmarks/architectures.py --baseline  # and 64 random ones, trained alike
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import lightning
import torch
from _digits import batches, digits, evaluate, fit, print_header, print_row
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_hpo import (
    BernoulliHyperparameter,
    CategoricalHyperparameter,
    OnlineHPOCallback,
    PolicyGradient,
    UnrollK,
    fixed_values,
    freeze,
    named_hyperparameters,
)

STEPS = 1500
FIRST_SEED = 10  # the settings of the search were chosen on the first few
WIDTH = 64
ACTIVATIONS = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "none": lambda x: x,
}
RATES = [0.003, 0.03, 0.1, 0.3]  # a training at 1 diverges, and takes the shared weights with it


class Layer(nn.Module):
    """A linear layer whose activation is chosen, and of whose units the first so many are used."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, WIDTH)
        self.activation = CategoricalHyperparameter(ACTIVATIONS)
        self.width = CategoricalHyperparameter([4, 16, WIDTH])

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = ACTIVATIONS[self.activation()](self.linear(x))
        return y * (torch.arange(WIDTH) < self.width())


class Searched(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = Layer(64), Layer(WIDTH), Layer(WIDTH)
        self.skip = BernoulliHyperparameter()
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        third = self.third(self.second(first))
        logits: Tensor = self.head(third + first if self.skip() else third)
        return logits

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    validation_step = training_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.03)


def search(seed: int, response: bool) -> tuple[dict[str, Any], OnlineHPOCallback]:
    """Learns the choices in one training; returns the most probable ones."""
    lightning.seed_everything(seed, verbose=False)
    module = Searched()
    callback = OnlineHPOCallback(
        PolicyGradient(UnrollK(10), response=response, samples=4),
        optimizer=lambda logits: torch.optim.Adam(logits, lr=0.3),
        every_n_steps=30,
        optimizer_hyperparameters={"lr": CategoricalHyperparameter(RATES)} if response else (),
    )
    train, held_out, _ = DATA
    fit(module, batches(train, 50), batches(held_out, 200), STEPS, [callback])
    return fixed_values(module), callback


def train_anew(choices: dict[str, Any], seed: int) -> tuple[float, float, float]:
    """Trains an architecture from scratch; returns held-out loss, test loss and test accuracy."""
    lightning.seed_everything(1000 + seed, verbose=False)
    module = freeze(Searched(), choices)
    train, held_out, test = DATA
    fit(module, batches(train, 50), batches(held_out, 200), STEPS)
    return evaluate(module, held_out)[0], *evaluate(module, test)


def drawn(generator: random.Random) -> dict[str, Any]:
    """Draws an architecture, and a learning rate."""
    every = {name: h.choices for name, h in named_hyperparameters(Searched()).items()}
    return {n: generator.choice(c) for n, c in (every | {"optimizer.lr": RATES}).items()}


def plot(callbacks: dict[str, OnlineHPOCallback], path: Path) -> None:
    """Draws the most probable choice of each decision over the steps."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(callbacks), figsize=(11, 4), sharey=True)
    for ax, (name, callback) in zip(axes, callbacks.items(), strict=True):
        steps = [record.step for record in callback.history]
        for decision in callback.history[-1].values:
            series = [record.values[decision] for record in callback.history]
            last = series[-1] if isinstance(series[-1], list) else [1 - series[-1], series[-1]]
            best = last.index(max(last))
            ps = [p[best] if isinstance(p, list) else abs(1 - best - p) for p in series]
            ax.plot(steps, ps, label=decision)
        ax.set(title=name, xlabel="step", ylim=(0, 1))
    axes[0].set_ylabel("probability of the choice that wins")
    axes[0].legend(fontsize=7, loc="lower right", ncol=2)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


DATA = digits(300, 700, 797)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--baseline", action="store_true", help="64 random architectures as well")
    parser.add_argument("--plot", type=Path, default=Path("architectures.png"))
    options = parser.parse_args()
    print_header("held-out loss", "test loss", "test accuracy")
    callbacks = {}
    for name, response in (("direct and response", True), ("direct alone (ENAS)", False)):
        results = []
        begin = time.process_time()
        for seed in range(FIRST_SEED, FIRST_SEED + options.seeds):
            choices, callback = search(seed, response)
            results.append(train_anew(choices, seed))
            print_row(f"  {name}, seed {seed}", *results[-1])
            print("    " + ", ".join(f"{n} {c}" for n, c in choices.items()), flush=True)
            callbacks[name] = callback
        show(name, results, (time.process_time() - begin) / options.seeds)
    plot(callbacks, options.plot)
    if options.baseline:
        generator, begin = random.Random(0), time.process_time()
        found = [train_anew(drawn(generator), 0) for _ in range(64)]
        print_row("best of 64 random ones", *min(found))
        show("all 64", found, time.process_time() - begin)


def show(name: str, results: list[tuple[float, float, float]], seconds: float) -> None:
    """Prints means with their standard errors, and what one result has cost."""
    columns = list(zip(*results, strict=True))
    error = [stdev(c) / len(c) ** 0.5 if len(c) > 1 else 0.0 for c in columns]
    print_row(name, *(f"{mean(c):.3f} ± {e:.3f}" for c, e in zip(columns, error, strict=True)))
    print(f"    {seconds:.1f} s", flush=True)


if __name__ == "__main__":
    main()
