"""Auxiliary tasks that find their own weights: one that harms the main task all but vanishes.

Only 50 of 500 training images say reliably which digit they show. All carry two more labels: its
``kind`` (odd or even, above four or not), which helps, and a ``guess`` of the digit that is no
better than chance. Both losses start with the weight 1.

    python examples/multitask.py
"""

import argparse
import time

import lightning
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_hpo import LossWeightMixin, OnlineHPOCallback


class LitClassifier(LossWeightMixin, lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.shared = nn.Sequential(nn.Linear(64, 50), nn.ReLU(), nn.Linear(50, 50), nn.ReLU())
        self.digit, self.kind = nn.Linear(50, 10), nn.Linear(50, 4)
        self.register_loss_weights({"kind": 1.0, "guess": 1.0})

    def training_step(self, batch, batch_idx):
        images, digit, kind, guess = batch
        features = self.shared(images)
        logits = self.digit(features)
        return self.weighted_loss(
            F.cross_entropy(logits, digit, ignore_index=-1),
            kind=F.cross_entropy(self.kind(features), kind),
            guess=F.cross_entropy(logits, guess),
        )

    def validation_step(self, batch, batch_idx):
        images, digit, *_ = batch
        return F.cross_entropy(self.digit(self.shared(images)), digit)

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.validation_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.5)


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--epochs", type=int, default=200)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--output", default="multitask.png", help="the picture of the training")
arguments = parser.parse_args()

digits = load_digits()
labels = torch.tensor(digits.target)
kind = labels % 2 + 2 * (labels > 4)
guess = torch.randint(10, labels.shape, generator=torch.Generator().manual_seed(0))
data = TensorDataset(torch.tensor(digits.data / 16).float(), labels.clone(), kind, guess)
train, held_out, test = random_split(data, [500, 300, 997], torch.Generator().manual_seed(0))
data.tensors[1][train.indices[50:]] = -1  # of most it is not known which digit they are

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
    trainer.fit(module, DataLoader(train, 100, shuffle=True), DataLoader(held_out, 100))
    seconds.append(time.perf_counter() - start)
    losses.append(trainer.test(module, DataLoader(test, 100), verbose=False)[0]["test_loss"])

callback.plot()[0].savefig(arguments.output)
weights = module.loss_weights
print(
    f"Weights of {weights.kind().item():.2f} for the kind and {weights.guess().item():.2f} for the "
    f"guess instead of 1 take the test loss from {losses[0]:.3f} to {losses[1]:.3f}, in one "
    f"training of {seconds[1] / seconds[0]:.1f} times the time of a plain one ({seconds[0]:.1f} s)."
)
