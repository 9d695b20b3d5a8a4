"""A weight decay that finds itself, in a module without a trace of this package.

The module and its AdamW are as they were; only the callback knows that there is something to tune.
The gain over AdamW's default is small.

    python examples/adamw_decay.py
"""

import argparse
import time

import lightning
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_hpo import OnlineHPOCallback


class LitClassifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 200), nn.ReLU(), nn.Linear(200, 10))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)  # weight_decay=0.01 by default


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--epochs", type=int, default=300)
parser.add_argument("--seed", type=int, default=0)
arguments = parser.parse_args()

digits = load_digits()
data = TensorDataset(torch.tensor(digits.data / 16).float(), torch.tensor(digits.target))
train, held_out, test = random_split(data, [200, 700, 897], torch.Generator().manual_seed(0))

callback = OnlineHPOCallback(optimizer_hyperparameters={"weight_decay": "auto"})
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

callback.plot()[0].savefig("adamw_decay.png")
decay = callback.history[-1].values["optimizer.weight_decay"]
print(
    f"A weight decay of {decay:.2g} instead of AdamW's 0.01 takes the test loss from "
    f"{losses[0]:.3f} to {losses[1]:.3f}, in one training of {seconds[1] / seconds[0]:.1f} times "
    f"the time of a plain one ({seconds[0]:.1f} s). Picture: adamw_decay.png"
)
