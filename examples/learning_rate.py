"""A learning rate that corrects itself: from one a thousand times too small, in one training.

The model is an ordinary LightningModule without a trace of this package: the callback tunes the
learning rate and the momentum of whatever optimizer it finds. The script trains once with each
estimator, and once for each learning rate of a grid (the start is the same training without
tuning). RTHO remembers the whole training without a bound on its tangents: where some long steps
make them explode, they do not come back, as with the default ``--seed`` but not with 1 or 2.

    python examples/learning_rate.py
"""

from __future__ import annotations

import math

import lightning
import torch
from _common import batches, digits, evaluate, fit, parse_seed, print_header, print_row
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from lightning_hpo import T1T2, ClipR, OnlineHPOCallback
from lightning_hpo.estimators import Estimator

START = 1e-4
GRID = [1e-4, 1e-3, 1e-2, 1e-1, 1.0]
MOMENTUM = 0.5
STEPS = 400
ESTIMATORS: dict[str, Estimator] = {
    "T1T2": T1T2(),
    "ClipR(1, decay=0.99)": ClipR(radius=1.0, decay=0.99),
    "ClipR(20, decay=0.9)": ClipR(radius=20.0, decay=0.9),
    "RTHO, ClipR(inf)": ClipR(radius=math.inf),
}


class LitClassifier(lightning.LightningModule):
    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.net = nn.Sequential(
            nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10)
        )

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    validation_step = training_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.rate, momentum=MOMENTUM)


def rates(raw: list[Tensor]) -> torch.optim.Optimizer:
    """Makes the λ-optimizer: one learning rate for each of the two scales.

    The learning rate is tuned on a log scale: 0.05 is 5 % per step, a factor of ten in 46 steps,
    which a start this bad needs. The momentum is tuned on its own scale, where that would go from
    one end to the other in 20 steps, long before its effect is seen.
    """
    rate, momentum = raw
    return torch.optim.Adam([{"params": [rate], "lr": 0.05}, {"params": [momentum], "lr": 0.005}])


def train(
    data: list[TensorDataset], rate: float, estimator: Estimator | None, seed: int
) -> tuple[str, str, float, float, float]:
    """Returns learning rate and momentum, the held-out and test losses, and the test accuracy."""
    lightning.seed_everything(seed, verbose=False)
    module = LitClassifier(rate)
    training, held_out, test = data
    learned, callbacks = {"optimizer.lr": rate, "optimizer.momentum": MOMENTUM}, []
    if estimator is not None:
        callbacks = [
            OnlineHPOCallback(
                estimator, optimizer=rates, optimizer_hyperparameters=["lr", "momentum"]
            )
        ]
    fit(module, batches(training, 50, STEPS), batches(held_out, 100), STEPS, callbacks)
    if callbacks:
        learned = callbacks[0].history[-1].values
    shown = f"{learned['optimizer.lr']:.2g}", f"{learned['optimizer.momentum']:.2f}"
    return *shown, evaluate(module.net, held_out)[0], *evaluate(module.net, test)


def main() -> None:
    seed = parse_seed(__doc__)
    data = digits(800, 300, 697)
    print_header("learning rate", "momentum", "held-out loss", "test loss", "test accuracy")
    for name, estimator in ESTIMATORS.items():
        rate, momentum, held_out, test, accuracy = train(data, START, estimator, seed)
        change = f"{START} → {rate}", f"{MOMENTUM} → {momentum}"
        print_row(f"tuned, {name}", *change, held_out, test, f"{accuracy:.1%}")
    for start in GRID:
        rate, momentum, held_out, test, accuracy = train(data, start, None, seed)
        name = "not tuned" if start == START else "fixed"
        print_row(name, rate, momentum, held_out, test, f"{accuracy:.1%}")


if __name__ == "__main__":
    main()
