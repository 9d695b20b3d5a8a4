"""The strength of an augmentation of one's own, tuned while the network trains, from a high start.

The gain over no augmentation is small here. Two trainings: python examples/augmentation.py
"""

import argparse
import time

import lightning
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_hpo import Hyperparameter, OnlineHPOCallback, Positive


class LitClassifier(lightning.LightningModule):
    def __init__(self, strength):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 200), nn.ReLU(), nn.Linear(200, 10))
        self.strength = Hyperparameter(strength, Positive(1e-4, 1.0), typical=0.1)

    def training_step(self, batch, batch_idx):
        images = batch[0].view(-1, 1, 8, 8)
        # Turned and shifted by normal draws times the strength, in radians and in half widths.
        angle, x, y = self.strength() * torch.randn(3, len(images), device=images.device)
        rows = [angle.cos(), -angle.sin(), x, angle.sin(), angle.cos(), y]
        maps = torch.stack(rows, 1).view(-1, 2, 3)
        grid = F.affine_grid(maps, images.shape, align_corners=False)
        images = F.grid_sample(images, grid, align_corners=False)
        return F.cross_entropy(self.net(images.flatten(1)), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.5)


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--epochs", type=int, default=300)
parser.add_argument("--seed", type=int, default=0)
arguments = parser.parse_args()

images, labels = map(torch.tensor, load_digits(return_X_y=True))
data = TensorDataset(images.float() / 16, labels)
train, held_out, test = random_split(data, [200, 700, 897], torch.Generator().manual_seed(0))

callback = OnlineHPOCallback()
quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
losses, seconds = [], []
for callbacks in [], [callback]:
    lightning.seed_everything(arguments.seed, verbose=False)
    module = LitClassifier(0.3 if callbacks else 0.001)  # 0.001 is as good as none
    trainer = lightning.Trainer(
        max_epochs=arguments.epochs, check_val_every_n_epoch=25, callbacks=callbacks, **quiet
    )
    start = time.perf_counter()
    trainer.fit(module, DataLoader(train, 50, shuffle=True), DataLoader(held_out, 100))
    seconds.append(time.perf_counter() - start)
    losses.append(trainer.validate(module, DataLoader(test, 100), verbose=False)[0]["val_loss"])

callback.plot()[0].savefig("augmentation.png")
print(
    f"A strength of {module.strength().item():.2g} instead of none takes the test loss from "
    f"{losses[0]:.3f} to {losses[1]:.3f}, in one training of {seconds[1] / seconds[0]:.1f} times "
    f"the time of a plain one ({seconds[0]:.1f} s). Picture: augmentation.png"
)
