"""Input noise that finds its own strength while the network trains.

A network learns how diabetes proceeds, from 200 patients, with a little noise on their data. A
second training starts like the first and tunes the noise's standard deviation σ. Without any noise
the test loss is 0.925 at seed 0, 0.757 at seed 1.

    python examples/noise.py
"""

import argparse
import time

import lightning
import torch
from sklearn.datasets import load_diabetes
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_hpo import GaussianNoiseMixin, OnlineHPOCallback


class LitRegressor(GaussianNoiseMixin, lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(10, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 1)
        )
        self.register_noise(init=0.1)  # before self.net, in training only

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self.net(batch[0]).squeeze(1), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--epochs", type=int, default=200)
parser.add_argument("--seed", type=int, default=0)
arguments = parser.parse_args()

features, target = (torch.tensor(array).float() for array in load_diabetes(return_X_y=True))
target = (target - target.mean()) / target.std()
data = TensorDataset(features / features.std(0), target)
train, held_out, test = random_split(data, [200, 100, 142], torch.Generator().manual_seed(0))

callback = OnlineHPOCallback()
quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
losses, seconds = [], []
for callbacks in [], [callback]:
    lightning.seed_everything(arguments.seed, verbose=False)
    module = LitRegressor()
    trainer = lightning.Trainer(
        max_epochs=arguments.epochs, check_val_every_n_epoch=25, callbacks=callbacks, **quiet
    )
    start = time.perf_counter()
    trainer.fit(module, DataLoader(train, 25, shuffle=True), DataLoader(held_out, 100))
    seconds.append(time.perf_counter() - start)
    losses.append(trainer.validate(module, DataLoader(test, 100), verbose=False)[0]["val_loss"])

callback.plot()[0].savefig("noise.png")
print(
    f"Noise of σ = {module.noise().item():.2g} instead of 0.1 takes the test loss from "
    f"{losses[0]:.3f} to {losses[1]:.3f}, in one training of {seconds[1] / seconds[0]:.1f} times "
    f"the time of a plain one ({seconds[0]:.1f} s). Picture: noise.png"
)
