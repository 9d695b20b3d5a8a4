"""Dropout that finds its own keep probability: from a bad one, in one training.

A wide network learns handwritten digits from 200 examples. Dropout starts so strong that the
network hardly learns (it keeps one unit in ten). Masks are drawn at random, so the derivative with
respect to the keep probability is a difference between coupled masks; nothing in the model changes
but the call of ``register_dropout``. The script trains once with each estimator, and once for each
keep probability of a grid (the start is the same training without tuning).

    python examples/dropout.py
"""

from __future__ import annotations

import lightning
import torch
from _common import batches, digits, evaluate, fit, parse_seed, print_header, print_row
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from lightning_hpo import T1T2, ClipR, DropoutMixin, OnlineHPOCallback
from lightning_hpo.estimators import Estimator

START = 0.1
GRID = [0.1, 0.2, 0.4, 0.6, 0.8, 0.95]
STEPS = 800
ESTIMATORS: dict[str, Estimator] = {
    "ClipR(20, decay=0.99)": ClipR(radius=20.0, decay=0.99),
    "T1T2": T1T2(),
}


class LitClassifier(DropoutMixin, lightning.LightningModule):
    def __init__(self, keep: float) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(64, 200),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(200, 200),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(200, 10),
        )
        self.register_dropout(init=keep)  # one keep probability for both layers

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    validation_step = training_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(
    data: list[TensorDataset], keep: float, estimator: Estimator | None, seed: int
) -> tuple[float, float, float, float]:
    """Returns the last keep probability, the held-out and test losses, and the test accuracy."""
    lightning.seed_everything(seed, verbose=False)
    module = LitClassifier(keep)
    training, held_out, test = data
    # The keep probability is tuned on a logit scale, where the default λ-optimizer is right: Adam
    # with learning rate 0.01 needs 220 steps from 0.1 to 0.5.
    callbacks = [] if estimator is None else [OnlineHPOCallback(estimator)]
    fit(module, batches(training, 50, STEPS), batches(held_out, 100), STEPS, callbacks)
    return module.keep().item(), evaluate(module.net, held_out)[0], *evaluate(module.net, test)


def main() -> None:
    seed = parse_seed(__doc__)
    data = digits(200, 700, 897)
    print_header("keep probability", "held-out loss", "test loss", "test accuracy")
    for name, estimator in ESTIMATORS.items():
        keep, held_out, test, accuracy = train(data, START, estimator, seed)
        print_row(f"tuned, {name}", f"{START} → {keep:.2f}", held_out, test, f"{accuracy:.1%}")
    for start in GRID:
        keep, held_out, test, accuracy = train(data, start, None, seed)
        name = "not tuned" if start == START else "fixed"
        print_row(name, f"{keep:.2f}", held_out, test, f"{accuracy:.1%}")


if __name__ == "__main__":
    main()
