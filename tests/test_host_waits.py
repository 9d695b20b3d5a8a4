"""A step without an update reads no number from a device: the host never waits for it.

The CPU stands in for a device: the functions that read a number are counted in a training with the
callback and in one without, and must be the same. That what is known to lie on the CPU anyway may
be read (``is_on_host``) is switched off.
"""

import math
import sys
import traceback
import warnings
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from cases import BATCH, Mlp, make_trainer, pairwise, train_loader, valid_loader
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_hpo import (
    T1T2,
    ClipR,
    DropoutMixin,
    ExampleWeightMixin,
    GaussianNoiseMixin,
    L1Mixin,
    OnlineHPOCallback,
    UnrollK,
)
from lightning_hpo.derivatives import FiniteDifference

READING = {
    "item",
    "tolist",
    "numpy",
    "cpu",
    "equal",
    "allclose",
    "nonzero",
    "masked_select",
    "unique",
    "__bool__",
    "__float__",
    "__int__",
    "__index__",
    "_local_scalar_dense",
}
# What lies in the memory of the host with any device: the states of generators, and what is shown
# in the progress bar (see test_monitoring.py), which Lightning reads at every step.
ON_HOST = ("lightning_hpo/rng.py", "logger_connector/result.py")


class Functions(TorchFunctionMode):
    """Counts what Python reads."""

    def __init__(self, count):
        super().__init__()
        self.count = count

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count(function.__name__)
        return function(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    """Counts what is read below Python."""

    def __init__(self, count):
        super().__init__()
        self.count = count

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.count(operator.overloadpacket.__name__)
        return operator(*args, **(kwargs or {}))


class Reads:
    """Counts reads in the steps after the first update that have none."""

    def __init__(self, every):
        self.every = every
        self.seen = Counter()
        self.step = 0
        self.begin = lambda watched: None

    @property
    def watched(self):
        return self.step > self.every and self.step % self.every > 0

    def count(self, name):
        if self.watched and name in READING:
            frames = traceback.extract_stack()
            if not any(f.filename.endswith(ON_HOST) for f in frames):
                own = [f"{f.filename}:{f.lineno}" for f in frames if "lightning_hpo" in f.filename]
                self.seen[name, own[-1] if own else "elsewhere"] += 1

    def batches(self, loader, steps):
        for self.step, batch in zip(range(1, steps + 1), loader, strict=False):
            self.begin(self.watched)
            yield batch
        self.step = 0
        self.begin(self.watched)


class Batches:
    """A loader that tells when a step begins."""

    def __init__(self, reads, steps):
        self.reads, self.steps = reads, steps
        self.batch_size = BATCH

    def __len__(self):
        return self.steps

    def __iter__(self):
        batches = [batch for _ in range(self.steps) for batch in train_loader()]
        return self.reads.batches(batches, self.steps)


class Plain(Mlp):
    def __init__(self, every, steps, **options):
        super().__init__("momentum", schedule=False, **options)
        self.reads = Reads(every)
        self.batches = Batches(self.reads, steps)

    def train_dataloader(self):
        return self.batches

    def val_dataloader(self):
        return valid_loader()


class Everything(GaussianNoiseMixin, DropoutMixin, L1Mixin, ExampleWeightMixin, Plain):
    """L2 and L1 in the gradient, noise, dropout and example weights in the loss."""

    def __init__(self, every, steps, **options):
        super().__init__(every, steps, **options)
        self.net.insert(2, nn.Dropout(0.3))
        self.double()
        self.register_l1(init=0.01)
        self.register_noise(init=0.1, at="net.0")
        self.register_dropout()
        self.register_example_weights(BATCH)
        self.double()

    def loss(self, batch):
        x, y = batch
        if not self.training:
            return super().loss(batch)
        losses = F.cross_entropy(self.net(x), y, reduction="none")
        return self.weighted_mean(losses, torch.arange(len(y), device=y.device))


def reads(module, steps, callbacks=(), **options):
    with Operators(module.reads.count), Functions(module.reads.count):
        make_trainer(steps, callbacks=list(callbacks), **options).fit(module)
    return module.reads.seen


@pytest.fixture(autouse=True)
def nothing_is_on_the_host(monkeypatch):
    for name, module in list(sys.modules.items()):
        if name.startswith("lightning_hpo") and hasattr(module, "is_on_host"):
            monkeypatch.setattr(module, "is_on_host", lambda tensor: False)


@pairwise(
    make={
        "T1T2": T1T2,
        "ClipR": lambda: ClipR(2.0, decay=0.9),
        "stride": lambda: ClipR(2.0, stride=2),
        "UnrollK": lambda: UnrollK(3),
    },
    derivatives=["reverse", "finite_difference"],
    kind={"plain": Plain, "everything": Everything},
    clip=[None, 0.3],
)
def test_a_step_without_an_update_waits_for_nothing(make, derivatives, kind, clip, monkeypatch):
    every, steps = 4, 12

    def train(*callbacks):
        torch.manual_seed(0)
        return reads(kind(every, steps), steps, callbacks, gradient_clip_val=clip)

    unread, looked = (
        OnlineHPOCallback(make(), every_n_steps=every, derivatives=derivatives) for _ in range(2)
    )
    assert train(unread) == train()
    # What may be read on a CPU saves work there, and changes nothing.
    monkeypatch.undo()
    train(looked)
    assert len(unread.history) == len(looked.history) == steps // every
    for a, b in zip(unread.history, looked.history, strict=True):
        for name, value in a.hypergradients.items():
            torch.testing.assert_close(value, b.hypergradients[name], rtol=1e-9, atol=1e-12)


def test_tuned_options_of_the_optimizer_are_read_after_updates_only():
    model = Plain(4, 12)
    callback = OnlineHPOCallback(T1T2(), every_n_steps=4, optimizer_hyperparameters=["lr"])
    copies = [name for name, place in reads(model, 12, [callback]).elements() if "options" in place]
    # Of raw λ; what is made of them lies on the CPU.
    assert copies.count("cpu") == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("derivatives", ["reverse", "finite_difference"])
@pytest.mark.parametrize(
    "make", [T1T2, lambda: ClipR(2.0, decay=0.9), lambda: UnrollK(3)], ids=["T1T2", "ClipR", "K"]
)
def test_a_gpu_is_not_waited_for(make, derivatives, monkeypatch):
    """As torch itself sees it, which warns of every operation that waits."""
    monkeypatch.undo()
    every, steps = 4, 12

    def count_waits(callbacks):
        module = Everything(every, steps)
        mode = torch.cuda.set_sync_debug_mode
        module.reads.begin = lambda watched: mode("warn" if watched else "default")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            make_trainer(steps, callbacks=callbacks, accelerator="gpu", devices=1).fit(module)
        torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing CUDA" in str(w.message) for w in caught)

    callback = OnlineHPOCallback(make(), every_n_steps=every, derivatives=derivatives)
    assert count_waits([callback]) == count_waits([])


def test_a_read_is_seen():
    class Curious(Plain):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            assert math.isfinite(loss.item())
            assert loss.detach() > 0
            return loss

    names = [name for name, _ in reads(Curious(4, 8), 8).elements()]
    # Steps 5, 6, 7.
    assert {n: names.count(n) for n in names} == {
        "item": 3,
        "__bool__": 3,
        "_local_scalar_dense": 6,
    }


def test_differences_in_directions_that_may_be_zero():
    """The host cannot skip them; their products are zero all the same."""
    theta = [torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)]
    lam = [torch.tensor(0.5, dtype=torch.float64, requires_grad=True)]
    u = [torch.tensor([[0.0, 0.0], [1.0, 2.0], [math.nan, 0.0]], dtype=torch.float64)]

    def loss(th, values):
        return (th[0].sin() * values[0]).prod()

    (found,) = FiniteDifference().tangent(loss, theta, lam, u, None)
    hessian = torch.autograd.functional.hessian(lambda t: loss([t], lam), theta[0])
    assert torch.equal(found[0], torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(found[1], hessian @ u[0][1], rtol=1e-8, atol=0)
    assert found[2].isnan().all()

    (displaced,), weights = FiniteDifference().one_sided(loss, theta, lam, u)
    (gradient,) = torch.autograd.grad(loss(theta, lam), theta)
    products = displaced - weights.reshape(-1, 1) * gradient
    assert torch.equal(products[0], torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(products[1], hessian @ u[0][1], rtol=1e-6, atol=0)
    assert products[2].isnan().all()
