"""Where a short horizon is biased and ClipR is not: the quadratic function of the online-HPO paper.

Section 4.1 of the paper tunes one λ on

    L_T(θ, λ) = ½ (θ − θ̄)ᵀ H (θ − θ̄) + ½ λ θᵀ H θ,      L_V(θ) = ½ (θ − θ̃)ᵀ H (θ − θ̃)

with θ of dimension 20 and a diagonal H. Its optimum is known: λ† = θ̄ᵀH(θ̄ − θ̃) / θ̄ᵀHθ̃. One phase
of gradient descent with learning rate η = 1e-3 is followed by a phase with η = 1e-4; λ moves by
plain gradient steps with learning rate 0.1 η. The script repeats Table 1 of the paper through
``OnlineHPOCallback`` and prints both tables side by side.

    python examples/quadratic.py                           # the whole table, some minutes
    python examples/quadratic.py --runs 10 --steps 2000    # a glance

The paper does not say how θ̄, θ̃ and H are drawn; ``sample_problems`` says how it is done here.
"""

from __future__ import annotations

import argparse
import logging
import os
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_hpo import ClipR, Hyperparameter, OnlineHPOCallback, Unconstrained, UnrollK
from lightning_hpo.estimators import Estimator

DIMENSION = 20
METHODS: dict[str, Callable[[], Estimator]] = {
    "Unroll1": lambda: UnrollK(1),
    "Unroll5": lambda: UnrollK(5),
    "Unroll10": lambda: UnrollK(10),
    "Clip2": lambda: ClipR(radius=2.0),
    "Clip5": lambda: ClipR(radius=5.0),
}
# ΔL_V(θ₁) in %, |λ₁ − λ†|, ΔL_V(θ₂) in %, |λ₂ − λ†|
Row = tuple[float, float, float, float]
PAPER: dict[str, Row] = {
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

    def solution(self, lam: Tensor) -> Tensor:
        """θ*(λ) = θ̄ / (1 + λ)."""
        return self.theta_bar / (1 + lam[:, None])

    def tangent_norm(self, lam: Tensor) -> Tensor:
        """‖dθ*/dλ‖ = ‖θ̄‖ / (1 + λ)²."""
        return self.theta_bar.norm(dim=1) / (1 + lam).square()

    def training_losses(self, theta: Tensor, lam: Tensor) -> Tensor:
        """L_T of each problem."""
        penalty = lam[:, None] * theta.square()
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
        self.lam = Hyperparameter(torch.zeros_like(problems.h[:, 0]), Unconstrained())
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


def train(method: str, runs: int, steps: int, seed: int) -> tuple[str, Row, float]:
    """Trains all problems with one method; returns its row of the table and the seconds it took."""
    torch.set_num_threads(1)  # the tensors are small, and the methods share the cores
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for noise in (".*does not have many workers.*", ".*LeafSpec.*", ".*barebones.*"):
        warnings.filterwarnings("ignore", noise)
    start = time.perf_counter()
    problems = sample_problems(runs, seed)
    module = Quadratic(problems)
    # There are no data: a batch is only the signal to make a step.
    no_data = torch.zeros(1)
    callback = OnlineHPOCallback(
        METHODS[method](),
        optimizer=lambda raw: torch.optim.SGD(raw, lr=0.1),
        scale_lr_with_model=True,
        dataloader=[no_data],
        validation_loss=Quadratic.validation_loss,
    )
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=2,
        callbacks=[callback],
        barebones=True,  # no logs, checkpoints or bars: steps are so small that they would show
    )
    trainer.fit(module, DataLoader(no_data.expand(steps), batch_size=None))
    row = [number for end in module.phase_ends for number in evaluate(problems, *end)]
    return method, (row[0], row[1], row[2], row[3]), time.perf_counter() - start


def evaluate(problems: Problems, theta: Tensor, lam: Tensor) -> tuple[float, float]:
    """Returns the mean increase of L_V over its optimum in percent, and the mean of |λ − λ†|."""
    best_lam = problems.best_lam
    best = problems.validation_losses(problems.solution(best_lam))
    increase = 100 * (problems.validation_losses(theta) / best - 1)
    return increase.mean().item(), (lam - best_lam).abs().mean().item()


def show(rows: dict[str, Row]) -> None:
    """Prints Table 1 of the paper beside ours."""
    columns = "  ΔL_V(θ1)  |λ1 − λ†|  ΔL_V(θ2)  |λ2 − λ†|"
    print(f"\n{'':8}{'Table 1 of the paper':^{len(columns)}}    {'this run':^{len(columns)}}")
    print(f"{'':8}{columns}    {columns}")
    for method, paper in PAPER.items():
        cells = ["".join(_cell(row)) for row in (paper, rows[method])]
        print(f"{method:8}{cells[0]}    {cells[1]}")


def _cell(row: Row) -> list[str]:
    return [f"{row[0]:+9.2f}%", f"{row[1]:11.3f}", f"{row[2]:+9.2f}%", f"{row[3]:11.3f}"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=50, help="number of problems")
    parser.add_argument("--steps", type=int, default=20_000, help="steps in each of the two phases")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    arguments = parser.parse_args()

    problems = sample_problems(arguments.runs, arguments.seed)
    best_lam = problems.best_lam
    norms = problems.tangent_norm(best_lam)
    print(
        f"{arguments.runs} problems, 2 × {arguments.steps} steps. "
        f"λ† in [{best_lam.min():.3f}, {best_lam.max():.3f}], "
        f"‖dθ*/dλ‖ in [{norms.min():.2f}, {norms.max():.2f}], "
        f"H in [{problems.h.min():.0f}, {problems.h.max():.0f}], λ_0 = 0"
    )
    start = time.perf_counter()
    rows: dict[str, Row] = {}
    with ProcessPoolExecutor(arguments.workers, mp_context=get_context("spawn")) as pool:
        # ClipR updates λ at every step and takes longest: it goes first.
        jobs = [
            pool.submit(train, method, arguments.runs, arguments.steps, arguments.seed)
            for method in reversed(METHODS)
        ]
        for job in as_completed(jobs):
            method, row, seconds = job.result()
            rows[method] = row
            print(f"{method:8} done in {seconds:4.0f} s", flush=True)
    show(rows)
    print(f"\n{time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()
