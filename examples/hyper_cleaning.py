"""Half of the labels are wrong, and one training finds out which (Franceschi et al. 2017, §5.1).

It trains twice, plain and tuned: python examples/hyper_cleaning.py
"""

import argparse
import time

import lightning
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_hpo import T1T2, ExampleWeightMixin, OnlineHPOCallback
from lightning_hpo.regularizers import IndexedDataset


class LitClassifier(ExampleWeightMixin, lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10))
        self.register_example_weights(1200)  # all 1 at the start

    def training_step(self, batch, batch_idx):
        losses = nn.functional.cross_entropy(self.net(batch[0]), batch[1], reduction="none")
        return self.weighted_mean(losses, batch[2])  # the third is the number of the example

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--epochs", type=int, default=80)
parser.add_argument("--seed", type=int, default=0)
arguments = parser.parse_args()

images, labels = map(torch.tensor, load_digits(return_X_y=True))
data = TensorDataset(images.float() / 16, labels)
train, held_out, test = random_split(data, [1200, 100, 497], torch.Generator().manual_seed(0))
train_loader = DataLoader(IndexedDataset(train), 100, shuffle=True)
wrong = torch.rand(1200, generator=torch.Generator().manual_seed(0)) < 0.5
labels[train.indices] = (labels[train.indices] + wrong) % 10
# Weights are tuned on their own scale: at 0.01 per step they need 100 steps from 1 to 0.
callback = OnlineHPOCallback(T1T2(), optimizer=lambda raw: torch.optim.Adam(raw, lr=0.01))
quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
losses, seconds = [], []
for callbacks in [], [callback]:
    lightning.seed_everything(arguments.seed, verbose=False)
    module = LitClassifier()
    trainer = lightning.Trainer(max_epochs=arguments.epochs, callbacks=callbacks, **quiet)
    start = time.perf_counter()
    trainer.fit(module, train_loader, DataLoader(held_out, 100))
    seconds.append(time.perf_counter() - start)
    losses.append(trainer.validate(module, DataLoader(test, 100), verbose=False)[0]["val_loss"])

weights = module.example_weights.value
plt.hist([weights[~wrong], weights[wrong]], 20, label=["right label", "wrong label"])
plt.gca().set(xlabel="weight at the end", ylabel="training examples")
plt.legend()
plt.savefig("hyper_cleaning.png")
print(
    f"The weights tell {((weights < 0.5) == wrong).float().mean():.1%} of right and wrong labels "
    f"apart and take the test loss from {losses[0]:.3f} to {losses[1]:.3f}, in one training of "
    f"{seconds[1] / seconds[0]:.1f} times the time of a plain one. Picture: hyper_cleaning.png"
)
