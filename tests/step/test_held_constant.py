"""Losses whose gradient is not the derivative of their value are found at the start, and named."""

import math
import warnings
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed.nn
import torch.nn.functional as F
from cases import (
    TRAIN,
    EachRank,
    Mlp,
    fit,
    last_hypergradient,
    make_trainer,
    observe,
    relative_error,
    truth,
)
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_hpo import (
    T1T2,
    ClipR,
    L2Mixin,
    OnlineHPOCallback,
    UnrollK,
)
from lightning_hpo.step import value_check

SAID = "is not the derivative of its value"


class SimSiam(Mlp):
    """Two views of each example, of which one is the other's target (Chen & He 2021)."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        one, two = self.net(x), self.net(x.roll(1, dims=1))
        return F.cross_entropy(one, y) - F.cosine_similarity(one, two.detach()).mean()


class PseudoLabels(Mlp):
    """Soft labels of its own for some of the examples."""

    def training_step(self, batch, batch_idx):
        x, _ = batch
        with torch.no_grad():
            labels = (2 * self.net(x)).softmax(1)
        return self.loss(batch) + F.cross_entropy(self.net(x.flip(1)), labels)


class DetachedWeights(Mlp):
    """Hard examples count more (focal loss with constant weights)."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        losses = F.cross_entropy(self.net(x), y, reduction="none")
        return ((1 - (-losses).exp()).square().detach() * losses).mean()


class DetachedInside(DetachedWeights):
    """The same with a penalty in the loss."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + self.penalty()


class Reversal(torch.autograd.Function):
    """Gradient reversal (Ganin & Lempitsky 2015)."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return -0.5 * g


class Adversary(Mlp):
    """The features are to please one head and to fool the other."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        features = self.net[1](self.net[0](x))
        domain = self.net[2](Reversal.apply(features)).flip(1)
        return F.cross_entropy(self.net[2](features), y) + F.cross_entropy(domain, y)


class ActivationHook(Mlp):
    """The gradient of the features is changed by a hook on them."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        features = self.net[1](self.net[0](x))
        features.register_hook(lambda g: -0.5 * g)
        return F.cross_entropy(self.net[2](features), y)


class ParameterHook(Mlp):
    """A layer that learns ten times as slowly."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.net[0].weight.register_hook(lambda g: 0.1 * g)


class ClippedFeatures(Mlp):
    """Gradients of the features are clipped, as those of recurrent layers often are."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        features = self.net[1](self.net[0](x))
        features.register_hook(lambda g: g.clamp(-0.02, 0.02))
        return F.cross_entropy(self.net[2](features), y)


class StraightThrough(Mlp):
    """Binary features, whose gradient passes straight through."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        features = self.net[0](x)
        binary = features + (features.sign() - features).detach()
        return F.cross_entropy(self.net[2](binary), y)


class LateHead(Mlp):
    """A second loss trains the head alone: the features are computed under no_grad."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        with torch.no_grad():
            features = self.net[0](x).tanh()
        return self.loss(batch) + 3 * F.cross_entropy(self.net[2](features), y)


PROVOKED = [
    SimSiam,
    PseudoLabels,
    DetachedWeights,
    Adversary,
    ActivationHook,
    ClippedFeatures,
    ParameterHook,
    StraightThrough,
    LateHead,
]


def messages(estimator, model, train=None, *, steps=2, derivatives="auto", **options):
    """Trains for a moment, and returns what is said of losses that hold something constant."""
    callback = OnlineHPOCallback(estimator, derivatives=derivatives)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(model, callback, steps=steps, train=train, **options)
    return [str(w.message) for w in caught if SAID in str(w.message)]


def in_float32(batch_size=8):
    x, y = TRAIN
    return DataLoader(TensorDataset(x.float(), y), batch_size=batch_size)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", PROVOKED)
def test_what_is_held_constant_is_found(kind, dtype):
    if dtype == "float32":
        torch.set_default_dtype(torch.float32)
        said = messages(ClipR(), kind().float(), in_float32(), valid=in_float32())
    else:
        said = messages(ClipR(), kind())
    assert len(said) == 1
    assert "derivatives='finite_difference' with ClipR or UnrollK(mode='forward')" in said[0]


def keeps_casts_without_gradient():
    """Whether weights that autocast has cast under ``no_grad`` get no gradient later on."""
    layer, x = nn.Linear(2, 2, dtype=torch.float32), torch.ones(1, 2, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            layer(x)
        return not layer(x).requires_grad


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(
            {"precision": "bf16-mixed"},
            marks=pytest.mark.skipif(
                keeps_casts_without_gradient(),
                reason="in this version of torch such a step has no gradient, callback or not",
            ),
        ),
        {"accumulate_grad_batches": 2},
    ],
)
def test_is_found_under_autocast_and_accumulation(options):
    torch.set_default_dtype(torch.float32)
    train = in_float32()
    assert len(messages(ClipR(), PseudoLabels().float(), train, valid=train, **options)) == 1
    assert not messages(ClipR(), Mlp().float(), train, valid=train, **options)


def test_the_rates_are_those_of_the_loss():
    class Scaled(Mlp):
        def training_step(self, batch, batch_idx):
            loss = self.loss(batch)
            return loss + 2 * (loss - loss.detach()) - 0.5 * (loss - loss.detach())

    (said,) = messages(ClipR(), Scaled())
    rates = said.split("changes at a rate of ")[1].split(", and its gradient says ")
    value, expected = float(rates[0]), float(rates[1].split(". Something")[0])
    assert expected == pytest.approx(2.5 * value, rel=1e-2)  # they are printed to three digits


# --------------------------------------------------------------------------------------- the remedy


@pytest.mark.parametrize("make", [lambda: ClipR(math.inf), lambda: UnrollK(10, "forward")])
@pytest.mark.parametrize("kind", PROVOKED)
def test_differences_along_tangents_follow_it_and_nothing_is_said(kind, make):
    def model():
        return kind("momentum", granularity="model")

    with warnings.catch_warnings():
        warnings.filterwarnings("error", f".*{SAID}")
        callback = observe(make(), model(), derivatives="finite_difference", every_n_steps=10)
    assert relative_error(last_hypergradient(callback), truth(model)) < 1e-5


@pytest.mark.parametrize("kind", [SimSiam, PseudoLabels, Adversary])
def test_without_it_hypergradients_are_off(kind):
    def model():
        return kind("momentum", granularity="model")

    with pytest.warns(UserWarning, match=SAID):
        callback = observe(ClipR(math.inf), model(), every_n_steps=10)
    assert relative_error(last_hypergradient(callback), truth(model)) > 0.05


def test_hooks_on_parameters_are_followed_by_adjoints():
    def model():
        return ParameterHook("momentum", granularity="model")

    with warnings.catch_warnings():
        warnings.filterwarnings("error", f".*{SAID}")
        callback = observe(UnrollK(10, "reverse"), model(), every_n_steps=10)
    assert relative_error(last_hypergradient(callback), truth(model)) < 1e-6
    assert messages(UnrollK(2, "reverse"), model(), derivatives="finite_difference")


def test_nothing_is_asked_where_no_estimator_replays(monkeypatch):
    asked = look(monkeypatch)
    fit(DetachedWeights(), OnlineHPOCallback(T1T2(), every_n_steps=1), steps=2)
    assert not asked
    assert messages(T1T2(), DetachedInside(inside_loss=True))
    assert asked


# ----------------------------------------------------------------------------------------- silence


class Healthy(L2Mixin, pl.LightningModule):
    """A network and a loss of (network, x, y), in float32."""

    def __init__(self, net, loss=None, shape=(12,)):
        super().__init__()
        self.net = net
        self.loss = loss or (lambda net, x, y: F.cross_entropy(net(x), y))
        self.shape = shape
        self.register_l2(init=1e-3)

    def data(self):
        generator = torch.Generator().manual_seed(3)
        x = torch.randn(64, *self.shape, generator=generator)
        y = torch.randint(0, 4, (64,), generator=generator)
        return DataLoader(TensorDataset(self.changed(x), y), batch_size=32)

    def changed(self, x):
        return x

    def training_step(self, batch, batch_idx):
        return self.loss(self.net, *batch)

    def validation_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Blank(Healthy):
    """Most of each picture is exactly zero, and so is what most units are given."""

    def changed(self, x):
        return x * (x > 3)


def mlp(width=32):
    return nn.Sequential(nn.Linear(12, width), nn.ReLU(), nn.Linear(width, 4))


def cnn():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32, 4),
    )


class Pooled(nn.Module):
    """Biases are zero, so that units whose input is zero are at their kink."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3)
        self.out = nn.Linear(8, 4)
        nn.init.zeros_(self.conv.bias)

    def forward(self, x):
        return self.out(self.conv(x).relu().mean((2, 3)))


class AtZero(nn.Module):
    """A shift that starts at zero, where its slope is one to the left and four to the right."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.shift = nn.Parameter(torch.zeros(4))

    def forward(self, x):
        return self.net(x) + self.shift + 3 * self.shift.relu()


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.LSTM(3, 8, 2, batch_first=True, dropout=0.2)
        self.out = nn.Linear(8, 4)

    def forward(self, x):
        return self.out(self.layers(x)[0][:, -1])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.into = nn.Linear(3, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, 0.1, batch_first=True)
        self.out = nn.Linear(8, 4)

    def forward(self, x):
        return self.out(self.layer(self.into(x)).mean(1))


def log_sum_exp(net, x, y):
    """The detached maximum cancels: the value does not depend on it."""
    z = net(x)
    top = z.max(1, keepdim=True).values.detach()
    return (top[:, 0] + (z - top).exp().sum(1).log() - z.gather(1, y[:, None])[:, 0]).mean()


def l1(net, x, y):
    return F.cross_entropy(net(x), y) + 0.01 * sum(p.abs().sum() for p in net.parameters())


def noise(net, x, y):
    return F.cross_entropy(net(x + 0.1 * torch.randn_like(x)), y)


def signed_gradient(net, x, y):
    """Adversarial examples: the sign of a gradient is constant nearly everywhere."""
    x = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(net(x), y), x)
    return F.cross_entropy(net((x + 0.1 * g.sign()).detach()), y)


def gradient_penalty(net, x, y):
    x = x.clone().requires_grad_()
    loss = F.cross_entropy(net(x), y)
    (g,) = torch.autograd.grad(loss, x, create_graph=True)
    return loss + 10 * g.square().sum()


def zeros():
    net = nn.Linear(12, 4)
    for p in net.parameters():
        nn.init.zeros_(p)
    return net


def zero_last():
    net = mlp()
    for p in net[2].parameters():
        nn.init.zeros_(p)
    return net


def spectral(width=64):
    normed = nn.utils.parametrizations.spectral_norm
    return nn.Sequential(
        normed(nn.Linear(12, width)),
        nn.ReLU(),
        normed(nn.Linear(width, width)),
        nn.ReLU(),
        normed(nn.Linear(width, 4)),
    )


def with_loss(loss):
    return lambda: Healthy(mlp(), loss)


HEALTHY = {
    "mlp": lambda: Healthy(mlp()),
    "cnn": lambda: Healthy(cnn(), shape=(1, 8, 8)),
    "kinks": lambda: Blank(Pooled(), shape=(1, 8, 8)),
    "lstm": lambda: Healthy(Recurrent(), shape=(4, 3)),
    "transformer": lambda: Healthy(Attention(), shape=(4, 3)),
    "spectral_norm": lambda: Healthy(spectral()),
    "zero_weights": lambda: Healthy(zero_last()),
    "zeros": lambda: Healthy(zeros()),
    "log_sum_exp": with_loss(log_sum_exp),
    "l1": with_loss(l1),
    "noise": with_loss(noise),
    "smoothing": with_loss(lambda n, x, y: F.cross_entropy(n(x), y, label_smoothing=0.1)),
    "sum": with_loss(lambda n, x, y: F.cross_entropy(n(x), y, reduction="sum")),
    "signed_gradient": with_loss(signed_gradient),
    "gradient_penalty": with_loss(gradient_penalty),
    "constant": with_loss(lambda n, x, y: F.cross_entropy(n(x), y) + 1e3),
    "zero": with_loss(lambda n, x, y: F.cross_entropy(n(x), y) - 1.4),
}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("make", HEALTHY.values(), ids=HEALTHY)
def test_nothing_is_said_of_healthy_losses(make, precision, monkeypatch):
    torch.set_default_dtype(torch.float32)
    asked = look(monkeypatch)
    model = make()
    data = model.data()
    assert not messages(UnrollK(2, "reverse"), model, data, valid=data, precision=precision)
    assert asked


@pytest.mark.parametrize(
    "options",
    [{"accumulate_grad_batches": 2}, {"gradient_clip_val": 1e-3}, {"precision": "bf16-true"}],
)
@pytest.mark.parametrize("inside", [False, True])
def test_nothing_is_said_in_healthy_trainings(options, inside):
    torch.set_default_dtype(torch.float32)
    train = in_float32()
    model = Mlp("momentum", inside_loss=inside, init=1.0).float()
    assert not messages(ClipR(), model, train, valid=train, **options)


def look(monkeypatch):
    """Counts the directions that are looked at."""
    asked = []
    original = value_check._slope
    monkeypatch.setattr(
        value_check, "_slope", lambda *a, **k: (asked.append(1), original(*a, **k))[1]
    )
    return asked


@pytest.mark.parametrize("seed", range(3))
def test_kinks_are_told_from_constants(seed):
    """At a kink a central difference is the mean of both slopes."""
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(seed)
    model = Healthy(AtZero(mlp()))
    data = model.data()
    assert not messages(ClipR(), model, data, valid=data)


def test_losses_that_differ_between_replays_are_left_to_others():
    state = []

    class Unrepeatable(Mlp):
        def training_step(self, batch, batch_idx):
            state.append(1)
            return self.loss(batch) * (1 + 0.01 * len(state))

    assert not messages(ClipR(), Unrepeatable())


# ------------------------------------------------------------------------------------ several ranks


class OnRanks(EachRank, Mlp):
    """Each rank has examples of its own."""

    def __init__(self):
        super().__init__()
        self.register_buffer("said", torch.zeros(2))


class OneRank(OnRanks):
    """Pseudo-labels on the second rank alone."""

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        if self.global_rank == 1:
            return loss + 2 * F.cross_entropy(
                self.net(batch[0].flip(1)), (2 * self.net(batch[0])).softmax(1).detach()
            )
        return loss


class Together(OnRanks):
    """Features are centred over both ranks: each loss depends on the examples of the other."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        features = self.net[0](x)
        center = torch.distributed.nn.functional.all_reduce(features.mean(0)) / 2
        return F.cross_entropy(self.net[2]((features - center).tanh()), y)


class Count(pl.Callback):
    """Leaves the fewest and the most warnings of any rank in what comes back from them."""

    def on_train_end(self, trainer, module):
        for i, sign in enumerate((-1, 1)):
            count = torch.tensor(float(sign * len(value_check.warnings.said)))
            torch.distributed.all_reduce(count, torch.distributed.ReduceOp.MAX)
            module.said[i] = sign * count


@pytest.mark.usefixtures("within_two_minutes")
@pytest.mark.parametrize(
    ("kind", "expected"), [(OnRanks, [0, 0]), (OneRank, [1, 1]), (Together, [0, 0])]
)
def test_ranks_agree(kind, expected, monkeypatch):
    said = []
    noted = SimpleNamespace(warn=lambda message, **_: said.append(message), said=said)
    monkeypatch.setattr(value_check, "warnings", noted)
    model = kind()
    make_trainer(
        2,
        callbacks=[Count(), OnlineHPOCallback(ClipR())],
        devices=2,
        strategy=DDPStrategy(start_method="fork"),
        use_distributed_sampler=False,
    ).fit(model)
    assert model.said.tolist() == expected
