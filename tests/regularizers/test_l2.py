"""L2Mixin: which weights, under which names, and how the penalty acts."""

import lightning.pytorch as pl
import pytest
import torch
from cases import (
    BATCH,
    CLIPPINGS,
    TRAIN,
    VALID,
    MemoryLogger,
    Mlp,
    fit,
    flat,
    make_optimizer,
    pairwise,
    weights,
)
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_hpo import (
    T1T2,
    ClipR,
    Hyperparameter,
    Interval,
    L2Mixin,
    OnlineHPOCallback,
    Positive,
    UnrollK,
    named_hyperparameters,
)
from lightning_hpo.regularizers import L1Penalty, L2Penalty


class RMSNormOfMyOwn(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))


class Zoo(L2Mixin, pl.LightningModule):
    """Layers of many kinds, and a weight of its own."""

    def __init__(self, **options):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3), nn.LayerNorm(4), nn.GroupNorm(1, 3)
        )
        self.custom = RMSNormOfMyOwn()
        self.head = nn.Linear(4, 2)
        self.embedding = nn.Embedding(5, 4)
        self.scale = nn.Parameter(torch.ones(()))
        self.tied = nn.Linear(4, 5, bias=False)
        self.tied.weight = self.embedding.weight
        self.register_l2(init=0.1, **options)


def coverage(module):
    """Maps each hyperparameter's name to the names of the weights that it acts on."""
    names = {id(p): n for n, p in module.named_parameters()}
    found = {id(h): n for n, h in named_hyperparameters(module).items()}
    penalties = [*module.gradient_penalties, *module.loss_penalties]
    return {found[id(p.hyperparameter)]: [names[id(w)] for w in p.weights] for p in penalties}


WEIGHTS = ["scale", "net.0.weight", "head.weight", "embedding.weight"]


def test_one_strength_for_the_model():
    """Biases and normalization layers are left out, and a shared weight counts once."""
    assert coverage(Zoo()) == {"l2": WEIGHTS}


def test_one_strength_per_layer():
    assert coverage(Zoo(granularity="layer")) == {
        "l2.own": ["scale"],
        "l2.net.0": ["net.0.weight"],
        "l2.head": ["head.weight"],
        "l2.embedding": ["embedding.weight"],
    }


def test_one_strength_per_parameter():
    assert coverage(Zoo(granularity="parameter", name="decay")) == {
        f"decay.{name}": [name] for name in WEIGHTS
    }


def test_a_layer_with_several_weights_has_one_strength():
    class Recurrent(L2Mixin, pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.rnn = nn.RNN(2, 3)
            self.register_l2(0.1, granularity="layer")

    assert coverage(Recurrent()) == {"l2.rnn": ["rnn.weight_ih_l0", "rnn.weight_hh_l0"]}


def test_a_layer_that_owns_weights_besides_its_sub_layers():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(2, 2)
            self.gain = nn.Parameter(torch.ones(2))

    class Nested(L2Mixin, pl.LightningModule):
        def __init__(self, flip):
            super().__init__()
            self.block = Outer()
            names = ["block.gain", "block.inner.weight"]
            self.register_l2(0.1, granularity="layer", parameters=names[::-1] if flip else names)

    for flip in (False, True):
        covered = coverage(Nested(flip))
        assert sorted(covered.values()) == [["block.gain"], ["block.inner.weight"]]
        assert all(name.startswith("l2.block") for name in covered)


@pytest.mark.parametrize("by_name", [False, True])
def test_chosen_parameters(by_name):
    """Whatever is chosen is regularized, biases included."""

    class Chosen(Zoo):
        def register_l2(self, init):
            chosen = (
                ["head.bias", "net.1.weight"] if by_name else [self.head.bias, self.net[1].weight]
            )
            super().register_l2(init, granularity="parameter", parameters=chosen)

    assert coverage(Chosen()) == {
        "l2.head.bias": ["head.bias"],
        "l2.net.1.weight": ["net.1.weight"],
    }


def test_several_registrations_under_names_of_their_own():
    class Two(Zoo):
        def __init__(self):
            super().__init__(parameters=["head.weight"])
            self.register_l2(0.2, name="other", parameters="scale", constraint=Interval(0.0, 1.0))

    module = Two()
    assert coverage(module) == {"l2": ["head.weight"], "other": ["scale"]}
    assert module.other().item() == 0.2
    assert module.other.constraint == Interval(0.0, 1.0)


def test_strengths_are_no_parameters_and_in_the_state_dict():
    module = Zoo(granularity="layer")
    assert not [n for n, _ in module.named_parameters() if n.startswith("l2")]
    assert {"l2.own.raw", "l2.net.0.raw"} <= set(module.state_dict())


@pytest.mark.parametrize("inside_loss", [False, True])
def test_a_penalty_acts_in_one_of_the_two_ways(inside_loss):
    module = Zoo(inside_loss=inside_loss)
    acting = {True: module.loss_penalties, False: module.gradient_penalties}
    assert len(acting[inside_loss]) == 1
    assert acting[not inside_loss] == []


def test_the_penalty_is_half_the_strength_times_the_squared_norm():
    module = Zoo(inside_loss=True, granularity="layer")
    named = dict(module.named_parameters())
    expected = sum(0.05 * named[name].square().sum() for name in WEIGHTS)
    torch.testing.assert_close(module.penalty(), expected)


# ----------------------------------------------------------------------------- without the callback


class WeightDecay(pl.LightningModule):
    """The same network with torch's own coupled weight decay on the weights."""

    def validation_step(self, batch, batch_idx):
        pass

    def __init__(self, twin, decay):
        super().__init__()
        self.net = twin.net
        self.name = twin.optimizer_name
        self.decay = decay

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        layers = (self.net[0], self.net[2])
        optimizer = make_optimizer(self.name, [p for layer in layers for p in layer.parameters()])
        (group,) = optimizer.param_groups
        group["params"] = [layer.weight for layer in layers]
        group["weight_decay"] = self.decay
        optimizer.add_param_group({"params": [layer.bias for layer in layers], "weight_decay": 0.0})
        return optimizer


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "nesterov", "adam", "rmsprop"])
@pytest.mark.parametrize("inside_loss", [False, True], ids=["gradient", "loss"])
def test_without_the_callback_it_is_a_coupled_weight_decay(optimizer, inside_loss):
    model = Mlp(optimizer, granularity="model", inside_loss=inside_loss, schedule=False, init=0.1)
    fit(model)
    decayed = WeightDecay(Mlp(optimizer), 0.1)
    fit(decayed)
    torch.testing.assert_close(weights(model), weights(decayed), rtol=1e-10, atol=1e-13)
    plain = WeightDecay(Mlp(optimizer), 0.0)
    fit(plain)
    assert not torch.allclose(weights(plain), weights(decayed), rtol=1e-3)
    assert model.l2().item() == pytest.approx(0.1)


def test_a_weight_without_a_gradient_is_left_alone():
    model = Mlp()
    model.net[0].weight.requires_grad_(False)
    before = model.net[0].weight.clone()
    fit(model)
    assert torch.equal(model.net[0].weight, before)


def test_strengths_can_differ_and_be_loaded():
    model = Mlp(raw=[-1.0, -4.0])
    other = Mlp()
    other.load_state_dict(model.state_dict())
    fit(model)
    fit(other)
    assert torch.equal(weights(model), weights(other))
    fit(default := Mlp())
    assert not torch.allclose(weights(model), weights(default), rtol=1e-3)


# ---------------------------------------------------------------------------------- two ways to act


def half_precision(name):
    data = {
        "train": DataLoader(TensorDataset(TRAIN[0].float(), TRAIN[1]), batch_size=BATCH),
        "valid": DataLoader(TensorDataset(VALID[0].float(), VALID[1]), batch_size=20),
    }
    if name == "bf16-mixed":
        return {"precision": name, **data}
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    return {"plugins": MixedPrecision(name, "cpu", scaler), **data}


# Several ranks: tests/test_distributed.py.
TRAININGS = {
    **{name: lambda name=name: CLIPPINGS[name] for name in CLIPPINGS},
    # Four batches: at the end of an epoch Lightning would halve the loss of a single one.
    "accumulation": lambda: {
        "accumulate_grad_batches": 2,
        "limit_train_batches": 4,
        **CLIPPINGS["norm"],
    },
    "logging": lambda: {"logger": MemoryLogger(), "log_every_n_steps": 1},
    "16-mixed": lambda: half_precision("16-mixed"),
    "bf16-mixed": lambda: half_precision("bf16-mixed"),
}


@pairwise(
    make={
        "T1T2": T1T2,
        "ClipR": lambda: ClipR(radius=2.0),
        "UnrollK": lambda: UnrollK(2, "reverse"),
    },
    optimizer=["momentum", "adam"],
    training=TRAININGS.keys(),
)
def test_inside_the_loss_equals_in_the_gradient_while_tuning(make, optimizer, training):
    """θ and λ trajectories, both moving."""
    mixed = "mixed" in training
    runs = []
    for inside_loss in (False, True):
        model = Mlp(optimizer, inside_loss=inside_loss)
        callback = OnlineHPOCallback(
            make(), every_n_steps=2, optimizer=lambda raw: torch.optim.SGD(raw, lr=50.0)
        )
        fit(model.float() if mixed else model, callback, **TRAININGS[training]())
        values = torch.tensor([list(r.values.values()) for r in callback.history])
        runs.append((values, weights(model)))
    (values, theta), (other_values, other_theta) = runs
    tolerance = 1e-4 if mixed else 1e-9
    torch.testing.assert_close(other_values, values, rtol=tolerance, atol=0)
    torch.testing.assert_close(other_theta, theta, rtol=tolerance, atol=1e-3 * tolerance)
    assert (values[-1] / values[0]).log().abs().min() > 10 * tolerance


# ---------------------------------------------------------------------------------- its derivatives


@pytest.mark.parametrize("given", ["u", "e", "both"])
@pytest.mark.parametrize("shapes", [[(3, 2), (4,)], [(3, 2), ()]], ids=["arrays", "scalar"])
@pytest.mark.parametrize("constraint", [None, Interval(0.0, 1.0)], ids=["log", "identity"])
def test_both_verbs_against_a_dense_hessian(given, shapes, constraint):
    class Owner(L2Mixin, pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.w = nn.ParameterList([torch.randn(s) for s in shapes])
            self.register_l2(0.3, constraint=constraint)

    (penalty,) = Owner().gradient_penalties
    assert isinstance(penalty, L2Penalty)
    w = [p.detach() for p in penalty.weights]
    sizes = [t.numel() for t in w]

    def value(vector):
        parts = vector[:-1].split(sizes)
        shaped = [p.reshape(t.shape) for p, t in zip(parts, w, strict=True)]
        return penalty.hyperparameter.constraint(vector[-1]) * penalty.total(shaped)

    hessian = torch.autograd.functional.hessian(value, torch.cat([flat(w), penalty.raw.reshape(1)]))
    m = 3
    u = [torch.randn(m, *t.shape) for t in w]
    e = torch.randn(m)
    stacked = torch.cat([d.reshape(m, -1) for d in u], dim=1)
    if given == "u":
        e = torch.zeros(m)
    if given == "e":
        stacked = torch.zeros_like(stacked)
    truth = torch.cat([stacked, e[:, None]], dim=1) @ hessian
    theta_part, which = [torch.zeros(m, *t.shape) for t in w], range(len(w))
    directions = None if given == "e" else u, None if given == "u" else e.tolist()
    penalty.tangent_(which, w, *directions, theta_part)
    result = torch.cat([t.reshape(m, -1) for t in theta_part], dim=1)
    torch.testing.assert_close(result, truth[:, :-1], rtol=1e-11, atol=1e-13)
    if given == "u":
        theta_part = [torch.zeros(m, *t.shape) for t in w]
        lambda_part = penalty.adjoint_(which, w, u, theta_part)
        result = torch.cat([t.reshape(m, -1) for t in theta_part], dim=1)
        torch.testing.assert_close(result, truth[:, :-1], rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(lambda_part, truth[:, -1], rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(penalty.adjoint_(which, w, u, None), lambda_part)


def test_the_gradient_that_is_added_is_that_of_the_term_in_the_loss():
    def gradient(inside_loss):
        model = Mlp(inside_loss=inside_loss)
        loss = model.loss(TRAIN) + (model.penalty() if inside_loss else 0)
        loss.backward()
        model.on_before_optimizer_step(None)
        return flat(p.grad for p in model.parameters())

    torch.testing.assert_close(gradient(False), gradient(True), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("kind", [L2Penalty, L1Penalty])
def test_the_fused_term_has_the_derivatives_of_the_plain_one(kind):
    """First and second, with respect to the weights and to raw λ."""
    net = nn.Linear(3, 2)
    penalty = kind().bound(Hyperparameter(0.3, Positive()), [(net, "weight"), (net, "bias")])
    raw = penalty.raw.requires_grad_()
    leaves = [*net.parameters(), raw]
    directions = [torch.randn_like(t) for t in leaves]

    def derivatives(value):
        first = torch.autograd.grad(value, leaves, create_graph=True)
        along = sum((g * d).sum() for g, d in zip(first, directions, strict=True))
        return [value, *first, *torch.autograd.grad(along, leaves)]

    fused = derivatives(penalty.term())
    plain = derivatives(penalty.hyperparameter() * penalty.total(penalty.weights))
    torch.testing.assert_close(fused, plain, rtol=1e-12, atol=1e-14)
    plain_gradient = torch.autograd.grad(penalty.term(), leaves)
    torch.testing.assert_close(list(plain_gradient), fused[1:4], rtol=1e-12, atol=1e-14)
