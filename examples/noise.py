"""Input noise that finds its own strength: from no noise at all, in one training.

A small network learns handwritten digits from 100 examples and overfits. Gaussian noise of standard
deviation σ on the pixels regularizes it, where σ is right. The script trains once from σ = 0 with
each estimator, and once for each σ of a grid (σ = 0 is the same training without tuning).

σ = 0 is a hard start: σ and −σ are the same noise, so that the derivative is 0 there on average.
ClipR gathers the derivatives of many steps and gets away; T1T2 sees one step at a time, and what it
sees near 0 is mostly chance.

    python examples/noise.py
"""

from __future__ import annotations

import lightning
import torch
from _common import adam, batches, digits, evaluate, fit, parse_seed, print_header, print_row
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from lightning_hpo import T1T2, ClipR, GaussianNoiseMixin, OnlineHPOCallback
from lightning_hpo.estimators import Estimator

GRID = [0.0, 0.1, 0.2, 0.3, 0.5, 0.8]
STEPS = 1000
ESTIMATORS: dict[str, Estimator] = {
    "ClipR(20, decay=0.99)": ClipR(radius=20.0, decay=0.99),
    "T1T2": T1T2(),
}


class LitClassifier(GaussianNoiseMixin, lightning.LightningModule):
    def __init__(self, sigma: float) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10)
        )
        self.register_noise(init=sigma)  # before self.net, in training only

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    validation_step = training_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(
    data: list[TensorDataset], sigma: float, estimator: Estimator | None, seed: int
) -> tuple[float, float, float, float]:
    """Returns the last σ, the held-out loss, the test loss and the test accuracy."""
    lightning.seed_everything(seed, verbose=False)
    module = LitClassifier(sigma)
    training, held_out, test = data
    # σ is tuned on its own scale, not on a log scale, which would not contain 0. Adam moves it by
    # up to its learning rate per step: 0.01 crosses the whole useful range, 0 to 1, in 100 steps.
    callbacks = [] if estimator is None else [OnlineHPOCallback(estimator, optimizer=adam(0.01))]
    fit(module, batches(training, 50, STEPS), batches(held_out, 100), STEPS, callbacks)
    return module.noise().item(), evaluate(module.net, held_out)[0], *evaluate(module.net, test)


def main() -> None:
    seed = parse_seed(__doc__)
    data = digits(100, 700, 997)
    print_header("σ", "held-out loss", "test loss", "test accuracy")
    for name, estimator in ESTIMATORS.items():
        sigma, held_out, test, accuracy = train(data, 0.0, estimator, seed)
        print_row(f"tuned, {name}", f"0 → {sigma:.2f}", held_out, test, f"{accuracy:.1%}")
    for start in GRID:
        sigma, held_out, test, accuracy = train(data, start, None, seed)
        name = "fixed" if start else "not tuned"
        print_row(name, f"{sigma:.2f}", held_out, test, f"{accuracy:.1%}")


if __name__ == "__main__":
    main()
