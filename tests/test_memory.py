"""What the callback holds in memory, in units of θ: every tensor that lives is counted."""

import gc

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from cases import L2SP, fit, frozen, pairwise
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_hpo import T1T2, ClipR, Hyperparameter, L1Mixin, L2Mixin, OnlineHPOCallback, UnrollK
from lightning_hpo.dynamics import base
from lightning_hpo.objectives import Moment
from lightning_hpo.step import tangents

WIDTH = 100
LAYERS = 8


class Deep(L1Mixin, L2Mixin, pl.LightningModule):
    """Weights weigh far more than activations, and no layer holds more than an eighth of them."""

    def __init__(self, optimizer, *, count=1, **options):
        super().__init__()
        hidden = [nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)]
        between = [part for layer in hidden for part in (layer, nn.Tanh())]
        self.net = nn.Sequential(nn.Linear(4, WIDTH), *between, nn.Linear(WIDTH, 3))
        self.optimizer = optimizer
        for i in range(count):
            self.register_l2(1e-3, name=f"l2_{i}", **options)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        return loss + self.penalty() if self.loss_penalties else loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        return self.optimizer(self.parameters())


class Noisy(Deep):
    def __init__(self, optimizer, **options):
        super().__init__(optimizer, **options)
        self.noise = Hyperparameter(0.1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x + self.noise() * torch.randn_like(x)), y)


def momentum(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def adam(parameters):
    return torch.optim.Adam(parameters, lr=1e-3)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that live, after every operation that makes one."""

    def __init__(self, least=WIDTH):
        super().__init__()
        self.least = least
        self.live = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        before = len(self.live)
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor) and t.numel() >= self.least:
                storage = t.untyped_storage()
                if storage._cdata not in self.live:
                    self.live[storage._cdata] = storage._weak_ref(), storage.nbytes()
        if len(self.live) > before:
            self.drop()
            self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return result

    def drop(self):
        for key, (reference, _) in list(self.live.items()):
            if torch.UntypedStorage._expired(reference):
                torch.UntypedStorage._free_weak_ref(reference)
                del self.live[key]


def peak(model, estimator=None, clip=None, every=2, accumulated=1, **options):
    """Returns the peak of a short training beyond the parameters, in units of θ."""
    callback = (
        []
        if estimator is None
        else [OnlineHPOCallback(estimator, optimizer=frozen, every_n_steps=every, **options)]
    )
    with LiveBytes() as live:
        fit(
            model,
            callback,
            steps=6,
            gradient_clip_val=clip,
            accumulate_grad_batches=accumulated,
            num_sanity_val_steps=0,
            limit_val_batches=0,
        )
    return live.peak / sum(p.numel() * p.element_size() for p in model.parameters())


LAYER = 1.1 / LAYERS
"""A layer's share of θ, a bit of activations included."""


@pytest.mark.parametrize("make", [momentum, adam])
@pytest.mark.parametrize("granularity", ["model", "layer"])
def test_t1t2_on_penalties_adds_one_theta(make, granularity, monkeypatch):
    monkeypatch.setattr(base, "BLOCK", WIDTH**2 // 10)
    plain = peak(Deep(make))
    model = Deep(make, granularity=granularity)
    # Besides its own, few tensors of the size of a layer come and go.
    assert 0.9 < peak(model, T1T2()) - plain < 1 + 2 * LAYER
    clipped = peak(Deep(make, granularity=granularity), T1T2(), clip=0.01)
    assert 1.9 < clipped - peak(Deep(make), clip=0.01) < 2 + 2 * LAYER
    # A threshold that is never reached costs nothing.
    assert peak(Deep(make), T1T2(), clip=1e6) - peak(Deep(make), clip=1e6) < 1 + 2 * LAYER
    model = Deep(make)
    model.register_l1(1e-4)
    assert 1.9 < peak(model, T1T2()) - plain < 2 + 2 * LAYER


class NearTheStart(Deep):
    """Its penalty keeps a θ of constants, which are there before the training starts."""

    def __init__(self, optimizer):
        super().__init__(optimizer, count=0)
        self.register_penalty(L2SP, 1e-3, name="near")


def test_t1t2_on_a_penalty_with_constants_adds_one_theta(monkeypatch):
    monkeypatch.setattr(base, "BLOCK", WIDTH**2 // 10)
    assert 0.9 < peak(NearTheStart(momentum), T1T2()) - peak(Deep(momentum)) < 1 + 2 * LAYER


BACKENDS = ["reverse", "forward", "finite_difference"]


@pytest.mark.parametrize(("make", "slopes"), [(momentum, 0), (adam, 1)])
@pytest.mark.parametrize("derivatives", BACKENDS)
def test_t1t2_inside_the_loss_adds_theta_and_the_validation_gradient(
    make, slopes, derivatives, monkeypatch
):
    """And ∂Φ/∂g, where that is no number; neither ∇L nor a displaced θ besides."""
    monkeypatch.setattr(base, "BLOCK", WIDTH**2 // 10)
    plain = peak(Noisy(make))
    for estimator, step in ((T1T2(), slopes), (T1T2(scale_by_lr=False), 0)):
        added = peak(Noisy(make), estimator, derivatives=derivatives) - plain
        assert 1.8 + step < added < 2 + step + 3 * LAYER


@pytest.mark.parametrize(("make", "kept"), [(momentum, 1), (adam, 4)])
@pytest.mark.parametrize("derivatives", BACKENDS)
def test_a_reverse_window_adds_theta_per_step(make, kept, derivatives):
    """For a nonlinear optimizer its gradient and its state as well; one graph at a time."""
    two, three = (
        peak(Noisy(make), UnrollK(k, "reverse"), every=k, derivatives=derivatives) for k in (2, 3)
    )
    assert three - two == pytest.approx(kept, abs=0.1)


def test_replays_share_constants():
    """A reverse window holds a θ per step, and none of what the penalty keeps."""
    two, three = (
        peak(NearTheStart(momentum), UnrollK(k, "reverse"), every=k, derivatives="reverse")
        for k in (2, 3)
    )
    assert three - two == pytest.approx(1, abs=0.1)


@pairwise(
    optimizer={"momentum": (momentum, 1), "adam": (adam, 2)},
    derivatives=BACKENDS,
    estimator={"ClipR": ClipR, "UnrollK": lambda: UnrollK(2, "forward")},
)
def test_a_tangent_adds_theta_and_the_state(optimizer, derivatives, estimator, monkeypatch):
    """What is needed besides does not depend on the number of λ."""
    make, states = optimizer
    monkeypatch.setattr(tangents, "_ELEMENTS", 1)
    two, five = (
        peak(Deep(make, count=count), estimator(), derivatives=derivatives) for count in (2, 5)
    )
    assert (five - two) / 3 == pytest.approx(1 + states, abs=0.02)


@pytest.mark.parametrize("derivatives", ["reverse", "finite_difference"])
def test_replays_at_the_batch_add_one_more_theta_per_tangent(derivatives, monkeypatch):
    """Until the last of the accumulated micro-batches has come."""
    monkeypatch.setattr(tangents, "_ELEMENTS", 1)
    two, five = (
        peak(Noisy(momentum, count=count), ClipR(), derivatives=derivatives, accumulated=2)
        for count in (2, 5)
    )
    assert (five - two) / 3 == pytest.approx(3, abs=0.1)


@pytest.mark.parametrize(
    "make", [T1T2, ClipR, lambda: UnrollK(2, "forward"), lambda: UnrollK(2, "reverse")]
)
def test_memory_does_not_grow(make):
    """What lives between two steps is as much as it was ten steps before, to the byte."""
    sizes = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            live.drop()
            if trainer.global_step % 10 == 8:
                sizes.append(sum(size for _, size in live.live.values()))

    with LiveBytes(least=1) as live:
        callback = OnlineHPOCallback(make(), optimizer=frozen, every_n_steps=2)
        fit(Noisy(adam), [Watch(), callback], steps=29, limit_val_batches=0)
    assert len(sizes) == 3
    assert len(set(sizes)) == 1


@pytest.mark.parametrize(
    ("make", "kept"),
    [(T1T2, 0), (ClipR, 0), (lambda: UnrollK(3, "forward"), 0), (lambda: UnrollK(3, "reverse"), 1)],
)
def test_micro_batches_are_let_go_of(make, kept):
    """Once a step has been made, only an open reverse window needs its micro-batches."""
    gc.collect()  # what other tests have left in cycles, such as the frames of an error
    counts = []
    before = alive()

    class Count(pl.Callback):
        def on_train_batch_end(self, *args):
            counts.append(alive() - before)

    callback = OnlineHPOCallback(make(), optimizer=frozen, every_n_steps=3)
    fit(Noisy(momentum), [callback, Count()], steps=6)
    assert counts == [kept, 2 * kept, 0] * 2
    assert alive() == before


def alive():
    # isinstance would follow the weak proxies of other libraries, some of them dead.
    return sum(type(o) is Moment for o in gc.get_objects())


def test_one_graph_at_a_time():
    """Where activations weigh more than weights, a longer window adds θ and its batch alone."""

    class Wide(Noisy):
        def training_step(self, batch, batch_idx):
            x, y = batch
            return super().training_step((x.repeat(300, 1), y.repeat(300)), batch_idx)

    two, six = (peak(Wide(momentum), UnrollK(k, "reverse"), every=k) for k in (2, 6))
    one = peak(Wide(momentum))
    assert one > 6  # what a graph weighs, in units of θ
    assert six - two == pytest.approx(4, abs=0.1)


@pytest.mark.parametrize("derivatives", ["reverse", "finite_difference"])
@pytest.mark.parametrize(("make", "states"), [(momentum, 1), (adam, 2)])
def test_one_tangent(derivatives, make, states, monkeypatch):
    """A product, and with differences the displaced θ, live while the step is under way."""
    monkeypatch.setattr(base, "BLOCK", WIDTH**2 // 10)
    added = peak(Deep(make), ClipR(), derivatives=derivatives) - peak(Deep(make))
    more = {"reverse": 1, "finite_difference": 2}[derivatives]
    assert 1 + states < added < 1 + states + more + 3 * LAYER  # with partial sums of a product
