"""Table 1 of the online-HPO paper: where a short horizon is biased and ClipR is not.

Section 4.1 of the paper tunes one λ on

    L_T(θ, λ) = ½ (θ − θ̄)ᵀ H (θ − θ̄) + ½ λ θᵀ H θ,      L_V(θ) = ½ (θ − θ̃)ᵀ H (θ − θ̃)

with θ of dimension 20 and a diagonal H. Its optimum is known: λ† = θ̄ᵀH(θ̄ − θ̃) / θ̄ᵀHθ̃. One phase
of gradient descent with learning rate η = 1e-3 is followed by a phase with η = 1e-4; λ moves by
plain gradient steps with learning rate 0.1 η, from 0. Beside the paper's methods stands
``OnlineHPOCallback()`` as it is, which chooses its own rate; it trains one problem at a time.

    python examples/papers/quadratic.py                   # 50 problems, 10 of them by the default
    python examples/papers/quadratic.py --scale tiny      # a glance

The paper does not say how θ̄, θ̃ and H are drawn; ``sample_problems`` says how it is done here.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import lightning
import torch
from _experiment import Experiment, parser, table
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_hpo import ClipR, Hyperparameter, OnlineHPOCallback, Unconstrained, UnrollK
from lightning_hpo.estimators import Estimator

DIMENSION = 20
DEFAULT = "OnlineHPOCallback()"
# The default trains one problem at a time, and so many of them.
ALONE = 10
METHODS: dict[str, Callable[[], Estimator]] = {
    "Unroll1": lambda: UnrollK(1),
    "Unroll5": lambda: UnrollK(5),
    "Unroll10": lambda: UnrollK(10),
    "Clip2": lambda: ClipR(radius=2.0),
    "Clip5": lambda: ClipR(radius=5.0),
}
COLUMNS = ("ΔL_V(θ₁), %", "|λ₁ − λ†|", "ΔL_V(θ₂), %", "|λ₂ − λ†|")
PAPER: dict[str, tuple[float, ...]] = {
    "Unroll1": (0.77, 0.047, 0.77, 0.047),
    "Unroll5": (0.56, 0.039, 0.72, 0.045),
    "Unroll10": (0.37, 0.032, 0.71, 0.044),
    "Clip2": (0.07, 0.012, 0.07, 0.012),
    "Clip5": (0.00, 0.000, 0.00, 0.000),
}


@dataclass
class Problems:
    """Independent problems, one per row.

    Attributes:
        h: The diagonal of H, ``(runs, 20)``.
        theta_bar: θ̄, the optimum of the training loss at λ = 0.
        theta_tilde: θ̃, the optimum of the validation loss.
    """

    h: Tensor
    theta_bar: Tensor
    theta_tilde: Tensor

    @property
    def best_lam(self) -> Tensor:
        """λ†, ``(runs,)``."""
        weighted = self.theta_bar * self.h
        return (weighted * (self.theta_bar - self.theta_tilde)).sum(1) / (
            weighted * self.theta_tilde
        ).sum(1)

    def slice(self, first: int, last: int) -> Problems:
        """Returns some of the problems."""
        parts = (self.h, self.theta_bar, self.theta_tilde)
        return Problems(*(part[first:last] for part in parts))

    def solution(self, lam: Tensor) -> Tensor:
        """θ*(λ) = θ̄ / (1 + λ)."""
        return self.theta_bar / (1 + lam[:, None])

    def tangent_norm(self, lam: Tensor) -> Tensor:
        """‖dθ*/dλ‖ = ‖θ̄‖ / (1 + λ)²."""
        return self.theta_bar.norm(dim=1) / (1 + lam).square()

    def training_losses(self, theta: Tensor, lam: Tensor) -> Tensor:
        """L_T of each problem."""
        penalty = lam.reshape(-1, 1) * theta.square()
        return 0.5 * (self.h * ((theta - self.theta_bar).square() + penalty)).sum(1)

    def validation_losses(self, theta: Tensor) -> Tensor:
        """L_V of each problem."""
        return 0.5 * (self.h * (theta - self.theta_tilde).square()).sum(1)


def sample_problems(runs: int, seed: int) -> Problems:
    """Draws problems with λ† in [0.2, 0.4], as the paper wants it.

    What the paper leaves open is drawn as follows. H is log-uniform on [20, 120]: the longer the
    horizon Kη against 1 / H, the less an unrolled estimate is biased, and on this range the bias
    falls with K at η = 1e-3 and is back at η = 1e-4. θ̄ is normal, θ̃ is θ̄ / 1.3 plus normal noise of
    0.4 (λ† would be 0.3 for all without it). Both are then scaled, which leaves λ† alone, so that
    ‖dθ*/dλ‖ at λ† is uniform on [3, 5], the range that the paper names.
    """
    generator = torch.Generator().manual_seed(seed)
    accepted: list[Problems] = []
    while len(accepted) < runs:
        uniform = torch.rand(1, DIMENSION, generator=generator, dtype=torch.float64)
        bar, noise = torch.randn(2, 1, DIMENSION, generator=generator, dtype=torch.float64)
        problem = Problems(20 * 6**uniform, bar, bar / 1.3 + 0.4 * noise)
        if 0.2 <= problem.best_lam.item() <= 0.4:
            norm = 3 + 2 * torch.rand(1, generator=generator, dtype=torch.float64)
            scale = norm / problem.tangent_norm(problem.best_lam)
            problem.theta_bar *= scale
            problem.theta_tilde *= scale
            accepted.append(problem)
    return Problems(
        *(
            torch.cat([getattr(problem, name) for problem in accepted])
            for name in ("h", "theta_bar", "theta_tilde")
        )
    )


class Quadratic(lightning.LightningModule):
    """All problems at once: one row of θ and one element of λ for each.

    The losses are sums, so that no problem feels the others: every θ row has its own gradient, and
    the tangent dθ/dλ_j is zero outside row j. ClipR clips per element of λ, hence per problem.
    """

    def __init__(self, problems: Problems) -> None:
        super().__init__()
        self.problems = problems
        self.theta = nn.Parameter(torch.zeros_like(problems.h))
        # The paper does not give λ_0. From 0 and from 0.1 the table comes out the same.
        start = torch.zeros_like(problems.h[:, 0])
        self.lam = Hyperparameter(start if len(start) > 1 else start[0], Unconstrained())
        self.phase_ends: list[tuple[Tensor, Tensor]] = []

    def training_step(self, batch: Tensor) -> Tensor:
        return self.problems.training_losses(self.theta, self.lam()).sum()

    def validation_loss(self, batch: Tensor) -> Tensor:
        return self.problems.validation_losses(self.theta).sum()

    def configure_optimizers(self) -> dict[str, object]:
        # Each phase is one epoch, and the learning rate falls tenfold between the two.
        optimizer = torch.optim.SGD(self.parameters(), lr=1e-3)
        return {
            "optimizer": optimizer,
            "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.1),
        }

    def on_train_epoch_end(self) -> None:
        self.phase_ends.append((self.theta.detach().clone(), self.lam().clone()))


class Trace(Callback):
    """Keeps the mean of |λ − λ†| at so many steps, evenly spaced."""

    def __init__(self, steps: int, points: int = 40) -> None:
        self.every = max(1, steps // points)
        self.found: list[tuple[int, float]] = []

    def on_train_batch_end(self, trainer: lightning.Trainer, module: Any, *_: Any) -> None:
        if trainer.global_step % self.every == 0:
            distance = (module.lam() - module.problems.best_lam).abs().mean().item()
            self.found.append((trainer.global_step, float(f"{distance:.4g}")))


def train(cell: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Trains some of the problems with one method."""
    first, last = cell["first"], cell["last"]
    problems = sample_problems(options.seeds, seed=0).slice(first, last)
    module = Quadratic(problems)
    # There are no data: a batch is only the signal to make a step.
    no_data = torch.zeros(1)
    held_out: dict[str, Any] = {
        "dataloader": [no_data],
        "validation_loss": Quadratic.validation_loss,
    }
    if cell["method"] == DEFAULT:
        callback = OnlineHPOCallback(**held_out)
    else:
        callback = OnlineHPOCallback(
            METHODS[cell["method"]](),
            optimizer=lambda raw: torch.optim.SGD(raw, lr=0.1),
            scale_lr_with_model=True,
            **held_out,
        )
    trace = Trace(2 * options.steps)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=2,
        callbacks=[callback, trace],
        barebones=True,  # no logs, checkpoints or bars: steps are so small that they would show
    )
    trainer.fit(module, DataLoader(no_data.expand(options.steps), batch_size=None))
    numbers = [number for end in module.phase_ends for number in evaluate(problems, *end)]
    return dict(zip(COLUMNS, numbers, strict=True)) | {"trace": json.dumps(trace.found)}


def evaluate(problems: Problems, theta: Tensor, lam: Tensor) -> tuple[float, float]:
    """Returns the mean increase of L_V over its optimum in percent, and the mean of |λ − λ†|."""
    best_lam = problems.best_lam
    best = problems.validation_losses(problems.solution(best_lam))
    increase = 100 * (problems.validation_losses(theta) / best - 1)
    return increase.mean().item(), (lam - best_lam).abs().mean().item()


def cells(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Lists all cells; ClipR updates λ at every step and takes longest: it goes first."""
    count = options.seeds
    found = [{"method": method, "first": 0, "last": count} for method in reversed(METHODS)]
    alone = range(min(count, ALONE))
    return [*found, *({"method": DEFAULT, "first": i, "last": i + 1} for i in alone)]


def rows_of(experiment: Experiment) -> list[list[str]]:
    """Makes the lines of the table: the paper's figures, and ours."""
    lines = []
    for method in [*METHODS, DEFAULT]:
        found = experiment.where(method=method)
        count = sum(int(row["last"]) - int(row["first"]) for row in found)
        paper = PAPER.get(method)
        cells = ["–"] * 4 if paper is None else [f"{number:.3f}" for number in paper]
        cells += [
            f"{fmean(float(row[column]) for row in found):.3f}" if found else "–"
            for column in COLUMNS
        ]
        lines.append([method, *cells, str(count)])
    return lines


def draw(experiment: Experiment) -> None:
    """Draws how far λ is from its optimum, over the steps."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    for method in [*METHODS, DEFAULT]:
        traces = [json.loads(row["trace"]) for row in experiment.where(method=method)]
        if traces:
            steps = [step for step, _ in traces[0]]
            means = [
                fmean(values) for values in zip(*([v for _, v in t] for t in traces), strict=True)
            ]
            width = 2.5 if method == DEFAULT else 1.5
            axes.plot(steps, means, label=method, linewidth=width)
    axes.axvline(experiment.options.steps, color="gray", linestyle=":", linewidth=1)
    axes.annotate(
        "learning rate / 10",
        (experiment.options.steps, 1),
        xycoords=("data", "axes fraction"),
        xytext=(4, -12),
        textcoords="offset points",
        color="gray",
    )
    axes.set(xlabel="step", ylabel="mean of |λ − λ†|", yscale="log")
    axes.legend()
    figure.tight_layout()
    figure.savefig(experiment.output / f"{experiment.name}.png", dpi=110)


def main() -> None:
    arguments = parser(__doc__, seeds=50, needs_data=False)
    options = arguments.parse_args()
    options.steps = 500 if options.scale == "tiny" else 20_000
    if options.scale == "tiny":
        options.seeds = min(options.seeds, 3)
    experiment = Experiment(
        f"quadratic_{options.scale}", ("method", "first", "last"), train, options, options.output
    )
    experiment.run(cells(options))
    headers = ["method", *(f"paper: {c}" for c in COLUMNS), *COLUMNS, "problems"]
    experiment.report("Quadratic function", [table(headers, rows_of(experiment))])
    draw(experiment)


if __name__ == "__main__":
    main()
