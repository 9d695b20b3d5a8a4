"""One L2 on few data, under SGD and under Adam: where tuning helps, and where it may do harm.

The task was brought by others, who looked for one on which ``OnlineHPOCallback()`` fails; nothing
was chosen by its results. scikit-learn's breast cancer: 100 examples to train on, 200 held out in
one batch, 269 for the test; a network of 30-100-2 at a learning rate that does not fall, 1 000
steps. ``tuned`` starts where ``register_l2()`` puts λ, ``left alone`` stays there. Losses are those
held out, in parentheses those of the test.

    python examples/benchmarks/breast_cancer.py
"""

from __future__ import annotations

import argparse
from statistics import mean

import lightning
import torch
from _common import environment, note, silent_trainer
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset, random_split

from lightning_hpo import L2Mixin, OnlineHPOCallback

GRID = [1e-5, 1e-4, 1e-3, 1e-2, 1e-1]
OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
}


class LitClassifier(L2Mixin, lightning.LightningModule):
    def __init__(self, optimizer: str) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.net = nn.Sequential(nn.Linear(30, 100), nn.ReLU(), nn.Linear(100, 2))
        self.register_l2()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.training_step(batch, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return OPTIMIZERS[self.optimizer](self.parameters())


def load() -> TensorDataset:
    """Loads 30 standardized numbers for each of 569 patients, and their labels."""
    data = load_breast_cancer()
    x = torch.tensor(data.data, dtype=torch.float32)
    return TensorDataset((x - x.mean(0)) / x.std(0), torch.tensor(data.target))


def train(
    optimizer: str, seed: int, steps: int, fixed: float | None, callbacks: list[OnlineHPOCallback]
) -> tuple[float, float, float]:
    """Trains once; returns the loss held out, that of the test, and λ at the end."""
    generator = torch.Generator().manual_seed(seed)
    parts: list[Subset] = random_split(load(), [100, 200, 269], generator)
    lightning.seed_everything(seed, verbose=False)
    module = LitClassifier(optimizer)
    if fixed is not None:
        module.l2.value = fixed
    trainer = silent_trainer(accelerator="cpu", max_epochs=steps // 5, callbacks=callbacks)
    trainer.fit(module, DataLoader(parts[0], 20, shuffle=True), DataLoader(parts[1], 200))
    losses = []
    for part in parts[1:]:
        with torch.no_grad():
            losses.append(module.validation_step(next(iter(DataLoader(part, len(part)))), 0).item())
    return losses[0], losses[1], module.l2().item()


def main() -> None:
    """Trains all, and prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=1000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    note(environment("cpu", 1))

    print(
        "| optimizer | seed | best of five fixed | … and the worst | left alone | tuned | "
        "its lowest | λ left alone; tuned |\n|---|---|---|---|---|---|---|---|"
    )
    for optimizer in OPTIMIZERS:
        rows = []
        for seed in range(options.seeds):
            fixed = [train(optimizer, seed, options.steps, value, [])[:2] for value in GRID]
            callback = OnlineHPOCallback()
            *tuned, end = train(optimizer, seed, options.steps, None, [callback])
            *alone, start = train(optimizer, seed, options.steps, None, [])
            lowest = min(record.loss for record in callback.history)
            row = [*min(fixed), *max(fixed), *alone, *tuned, lowest]
            rows.append(row)
            print_row(optimizer, str(seed), row, f"{start:.2g}; {end:.1e}")
        print_row(optimizer, "mean", [mean(column) for column in zip(*rows, strict=True)], "")


def print_row(optimizer: str, seed: str, row: list[float], ends: str) -> None:
    """Prints a row: losses held out, and those of the test in parentheses."""
    pairs = [f"{a:.3f} ({b:.3f})" for a, b in zip(row[:8:2], row[1:8:2], strict=True)]
    print(f"| {' | '.join([optimizer, seed, *pairs, f'{row[8]:.3f}', ends])} |", flush=True)


if __name__ == "__main__":
    main()
