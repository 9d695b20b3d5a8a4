"""Figure 1 of the online-HPO paper: at an optimum θ stands still, its derivative does not.

Appendix A: a scalar θ begins at θ*(λ₀). It stays there, but y_t = ∂θ_t/∂λ begins at 0 and needs
many steps to come to dθ*/dλ, the more of them the smaller the learning rate η is. Here

    L_T(θ, λ) = ½ h (θ − θ̄)² + ½ λ θ²,   A = h + λ,   θ*(λ) = h θ̄ / A,   dθ*/dλ = −θ* / A,
    y_t = (1 − (1 − η A)ᵗ) dθ*/dλ

A λ-optimizer of rate 0 leaves λ where it is, so that the callback only looks: ``ClipR(inf)`` keeps
y, and its history has |y| of every step. ``UnrollK(K)`` starts from y = 0 again after K steps, and
never sees more than y_K. The paper gives no numbers: h, θ̄, λ₀ and η are chosen here.

    python examples/papers/derivative.py
"""

from __future__ import annotations

import argparse
import json
import math
from typing import Any

import lightning
import torch
from _experiment import Experiment, parser, table
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_hpo import ClipR, Hyperparameter, OnlineHPOCallback, Unconstrained, UnrollK

H, THETA_BAR, LAM = 1.0, 1.0, 0.3
RATES = (0.1, 0.02)
STEPS = {"tiny": 60, "small": 600, "paper": 600}
SHOWN = (1, 5, 10, 50, 100, 300, 600)
"""Steps of the table and of the left picture."""
WINDOWS = {f"UnrollK({k})": k for k in (1, 5, 10)}
TANGENT, DEFAULT = "ClipR(inf)", "OnlineHPOCallback()"
METHODS = [TANGENT, *WINDOWS, DEFAULT]
AROUND = "λ around λ₀"
NEAR = torch.linspace(-0.25, 0.25, 11, dtype=torch.float64) + LAM


def optimum(lam: float) -> float:
    """θ*(λ)."""
    return H * THETA_BAR / (H + lam)


def derivative(eta: float, steps: float = math.inf) -> float:
    """|y_t|; without ``steps`` that of θ*."""
    return (1 - (1 - eta * (H + LAM)) ** steps) * optimum(LAM) / (H + LAM)


class Scalar(lightning.LightningModule):
    """θ at θ*(λ₀); several of them that do not feel each other, where λ has several values."""

    def __init__(self, lam: Tensor, eta: float) -> None:
        super().__init__()
        self.eta = eta
        self.theta = nn.Parameter(torch.full_like(lam, optimum(LAM)))
        self.lam = Hyperparameter(lam, Unconstrained())
        self.trace: dict[int, list[float]] = {}

    def training_step(self, batch: Tensor) -> Tensor:
        fit = H * (self.theta - THETA_BAR).square()
        return 0.5 * (fit + self.lam() * self.theta.square()).sum()

    def validation_loss(self, batch: Tensor) -> Tensor:
        return self.theta.sum()  # so that a hypergradient is y itself

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.eta)

    def on_train_batch_end(self, *_: Any) -> None:
        self.trace[self.trainer.global_step] = self.theta.detach().tolist()


def callback_of(method: str) -> OnlineHPOCallback:
    """Makes a callback that looks, and leaves λ where it is."""
    options: dict[str, Any] = {
        "dataloader": [torch.zeros(1)],
        "validation_loss": Scalar.validation_loss,
    }
    if method == DEFAULT:
        return OnlineHPOCallback(lr=0.0, **options)
    estimator = ClipR(math.inf) if method == TANGENT else UnrollK(WINDOWS[method], mode="forward")
    return OnlineHPOCallback(
        estimator, optimizer=lambda raw: torch.optim.SGD(raw, lr=0.0), **options
    )


def train(cell: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Notes |y| at each update; around λ₀ also θ, of several trainings in one."""
    steps, is_alone = STEPS[options.scale], cell["method"] != AROUND
    module = Scalar(torch.tensor(LAM, dtype=torch.float64) if is_alone else NEAR, cell["eta"])
    callbacks = [callback_of(cell["method"])] if is_alone else []
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=1, callbacks=callbacks, barebones=True
    )
    # There are no data: a batch is only the signal to make a step.
    trainer.fit(module, DataLoader(torch.zeros(steps), batch_size=None))
    history = callbacks[0].history if callbacks else []
    # In a training of few steps the default is T1T2, which keeps no tangents.
    found = {r.step: abs(float((r.tangent_norms or r.hypergradients)["lam"])) for r in history}
    thetas = {step: module.trace[step] for step in SHOWN if step <= steps}
    return {"y": json.dumps(found), "theta": json.dumps(thetas)}


def load(experiment: Experiment, column: str, **cell: Any) -> dict[int, Any]:
    """Returns what a training noted, by step; empty where it is missing."""
    rows = experiment.where(**cell)
    return {int(s): value for s, value in json.loads(rows[0][column]).items()} if rows else {}


def rows_of(experiment: Experiment) -> list[list[str]]:
    """Makes the lines of the table: |y| at the last update until then, beside the exact one."""
    steps = [step for step in SHOWN if step <= STEPS[experiment.options.scale]]
    lines = []
    for eta in RATES:
        exact = [derivative(eta, step) for step in (*steps, math.inf)]
        lines.append([f"{eta:g}", "exact y", *(f"{y:.5f}" for y in exact), f"{optimum(LAM):.5f}"])
        for method in METHODS:
            found = load(experiment, "y", method=method, eta=eta)
            thetas = load(experiment, "theta", method=method, eta=eta)
            last = [[y for at, y in found.items() if at <= step][-1:] for step in steps]
            texts = [f"{y[0]:.5f}" if y else "–" for y in last]
            end = f"{thetas[steps[-1]]:.5f}" if thetas else "–"
            lines.append([f"{eta:g}", method, *texts, "–", end])
    return lines


def draw(experiment: Experiment) -> None:
    """Draws θ over λ after some steps, and |y| over the steps."""
    import matplotlib.pyplot as plt

    steps = STEPS[experiment.options.scale]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 3.9))
    thetas = load(experiment, "theta", method=AROUND, eta=RATES[0])
    left.plot(NEAR, [optimum(LAM)] * len(NEAR), color="0.75", label="start")
    for number, step in enumerate(s for s in (1, 5, 10, 50) if s in thetas):
        left.plot(NEAR, thetas[step], color=plt.cm.viridis(number / 4), label=f"step {step}")
    left.plot(NEAR, [optimum(lam) for lam in NEAR.tolist()], "k:", label="θ*(λ)")
    left.plot(LAM, optimum(LAM), "ko", markersize=5)
    left.annotate("λ₀", (LAM, optimum(LAM)), xytext=(4, 6), textcoords="offset points")
    left.set(xlabel="λ", ylabel="θ", title=f"θ after some steps from θ*(λ₀), η = {RATES[0]:g}")
    left.legend(fontsize=8)

    for eta, color, place in zip(RATES, ("C0", "C1"), (0.98, 0.7), strict=True):
        found = load(experiment, "y", method=TANGENT, eta=eta)
        right.plot(list(found), list(found.values()), color=color, label=f"{TANGENT}, η = {eta:g}")
        some = [step for step in found if step % (steps // 30) == 0]
        exact = [derivative(eta, step) for step in some]
        right.plot(some, exact, ".", color=color, label="closed form")
        for method in WINDOWS:
            windows = load(experiment, "y", method=method, eta=eta)
            if windows:
                y = list(windows.values())[-1]
                right.axhline(y, color=color, linestyle="--", linewidth=0.8)
                box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
                at = {"x": place * steps, "y": y, "ha": "right", "va": "center"}
                right.text(s=method, fontsize=8, color=color, bbox=box, **at)
    right.axhline(derivative(RATES[0]), color="black", linestyle=":", label="dθ*/dλ")
    right.set(xlabel="step", ylabel="|y|", title="|∂θ/∂λ| at λ₀", ylim=(0, None))
    right.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.tight_layout()
    figure.savefig(experiment.output / f"{experiment.name}.png", dpi=90)


def main() -> None:
    options = parser(__doc__, seeds=1, needs_data=False).parse_args()
    name = f"derivative_{options.scale}"
    experiment = Experiment(name, ("method", "eta"), train, options, options.output)
    experiment.run({"method": m, "eta": eta} for eta in RATES for m in (*METHODS, AROUND))
    steps = [step for step in SHOWN if step <= STEPS[options.scale]]
    headers = ["η", "|y|", *(f"step {step}" for step in steps), "∞", "θ at the end"]
    title = "Convergence of the derivative"
    experiment.report(title, [table(headers, rows_of(experiment))])
    draw(experiment)


if __name__ == "__main__":
    main()
