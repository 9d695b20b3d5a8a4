"""The strength of an augmentation of one's own, tuned while the network trains.

Digits are shifted and turned at random. How far is a ``Hyperparameter`` that acts in
``training_step``, and the images are a differentiable function of it.

    python examples/augmentation.py
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
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 200), nn.ReLU(), nn.Linear(200, 10))
        # Positive: on a log scale. Typical: where it drifts as long as hypergradients say nothing.
        self.strength = Hyperparameter(0.3, Positive(1e-4, 1.0), typical=0.1)

    def augment(self, images):
        """Turns and shifts by normal draws times the strength, in radians and in half widths."""
        draws = self.strength() * torch.randn(len(images), 3, device=images.device)
        angle, x, y = draws.unbind(1)
        rows = [angle.cos(), -angle.sin(), x, angle.sin(), angle.cos(), y]
        maps = torch.stack(rows, 1).view(-1, 2, 3)
        images = images.view(-1, 1, 8, 8)
        grid = F.affine_grid(maps, images.shape, align_corners=False)
        return F.grid_sample(images, grid, align_corners=False).flatten(1)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return F.cross_entropy(self.net(self.augment(images)), labels)

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.validation_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.5)


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--epochs", type=int, default=300)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--output", default="augmentation.png", help="the picture of the training")
arguments = parser.parse_args()

digits = load_digits()
data = TensorDataset(torch.tensor(digits.data / 16).float(), torch.tensor(digits.target))
train, held_out, test = random_split(data, [200, 700, 897], torch.Generator().manual_seed(0))

callback = OnlineHPOCallback()
losses, seconds = [], []
for callbacks in [], [callback]:
    lightning.seed_everything(arguments.seed, verbose=False)
    module = LitClassifier()
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=arguments.epochs,
        check_val_every_n_epoch=25,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    start = time.perf_counter()
    trainer.fit(module, DataLoader(train, 50, shuffle=True), DataLoader(held_out, 100))
    seconds.append(time.perf_counter() - start)
    losses.append(trainer.test(module, DataLoader(test, 100), verbose=False)[0]["test_loss"])

callback.plot()[0].savefig(arguments.output)
print(
    f"An augmentation of strength {module.strength().item():.2g} instead of 0.3 takes the test "
    f"loss from {losses[0]:.3f} to {losses[1]:.3f}, in one training of "
    f"{seconds[1] / seconds[0]:.1f} times the time of a plain one ({seconds[0]:.1f} s)."
)
