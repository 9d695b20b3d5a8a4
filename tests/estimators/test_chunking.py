"""Directions, parameters and the validation gradient taken a few at a time: the same numbers."""

import pytest
import torch
from cases import OPTIMIZERS, Mlp, flat, observe, pairwise

from lightning_hpo import T1T2, ClipR, L1Mixin, UnrollK
from lightning_hpo.dynamics import base
from lightning_hpo.step import ValidationGradient, tangents


class Overlapping(L1Mixin, Mlp):
    """Two penalties on the same weights, one on biases too, one frozen."""

    def __init__(self, optimizer, **options):
        super().__init__(optimizer, **options)
        self.register_l1(0.01, parameters=["net.0.weight", "net.0.bias"])
        self.register_l2(0.03, name="other", parameters=["net.2.weight"])
        self.get_submodule("other").frozen = True


class Generic(torch.optim.Adam):
    """Takes the generic path."""


class Subclassed(Overlapping):
    def configure_optimizers(self):
        return Generic(self.parameters(), lr=0.01)


def path(estimator, model, **options):
    return hypergradients(observe(estimator, model, **options))


def hypergradients(callback):
    return torch.stack([flat(record.hypergradients.values()) for record in callback.history])


@pytest.fixture
def few_at_a_time(monkeypatch):
    def switch():
        monkeypatch.setattr(tangents, "_ELEMENTS", 1)
        monkeypatch.setattr(base, "BLOCK", 3)

    return switch


@pairwise(
    optimizer=[*OPTIMIZERS, "generic"],
    clip={"unclipped": None, "norm": (0.05, "norm"), "value": (0.01, "value")},
    derivatives=["reverse", "finite_difference"],
    accumulate=[1, 2],
)
def test_directions_and_elements(derivatives, optimizer, clip, accumulate, few_at_a_time):
    def run():
        model = Subclassed("adam") if optimizer == "generic" else Overlapping(optimizer)
        value, algorithm = clip or (None, None)
        return path(
            ClipR(5.0, decay=0.9),
            model,
            derivatives=derivatives,
            steps=5,
            accumulate_grad_batches=accumulate,
            gradient_clip_val=value,
            gradient_clip_algorithm=algorithm,
        )

    together = run()
    few_at_a_time()
    torch.testing.assert_close(run(), together, rtol=1e-9, atol=1e-16)
    assert together.abs().min() > 0


@pytest.mark.parametrize("clip", [None, (0.05, "norm"), (0.01, "value")])
@pytest.mark.parametrize("optimizer", [*OPTIMIZERS, "generic"])
def test_t1t2_on_penalties_is_one_step_of_unroll(optimizer, clip, few_at_a_time):
    """T1T2 carries penalties forward; UnrollK(1) pulls g_V back."""
    few_at_a_time()
    value, algorithm = clip or (None, None)
    options = {"gradient_clip_val": value, "gradient_clip_algorithm": algorithm, "steps": 5}

    def model():
        return Subclassed("adam") if optimizer == "generic" else Overlapping(optimizer)

    found = path(T1T2(), model(), **options)
    truth = path(UnrollK(1, "reverse"), model(), **options)
    torch.testing.assert_close(found, truth, rtol=1e-11, atol=1e-16)
    assert (truth != 0).float().mean() > 0.9


def test_without_the_optimizer():
    """Unroll1-gTgV is T1–T2 but for the step of the optimizer."""
    for optimizer in ("sgd", "momentum"):  # whose first step is −η g
        model = Overlapping(optimizer, schedule=False)
        found = path(T1T2(scale_by_lr=False), model, steps=1)
        rate = OPTIMIZERS[optimizer][1]["lr"]
        truth = path(T1T2(), Overlapping(optimizer, schedule=False), steps=1)
        torch.testing.assert_close(found * rate, truth, rtol=1e-12, atol=0)
        assert truth.abs().min() > 0


@pytest.mark.parametrize(
    ("make", "whole"), [(T1T2, False), (ClipR, False), (lambda: UnrollK(1), True)]
)
def test_who_needs_the_whole_validation_gradient(make, whole, monkeypatch):
    calls = []
    tensors = ValidationGradient.tensors
    monkeypatch.setattr(
        ValidationGradient, "tensors", lambda self: calls.append(self) or tensors(self)
    )
    callback = observe(make(), Mlp("momentum"), steps=3)
    assert len(callback.history) == 3
    assert len(calls) == (3 if whole else 0)
