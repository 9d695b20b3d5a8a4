"""Many starts, one λ: the picture of the README, and a grid of fixed values beside it.

A small network learns handwritten digits from 100 examples, so that it overfits unless λ is right.
It is trained with ``OnlineHPOCallback`` from eight starts of its L2 strength λ, and with λ fixed at
each decade from 1e-6 to 1e-1: what that grid reaches after so many trainings is what one tuned
training has to beat. Six starts lie from 8e-5 to 1.8e-3: there, a start is kept. Further away from
where λ begins to matter over this training (above 2e-3, below 7e-5) it is taken for a guess, and
replaced by that value before the first step, like the other two.

    python examples/benchmarks/starts.py

It prints losses and costs, and draws them (``--out``, default: starts.png).
"""

from __future__ import annotations

import argparse
import logging
import math
import time
import warnings
from dataclasses import dataclass
from math import comb
from statistics import mean, median

import lightning
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from lightning_hpo import L2Mixin, OnlineHPOCallback

# Chosen by where starts are kept, before any loss was seen.
STARTS = [1e-6, 8e-5, 1.5e-4, 3e-4, 5e-4, 1e-3, 1.8e-3, 1e-1]
GRID = [10.0**k for k in range(-6, 0)]
STEPS = 1500


class LitClassifier(L2Mixin, lightning.LightningModule):
    def __init__(self, l2: float) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10)
        )
        self.register_l2(init=l2)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.training_step(batch, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def load() -> list[TensorDataset]:
    """Loads few training examples (where there are many, λ hardly matters), held-out and test."""
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return [TensorDataset(images[part], labels[part]) for part in order.split([100, 700, 997])]


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

    @property
    def is_replaced(self) -> bool:
        """Whether the start was; one update moves λ by much less than a factor of two."""
        return abs(math.log(self.path[1][1] / self.path[0][1])) > math.log(2)


def train(data: list[TensorDataset], start: float, seed: int, *, tuned: bool) -> Result:
    """Trains from a start of λ, where it stays unless it is tuned."""
    lightning.seed_everything(seed, verbose=False)
    module = LitClassifier(start)
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
    trainer.fit(module, batches(data[0], 50, 50 * STEPS), batches(data[1], 100))
    seconds = time.process_time() - began
    with torch.no_grad():
        others = (part.tensors for part in data[1:])
        held_out, test = (F.cross_entropy(module.net(x), y).item() for x, y in others)
    path = [(0, start), *((record.step, record.values["l2"]) for record in callback.history)]
    return Result(module.l2().item(), held_out, test, seconds, path)


def best_of(results: list[Result], n: int) -> tuple[float, float]:
    """Returns what the best of n of these, drawn at random, reaches: the means of both losses."""
    ranked = sorted(results, key=lambda result: result.held_out)
    total = comb(len(ranked), n)
    # The i-th is the best of those that are drawn if the other n − 1 are among those behind it.
    odds = [comb(len(ranked) - 1 - i, n - 1) / total for i in range(len(ranked))]
    pairs = list(zip(odds, ranked, strict=True))
    return sum(p * r.held_out for p, r in pairs), sum(p * r.test for p, r in pairs)


BLUE, AMBER, GREY = "#1f5fbf", "#c97a06", "#4b5563"


def draw(path: str, tuned: list[Result], fixed: list[Result], cost: float) -> None:
    """Draws λ over the training, both losses over the start, and over the cost."""
    figure = Figure(figsize=(11.5, 3.9), dpi=100, layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=[1.1, 1, 1])
    for result in tuned:
        steps, values = zip(*result.path, strict=True)
        skipped = int(result.is_replaced)
        left.plot(steps[skipped:], values[skipped:], color=BLUE, alpha=0.75, linewidth=1.6)
        if result.is_replaced:
            left.plot((0, 0), values[:2], ":", color=GREY, linewidth=1.2)
        left.plot(0, values[0], "o", color=BLUE, clip_on=False, zorder=5,
                  markerfacecolor="white" if result.is_replaced else BLUE)  # fmt: skip
    left.plot(
        [], [], "o", color=BLUE, markerfacecolor="white", label="too far off: replaced at once"
    )
    left.plot([], [], "o-", color=BLUE, label="kept, and tuned")
    left.legend(frameon=False, fontsize=8, loc="lower right")
    left.set(title="Eight starts, one λ", xlabel="training step", ylabel="L2 strength λ")
    left.set(yscale="log", xlim=(-0.04 * STEPS, STEPS))

    for results, starts, color, name in (
        (fixed, GRID, AMBER, "fixed"),
        (tuned, STARTS, BLUE, "tuned"),
    ):
        for loss, style in (("held_out", "-o"), ("test", "--o")):
            losses = [getattr(result, loss) for result in results]
            label = f"{name}, {'held-out' if loss == 'held_out' else loss}"
            middle.plot(starts, losses, style, color=color, markersize=4, label=label)
    middle.set(title="Loss against the start", xlabel="λ at the start", xscale="log")
    middle.set(ylabel="loss at the end", ylim=loss_limits(tuned, fixed))

    counts = range(1, len(fixed) + 1)
    grid = [best_of(fixed, n) for n in counts]
    for i, style in ((0, "-o"), (1, "--o")):
        right.plot(counts, [pair[i] for pair in grid], style, color=AMBER, markersize=4)
    for i, loss in enumerate(("held_out", "test")):
        losses = [getattr(result, loss) for result in tuned]
        spread = [[mean(losses) - min(losses)], [max(losses) - mean(losses)]]
        right.errorbar(cost, mean(losses), spread, fmt="o", color=BLUE, capsize=4,
                       markerfacecolor="white" if i else BLUE)  # fmt: skip
    right.set(title="Loss against the cost", xlabel="cost, in plain trainings", xlim=(0.5, 6.4))
    right.set(ylim=loss_limits(tuned, fixed))
    right.annotate(
        "best of so many grid values,\ndrawn at random", (2.2, grid[1][0] + 0.06), color=AMBER
    )
    right.annotate("one tuned training", (cost, mean(r.test for r in tuned)), (9, -10),
                   textcoords="offset points", color=BLUE)  # fmt: skip
    for axes in (left, middle, right):
        tidy(axes)
    middle.legend(frameon=False, fontsize=8, loc="upper center")
    figure.savefig(path)


def loss_limits(tuned: list[Result], fixed: list[Result]) -> tuple[float, float]:
    """Shows all but what has learned nothing."""
    losses = [x for r in tuned + fixed for x in (r.held_out, r.test)]
    return 0.8 * min(losses), 1.4 * sorted(losses)[-3]


def tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=GREY)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="starts.png", help="where the picture goes")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for noise in (".*does not have many workers.*", ".*LeafSpec.*"):
        warnings.filterwarnings("ignore", noise)
    torch.set_num_threads(1)  # threads do not pay for matrices this small

    data = load()
    fixed, tuned = [], []
    print(f"{'':20}held-out    test   seconds   λ at the end")
    for starts, results, name in ((GRID, fixed, "fixed at"), (STARTS, tuned, "tuned from")):
        for start in starts:
            result = train(data, start, arguments.seed, tuned=name == "tuned from")
            results.append(result)
            print(
                f"λ {name:10}{start:8.1e}{result.held_out:8.4f}{result.test:8.4f}"
                f"{result.seconds:10.1f}{result.end:15.1e}",
                "(replaced)" if len(result.path) > 1 and result.is_replaced else "",
                flush=True,
            )
    plain = median(result.seconds for result in fixed)
    cost = median(result.seconds for result in tuned) / plain
    best = min(fixed, key=lambda result: result.held_out)
    held_out, test = (mean(getattr(r, name) for r in tuned) for name in ("held_out", "test"))
    ends = [result.end for result in tuned]
    print(
        f"\nOne tuned training, mean of {len(tuned)} starts: λ ends at {min(ends):.1e} to "
        f"{max(ends):.1e}, held-out {held_out:.3f}, test {test:.3f}, at {cost:.1f} times the CPU "
        f"time of a plain one ({plain:.1f} s).\nBest of the {len(fixed)} fixed λ: held-out "
        f"{best.held_out:.3f}, test {best.test:.3f}, at {len(fixed)} times."
    )
    draw(arguments.out, tuned, fixed, cost)
    print(f"Picture: {arguments.out}")


if __name__ == "__main__":
    main()
