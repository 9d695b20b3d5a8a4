"""Optimizers of other libraries: exact, or refused by name before a parameter has moved."""

import math

import optimizers
import pytest
import torch
from cases import Mlp, fit, last_hypergradient, observe, relative_error, truth, weights
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_hpo import T1T2, ClipR, UnrollK

STEPS = 8
ESTIMATORS = {
    "forward": lambda: ClipR(math.inf),
    "reverse": lambda: UnrollK(STEPS, "reverse"),
}


def maker(kind):
    """A module that is trained by an optimizer."""

    class With(Mlp):
        def __init__(self):
            super().__init__(granularity="model", init=0.1)
            self.double()

        def configure_optimizers(self):
            return kind(self.parameters())

    return With


@pytest.mark.parametrize("kind", optimizers.EXACT, ids=lambda kind: kind.__name__)
def test_hypergradients_are_those_of_whole_fits(kind):
    """Forward and reverse; and with frozen λ the weights are those of the training alone."""
    make = maker(kind)
    expected = truth(make, steps=STEPS)
    plain = make()
    fit(plain, steps=STEPS)
    for estimator in ESTIMATORS.values():
        model = make()
        callback = observe(estimator(), model, steps=STEPS)
        assert relative_error(last_hypergradient(callback), expected) < 1e-5
        assert torch.equal(weights(model), weights(plain))


@pytest.mark.parametrize(
    ("kind", "reason"), optimizers.REFUSED, ids=lambda x: getattr(x, "__name__", "")
)
def test_what_cannot_be_followed_is_refused_before_anything_moves(kind, reason):
    model = maker(kind)()
    before = weights(model)
    with pytest.raises(
        MisconfigurationException, match=rf"cannot follow the optimizer {kind.__name__}"
    ) as e:
        observe(ClipR(), model, steps=STEPS)
    assert reason in str(e.value)
    assert "Use an optimizer of torch.optim, or write its step" in str(e.value)
    assert torch.equal(weights(model), before)


def test_what_the_training_step_sets_stays_beside_what_the_optimizer_counts():
    """Before the closure the optimizer sets its learning rate, inside of it the step momentum."""

    class Sets(maker(optimizers.WarmsUp)):
        def training_step(self, batch, batch_idx):
            self.trainer.optimizers[0].param_groups[0]["momentum"] = 0.9 - 0.05 * self.global_step
            return super().training_step(batch, batch_idx)

    expected = truth(Sets, steps=STEPS)
    for estimator in ESTIMATORS.values():
        callback = observe(estimator(), Sets(), steps=STEPS)
        assert relative_error(last_hypergradient(callback), expected) < 1e-5


@pytest.mark.parametrize("make", [T1T2, ClipR], ids=["T1T2", "ClipR"])
def test_a_number_that_acts_later_is_found_later(make):
    """The trials at the third step reach the fifth."""
    model = maker(optimizers.LaterByItem)()
    with pytest.raises(MisconfigurationException, match="cannot follow the optimizer LaterByItem"):
        observe(make(), model, steps=STEPS)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, optimizers.Lists])
def test_complex_parameters_are_refused_at_setup(kind):
    class Complex(Mlp):
        def __init__(self):
            super().__init__()
            self.phase = torch.nn.Parameter(torch.ones(3, dtype=torch.complex128))

        def loss(self, batch):
            return super().loss(batch) + self.phase.abs().square().sum()

        def configure_optimizers(self):
            return kind(self.parameters(), lr=0.1)

    model = Complex()
    before = weights(model)
    with pytest.raises(MisconfigurationException, match=r"complex parameters.*view_as_complex"):
        observe(ClipR(), model)
    assert torch.equal(weights(model), before)
    model.phase.requires_grad_(False)
    if kind is optimizers.Lists:  # one of torch.optim may have been given what is not trained
        model.configure_optimizers = lambda: kind(model.net.parameters(), lr=0.1)
    assert len(observe(ClipR(), model, steps=3).history) == 3


@pytest.mark.parametrize("make", [T1T2, ClipR, lambda: UnrollK(2, "reverse")])
def test_complex_parameters_that_come_later_are_refused_when_they_come(make):
    class Later(Mlp):
        def __init__(self):
            super().__init__(schedule=False)
            self.phase = torch.nn.Parameter(torch.ones(3, dtype=torch.complex128))

        def loss(self, batch):
            return super().loss(batch) + self.phase.abs().square().sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.net.parameters(), lr=0.1)

        def on_train_batch_start(self, batch, batch_idx):
            if self.global_step == 4:
                self.trainer.optimizers[0].add_param_group({"params": [self.phase]})

    model = Later()
    with pytest.raises(MisconfigurationException, match=r"complex parameters \('phase'\)"):
        observe(make(), model)
    assert model.global_step == 4


def test_the_remedy_for_complex_parameters():
    """A real parameter that is viewed as complex trains alike, and is exact."""

    class Viewed(Mlp):
        def __init__(self):
            super().__init__(granularity="model", schedule=False)
            self.phase = torch.nn.Parameter(torch.full((3, 2), 0.3))

        def loss(self, batch):
            factor = torch.view_as_complex(self.phase).abs().square()
            return torch.nn.functional.cross_entropy(self.net(batch[0]) * factor, batch[1])

    callback = observe(ClipR(math.inf), Viewed(), steps=STEPS)
    assert relative_error(last_hypergradient(callback), truth(Viewed, steps=STEPS)) < 1e-6
