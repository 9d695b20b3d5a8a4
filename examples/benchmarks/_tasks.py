"""The tasks of unattended.py: small trainings in which a hyperparameter decides how well they end.

Each is a function that makes a module with its hyperparameters at given values, and its data. The
training sets are small, so that regularization matters; what is held out is large, so that its loss
can be trusted. Tasks were split before anything was tuned on them: those marked ``held_back`` are
looked at for the final table only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from lightning_hpo import (
    DropoutMixin,
    ExampleWeightMixin,
    GaussianNoiseMixin,
    Hyperparameter,
    L2Mixin,
    LabelSmoothing,
    LossWeightMixin,
    Positive,
)

Values = Mapping[str, Any]
Sets = tuple[TensorDataset, TensorDataset, TensorDataset]

# --------------------------------------------------------------------------------------------------
# What a task is
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Axis:
    """A direction in which a grid and a random search look for values.

    Args:
        sensible: What one would take by habit.
        scale: ``"log"``: strengths; ``"logit"``: strengths below 1; ``"keep"``: keep probabilities,
            where more regularization is *less*.
    """

    sensible: float
    scale: str = "log"

    def at(self, decades: float) -> float:
        """Returns the value so many decades (of the odds, below 1) stronger than the sensible."""
        if self.scale == "log":
            return float(f"{self.sensible * 10**decades:.6g}")
        sign = -1 if self.scale == "keep" else 1
        odds = self.sensible / (1 - self.sensible) * 10 ** (sign * decades)
        return float(f"{odds / (1 + odds):.6g}")


@dataclass
class Problem:
    """One training that is ready to start."""

    module: Lit
    train: DataLoader
    held_out: TensorDataset
    test: TensorDataset

    @property
    def steps(self) -> int:
        """The length of the training."""
        return self.module.steps


@dataclass(frozen=True)
class Task:
    """A task, and where to look for its hyperparameters.

    Args:
        name: Of the function that makes it.
        split: ``"develop"`` or ``"held_back"``.
        axes: By the names of hyperparameters; options of the optimizer are ``optimizer.<option>``.
        make: Makes the training from values, a seed and the folder of data.
        data: The folder that it needs below ``--data-dir``; empty for scikit-learn's own data.
        spread: Makes the values of the hyperparameters from those on the axes, where they are more;
            not for starts, which do not know better.
        auto: Hyperparameters whose start may be ``"auto"``.
    """

    name: str
    split: str
    axes: dict[str, Axis]
    make: Callable[[Values, int, Path | None], Problem]
    data: str = ""
    spread: Callable[[Values], Values] | None = None
    auto: bool = False

    @property
    def description(self) -> str:
        """What the function that makes it says of it."""
        return (self.make.__doc__ or "").removesuffix(".")

    @property
    def options(self) -> list[str]:
        """Options of the optimizer that are tuned."""
        return [n.removeprefix("optimizer.") for n in self.axes if n.startswith("optimizer.")]

    def at(self, decades: float | Sequence[float]) -> dict[str, float]:
        """Returns values on all axes, moved together by so many decades, or each by its own."""
        each = [decades] * len(self.axes) if isinstance(decades, (int, float)) else decades
        pairs = zip(self.axes.items(), each, strict=True)
        return {name: axis.at(d) for (name, axis), d in pairs}

    def expanded(self, values: Values) -> Values:
        """Returns the values of the hyperparameters for values on the axes."""
        return values if self.spread is None else self.spread(values)

    def grid(self) -> dict[str, Values]:
        """Returns nine values from two decades below the sensible to two above, by the decades."""
        return {f"{k / 2:+.1f}": self.expanded(self.at(k / 2)) for k in range(-4, 5)}

    def left_alone(self) -> dict[str, tuple[str, Values]]:
        """Returns for each start the name and the values of the training that stays there.

        The name is that of the grid, where the start is on it.
        """
        names = {json.dumps(values): name for name, values in self.grid().items()}
        return {
            start: (names.get(json.dumps(values), start), values)
            for start, values in self.starts().items()
        }

    def starts(self) -> dict[str, Values]:
        """Returns the starts by name: sensible, two decades to either side, those of the paper."""
        starts: dict[str, Values] = {"sensible": self.at(0), "low": self.at(-2), "high": self.at(2)}
        if self.auto:
            starts["auto"] = dict.fromkeys(self.axes, "auto")
        if self.auto and not self.options:
            for exponent in range(-6, 0):
                starts[f"1e{exponent}"] = dict.fromkeys(self.axes, 10.0**exponent)
        return starts


TASKS: dict[str, Task] = {}


def task(split: str, axes: dict[str, Axis], **more: Any) -> Callable[[Any], Any]:
    """Adds the function below to the tasks."""

    def add(make: Any) -> Any:
        name = make.__name__.replace("_", "-")
        TASKS[name] = Task(name, split, axes, make, **more)
        return make

    return add


# --------------------------------------------------------------------------------------------------
# Modules
# --------------------------------------------------------------------------------------------------

Optimizer = Callable[[Any], torch.optim.Optimizer]


class Lit(
    L2Mixin,
    GaussianNoiseMixin,
    DropoutMixin,
    LossWeightMixin,
    ExampleWeightMixin,
    lightning.LightningModule,
):
    """Any network with any loss, and a learning rate that falls as a cosine.

    Args:
        net: The network.
        optimizer: Makes the optimizer from the parameters.
        steps: The length of the training.
        loss: Of the network's output and the target.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: Optimizer,
        steps: int,
        loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    ) -> None:
        super().__init__()
        self.net = net
        self.optimizer = optimizer
        self.steps = steps
        self.loss = loss

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return self.loss(self.net(x), y)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return self.loss(self.net(x), y)

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(self.parameters())
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(cosine, steps=self.steps))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def cosine(step: int, steps: int) -> float:
    """Returns the part of the learning rate that is left."""
    return 0.5 * (1 + math.cos(math.pi * min(step / steps, 1.0)))


def sgd(rate: float, momentum: float = 0.9) -> Optimizer:
    return partial(torch.optim.SGD, lr=rate, momentum=momentum)


def adam(rate: float) -> Optimizer:
    return partial(torch.optim.Adam, lr=rate)


def adamw(rate: float, weight_decay: float = 0.0) -> Optimizer:
    return partial(torch.optim.AdamW, lr=rate, weight_decay=weight_decay)


def mlp(*sizes: int, dropout: float = 0.0) -> nn.Sequential:
    """Linear layers with ReLU between them, and dropout after each ReLU where asked for."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes[:-1]):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        layers += [nn.Dropout(dropout)] if dropout else []
    return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1]))


def cnn(colors: int, size: int, dropout: float = 0.0) -> nn.Sequential:
    """Three convolutions with BatchNorm, and two linear layers, over images of size × size."""

    def block(inputs: int, outputs: int, *then: nn.Module) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(outputs), nn.ReLU(), *then]

    def drop() -> list[nn.Module]:
        return [nn.Dropout(dropout)] if dropout else []

    return nn.Sequential(
        *block(colors, 16, nn.MaxPool2d(2), *drop()),
        *block(16, 32, nn.MaxPool2d(2), *drop()),
        *block(32, 64, nn.Flatten(), *drop()),
        nn.Linear(64 * (size // 4) ** 2, 100),
        nn.ReLU(),
        *drop(),
        nn.Linear(100, 10),
    )


class LanguageModel(nn.Module):
    """Two LSTM layers, with dropout before, between and after them."""

    def __init__(self, letters: int, width: int, dropout: float) -> None:
        super().__init__()
        self.embed = nn.Embedding(letters, width)
        self.drop_input = nn.Dropout(dropout)
        self.rnn = nn.LSTM(width, width, 2, batch_first=True, dropout=dropout)
        self.drop_output = nn.Dropout(dropout)
        self.head = nn.Linear(width, letters)

    def forward(self, x: Tensor) -> Tensor:
        hidden, _ = self.rnn(self.drop_input(self.embed(x)))
        logits: Tensor = self.head(self.drop_output(hidden))
        return logits.flatten(0, 1)


class Transformer(nn.Module):
    """Two encoder layers over the rows of a picture."""

    def __init__(self, rows: int, inputs: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Linear(inputs, width)
        self.place = nn.Parameter(0.02 * torch.randn(rows, width))
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.unflatten(1, (len(self.place), -1))
        logits: Tensor = self.head(self.encoder(self.embed(rows) + self.place).mean(1))
        return logits


class Shift(nn.Module):
    """Shifts each picture by a random distance of up to ``pixels`` both ways, in training only.

    Between pixels it interpolates, so that the result is differentiable in the distance.
    """

    def __init__(self, pixels: float) -> None:
        super().__init__()
        self.pixels = Hyperparameter(pixels, Positive())

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        count, _, height, width = x.shape
        distance = self.pixels() * (2 * torch.rand(2, count, 1, 1, device=x.device) - 1)
        vertical, horizontal = (
            (1 - (torch.arange(n)[:, None] - torch.arange(n) + d).abs()).relu()
            for n, d in zip((height, width), distance, strict=True)
        )
        return (vertical @ x.squeeze(1) @ horizontal.mT).unsqueeze(1)


# --------------------------------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------------------------------


def batches(data: TensorDataset, size: int, steps: int) -> DataLoader:
    """Returns a loader of so many batches in one epoch, over one permutation after another.

    It indexes the tensors once per batch: collating single examples would take most of the time.
    """
    draws = RandomSampler(data, num_samples=size * steps)
    return DataLoader(data, batch_size=None, sampler=BatchSampler(draws, size, drop_last=False))


def split(tensors: Sequence[Tensor], seed: int, train: int, held_out: int, test: int) -> Sets:
    """Divides examples: held-out and test sets are always the same, training sets by the seed."""
    order = torch.randperm(len(tensors[0]), generator=torch.Generator().manual_seed(0))
    pool = order[held_out + test :]
    drawn = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))[:train]
    parts = pool[drawn], order[:held_out], order[held_out : held_out + test]
    training, held, tested = (TensorDataset(*(t[part] for t in tensors)) for part in parts)
    return training, held, tested


@cache
def load_digits() -> tuple[Tensor, Tensor]:
    """Returns scikit-learn's 1 797 digits as 64 numbers between 0 and 1, and their labels."""
    from sklearn.datasets import load_digits as load

    data = load()
    return torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)


@cache
def load_diabetes() -> tuple[Tensor, Tensor]:
    """Returns scikit-learn's 442 patients: ten numbers, and how their illness went on."""
    from sklearn.datasets import load_diabetes as load

    data = load()
    x = torch.tensor(data.data, dtype=torch.float32)
    y = torch.tensor(data.target, dtype=torch.float32)[:, None]
    return (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()


@cache
def load_mnist(folder: Path, count: int = 10_000) -> tuple[Tensor, Tensor]:
    """Returns the first MNIST images as 784 numbers between 0 and 1, and their labels."""
    from torchvision.datasets import MNIST

    data = MNIST(root=str(folder), train=True)
    return data.data[:count].flatten(1).float() / 255, data.targets[:count]


@cache
def load_cifar(folder: Path, count: int = 6_000) -> tuple[Tensor, Tensor]:
    """Returns the first CIFAR-10 images, shrunk to 16 × 16 and standardized, and their labels."""
    import numpy
    from torchvision.io import decode_jpeg

    with numpy.load(folder / "cifar10" / "cifar10_jpeg.npz") as data:
        stream, offsets = torch.from_numpy(data["train_jpeg"]), data["train_offsets"]
        labels = torch.from_numpy(data["train_labels"][:count]).long()
    images = torch.stack([decode_jpeg(stream[a:b]) for a, b in pairwise(offsets[: count + 1])])
    small = F.avg_pool2d(images.float(), 2)
    return (small - small.mean((0, 2, 3), keepdim=True)) / small.std(), labels


@cache
def load_ptb(folder: Path, length: int) -> tuple[Tensor, Tensor]:
    """Returns windows of the Penn Treebank (its validation part) and the letters that follow.

    Letters, since a few thousand words are too few to learn more from than their frequencies.
    """
    text = (folder / "ptb" / "ptb.valid.txt").read_text()
    known = {letter: i for i, letter in enumerate(sorted(set(text)))}
    numbers = torch.tensor([known[letter] for letter in text])
    windows = numbers.unfold(0, length + 1, length)
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


# --------------------------------------------------------------------------------------------------
# Tasks to develop on
# --------------------------------------------------------------------------------------------------


@task("develop", {"l2": Axis(1e-3)}, auto=True)
def digits_l2(values: Values, seed: int, folder: Path | None) -> Problem:
    """L2, one strength. MLP, SGD with momentum, 200 digits."""
    train, *rest = split(load_digits(), seed, 200, 600, 597)
    module = Lit(mlp(64, 250, 250, 10), sgd(0.02), 2500)
    module.register_l2(values["l2"])
    return Problem(module, batches(train, 100, module.steps), *rest)


@task("develop", {"l2": Axis(1e-2)}, auto=True)
def diabetes_l2(values: Values, seed: int, folder: Path | None) -> Problem:
    """L2, one strength. MLP for a regression, Adam, 150 patients."""
    train, *rest = split(load_diabetes(), seed, 150, 146, 146)
    module = Lit(mlp(10, 150, 150, 1), adam(3e-3), 3000, F.mse_loss)
    module.register_l2(values["l2"])
    return Problem(module, batches(train, 75, module.steps), *rest)


CNN_LAYERS = ("0", "4", "8", "12", "14")


@task("develop", {f"l2.net.{k}": Axis(3e-3) for k in CNN_LAYERS}, data="cifar10", auto=True)
def cifar_l2_layers(values: Values, seed: int, folder: Path) -> Problem:
    """L2 of each layer. CNN with BatchNorm, SGD with momentum, 2 000 CIFAR-10 images."""
    train, *rest = split(load_cifar(folder), seed, 2000, 2000, 2000)
    module = Lit(cnn(3, 16), sgd(0.05), 500)
    module.register_l2(next(iter(values.values())), granularity="layer")
    return Problem(module, batches(train, 50, module.steps), *rest)


@task("develop", {"keep": Axis(0.5, "keep")}, data="MNIST")
def mnist_dropout(values: Values, seed: int, folder: Path) -> Problem:
    """Dropout, one rate. Wide MLP, Adam, 500 MNIST images."""
    train, *rest = split(load_mnist(folder), seed, 500, 2000, 2000)
    module = Lit(mlp(784, 200, 200, 10, dropout=0.5), adam(1e-3), 1500)
    module.register_dropout(values["keep"])
    return Problem(module, batches(train, 64, module.steps), *rest)


LSTM_KEEPS = ("drop_input", "rnn", "drop_output")


@task("develop", {f"keep.net.{k}": Axis(0.5, "keep") for k in LSTM_KEEPS}, data="ptb")
def ptb_dropouts(values: Values, seed: int, folder: Path) -> Problem:
    """Dropout, three rates. LSTM, Adam, 5 000 letters of the Penn Treebank."""
    inputs, targets = load_ptb(folder, 25)
    train, *rest = split((inputs, targets), seed, 200, 1000, 1000)
    net = LanguageModel(int(inputs.max()) + 1, 96, 0.5)
    module = Lit(net, adam(1e-2), 600, letter_loss)
    module.register_dropout(tied=False)
    return Problem(module, batches(train, 10, module.steps), *rest)


def letter_loss(logits: Tensor, letters: Tensor) -> Tensor:
    return F.cross_entropy(logits, letters.flatten())


@task("develop", {"optimizer.weight_decay": Axis(0.1)}, data="MNIST", auto=True)
def mnist_decay(values: Values, seed: int, folder: Path) -> Problem:
    """Decoupled weight decay. Transformer, AdamW, 200 MNIST images."""
    images, labels = load_mnist(folder)
    rows = F.avg_pool2d(images.unflatten(1, (1, 28, 28)), 2).flatten(1)  # 7 rows of 28 numbers
    train, *rest = split((rows, labels), seed, 200, 2000, 2000)
    decay = values["optimizer.weight_decay"]
    # Where it is "auto", the callback puts it in place.
    optimizer = adamw(2e-3, 0.0 if decay == "auto" else decay)
    module = Lit(Transformer(7, 28, 64), optimizer, 600)
    return Problem(module, batches(train, 32, module.steps), *rest)


@task("develop", {"optimizer.lr": Axis(0.02)})
def digits_rate(values: Values, seed: int, folder: Path | None) -> Problem:
    """Learning rate, scheduled. MLP, SGD with momentum, 600 digits."""
    train, *rest = split(load_digits(), seed, 600, 600, 597)
    module = Lit(mlp(64, 250, 250, 10), sgd(values["optimizer.lr"]), 2500)
    return Problem(module, batches(train, 100, module.steps), *rest)


@task(
    "develop",
    {
        "l2": Axis(1e-3),
        "keep": Axis(0.8, "keep"),
        "noise": Axis(0.1),
        "loss.epsilon": Axis(0.05, "logit"),
    },
)
def digits_four(values: Values, seed: int, folder: Path | None) -> Problem:
    """L2, dropout, input noise and label smoothing at once. MLP, Adam, 200 digits."""
    train, *rest = split(load_digits(), seed, 200, 600, 597)
    smoothing = LabelSmoothing(values["loss.epsilon"])
    module = Lit(mlp(64, 250, 250, 10, dropout=0.5), adam(2e-3), 1500, smoothing)
    module.register_l2(values["l2"])
    module.register_dropout(values["keep"])
    module.register_noise(values["noise"])
    return Problem(module, batches(train, 50, module.steps), *rest)


CLEAN = 20  # the first so many of 1 000 labels can be trusted


class Cleaning(Lit):
    """Weighs its examples."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y, index = batch
        return self.weighted_mean(F.cross_entropy(self.net(x), y, reduction="none"), index)


def weigh(values: Values, count: int) -> Values:
    """Gives full weight to labels that can be trusted, and one common weight to the others.

    That is the square of the value on the axis: there are so many of them that it must reach low.
    """
    weights = torch.full((count,), float(values["example_weights"]) ** 2)
    weights[:CLEAN] = 1.0
    return {"example_weights": weights.tolist()}


@task("develop", {"example_weights": Axis(0.5, "logit")}, spread=partial(weigh, count=1000))
def digits_cleaning(values: Values, seed: int, folder: Path | None) -> Problem:
    """Weights of 1 000 examples, of which 980 have doubtful labels. MLP, Adam, 1 000 digits."""
    (x, y), *rest = (data.tensors for data in split(load_digits(), seed, 1000, 500, 297))
    index = torch.arange(1000)
    wrong = torch.rand(1000, generator=torch.Generator().manual_seed(seed)) < 0.3
    labels = torch.where(wrong & (index >= CLEAN), (y + 1) % 10, y)
    module = Cleaning(mlp(64, 250, 250, 10), adam(1e-3), 1700)
    module.register_example_weights(1000)
    train = batches(TensorDataset(x, labels, index), 100, module.steps)
    return Problem(module, train, *(TensorDataset(*tensors) for tensors in rest))


@task("develop", {"net.0.pixels": Axis(1.0)}, data="MNIST")
def mnist_augment(values: Values, seed: int, folder: Path) -> Problem:
    """Strength of an augmentation, random shifts. MLP, AdamW, 200 MNIST images."""
    images, labels = load_mnist(folder)
    small = F.avg_pool2d(images.unflatten(1, (1, 28, 28)), 2)
    train, *rest = split((small, labels), seed, 200, 2000, 2000)
    net = nn.Sequential(Shift(values["net.0.pixels"]), nn.Flatten(), *mlp(196, 200, 200, 10))
    module = Lit(net, adamw(2e-3), 1500)
    return Problem(module, batches(train, 50, module.steps), *rest)


# --------------------------------------------------------------------------------------------------
# Tasks that are held back
# --------------------------------------------------------------------------------------------------


@task("held_back", {"l2": Axis(1e-3)}, data="MNIST", auto=True)
def mnist_l2(values: Values, seed: int, folder: Path) -> Problem:
    """L2, one strength. MLP, SGD, 500 MNIST images."""
    train, *rest = split(load_mnist(folder), seed, 500, 2000, 2000)
    module = Lit(mlp(784, 200, 200, 10), sgd(0.1, 0.0), 1500)
    module.register_l2(values["l2"])
    return Problem(module, batches(train, 100, module.steps), *rest)


CNN_KEEPS = ("4", "9", "14", "17")


@task("held_back", {f"keep.net.{k}": Axis(0.8, "keep") for k in CNN_KEEPS}, data="cifar10")
def cifar_dropouts(values: Values, seed: int, folder: Path) -> Problem:
    """Dropout, four rates. CNN with BatchNorm, AdamW, 1 000 CIFAR-10 images."""
    train, *rest = split(load_cifar(folder), seed, 1000, 2000, 2000)
    module = Lit(cnn(3, 16, dropout=0.5), adamw(2e-3), 500)
    module.register_dropout(tied=False)
    return Problem(module, batches(train, 32, module.steps), *rest)


@task("held_back", {"loss.epsilon": Axis(0.1, "logit")})
def digits_smoothing(values: Values, seed: int, folder: Path | None) -> Problem:
    """Label smoothing. MLP, Adam, 300 digits."""
    train, *rest = split(load_digits(), seed, 300, 600, 597)
    smoothing = LabelSmoothing(values["loss.epsilon"])
    module = Lit(mlp(64, 250, 250, 10), adam(2e-3), 1500, smoothing)
    return Problem(module, batches(train, 100, module.steps), *rest)


LABELED, UNKNOWN = 50, -1


class Multitask(Lit):
    """Learns from few digits, from a property of many, and from guesses at many."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.kind = nn.Linear(150, 4)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, digit, kind, guess = batch
        features = self.net[:-1](x)
        logits = self.net[-1](features)
        return self.weighted_loss(
            F.cross_entropy(logits, digit, ignore_index=UNKNOWN),
            kind=F.cross_entropy(self.kind(features), kind),
            guess=F.cross_entropy(logits, guess),
        )


@task("held_back", {f"loss_weights.{k}": Axis(0.1) for k in ("kind", "guess")})
def digits_multitask(values: Values, seed: int, folder: Path | None) -> Problem:
    """Weights of two auxiliary losses. MLP, Adam, 50 digits, a property of 500, guesses at 500."""
    (x, y), *rest = (data.tensors for data in split(load_digits(), seed, 500, 600, 597))
    generator = torch.Generator().manual_seed(seed)
    known = torch.where(torch.arange(len(y)) < LABELED, y, UNKNOWN)
    is_right = torch.rand(len(y), generator=generator) < 0.6
    guess = torch.where(is_right, y, torch.randint(10, y.shape, generator=generator))
    module = Multitask(mlp(64, 150, 150, 10), adam(2e-3), 2000)
    module.register_loss_weights({"kind": 1.0, "guess": 1.0})
    train = batches(TensorDataset(x, known, y % 2 + 2 * (y > 4), guess), 100, module.steps)
    return Problem(module, train, *(TensorDataset(*tensors) for tensors in rest))


@task("held_back", {"noise": Axis(0.3), "hidden_noise": Axis(0.3)})
def digits_noise(values: Values, seed: int, folder: Path | None) -> Problem:
    """Noise at the input and before hidden layers. MLP, SGD with momentum, 200 digits."""
    train, *rest = split(load_digits(), seed, 200, 600, 597)
    module = Lit(mlp(64, 250, 250, 10), sgd(0.02), 2000)
    module.register_noise(values["noise"])
    module.register_noise(values["hidden_noise"], at=["net.2", "net.4"], name="hidden_noise")
    return Problem(module, batches(train, 100, module.steps), *rest)
