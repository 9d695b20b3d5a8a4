"""A network that finds its own L2 strength λ: one training with λ as it was, one that tunes it.

It trains twice, plain and tuned: python examples/quickstart.py
"""

import argparse
import time

import lightning
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_hpo import L2Mixin, OnlineHPOCallback


class LitDigits(L2Mixin, lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10)
        )
        self.register_l2(1e-4)  # one λ for all weights; without a number it finds a start itself

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])  # λ acts on the gradient

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))  # λ descends on this

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--epochs", type=int, default=300)
parser.add_argument("--seed", type=int, default=0)
arguments = parser.parse_args()

digits = load_digits()
data = TensorDataset(torch.tensor(digits.data).float() / 16, torch.tensor(digits.target))
train, held_out, test = random_split(data, [100, 700, 997], torch.Generator().manual_seed(0))

callback = OnlineHPOCallback()
quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
losses, seconds = [], []
for callbacks in [], [callback]:
    lightning.seed_everything(arguments.seed, verbose=False)
    module = LitDigits()
    trainer = lightning.Trainer(
        max_epochs=arguments.epochs, check_val_every_n_epoch=300, callbacks=callbacks, **quiet
    )
    start = time.perf_counter()
    trainer.fit(module, DataLoader(train, 20, shuffle=True), DataLoader(held_out, 100))
    seconds.append(time.perf_counter() - start)
    losses.append(trainer.validate(module, DataLoader(test, 100), verbose=False)[0]["val_loss"])

callback.plot()[0].savefig("quickstart.png")
print(
    f"λ = {module.l2().item():.1e} instead of 1.0e-04 takes the test loss from {losses[0]:.3f} to "
    f"{losses[1]:.3f}, in one training of {seconds[1] / seconds[0]:.1f} times the time of a plain "
    f"one ({seconds[0]:.1f} s). Picture: quickstart.png"
)
