"""Auxiliary tasks that find their own weights: a helpful one grows, a harmful one vanishes.

The task is to tell digits apart, but only 50 of 500 training images say reliably which digit they
show. All 500 carry two more labels:

- ``kind``: whether the digit is odd, and whether it is above four; a head of its own predicts it
  from the shared layers. Such labels are cheap, and learning them shapes layers that help with the
  digits. Its loss weight ρ starts at 0.
- ``guess``: somebody's guess of the digit, no better than chance, learned by the same head as the
  digit. Its ρ starts at 1.

The script trains once with each estimator, and once for each pair of a grid (the start is the same
training without tuning).

    python examples/multitask.py
"""

from __future__ import annotations

import lightning
import torch
from _common import adam, batches, digits, evaluate, fit, parse_seed, print_header, print_row
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from lightning_hpo import T1T2, ClipR, LossWeightMixin, OnlineHPOCallback
from lightning_hpo.estimators import Estimator

LABELED = 50
UNKNOWN = -1
STEPS = 1000
START = 0.0, 1.0
GRID = [START, (0.0, 0.0), (0.5, 0.0), (2.0, 0.0), (2.0, 0.2)]
ESTIMATORS: dict[str, Estimator] = {
    "ClipR(20, decay=0.99)": ClipR(radius=20.0, decay=0.99),
    "T1T2": T1T2(),
}


class LitClassifier(LossWeightMixin, lightning.LightningModule):
    def __init__(self, kind: float, guess: float) -> None:
        super().__init__()
        self.shared = nn.Sequential(nn.Linear(64, 50), nn.ReLU(), nn.Linear(50, 50), nn.ReLU())
        self.digit, self.kind = nn.Linear(50, 10), nn.Linear(50, 4)
        self.register_loss_weights({"kind": kind, "guess": guess})

    def forward(self, images: Tensor) -> Tensor:
        return self.digit(self.shared(images))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, digit, kind, guess = batch
        features = self.shared(images)
        logits = self.digit(features)
        return self.weighted_loss(
            F.cross_entropy(logits, digit, ignore_index=UNKNOWN),
            kind=F.cross_entropy(self.kind(features), kind),
            guess=F.cross_entropy(logits, guess),
        )

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, digit = batch
        return F.cross_entropy(self(images), digit)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.5)


def with_auxiliary_labels(data: TensorDataset) -> TensorDataset:
    """Hides most digits, and adds both other labels."""
    images, digit = data.tensors
    known = torch.where(torch.arange(len(digit)) < LABELED, digit, UNKNOWN)
    kind = digit % 2 + 2 * (digit > 4)
    guess = torch.randint(10, digit.shape, generator=torch.Generator().manual_seed(0))
    return TensorDataset(images, known, kind, guess)


def train(
    data: list[TensorDataset], start: tuple[float, float], estimator: Estimator | None, seed: int
) -> tuple[list[float], float, float, float]:
    """Returns the last weights, the held-out loss, the test loss and the test accuracy."""
    lightning.seed_everything(seed, verbose=False)
    module = LitClassifier(*start)
    training, held_out, test = data
    # Weights are tuned on their own scale, where 0 can be reached and left. Adam moves them by up
    # to its learning rate per step: 0.01 takes 100 of the 1 000 steps from 0 to 1.
    callbacks = [] if estimator is None else [OnlineHPOCallback(estimator, optimizer=adam(0.01))]
    fit(module, batches(training, 100, STEPS), batches(held_out, 100), STEPS, callbacks)
    weights = [module.loss_weights.kind().item(), module.loss_weights.guess().item()]
    return weights, evaluate(module, held_out)[0], *evaluate(module, test)


def main() -> None:
    seed = parse_seed(__doc__)
    training, held_out, test = digits(500, 300, 997)
    data = [with_auxiliary_labels(training), held_out, test]
    print_header("ρ of kind", "ρ of guess", "held-out loss", "test loss", "test accuracy")
    for name, estimator in ESTIMATORS.items():
        weights, held, test_loss, accuracy = train(data, START, estimator, seed)
        changes = [f"{a:.1f} → {b:.2f}" for a, b in zip(START, weights, strict=True)]
        print_row(f"tuned, {name}", *changes, held, test_loss, f"{accuracy:.1%}")
    for start in GRID:
        weights, held, test_loss, accuracy = train(data, start, None, seed)
        name = "not tuned" if start == START else "fixed"
        shown = [f"{weight:.1f}" for weight in weights]
        print_row(name, *shown, held, test_loss, f"{accuracy:.1%}")


if __name__ == "__main__":
    main()
