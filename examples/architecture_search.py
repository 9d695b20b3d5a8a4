"""Activations, width and learning rate chosen in one training, and what it finds trained anew.

It trains three times, plain, choosing and anew: python examples/architecture_search.py
"""

import argparse
import time

import lightning
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

import lightning_hpo as hpo


class LitDigits(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10)
        # A plain training has the first of each: equal odds, as they are at the start.
        self.activation = hpo.CategoricalHyperparameter(["relu", "tanh", "sigmoid"])
        self.width = hpo.CategoricalHyperparameter([64, 16, 4])

    def training_step(self, batch, batch_idx):
        hidden = getattr(torch, self.activation())(self.first(batch[0]))
        hidden = getattr(torch, self.activation())(self.second(hidden))
        hidden = hidden * (torch.arange(64, device=self.device) < self.width())
        return nn.functional.cross_entropy(self.head(hidden), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.03)


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--epochs", type=int, default=250)
parser.add_argument("--seed", type=int, default=0)
arguments = parser.parse_args()

images, labels = map(torch.tensor, load_digits(return_X_y=True))
data = TensorDataset(images.float() / 16, labels)
train, held_out, test = random_split(data, [300, 700, 797], torch.Generator().manual_seed(0))

rates = hpo.CategoricalHyperparameter([0.003, 0.03, 0.1, 0.3])
callback = hpo.OnlineHPOCallback(optimizer_hyperparameters={"lr": rates})
quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
chosen, losses, seconds = {}, [], []
for callbacks in [], [callback], []:
    lightning.seed_everything(arguments.seed, verbose=False)
    module = hpo.freeze(LitDigits(), chosen)  # nothing is chosen before the second training
    trainer = lightning.Trainer(
        max_epochs=arguments.epochs, check_val_every_n_epoch=25, callbacks=callbacks, **quiet
    )
    start = time.perf_counter()
    trainer.fit(module, DataLoader(train, 50, shuffle=True), DataLoader(held_out, 200))
    seconds.append(time.perf_counter() - start)
    losses.append(trainer.validate(module, DataLoader(test, 100), verbose=False)[0]["val_loss"])
    chosen = hpo.fixed_values(module) if callbacks else chosen

callback.plot()[0].savefig("architecture_search.png")
print(
    f"{', '.join(map(str, chosen.values()))} instead of relu, 64, 0.03 take the test loss from "
    f"{losses[0]:.3f} to {losses[2]:.3f}, in two trainings of {sum(seconds[1:]) / seconds[0]:.1f} "
    f"times the time of a plain one ({seconds[0]:.1f} s). Picture: architecture_search.png"
)
