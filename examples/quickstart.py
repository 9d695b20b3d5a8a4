"""One training instead of a grid: a network finds its own L2 strength λ while it learns.

A small network learns handwritten digits from few examples, so that it overfits unless λ is right.
From each of six starts it is trained twice: with ``OnlineHPOCallback``, and with λ fixed there. The
six fixed values are a grid, too: what it reaches after so many trainings is what one tuned training
has to beat. A start that is far from where λ begins to matter over this training is taken for a
guess, and replaced before the first step; from there on, hypergradients move it.

    python examples/quickstart.py                    # scikit-learn's digits, nothing to download
    python examples/quickstart.py --data-dir DATA    # MNIST below DATA

It prints losses and costs, and draws them (``--out``, default: quickstart.png).
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from dataclasses import dataclass
from math import comb
from statistics import mean, median

import lightning
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from lightning_hpo import L2Mixin, OnlineHPOCallback

STARTS = [10.0**k for k in range(-6, 0)]
STEPS = 1500


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

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.training_step(batch, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


@dataclass
class Data:
    name: str
    train: TensorDataset
    held_out: TensorDataset
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


def batches(data: TensorDataset, size: int, draws: int | None = None) -> DataLoader:
    """Indexes the tensors once per batch: collating single examples would take most of the time."""
    sampler = RandomSampler(data, replacement=draws is not None, num_samples=draws)
    return DataLoader(data, batch_size=None, sampler=BatchSampler(sampler, size, drop_last=False))


@dataclass
class Result:
    """One training: λ at its end, losses at its end, CPU time, and λ after each update."""

    end: float
    held_out: float
    test: float
    seconds: float
    path: list[tuple[int, float]]
    summary: str = ""


def train(data: Data, start: float, seed: int, *, tuned: bool) -> Result:
    """Trains from a start of λ, where it stays unless it is tuned."""
    lightning.seed_everything(seed, verbose=False)
    module = LitClassifier(data.train.tensors[0].shape[1], start)
    callback = OnlineHPOCallback()
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,  # of all steps: a pass over so few examples would last only two
        callbacks=[callback] if tuned else [],
        limit_val_batches=0,  # the callback finds the held-out batches all the same
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    began = time.process_time()  # which other programs on the machine do not lengthen
    trainer.fit(module, batches(data.train, 50, 50 * STEPS), batches(data.held_out, 100))
    seconds = time.process_time() - began
    with torch.no_grad():
        sets = (data.held_out.tensors, data.test.tensors)
        held_out, test = (F.cross_entropy(module.net(x), y).item() for x, y in sets)
    path = [(0, start), *((record.step, record.values["l2"]) for record in callback.history)]
    summary = callback.summary() if tuned else ""
    return Result(module.l2().item(), held_out, test, seconds, path, summary)


def best_of(results: list[Result], n: int) -> tuple[float, float]:
    """Returns what the best of n of these, drawn at random, reaches: the means of both losses."""
    ranked = sorted(results, key=lambda result: result.held_out)
    total = comb(len(ranked), n)
    # The i-th is the best of those that are drawn if the other n − 1 are among those behind it.
    odds = [comb(len(ranked) - 1 - i, n - 1) / total for i in range(len(ranked))]
    pairs = list(zip(odds, ranked, strict=True))
    return sum(p * r.held_out for p, r in pairs), sum(p * r.test for p, r in pairs)


BLUE, AMBER, GREY = "#1f5fbf", "#c97a06", "#4b5563"


def draw(path: str, tuned: list[Result], fixed: list[Result], costs: list[float]) -> None:
    """Draws λ over the training, both losses over the start, and over the cost."""
    figure = Figure(figsize=(11.5, 3.9), dpi=100, layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=[1.1, 1, 1])
    for result in tuned:
        left.plot(*zip(*result.path, strict=True), color=BLUE, alpha=0.75, linewidth=1.6)
        left.plot(0, result.path[0][1], "o", color=BLUE, clip_on=False, zorder=5)
    left.set(title="Six starts, one λ", xlabel="training step", ylabel="L2 strength λ")
    left.set(yscale="log", xlim=(0, STEPS))
    left.annotate("far starts are replaced\nbefore the first step", (0.06, 0.03), (0.14, 0.04),
                  xycoords="axes fraction", color=GREY, fontsize=9)  # fmt: skip

    for results, color, name in ((fixed, AMBER, "fixed"), (tuned, BLUE, "tuned")):
        for loss, style in (("held_out", "-o"), ("test", "--o")):
            losses = [getattr(result, loss) for result in results]
            label = f"{name}, {'held-out' if loss == 'held_out' else loss}"
            middle.plot(STARTS, losses, style, color=color, markersize=4, label=label)
    middle.set(title="Loss against the start", xlabel="λ at the start", xscale="log")
    middle.set(ylabel="loss at the end", ylim=loss_limits(tuned, fixed))

    counts = range(1, len(fixed) + 1)
    grid = [best_of(fixed, n) for n in counts]
    for i, style in ((0, "-o"), (1, "--o")):
        right.plot(counts, [pair[i] for pair in grid], style, color=AMBER, markersize=4)
    for i, loss in enumerate(("held_out", "test")):
        losses = [getattr(result, loss) for result in tuned]
        spread = [[mean(losses) - min(losses)], [max(losses) - mean(losses)]]
        right.errorbar(median(costs), mean(losses), spread, fmt="o", color=BLUE, capsize=4,
                       markerfacecolor="white" if i else BLUE)  # fmt: skip
    right.set(title="Loss against the cost", xlabel="cost, in plain trainings", xlim=(0.5, 6.4))
    right.set(ylim=loss_limits(tuned, fixed))
    right.annotate(
        "best of so many grid values,\ndrawn at random", (2.2, grid[1][0] + 0.06), color=AMBER
    )
    right.annotate("one tuned training", (median(costs), mean(r.test for r in tuned)), (9, -10),
                   textcoords="offset points", color=BLUE)  # fmt: skip
    for axes in (left, middle, right):
        tidy(axes)
    middle.legend(frameon=False, fontsize=8, loc="upper center")
    figure.savefig(path)


def loss_limits(tuned: list[Result], fixed: list[Result]) -> tuple[float, float]:
    """Shows all but what has learned nothing."""
    losses = [x for r in tuned + fixed for x in (r.held_out, r.test)]
    return 0.8 * min(losses), 1.6 * sorted(losses)[-3]


def tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=GREY)


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
        f"{data.name}: {len(data.train)} training, {len(data.held_out)} held-out and "
        f"{len(data.test)} test examples; {STEPS} steps per training\n"
    )
    print("λ at the start        fixed: held-out    test        tuned: held-out    test       → λ")
    fixed, tuned = [], []
    for start in STARTS:
        fixed.append(train(data, start, arguments.seed, tuned=False))
        tuned.append(train(data, start, arguments.seed, tuned=True))
        a, b = fixed[-1], tuned[-1]
        print(
            f"{start:14.0e}{a.held_out:23.4f}{a.test:8.4f}{b.held_out:23.4f}{b.test:8.4f}"
            f"{b.end:10.1e}",
            flush=True,
        )
    costs = [b.seconds / a.seconds for a, b in zip(fixed, tuned, strict=True)]
    best = min(fixed, key=lambda result: result.held_out)
    held_out, test = (mean(getattr(r, name) for r in tuned) for name in ("held_out", "test"))
    print(f"\n{tuned[0].summary}")
    print(
        f"\nOne tuned training, mean of {len(tuned)} starts: held-out {held_out:.4f}, test "
        f"{test:.4f}, at {median(costs):.2f} times the CPU time of a plain one "
        f"({median(a.seconds for a in fixed):.1f} s).\nBest of the {len(fixed)} fixed λ: held-out "
        f"{best.held_out:.4f}, test {best.test:.4f}, at {len(fixed)} times."
    )
    draw(arguments.out, tuned, fixed, costs)
    print(f"Picture: {arguments.out}")


if __name__ == "__main__":
    main()
