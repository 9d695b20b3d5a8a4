"""``derivatives="forward"`` is refused where dual tensors do not reach all of the loss."""

import math

import pytest
import torch
import torch.nn.functional as F
from cases import Mlp, last_hypergradient, observe, relative_error, truth, weights
from torch import nn

from lightning_hpo import ClipR, UnrollK
from lightning_hpo._lightning import MisconfigurationException

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit")
ESTIMATORS = {"ClipR": lambda: ClipR(math.inf), "reverse": lambda: UnrollK(10, "reverse")}


def gate(x: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x) * torch.sigmoid(x)


class ScriptedPart(Mlp):
    def __init__(self):
        super().__init__(granularity="model")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            part = nn.Sequential(nn.Tanh(), nn.Linear(5, 5))
        self.net.insert(1, torch.jit.script(part))


class ScriptedFunction(Mlp):
    def __init__(self):
        super().__init__(granularity="model")
        self.gate = torch.jit.script(gate)

    def loss(self, batch):
        return F.cross_entropy(self.net[2](self.gate(self.net[0](batch[0]))), batch[1])


class OwnDirection(Mlp):
    """A forward derivative of its own, along the input."""

    def __init__(self):
        super().__init__(granularity="model")

    def loss(self, batch):
        x, y = batch
        logits, slope = torch.func.jvp(self.net, (x,), (torch.ones_like(x),))
        return F.cross_entropy(logits, y) + 0.1 * slope.square().mean()


class OwnGradient(Mlp):
    """Differentiates over what the optimizer holds, which no dual tensor takes the place of."""

    def __init__(self):
        super().__init__(granularity="model", schedule=False)

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        theta = self.optimizers().param_groups[0]["params"]
        slopes = torch.autograd.grad(loss, theta, create_graph=True)
        return loss + 0.5 * sum(g.square().sum() for g in slopes)


class Hooked(Mlp):
    def __init__(self):
        super().__init__(granularity="model")
        self.net[0].weight.register_hook(lambda g: 0.5 * g)


def test_hooks_that_change_gradients_are_named():
    with pytest.raises(MisconfigurationException, match="'finite_difference' where hooks"):
        observe(ClipR(math.inf), Hooked(), derivatives="forward")
    found = last_hypergradient(observe(ClipR(math.inf), Hooked(), derivatives="finite_difference"))
    assert relative_error(found, truth(Hooked)) < 1e-5


KINDS = [ScriptedPart, ScriptedFunction, OwnDirection, OwnGradient]


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_refused_before_anything_has_moved(kind, estimator):
    model = kind()
    before = weights(model)
    every = 10 if estimator == "reverse" else 1
    with pytest.raises(MisconfigurationException, match=r"'forward'.*Use derivatives='auto'"):
        observe(ESTIMATORS[estimator](), model, derivatives="forward", every_n_steps=every)
    assert torch.equal(weights(model), before)


@pytest.mark.parametrize("kind", KINDS)
def test_auto_is_exact(kind):
    found = last_hypergradient(observe(ClipR(math.inf), kind()))
    assert relative_error(found, truth(kind)) < 1e-5
