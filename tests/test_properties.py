"""Trainings drawn at random: forward mode, reverse mode and central differences agree."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import CLIPPINGS, OPTIMIZERS, fit, flat, frozen, make_optimizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_hpo import (
    ClipR,
    GaussianNoiseMixin,
    L2Mixin,
    OnlineHPOCallback,
    UnrollK,
    named_hyperparameters,
)

SCHEDULES = {
    "none": lambda t: 1.0,
    "warm-up": lambda t: min(1.0, (t + 1) / 3),
    "decay": lambda t: 0.7**t,
    "restart": lambda t: 1.0 if t % 2 == 0 else 0.1,
}
STEPS = 4


@st.composite
def trainings(draw: Any) -> dict[str, Any]:
    return {
        "widths": draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)),
        "activation": draw(st.sampled_from([nn.Tanh, nn.Softplus, nn.SiLU])),
        "bias": draw(st.booleans()),
        "normalized": draw(st.booleans()),
        "optimizer": draw(st.sampled_from(list(OPTIMIZERS))),
        "schedule": draw(st.sampled_from(list(SCHEDULES))),
        "clipping": draw(st.sampled_from(list(CLIPPINGS))),
        "granularity": draw(st.sampled_from(["model", "layer", "parameter"])),
        "inside_loss": draw(st.booleans()),
        "accumulate": draw(st.integers(1, 3)),
        "batch": draw(st.integers(1, 5)),
        "outputs": draw(st.integers(1, 3)),
        "seed": draw(st.integers(0, 1000)),
    }


class Drawn(GaussianNoiseMixin, L2Mixin, LightningModule):
    def __init__(self, training: dict[str, Any]) -> None:
        super().__init__()
        self.training_options = training
        torch.manual_seed(training["seed"])
        layers: list[nn.Module] = []
        sizes = [3, *training["widths"], training["outputs"]]
        for k, (a, b) in enumerate(itertools.pairwise(sizes)):
            if k and training["normalized"]:
                layers.append(nn.LayerNorm(a, eps=0.1))
            layers.append(nn.Linear(a, b, bias=training["bias"]))
            layers.append(training["activation"]())
        self.net = nn.Sequential(*layers[:-1])
        self.register_l2(
            0.05, granularity=training["granularity"], inside_loss=training["inside_loss"]
        )
        self.register_noise(0.2)

    def on_train_start(self) -> None:
        torch.manual_seed(self.training_options["seed"])

    def loss(self, batch: Any) -> torch.Tensor:
        x, y = batch
        return F.smooth_l1_loss(self.net(x), y[:, : self.training_options["outputs"]], beta=5.0)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self.loss(batch)
        return loss + self.penalty() if self.training_options["inside_loss"] else loss

    def validation_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        optimizer = make_optimizer(self.training_options["optimizer"], self.parameters())
        factor = SCHEDULES[self.training_options["schedule"]]
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def run(training: dict[str, Any], callback: Any = None, moved: torch.Tensor | None = None) -> Any:
    generator = torch.Generator().manual_seed(training["seed"])
    n = training["batch"] * training["accumulate"] * STEPS
    x, y = (torch.randn(count, 3, generator=generator) for count in (n, n))
    model = Drawn(training)
    held_out = x[: n // 2 + 1] + 1, y[: n // 2 + 1]
    for h, distance in zip(
        named_hyperparameters(model).values(), [] if moved is None else moved, strict=False
    ):
        h.raw += distance
    fit(
        model,
        callback,
        steps=STEPS,
        train=DataLoader(TensorDataset(x, y), batch_size=training["batch"]),
        valid=DataLoader(TensorDataset(*held_out), batch_size=len(held_out[0])),
        accumulate_grad_batches=training["accumulate"],
        **CLIPPINGS[training["clipping"]],
    )
    model.eval()
    with torch.no_grad():
        return model.loss(held_out).item()


@pytest.mark.slow
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(trainings())
def test_three_ways_to_the_same_hypergradient(training: dict[str, Any]) -> None:
    found = []
    for estimator in (ClipR(math.inf), UnrollK(STEPS, "forward"), UnrollK(STEPS, "reverse")):
        callback = OnlineHPOCallback(estimator, optimizer=frozen)
        run(training, callback)
        found.append(flat(callback.history[-1].hypergradients.values()))
    forward, unrolled, reverse = found
    scale = forward.norm()
    assert (unrolled - forward).norm() <= 1e-9 * scale
    assert (reverse - forward).norm() <= 1e-9 * scale

    direction = torch.randn(len(forward), generator=torch.Generator().manual_seed(0))
    direction /= direction.norm()
    epsilon = 1e-5
    up, down = (run(training, moved=sign * epsilon * direction) for sign in (1, -1))
    # Against the whole: a direction may happen to be almost flat.
    assert abs(direction @ forward - (up - down) / (2 * epsilon)) < 1e-4 * scale
