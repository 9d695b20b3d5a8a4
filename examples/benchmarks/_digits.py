"""What the benchmarks of choices train with: digits, a silent Trainer, and the evaluation."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="lightning")
torch.set_num_threads(1)  # threads do not pay for matrices this small


def digits(*sizes: int) -> list[TensorDataset]:
    """Returns disjoint sets of 8×8 images (64 numbers between 0 and 1) and their labels."""
    data = load_digits()
    images = torch.tensor(data.data, dtype=torch.float32) / 16
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return [TensorDataset(images[i], labels[i]) for i in order[: sum(sizes)].split(sizes)]


def batches(data: TensorDataset, size: int, count: int | None = None) -> DataLoader:
    """Returns a loader that indexes the tensors once per batch, which saves most of its time.

    Args:
        data: The examples.
        size: Of a batch.
        count: Batches per epoch, drawn with replacement. Default: one pass over the data.
    """
    draws = RandomSampler(data, replacement=count is not None, num_samples=count and count * size)
    return DataLoader(data, batch_size=None, sampler=BatchSampler(draws, size, drop_last=False))


def fit(
    module: lightning.LightningModule,
    train: DataLoader,
    held_out: DataLoader,
    steps: int,
    callbacks: Sequence[Callback] = (),
) -> None:
    """Trains in silence; λ moves only where an ``OnlineHPOCallback`` is among the callbacks."""
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=list(callbacks),
        limit_val_batches=0,  # the callback still finds the held-out batches
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, train, held_out)


@torch.no_grad()
def evaluate(net: nn.Module, data: TensorDataset) -> tuple[float, float]:
    """Returns cross-entropy and accuracy."""
    images, labels = data.tensors[:2]
    net.eval()
    logits: Tensor = net(images)
    accuracy = (logits.argmax(1) == labels).float().mean()
    return F.cross_entropy(logits, labels).item(), accuracy.item()


def print_header(*columns: str) -> None:
    """Starts a table whose rows appear as the trainings end."""
    print(f"{'':34}" + "".join(f"{column:>18}" for column in columns), flush=True)


def print_row(name: str, *cells: str | float) -> None:
    """Adds a row: losses with four digits, texts as they are."""
    texts = (cell if isinstance(cell, str) else f"{cell:.4f}" for cell in cells)
    print(f"{name:34}" + "".join(f"{text:>18}" for text in texts), flush=True)
