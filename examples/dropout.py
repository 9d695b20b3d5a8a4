"""Dropout that finds its own rate while the network trains.

PyTorch's default of 0.5 is too much for a network as narrow as this one: both rates are tuned.
Nothing is gained over a training without dropout (test loss 0.188 and 0.170 at seeds 0 and 1).

    python examples/dropout.py
"""

import argparse
import time

import lightning
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_hpo import DropoutMixin, OnlineHPOCallback, fixed_values


class LitClassifier(DropoutMixin, lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Linear(64, 20), nn.ReLU(), nn.Dropout()),
            *(nn.Linear(20, 20), nn.ReLU(), nn.Dropout()),
            nn.Linear(20, 10),
        )
        self.register_dropout(tied=False)  # makes them tunable: λ is the keep probability, 1 − p

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--epochs", type=int, default=100)
parser.add_argument("--seed", type=int, default=0)
arguments = parser.parse_args()

digits = load_digits()
data = TensorDataset(torch.tensor(digits.data / 16).float(), torch.tensor(digits.target))
train, held_out, test = random_split(data, [800, 300, 697], torch.Generator().manual_seed(0))

callback = OnlineHPOCallback()
quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
losses, seconds = [], []
for callbacks in [], [callback]:
    lightning.seed_everything(arguments.seed, verbose=False)
    module = LitClassifier()
    trainer = lightning.Trainer(
        max_epochs=arguments.epochs, check_val_every_n_epoch=25, callbacks=callbacks, **quiet
    )
    start = time.perf_counter()
    trainer.fit(module, DataLoader(train, 50, shuffle=True), DataLoader(held_out, 100))
    seconds.append(time.perf_counter() - start)
    losses.append(trainer.validate(module, DataLoader(test, 100), verbose=False)[0]["val_loss"])

callback.plot()[0].savefig("dropout.png")
first, second = (1 - keep for keep in fixed_values(module).values())
print(
    f"Drop rates of {first:.2f} and {second:.2f} instead of PyTorch's 0.5 take the test loss from "
    f"{losses[0]:.3f} to {losses[1]:.3f}, in one training of {seconds[1] / seconds[0]:.1f} times "
    f"the time of a plain one ({seconds[0]:.1f} s). Picture: dropout.png"
)
