"""The data sets of the experiments, as tensors; read from ``--data-dir``, never downloaded."""

from __future__ import annotations

from collections import Counter
from functools import cache
from io import BytesIO
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
)


@cache
def mnist(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Returns images of MNIST as 784 numbers between 0 and 1 each, and their labels.

    Args:
        folder: ``DATA``; ``DATA/MNIST/raw`` has the four files.
        part: ``"train"`` (60 000 of them, in no order) or ``"test"`` (10 000).
    """
    from torchvision.datasets import MNIST

    data = MNIST(root=str(folder), train=part == "train")
    return data.data.flatten(1).float() / 255, data.targets


@cache
def cifar(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Returns images of CIFAR-10, ``(n, 3, 32, 32)`` between 0 and 1, and their labels.

    Args:
        folder: ``DATA``; ``DATA/cifar10/cifar10_jpeg.npz`` holds them as JPEG.
        part: ``"train"`` (25 000 of them) or ``"test"`` (5 000).
    """
    import numpy
    from PIL import Image

    with numpy.load(folder / "cifar10" / "cifar10_jpeg.npz") as data:
        stream, offsets = data[f"{part}_jpeg"].tobytes(), data[f"{part}_offsets"]
        labels = torch.from_numpy(data[f"{part}_labels"]).long()
    files = (BytesIO(stream[a:b]) for a, b in pairwise(offsets))
    images = torch.from_numpy(numpy.stack([numpy.asarray(Image.open(file)) for file in files]))
    return images.permute(0, 3, 1, 2).float() / 255, labels


@cache
def penn_treebank(
    folder: Path, part: str = "test", kinds: int | None = None
) -> tuple[Tensor, Tensor, int]:
    """Returns the words to train on and those of the validation part, and how many are known.

    Words are numbers; a sentence ends with one of its own. All that are not known are one word.

    Args:
        folder: ``DATA``; ``DATA/ptb`` has ``ptb.test.txt`` and so on.
        part: To train on: ``"test"`` (79 000 words) or ``"train"`` (930 000).
        kinds: How many are known at most, the most frequent ones. Default: all of ``part``.
    """
    train, other = (
        (folder / "ptb" / f"ptb.{name}.txt").read_text().replace("\n", " <eos> ").split()
        for name in (part, "valid")
    )
    known = {"<unk>"} | {word for word, _ in Counter(train).most_common(kinds)}
    numbers = {word: i for i, word in enumerate(sorted(known))}
    texts = [[numbers.get(w, numbers["<unk>"]) for w in words] for words in (train, other)]
    return torch.tensor(texts[0]), torch.tensor(texts[1]), len(numbers)


def batches(data: TensorDataset, size: int, *, shuffle: bool = False) -> DataLoader:
    """Returns a loader that indexes the tensors once per batch; collating would take most time."""
    sampler = RandomSampler(data) if shuffle else SequentialSampler(data)
    return DataLoader(data, batch_size=None, sampler=BatchSampler(sampler, size, drop_last=False))
