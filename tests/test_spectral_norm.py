"""What is estimated under spectral normalization, whose vectors training moves without a graph."""

import pytest
import torch
from cases import VALID, Mlp, fit, last_hypergradient, observe
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as old_spectral_norm

from lightning_hpo import ClipR, UnrollK

STEPS = 6
KINDS = {"old": old_spectral_norm, "new": parametrizations.spectral_norm}


class Normalized(Mlp):
    """Notes the vectors that each step uses, or is given those of another training."""

    def __init__(self, kind, given=None):
        super().__init__("sgd", granularity="model", schedule=False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.net = nn.Sequential(
                KINDS[kind](nn.Linear(4, 8)), nn.Tanh(), KINDS[kind](nn.Linear(8, 3))
            )
        del self.l2
        self.register_l2(init=0.05, name="strength")
        self.double()
        self.given = given
        if given is not None:
            iterated = (
                [m.parametrizations.weight[0] for m in self.net[::2]]
                if kind == "new"
                else [hook for m in self.net[::2] for hook in m._forward_pre_hooks.values()]
            )
            for each in iterated:
                each.n_power_iterations = 0

    def vectors(self):
        return [b for name, b in self.named_buffers() if name.endswith(("_u", "_v"))]

    def on_train_batch_start(self, batch, batch_idx):
        if self.given is not None:
            for b, value in zip(self.vectors(), self.given[self.global_step], strict=True):
                b.copy_(value)


class Noting(Normalized):
    def __init__(self, kind):
        super().__init__(kind)
        self.noted = []

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.noted.append([b.clone() for b in self.vectors()])


def _truth(make):
    losses = []
    for sign in (1, -1):
        model = make()
        model.strength.raw.add_(sign * 1e-4)
        fit(model, steps=STEPS)
        with torch.no_grad():
            losses.append(model.eval().loss(VALID).item())
    return (losses[0] - losses[1]) / 2e-4


@pytest.mark.parametrize("kind", KINDS)
def test_tangents_follow_the_vectors(kind):
    with pytest.warns(UserWarning, match=r"uses finite differences, because .*buffers .*_u'"):
        found = observe(ClipR(float("inf")), Normalized(kind), steps=STEPS)
    truth = _truth(lambda: Normalized(kind))
    assert last_hypergradient(found).item() == pytest.approx(truth, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_adjoints_take_them_as_constants(kind):
    """Right for a training with the vectors of each step given, a few per cent off for its own."""
    estimator = UnrollK(STEPS, "reverse")
    noting = Noting(kind)
    fit(noting, steps=STEPS)

    def given():
        return Normalized(kind, noting.noted)

    held = observe(estimator, given(), steps=STEPS, every_n_steps=STEPS)
    assert last_hypergradient(held).item() == pytest.approx(_truth(given), rel=1e-6)
    with pytest.warns(UserWarning, match=r"as constants, because .*buffers .*_u'"):
        own = observe(estimator, Normalized(kind), steps=STEPS, every_n_steps=STEPS)
    found, truth = last_hypergradient(own).item(), _truth(lambda: Normalized(kind))
    assert found == pytest.approx(truth, rel=0.05)
    assert found != pytest.approx(truth, rel=1e-3)
