"""A learning rate that corrects itself, from one that is a hundred times too small.

The module has no trace of this package: the callback tunes what it finds in the optimizer. T1T2
looks at one step at a time, which is greedy, and enough here. The start is too small on purpose: to
improve on a usual learning rate, a search does better (README, "When not to use it").

    python examples/learning_rate.py
"""

import argparse
import time

import lightning
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_hpo import T1T2, OnlineHPOCallback


class LitClassifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 200), nn.ReLU(), nn.Linear(200, 10))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.5)


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--epochs", type=int, default=25)
parser.add_argument("--seed", type=int, default=0)
arguments = parser.parse_args()

digits = load_digits()
data = TensorDataset(torch.tensor(digits.data / 16).float(), torch.tensor(digits.target))
train, held_out, test = random_split(data, [800, 300, 697], torch.Generator().manual_seed(0))

callback = OnlineHPOCallback(
    T1T2(),
    optimizer=lambda raw: torch.optim.Adam(raw, lr=0.2),  # λ moves by up to 20 % per update
    every_n_steps=4,
    optimizer_hyperparameters=["lr"],
)
quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
losses, seconds = [], []
for callbacks in [], [callback]:
    lightning.seed_everything(arguments.seed, verbose=False)
    module = LitClassifier()
    trainer = lightning.Trainer(max_epochs=arguments.epochs, callbacks=callbacks, **quiet)
    start = time.perf_counter()
    trainer.fit(module, DataLoader(train, 50, shuffle=True), DataLoader(held_out, 100))
    seconds.append(time.perf_counter() - start)
    losses.append(trainer.validate(module, DataLoader(test, 100), verbose=False)[0]["val_loss"])

callback.plot()[0].savefig("learning_rate.png")
rates = [record.values["optimizer.lr"] for record in callback.history]
print(
    f"A learning rate that rises from 0.001 to {max(rates):.2g} and ends at {rates[-1]:.2g} takes "
    f"the test loss from {losses[0]:.3f} to {losses[1]:.3f}, in one training of "
    f"{seconds[1] / seconds[0]:.1f} times the time of a plain one. Picture: learning_rate.png"
)
