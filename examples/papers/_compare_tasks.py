"""The tasks of compare.py: small trainings in which a few strengths decide how well they end.

The training sets are small, so that regularization matters; what is held out is large, so that its
loss can be trusted (of the 442 patients of the regression a third).
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning
import torch
from _data import cifar, mnist
from _experiment import trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from lightning_hpo import DropoutMixin, GaussianNoiseMixin, L2Mixin, freeze

Values = Mapping[str, float]
"""Strengths by the names of axes. Of dropout it is the rate, not the keep probability."""


@dataclass(frozen=True)
class Axis:
    """Where a search looks for a strength, and where ours starts."""

    low: float
    high: float
    sensible: float
    bad: float
    log: bool = True

    def clip(self, value: float) -> float:
        return min(max(value, self.low), self.high)

    def draw(self, draws: random.Random) -> float:
        if self.log:
            return math.exp(draws.uniform(math.log(self.low), math.log(self.high)))
        return draws.uniform(self.low, self.high)


L2 = Axis(1e-6, 1e-1, sensible=5e-4, bad=1e-6)
DROP = Axis(0.001, 0.8, sensible=0.5, bad=0.01, log=False)  # of units that are dropped
DROP_MAPS = Axis(0.001, 0.8, sensible=0.2, bad=0.01, log=False)
NOISE = Axis(1e-3, 1.0, sensible=0.1, bad=1e-3)
DECAY = Axis(1e-4, 100.0, sensible=1e-2, bad=1e-4)  # decoupled: acts times the learning rate


class Lit(L2Mixin, GaussianNoiseMixin, DropoutMixin, lightning.LightningModule):
    """Any network with any loss, and a learning rate that falls as a cosine."""

    def __init__(
        self,
        net: nn.Module,
        optimizer: Callable[..., torch.optim.Optimizer],
        steps: int,
        loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__()
        self.net = net
        self.optimizer = optimizer
        self.steps = steps
        self.loss = loss
        self.weight_decay = weight_decay

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(self.parameters(), weight_decay=self.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(cosine, steps=self.steps))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def cosine(step: int, steps: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * min(step / steps, 1.0)))


sgd = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
adam = partial(torch.optim.Adam, lr=2e-3)
adamw = partial(torch.optim.AdamW, lr=2e-3)


def mlp(*sizes: int, dropout: float = 0.0) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes[:-1]):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        layers += [nn.Dropout(dropout)] if dropout else []
    return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1]))


def cnn(*maps: int) -> nn.Sequential:
    """Convolutions with BatchNorm over images of 16 × 16, and two linear layers."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(maps):
        convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout()]
    side = 16 // 2 ** (len(maps) - 1)
    head = [nn.Linear(maps[-1] * side**2, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 10)]
    return nn.Sequential(*layers, nn.Flatten(), *head)


class LanguageModel(nn.Module):
    """Two LSTM layers, with dropout before, between and after them."""

    def __init__(self, letters: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(letters, width)
        self.drop_input = nn.Dropout()
        self.rnn = nn.LSTM(width, width, 2, batch_first=True, dropout=0.5)
        self.drop_output = nn.Dropout()
        self.head = nn.Linear(width, letters)

    def forward(self, x: Tensor) -> Tensor:
        hidden, _ = self.rnn(self.drop_input(self.embed(x)))
        logits: Tensor = self.head(self.drop_output(hidden))
        return logits.flatten(0, 1)


def letter_loss(logits: Tensor, letters: Tensor) -> Tensor:
    return F.cross_entropy(logits, letters.flatten())


@dataclass(frozen=True)
class Task:
    """A training, and what is tuned in it.

    Attributes:
        title: What it is.
        axes: By the names that hyperparameters have in the module; ``optimizer.`` stands before an
            option of the optimizer. Axes of keep probabilities are those of the dropped part.
        make: Makes the module from a start, a strength for each kind, and its number of steps.
        data: Makes the tensors.
        train: Examples to train on.
        held_out: As many held-out ones, and as many to test.
        batch: The size of a batch.
        steps: Of a training.
    """

    title: str
    axes: dict[str, Axis]
    make: Callable[[Values, int], Lit]
    data: Callable[[Path], tuple[Tensor, Tensor]]
    train: int
    held_out: int
    batch: int
    steps: int


def make_mnist(start: Values, steps: int) -> Lit:
    module = Lit(mlp(784, 100, 100, 100, 10), sgd, steps)
    module.register_l2(start["l2"], granularity="layer")
    return module


def make_digits(start: Values, steps: int) -> Lit:
    module = Lit(mlp(64, 100, 100, 10, dropout=0.5), adam, steps)
    module.register_l2(start["l2"])
    module.register_dropout(start["keep"])
    module.register_noise(start["noise"])
    return module


def make_cifar(start: Values, steps: int) -> Lit:
    module = Lit(cnn(3, 12, 24, 48), adam, steps)
    module.register_dropout(start["keep"], tied=False)
    return module


def make_diabetes(start: Values, steps: int) -> Lit:
    return Lit(mlp(10, 100, 100, 1), adamw, steps, F.mse_loss, start["optimizer"])


def make_ptb(start: Values, steps: int) -> Lit:
    module = Lit(LanguageModel(60, 64), partial(adam, lr=1e-2), steps, letter_loss)
    module.register_dropout(start["keep"], tied=False)
    return module


@cache
def digits_data(folder: Path) -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)


@cache
def cifar_data(folder: Path) -> tuple[Tensor, Tensor]:
    """Shrinks the images to 16 × 16, and standardizes them."""
    images, labels = cifar(folder, "train")
    small = F.avg_pool2d(images, 2)
    return (small - small.mean((0, 2, 3), keepdim=True)) / small.std(), labels


@cache
def diabetes_data(folder: Path) -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_diabetes

    data = load_diabetes()
    x = torch.tensor(data.data, dtype=torch.float32)
    y = torch.tensor(data.target, dtype=torch.float32)[:, None]
    return (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()


@cache
def ptb_data(folder: Path) -> tuple[Tensor, Tensor]:
    """Returns windows of 25 letters of the validation part, and the letters that follow each."""
    text = (folder / "ptb" / "ptb.valid.txt").read_text()
    known = {letter: i for i, letter in enumerate(sorted(set(text)))}
    windows = torch.tensor([known[letter] for letter in text]).unfold(0, 26, 25)
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


TASKS = {
    "mnist": Task(
        "MNIST, MLP, SGD with momentum: an L2 for each of four layers",
        {f"l2.net.{k}": L2 for k in (0, 2, 4, 6)},
        make_mnist, partial(mnist, part="train"), 500, 2000, 50, 1200,
    ),
    "digits": Task(
        "Digits, MLP, Adam: L2, input noise and dropout",
        {"l2": L2, "noise": NOISE, "keep": DROP},
        make_digits, digits_data, 200, 600, 50, 1200,
    ),
    "cifar": Task(
        "CIFAR-10, CNN with BatchNorm, Adam: four dropout rates",
        {f"keep.net.{k}": DROP_MAPS for k in (4, 9, 14, 18)},
        make_cifar, cifar_data, 1000, 2000, 32, 500,
    ),
    "diabetes": Task(
        "Diabetes, MLP for a regression, AdamW: weight decay",
        {"optimizer.weight_decay": DECAY},
        make_diabetes, diabetes_data, 150, 146, 50, 1000,
    ),
    "ptb": Task(
        "Penn Treebank (letters), LSTM, Adam: three dropout rates",
        {f"keep.net.{k}": DROP for k in ("drop_input", "rnn", "drop_output")},
        make_ptb, ptb_data, 200, 1000, 10, 400,
    ),
}  # fmt: skip


@dataclass
class Problem:
    """One training that is ready to start, and its data."""

    module: Lit
    train: TensorDataset
    held_out: TensorDataset
    test: TensorDataset
    batch: int
    accelerator: str

    @property
    def steps(self) -> int:
        """The length of the whole training."""
        return self.module.steps

    def fit(self, callbacks: Sequence[Callback] = (), steps: int | None = None) -> float:
        """Trains, and returns the CPU seconds that it took."""
        steps = steps or self.steps
        draws = RandomSampler(self.train, num_samples=steps * self.batch)
        begin = time.process_time()
        fitting = trainer(steps, callbacks, accelerator=self.accelerator)
        fitting.fit(self.module, loader(self.train, draws, self.batch))
        return time.process_time() - begin

    def losses(self) -> tuple[float, float]:
        """Returns the mean loss over all held-out examples, and over those to test."""
        return evaluate(self.module, self.held_out), evaluate(self.module, self.test)


def loader(data: TensorDataset, draws: Any, size: int) -> DataLoader:
    """Returns a loader that indexes the tensors once per batch."""
    return DataLoader(data, batch_size=None, sampler=BatchSampler(draws, size, drop_last=True))


@torch.no_grad()
def evaluate(module: Lit, data: TensorDataset) -> float:
    """Returns the mean loss over all of a set, as it is when nothing is dropped."""
    was_training = module.training
    module.eval()
    total = 0.0
    tensors = [tensor.to(module.device).split(500) for tensor in data.tensors]
    for batch in zip(*tensors, strict=True):
        total += module.validation_step(list(batch), 0).item() * len(batch[0])
    module.train(was_training)
    return total / len(data)


# So many times the examples to train on, as far as there are, and so many times the steps.
SCALES = {"tiny": (0.5, 0.02), "small": (1.0, 1.0), "paper": (10.0, 5.0)}


def make(task: Task, start: Values, seed: int, scale: str, folder: Path) -> Problem:
    """Makes a training whose strengths are still free, at a start.

    Held-out and test examples are always the same; those to train on, the initial weights and the
    batches come from the seed.

    Args:
        task: What is trained.
        start: A strength for each axis; axes of one kind start alike.
        seed: Of the training.
        scale: Of ``SCALES``.
        folder: Of the data.
    """
    more, longer = SCALES[scale]
    x, y = task.data(folder)
    held_out = min(task.held_out, len(x) // 3)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    pool = order[2 * held_out :]
    drawn = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
    parts = (pool[drawn[: int(task.train * more)]], *order[: 2 * held_out].split(held_out))
    sets = [TensorDataset(x[part], y[part]) for part in parts]
    lightning.seed_everything(seed, verbose=False)
    kinds = {name.split(".")[0]: value for name, value in to_module(start).items()}
    module = task.make(kinds, int(task.steps * longer))
    return Problem(module, *sets, task.batch, "auto" if scale == "paper" else "cpu")


def start_of(task: Task, which: str) -> dict[str, float]:
    """Returns the sensible or the bad start of each axis."""
    return {name: getattr(axis, which) for name, axis in task.axes.items()}


def to_module(values: Values) -> dict[str, float]:
    """Returns the values as the module has them: keep probabilities for dropout rates."""
    return {name: 1 - v if name.startswith("keep") else v for name, v in values.items()}


def fix(module: Lit, values: Values) -> None:
    """Gives the strengths of a module these values, and leaves them there."""
    own = to_module(values)
    module.weight_decay = own.pop("optimizer.weight_decay", module.weight_decay)
    freeze(module, own)
