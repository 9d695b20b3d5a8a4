"""What a training step writes besides θ: a replay starts from what was there, and leaves it."""

import collections
import copy
import functools
import math

import pytest
import torch
import torch.nn.functional as F
from cases import Mlp, fit, last_hypergradient, observe, relative_error, truth
from torch import nn

from lightning_hpo import T1T2, ClipR, UnrollK

BACKENDS = pytest.mark.parametrize("derivatives", ["reverse", "finite_difference"])


class Annealed(Mlp):
    """Writes to a parameter that is not trained."""

    def __init__(self, optimizer):
        super().__init__(optimizer)
        self.temperature = nn.Parameter(torch.ones(()), requires_grad=False)

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            self.temperature.mul_(0.8)
        return super().training_step(batch, batch_idx) * self.temperature


class AnnealedBackbone(Annealed):
    """Small beside what else is frozen."""

    def __init__(self, optimizer):
        super().__init__(optimizer)
        self.backbone = nn.Parameter(torch.zeros(20_000), requires_grad=False)


class Teacher(Mlp):
    """Follows a moving average that requires grad, and that no optimizer moves."""

    def __init__(self, optimizer):
        super().__init__(optimizer)
        self.teacher = copy.deepcopy(self.net)

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            for slow, p in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
                slow.lerp_(p.detach(), 0.1)
        size = sum(p.detach().square().sum() for p in self.teacher.parameters())
        return super().training_step(batch, batch_idx) * size

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=0.01, momentum=0.9)


class OwnState(Mlp):
    """Makes an attribute, a buffer and the contents of a tuple in the course of a step."""

    def __init__(self, optimizer):
        super().__init__(optimizer)
        self.register_buffer("count", None)
        self.pair = (torch.ones(()), [1.0])

    def on_train_batch_start(self, batch, batch_idx):
        self.count = None
        vars(self).pop("seen", None)

    def training_step(self, batch, batch_idx):
        factor = 0.3 if hasattr(self, "seen") or self.count is not None else 1.0
        self.seen, self.count = True, torch.ones(())
        self.pair[0].mul_(0.9)
        return super().training_step(batch, batch_idx) * factor * self.pair[0]


class AnnealedLater(Annealed):
    """In a way that torch does not count."""

    def training_step(self, batch, batch_idx):
        if self.global_step >= 4:
            self.temperature.data.mul_(0.8)
        return Mlp.training_step(self, batch, batch_idx) * self.temperature


class Exchanges(Mlp):
    """Exchanges functions and modules, once."""

    def __init__(self, optimizer):
        super().__init__(optimizer)
        self.criterion = F.cross_entropy

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = self.criterion(self.net(x), y)
        if self.criterion is F.cross_entropy:
            self.criterion = functools.partial(F.cross_entropy, label_smoothing=0.3)
        else:
            self.criterion = lambda *a: F.cross_entropy(*a, label_smoothing=0.1)
        return loss


class Registers(Mlp):
    """Registers a buffer where there was none, and deletes another."""

    def __init__(self, optimizer):
        super().__init__(optimizer)
        self.register_buffer("early", torch.tensor(2.0))

    def training_step(self, batch, batch_idx):
        factor = self.early if hasattr(self, "early") else 1.0
        if hasattr(self, "early"):
            del self.early
        if "late" not in dict(self.net.named_buffers()):
            self.net.register_buffer("late", torch.tensor(0.5))
            factor = factor * 3.0
        return super().training_step(batch, batch_idx) * factor


class RegistersUnsaved(Mlp):
    """Registers a buffer that is not saved, of which the module keeps the name in a set."""

    def on_train_batch_start(self, batch, batch_idx):
        vars(self)["_buffers"].clear()
        self._non_persistent_buffers_set.clear()

    def training_step(self, batch, batch_idx):
        factor = 0.3 if self._non_persistent_buffers_set else 1.0
        self.register_buffer("late", torch.ones(()), persistent=False)
        return super().training_step(batch, batch_idx) * factor


class Counter:
    def __init__(self):
        self.factor = 1.0

    def __call__(self):
        self.factor *= 0.9
        return self.factor


class Objects(Mlp):
    """Keeps state in an object that can be called, and in a named tuple."""

    def __init__(self, optimizer):
        super().__init__(optimizer)
        self.counter = Counter()
        self.pair = collections.namedtuple("Pair", "a b")(torch.ones(()), [1.0])

    def training_step(self, batch, batch_idx):
        self.pair.a.mul_(0.9)
        self.pair.b[0] *= 0.95
        factor = self.counter() * self.pair.a * self.pair.b[0]
        return super().training_step(batch, batch_idx) * factor


class OnOptimizer(Mlp):
    """Keeps counts in attributes of the optimizer, and in its defaults."""

    def training_step(self, batch, batch_idx):
        optimizer = self.trainer.optimizers[0]
        optimizer.count = getattr(optimizer, "count", 0) + 1
        optimizer.defaults["scale"] = 0.9 * optimizer.defaults.get("scale", 1.0)
        factor = optimizer.defaults["scale"] / optimizer.count
        return super().training_step(batch, batch_idx) * factor


class Scaled(torch.optim.SGD):
    scale = 1.0

    def step(self, closure=None):
        loss = closure()
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p.sub_(0.01 * self.scale * p.grad)
        return loss


class OfOptimizer(Mlp):
    """Anneals an attribute that the optimizer's own step reads."""

    def configure_optimizers(self):
        self.own = Scaled(self.parameters(), lr=0.01)
        return self.own

    def training_step(self, batch, batch_idx):
        self.own.scale *= 0.8
        return super().training_step(batch, batch_idx)


WRITING = [
    *(
        Annealed,
        AnnealedBackbone,
        AnnealedLater,
        OwnState,
        Exchanges,
        Registers,
        RegistersUnsaved,
        Objects,
    ),
    *(OnOptimizer, OfOptimizer),
]


@functools.cache
def expected(kind):
    return truth(lambda: kind("momentum"))


@pytest.mark.parametrize("kind", WRITING)
@pytest.mark.parametrize(
    "make", [lambda: ClipR(math.inf), lambda: UnrollK(10, "forward"), lambda: UnrollK(10)]
)
@BACKENDS
def test_what_a_step_writes_besides(kind, make, derivatives):
    """A replay starts from what was there before."""
    found = last_hypergradient(observe(make(), kind("momentum"), derivatives=derivatives))
    assert relative_error(found, expected(kind)) < 1e-5


class Lazy(Mlp):
    """Makes a part of itself when it is first needed, and draws its weights then."""

    def training_step(self, batch, batch_idx):
        if not hasattr(self, "extra"):
            self.extra = nn.Linear(4, 4)
        x, y = batch
        return super().training_step((x + self.extra(x), y), batch_idx)


@pytest.mark.parametrize("kind", [*WRITING, Teacher, Lazy])
@pytest.mark.parametrize("make", [T1T2, ClipR, lambda: UnrollK(2, "reverse")])
def test_what_a_step_writes_is_written_once(kind, make):
    observed, alone = kind("momentum"), kind("momentum")
    torch.manual_seed(0)
    observe(make(), observed)
    torch.manual_seed(0)
    fit(alone)
    states = observed.state_dict(), alone.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, value in states[1].items():
        assert torch.equal(states[0][name], value), name
