"""Six bad starts, one training each: the L2 strength of an MNIST network tunes itself.

The image classification experiment of the online-HPO paper (§4.2), shortened: a fully connected
100-100-100-10 network, 45 000 training and 15 000 held-out images, batches of 100, SGD from
learning rate 0.1 with cosine decay. λ starts at 1e-6, 1e-5, …, 1e-1. Each start is trained once
with λ fixed (which is also the grid search) and once with each method.

    python examples/mnist_l2.py --data-dir DATA      # MNIST below DATA, 8 000 steps
    python examples/mnist_l2.py                      # scikit-learn's digits, 1 000 steps
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path

import lightning
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from lightning_hpo import T1T2, ClipR, L2Mixin, OnlineHPOCallback, UnrollK
from lightning_hpo.estimators import Estimator

STARTS = [10.0**k for k in range(-6, 0)]
METHODS: dict[str, Callable[[], Estimator | None]] = {
    "fixed": lambda: None,
    "T1T2": T1T2,
    "T1T2(scale_by_lr=False)": lambda: T1T2(scale_by_lr=False),
    "UnrollK(5)": lambda: UnrollK(5),
    "UnrollK(10)": lambda: UnrollK(10),
    "ClipR(20, decay=0.99)": lambda: ClipR(radius=20.0, decay=0.99),
    "ClipR(20)": lambda: ClipR(radius=20.0),
}
DEFAULT_METHODS = ["fixed", "T1T2", "ClipR(20, decay=0.99)", "ClipR(20)"]


class Examples(Dataset):
    """Tensors that hand out whole batches: collating single images would take most of the time."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        index = torch.as_tensor(indices)
        return self.images[index], self.labels[index]


def as_is(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Takes the place of collating."""
    return batch


def load(data_dir: str | None) -> tuple[Examples, Examples, Examples]:
    """Returns the training, held-out and test examples."""
    if data_dir is None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = torch.tensor(digits.data, dtype=torch.float32) / 16
        labels = torch.tensor(digits.target)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        images, labels = images[order], labels[order]
        bounds = [0, 300, 1000, len(labels)]
    else:
        from torchvision.datasets import MNIST

        sets = [MNIST(root=data_dir, train=train) for train in (True, False)]
        images = torch.cat([s.data for s in sets]).flatten(1).float() / 255
        labels = torch.cat([s.targets for s in sets])
        bounds = [0, 45_000, 60_000, 70_000]
    images = (images - images[: bounds[1]].mean()) / images[: bounds[1]].std()
    train, held_out, test = (Examples(images[a:b], labels[a:b]) for a, b in pairwise(bounds))
    return train, held_out, test


class LitClassifier(L2Mixin, lightning.LightningModule):
    def __init__(self, inputs: int, l2: float, steps: int) -> None:
        super().__init__()
        sizes = [inputs, 100, 100, 100]
        hidden = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
        self.net = nn.Sequential(*hidden, nn.Linear(sizes[-1], 10))
        self.steps = steps
        self.register_l2(init=l2)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


@torch.no_grad()
def cross_entropy(model: LitClassifier, data: Examples) -> float:
    model.eval()
    return F.cross_entropy(model.net(data.images), data.labels).item()


def train(job: tuple[str, float, str | None, int]) -> dict[str, float]:
    """Makes one training; returns its last λ and its losses."""
    method, start, data_dir, steps = job
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    lightning.seed_everything(0, verbose=False)
    data, held_out, test = load(data_dir)
    model = LitClassifier(data.images.shape[1], start, steps)
    estimator = METHODS[method]()
    trainer = lightning.Trainer(
        max_steps=steps,
        accelerator="cpu",
        callbacks=[] if estimator is None else [OnlineHPOCallback(estimator)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    options = {"batch_size": 100, "collate_fn": as_is}
    begin = time.perf_counter()
    trainer.fit(model, DataLoader(data, shuffle=True, **options), DataLoader(held_out, **options))
    return {
        "seconds": time.perf_counter() - begin,
        "l2": model.l2().item(),
        "validation": cross_entropy(model, held_out),
        "test": cross_entropy(model, test),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", help="folder with MNIST; default: bundled digits")
    parser.add_argument("--steps", type=int, help="default: 8000 with --data-dir, else 1000")
    parser.add_argument("--methods", nargs="+", default=DEFAULT_METHODS, choices=METHODS)
    parser.add_argument("--workers", type=int, default=2, help="trainings at the same time")
    arguments = parser.parse_args()
    data_dir = str(Path(arguments.data_dir)) if arguments.data_dir else None
    steps = arguments.steps or (8000 if data_dir else 1000)

    jobs = [(method, start, data_dir, steps) for method in arguments.methods for start in STARTS]
    # Spawned, since a forked process may not use several threads again.
    with ProcessPoolExecutor(arguments.workers, mp_context=get_context("spawn")) as pool:
        results = {}
        for job, result in zip(jobs, pool.map(train, jobs), strict=True):
            results[job[:2]] = result
            print(
                f"{job[0]:24} λ {job[1]:.0e} → {result['l2']:.2e}   validation "
                f"{result['validation']:.4f}   test {result['test']:.4f}   "
                f"{result['seconds']:.0f} s",
                flush=True,
            )

    print(f"\n{steps} steps, torch {torch.__version__}, lightning {lightning.__version__}")
    print("| method | validation | worst start | test | final λ |\n|---|---|---|---|---|")
    for method in arguments.methods:
        runs = [results[method, start] for start in STARTS]
        if method == "fixed":
            best = min(runs, key=lambda run: run["validation"])
            print(row("best fixed λ of the grid", [best]))
            print(row("fixed at the start", runs))
        else:
            print(row(method, runs))


def row(name: str, runs: list[dict[str, float]]) -> str:
    """Formats the mean over the starts."""

    def mean(key: str) -> float:
        return sum(run[key] for run in runs) / len(runs)

    low, high = min(run["l2"] for run in runs), max(run["l2"] for run in runs)
    span = f"{low:.1e}" if low == high else f"{low:.1e} … {high:.1e}"
    worst = max(run["validation"] for run in runs)
    return f"| {name} | {mean('validation'):.4f} | {worst:.4f} | {mean('test'):.4f} | {span} |"


if __name__ == "__main__":
    main()
