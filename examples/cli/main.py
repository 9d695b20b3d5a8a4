"""LightningCLI: a YAML file sets the callback, its estimator and its λ-optimizer.

A network learns scikit-learn's digits. The module and the data know nothing of the callback:
``config.yaml`` adds it; its arguments are set there or on the command line.

    python examples/cli/main.py fit --config examples/cli/config.yaml

It prints the L2 strength that it found. Other things to try, after the same line:

    --trainer.callbacks.estimator=lightning_hpo.T1T2
    --trainer.callbacks.estimator.radius=.inf
    --trainer.callbacks.optimizer=torch.optim.SGD --trainer.callbacks.optimizer.lr=0.1
    --print_config
"""

from __future__ import annotations

import lightning
import torch
from lightning.pytorch.cli import ArgsType, LightningCLI
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_hpo import L2Mixin, fixed_values


class LitDigits(L2Mixin, lightning.LightningModule):
    """A network with one hidden layer and one L2 strength; the YAML file sets its optimizer.

    Args:
        hidden: Units of the hidden layer.
        l2: Where the L2 strength starts.
    """

    def __init__(self, hidden: int = 100, l2: float = 0.1) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 10))
        self.register_l2(init=l2)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self.net(images), labels)
        self.log("val_loss", loss, prog_bar=True)
        return loss


class Digits(lightning.LightningDataModule):
    """8×8 images of handwritten digits: few to train on, the next 700 held out.

    Args:
        train_size: Training examples.
        batch_size: Of both loaders.
    """

    def __init__(self, train_size: int = 200, batch_size: int = 20) -> None:
        super().__init__()
        self.train_size = train_size
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        data = load_digits()
        images = torch.tensor(data.data / 16, dtype=torch.float32)
        self.data = TensorDataset(images, torch.tensor(data.target))
        self.order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))

    def train_dataloader(self) -> DataLoader:
        chosen = self.order[: self.train_size].tolist()
        return DataLoader(Subset(self.data, chosen), self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        held_out = self.order[self.train_size :][:700].tolist()
        return DataLoader(Subset(self.data, held_out), self.batch_size)


class CLI(LightningCLI):
    def after_fit(self) -> None:
        print({name: f"{value:.2g}" for name, value in fixed_values(self.model).items()})


def main(args: ArgsType = None) -> CLI:
    return CLI(LitDigits, Digits, args=args)


if __name__ == "__main__":
    main()
