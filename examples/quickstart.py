"""One training instead of a grid search: a network finds its own L2 strength while it learns.

A small network learns handwritten digits from few examples, so that it overfits unless the L2
strength λ is right. λ starts far too small: the callback takes that for a guess, begins where λ
begins to matter, and goes on from there by hypergradients. The script trains once with
``OnlineHPOCallback`` and once for each λ of a grid (the bad start is one of them), and compares.

    python examples/quickstart.py                    # scikit-learn's digits, nothing to download
    python examples/quickstart.py --data-dir DATA    # MNIST below DATA

It prints the losses and the cost of both ways, and draws λ and the validation loss over the
training (``--out``, default: quickstart.png).
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from dataclasses import dataclass
from statistics import median

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    Sampler,
    SequentialSampler,
    TensorDataset,
)

from lightning_hpo import L2Mixin, OnlineHPOCallback

START = 1e-6
GRID = [10.0**k for k in range(-6, 1)]
STEPS = 1500
CHECK_EVERY = 25

# --------------------------------------------------------------------------- the model and its data


class LitClassifier(L2Mixin, lightning.LightningModule):
    """An ordinary LightningModule: only ``L2Mixin`` and ``register_l2`` are added."""

    def __init__(self, inputs: int, l2: float) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(inputs, 100),
            nn.ReLU(),
            nn.Linear(100, 100),
            nn.ReLU(),
            nn.Linear(100, 10),
        )
        self.register_l2(init=l2)
        self.validation_losses: list[float] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self.net(images), labels)
        self.log("val_loss", loss, prog_bar=True)
        return loss

    def on_validation_epoch_end(self) -> None:
        self.validation_losses.append(self.trainer.callback_metrics["val_loss"].item())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


@dataclass
class Data:
    name: str
    train: TensorDataset
    validation: TensorDataset
    test: TensorDataset


def load(data_dir: str | None) -> Data:
    """Loads few training examples: where there are many, λ hardly matters."""
    if data_dir is None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = torch.tensor(digits.data, dtype=torch.float32) / 16
        labels = torch.tensor(digits.target)
        name, sizes = "digits", [100, 700, 997]
    else:
        from torchvision.datasets import MNIST

        try:
            sets = [MNIST(root=data_dir, train=train) for train in (True, False)]
        except RuntimeError:
            raise SystemExit(f"--data-dir {data_dir}: expected MNIST/raw below it") from None
        images = torch.cat([s.data for s in sets]).flatten(1).float() / 255
        labels = torch.cat([s.targets for s in sets])
        name, sizes = "MNIST", [300, 2000, 10_000]
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    parts = order[: sum(sizes)].split(sizes)
    return Data(name, *(TensorDataset(images[part], labels[part]) for part in parts))


def batches(data: TensorDataset, sampler: Sampler, size: int) -> DataLoader:
    """Indexes the tensors once per batch: collating single examples would take most of the time."""
    return DataLoader(data, batch_size=None, sampler=BatchSampler(sampler, size, drop_last=False))


# ----------------------------------------------------------------------------------------- training


@dataclass
class Result:
    """One training.

    Attributes:
        start: λ at its start.
        end: λ at its end.
        validation: Cross-entropy on the validation examples at the end.
        test: Cross-entropy on the test examples.
        accuracy: Accuracy on the test examples.
        seconds: Wall time.
        curve: Validation loss after every ``CHECK_EVERY`` steps.
    """

    start: float
    end: float
    validation: float
    test: float
    accuracy: float
    seconds: float
    curve: list[float]


def train(data: Data, l2: float, callbacks: list[Callback], seed: int) -> Result:
    """Trains from a start of λ; without an ``OnlineHPOCallback`` λ stays there."""
    lightning.seed_everything(seed, verbose=False)
    module = LitClassifier(data.train.tensors[0].shape[1], l2)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=callbacks,
        val_check_interval=CHECK_EVERY,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    # All steps are one epoch: with so few examples a pass over them would last only two steps.
    draws = RandomSampler(data.train, replacement=True, num_samples=50 * STEPS)
    start = time.perf_counter()
    trainer.fit(
        module,
        batches(data.train, draws, 50),
        batches(data.validation, SequentialSampler(data.validation), 100),
    )
    seconds = time.perf_counter() - start
    validation, _ = evaluate(module, data.validation)
    test, accuracy = evaluate(module, data.test)
    end = module.l2().item()
    return Result(l2, end, validation, test, accuracy, seconds, module.validation_losses)


@torch.no_grad()
def evaluate(module: LitClassifier, data: TensorDataset) -> tuple[float, float]:
    """Returns cross-entropy and accuracy."""
    images, labels = data.tensors
    logits = module.net(images)
    accuracy = (logits.argmax(1) == labels).float().mean()
    return F.cross_entropy(logits, labels).item(), accuracy.item()


# ------------------------------------------------------------------------------------------- report


def report(tuned: Result, frozen: Result, grid: list[Result]) -> None:
    """Prints the comparison."""
    best = min(grid, key=lambda result: result.validation)
    print(f"\n{'':28}{'λ':>16}  validation    test  test accuracy")
    for name, result in (
        ("tuned during one training", tuned),
        ("the same with λ frozen", frozen),
        (f"best of {len(grid)} fixed λ", best),
    ):
        lam = f"{result.start:.0e}"
        if result is tuned:
            lam += f" → {result.end:.1e}"
        print(
            f"{name:28}{lam:>16}  {result.validation:10.4f}  {result.test:6.4f}  "
            f"{result.accuracy:13.1%}"
        )
    plain = median(result.seconds for result in grid)
    print(
        f"\nThe tuned training took {tuned.seconds:.1f} s: {tuned.seconds / plain:.2f} times one "
        f"plain training of {plain:.1f} s. The grid took {len(grid)} of them."
    )


BLUE, RED, AMBER, GREY = "#1f5fbf", "#c8373d", "#c97a06", "#4b5563"
DASHED = (0, (5, 3))


def draw(
    path: str,
    lams: list[tuple[int, float]],
    tuned: Result,
    frozen: Result,
    grid: list[Result],
) -> None:
    """Draws λ after each step of its own, and the validation loss over the training."""
    best = min(grid, key=lambda result: result.validation)
    figure = Figure(figsize=(7.6, 6.0), dpi=110, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    figure.suptitle(
        "One training finds its own L2 strength", x=0.02, ha="left", fontsize=14, weight="bold"
    )

    best_name = f"best of {len(grid)}\nfixed λ"
    upper.axhline(best.start, color=AMBER, linestyle=DASHED, linewidth=2)
    at, values = zip(*lams, strict=True)
    upper.plot(at, values, color=BLUE, linewidth=2.2)
    for end in (0, -1):
        upper.plot(at[end], values[end], "o", color=BLUE, clip_on=False, zorder=5)
    upper.annotate(
        f"bad start, λ = {values[0]:.0e}",
        (0, values[0]),
        xytext=(8, -17),
        textcoords="offset points",
        va="center",
        color=BLUE,
    )
    label(
        upper, {f"tuned\nλ = {values[-1]:.1e}": (values[-1], BLUE), best_name: (best.start, AMBER)}
    )
    upper.set(yscale="log", ylim=(min(values) / 6, 10 * max(values)), ylabel="L2 strength λ")

    steps = range(CHECK_EVERY, STEPS + 1, CHECK_EVERY)
    lower.plot(steps, best.curve, color=AMBER, linestyle=DASHED, linewidth=2)
    lower.plot(steps, frozen.curve, color=RED, linewidth=2)
    lower.plot(steps, tuned.curve, color=BLUE, linewidth=2.2)
    label(lower, {"tuned": (tuned.curve[-1], BLUE), best_name: (best.curve[-1], AMBER)})
    label(lower, {"λ frozen at\nthe bad start": (frozen.curve[-1], RED)})
    top = 1.15 * max(frozen.curve[len(frozen.curve) // 4 :])
    lower.set(ylim=(0.9 * min(tuned.curve + best.curve), top), xlim=(0, STEPS))
    lower.set(xlabel="training step", ylabel="validation loss")

    for axes in (upper, lower):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(colors=GREY)
        axes.yaxis.label.set_color(GREY)
        axes.xaxis.label.set_color(GREY)
    figure.savefig(path)


def label(axes: Axes, lines: dict[str, tuple[float, str]]) -> None:
    """Names lines at their right ends: one, or two whose names must not run into each other."""
    by_height = sorted(lines.items(), key=lambda line: line[1][0])
    sides = ["center"] if len(lines) == 1 else ["top", "bottom"]
    for side, (text, (height, color)) in zip(sides, by_height, strict=True):
        axes.annotate(
            text,
            (1, height),
            xycoords=("axes fraction", "data"),
            xytext=(10, 0),
            textcoords="offset points",
            va=side,
            color=color,
            annotation_clip=False,
        )


# --------------------------------------------------------------------------------------------- main


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", help="folder with MNIST; default: bundled digits")
    parser.add_argument("--out", default="quickstart.png", help="where the picture goes")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for noise in (".*does not have many workers.*", ".*LeafSpec.*"):
        warnings.filterwarnings("ignore", noise)
    torch.set_num_threads(1)  # threads do not pay for matrices this small

    data = load(arguments.data_dir)
    print(
        f"{data.name}: {len(data.train)} training, {len(data.validation)} validation and "
        f"{len(data.test)} test examples; {STEPS} steps per training"
    )
    print(f"\nOne training with OnlineHPOCallback(), from λ = {START:.0e}")
    callback = OnlineHPOCallback()
    tuned = train(data, START, [callback], arguments.seed)

    print(f"\nThe same training with each of {len(GRID)} fixed λ")
    grid = []
    for lam in GRID:
        grid.append(train(data, lam, [], arguments.seed))
        print(
            f"  λ = {lam:.0e}   validation {grid[-1].validation:.4f}   {grid[-1].seconds:4.1f} s",
            flush=True,
        )
    frozen = grid[GRID.index(START)]
    print(f"\n{callback.summary()}")
    report(tuned, frozen, grid)
    draw(
        arguments.out,
        [(0, START), *((record.step, record.values["l2"]) for record in callback.history)],
        tuned,
        frozen,
        grid,
    )
    print(f"Picture: {arguments.out}")


if __name__ == "__main__":
    main()
