"""Data hyper-cleaning: half of the labels are wrong, and one training finds out which.

Every training example has a weight, 1 at the start. All weights are tuned at once by the loss on
100 clean held-out examples (Franceschi et al. 2017, §5.1). A wrong label is the next digit's.

    python examples/hyper_cleaning.py
"""

import argparse
import time

import lightning
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_hpo import T1T2, ExampleWeightMixin, OnlineHPOCallback
from lightning_hpo.regularizers import IndexedDataset


class LitClassifier(ExampleWeightMixin, lightning.LightningModule):
    def __init__(self, count):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10))
        self.register_example_weights(count)

    def training_step(self, batch, batch_idx):
        images, labels, index = batch
        losses = F.cross_entropy(self.net(images), labels, reduction="none")
        return self.weighted_mean(losses, index)

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def test_step(self, batch, batch_idx):
        images, labels = batch
        self.log("test_accuracy", (self.net(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--epochs", type=int, default=80)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--output", default="hyper_cleaning.png", help="the picture of the weights")
arguments = parser.parse_args()

digits = load_digits()
data = TensorDataset(torch.tensor(digits.data / 16).float(), torch.tensor(digits.target))
train, held_out, test = random_split(data, [1200, 100, 497], torch.Generator().manual_seed(0))
wrong = torch.rand(1200, generator=torch.Generator().manual_seed(0)) < 0.5
labels = data.tensors[1]
labels[train.indices] = (labels[train.indices] + wrong) % 10

# Weights are tuned on their own scale: at 0.01 per step they need 100 steps from 1 to 0.
callback = OnlineHPOCallback(T1T2(), optimizer=lambda raw: torch.optim.Adam(raw, lr=0.01))
accuracies, seconds = [], []
for callbacks in [], [callback]:
    lightning.seed_everything(arguments.seed, verbose=False)
    module = LitClassifier(len(train))
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=arguments.epochs,
        check_val_every_n_epoch=10,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    start = time.perf_counter()
    trainer.fit(
        module, DataLoader(IndexedDataset(train), 100, shuffle=True), DataLoader(held_out, 100)
    )
    seconds.append(time.perf_counter() - start)
    metrics = trainer.test(module, DataLoader(test, 100), verbose=False)[0]
    accuracies.append(metrics["test_accuracy"])

weights = module.example_weights.value
figure = Figure(figsize=(5, 3), layout="constrained")
axes = figure.subplots()
axes.hist([weights[~wrong], weights[wrong]], 20, label=["right label", "wrong label"])
axes.set(xlabel="weight at the end", ylabel="training examples")
axes.legend()
figure.savefig(arguments.output)
found = (weights < 0.5) == wrong
print(
    f"The weights tell {found.float().mean():.1%} of the right and wrong labels apart and take the "
    f"test accuracy from {accuracies[0]:.1%} to {accuracies[1]:.1%}, in one training of "
    f"{seconds[1] / seconds[0]:.1f} times the time of a plain one ({seconds[0]:.1f} s)."
)
