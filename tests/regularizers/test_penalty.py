"""Penalties of the user's own: R and a constant per weight."""

import copy
import inspect
import math
from functools import cache

import pytest
import torch
from cases import (
    L2SP,
    STEPS,
    VALID,
    Mlp,
    fit,
    flat,
    last_hypergradient,
    make_trainer,
    observe,
    pairwise,
    train_batch,
    train_loader,
    valid_loader,
    validation_loss,
    weights,
)
from reference import central_differences
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from lightning_hpo import (
    T1T2,
    ClipR,
    Hyperparameter,
    Implicit,
    Interval,
    OnlineHPOCallback,
    Positive,
    UnrollK,
    fixed_values,
    freeze,
    named_hyperparameters,
)
from lightning_hpo.regularizers import L1Penalty, L2Penalty, Penalty


class EWC(Penalty):
    """½ λ Σ F (w − w₀)²: elastic weight consolidation (Kirkpatrick et al. 2017)."""

    def __init__(self, fisher):
        self.fisher = fisher

    def constant(self, weight):
        return weight.detach().clone(), self.fisher[weight]

    def value(self, weight, constant):
        start, fisher = constant
        return 0.5 * (fisher * (weight - start).square()).sum()


class Quartic(Penalty):
    """¼ λ Σ w⁴: the shortest penalty, whose second derivative is no constant."""

    def value(self, weight, constant):
        return 0.25 * weight.pow(4).sum()


def fisher_of(module):
    """Some positive numbers per parameter, the same for every model of a class."""
    generator = torch.Generator().manual_seed(3)
    return {p: 2 * torch.rand(p.shape, generator=generator) for p in module.parameters()}


KINDS = {"L2SP": lambda module: L2SP(), "EWC": lambda module: EWC(fisher_of(module))}


class Tuned(Mlp):
    """Has gone some way from w₀ when the training starts; its first weight may be frozen."""

    def __init__(
        self,
        optimizer="momentum",
        *,
        kind="L2SP",
        granularity="layer",
        inside_loss=False,
        freezes=False,
        raw=None,
        schedule=True,
    ):
        super().__init__(optimizer, schedule=schedule)
        self.get_submodule("l2").apply(lambda m: vars(m).update(frozen=True))
        self.inside_loss = inside_loss
        penalty = KINDS[kind](self)
        self.register_penalty(
            penalty, 0.3, name="own", granularity=granularity, inside_loss=inside_loss
        )
        if raw is not None:
            for h, value in zip(strengths(self).values(), raw, strict=True):
                h.raw.fill_(value)
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for p in self.net.parameters():
                p += 0.3 * torch.randn(p.shape, generator=generator)
        self.net[0].weight.requires_grad_(not freezes)


def strengths(module):
    return {n: h for n, h in named_hyperparameters(module).items() if n.startswith("own")}


def constants(module):
    penalties = [*module.gradient_penalties, *module.loss_penalties]
    kept = [c for p in penalties for c in p.constants if c is not None]
    return [t for c in kept for t in (c if isinstance(c, tuple) else (c,))]


@pytest.mark.parametrize("kind", [L2SP, EWC])
def test_a_penalty_is_short(kind):
    assert len(inspect.getsource(kind).splitlines()) <= 25


# ------------------------------------------------------------------------------ under the callback


@cache
def differences(steps, **options):
    """Central differences of the whole of ``trainer.fit``, callback-free."""

    def trained(raw):
        model = Tuned(raw=raw, **options)
        fit(model, steps=steps)
        return validation_loss(model)

    start = [h.raw.item() for h in strengths(Tuned(**options)).values()]
    return central_differences(trained, start)


EXACT = {
    "RTHO": lambda: ClipR(radius=math.inf),
    "forward": lambda: UnrollK(STEPS, "forward"),
    "reverse": lambda: UnrollK(STEPS, "reverse"),
}

FREEZES = pytest.mark.parametrize("freezes", [False, True], ids=["trained", "frozen"])
BOTH_WAYS = pytest.mark.parametrize("inside_loss", [False, True], ids=["gradient", "loss"])
ALL = pytest.mark.parametrize("kind", KINDS)


@ALL
@FREEZES
@BOTH_WAYS
@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_hypergradients_equal_central_differences(optimizer, inside_loss, freezes, kind):
    options = {"kind": kind, "optimizer": optimizer, "freezes": freezes, "granularity": "model"}
    truth = differences(STEPS, **options)
    for make in EXACT.values():
        result = last_hypergradient(observe(make(), Tuned(inside_loss=inside_loss, **options)))
        torch.testing.assert_close(result, truth, rtol=1e-5, atol=0)
        assert result.abs().min() > 1e-5


@ALL
@FREEZES
@BOTH_WAYS
def test_the_last_step_alone(inside_loss, freezes, kind):
    """T1T2: central differences of a training of one step; of more, UnrollK(1)."""
    options = {"kind": kind, "freezes": freezes, "granularity": "model"}
    truth = differences(1, **options)
    result = observe(T1T2(), Tuned(inside_loss=inside_loss, **options), steps=1)
    torch.testing.assert_close(last_hypergradient(result), truth, rtol=1e-5, atol=0)
    for optimizer in ("momentum", "adam"):
        paths = []
        for estimator in (T1T2(), UnrollK(1, "reverse")):
            model = Tuned(optimizer, inside_loss=inside_loss, **options)
            history = observe(estimator, model).history
            paths.append(torch.stack([flat(r.hypergradients.values()) for r in history]))
        torch.testing.assert_close(*paths, rtol=1e-10, atol=1e-16)
        assert paths[0].abs().max() > 1e-5


@pytest.mark.parametrize("granularity", ["model", "layer", "parameter"])
@ALL
def test_every_granularity(kind, granularity):
    """One penalty object per strength, with the constants of its own weights."""
    options = {"kind": kind, "granularity": granularity}
    truth = differences(STEPS, **options)
    assert len(truth) == (1 if granularity == "model" else 2)
    for make in EXACT.values():
        result = last_hypergradient(observe(make(), Tuned(**options)))
        torch.testing.assert_close(result, truth, rtol=1e-5, atol=0)


def test_a_frozen_layer_has_a_strength_without_effect():
    """Its λ is warned about; that of the other layer is as exact as alone."""
    options = {"kind": "EWC", "granularity": "parameter", "freezes": True}
    truth = differences(STEPS, **options)
    assert truth[0] == 0
    for make in EXACT.values():
        with pytest.warns(UserWarning, match=r"'own\.net\.0\.weight' has no effect"):
            result = last_hypergradient(observe(make(), Tuned(**options)))
        torch.testing.assert_close(result, truth, rtol=1e-5, atol=0)


@ALL
@FREEZES
@BOTH_WAYS
def test_the_implicit_estimate_solves_the_dense_system(kind, freezes, inside_loss):
    damping = 1.0
    model = Tuned("sgd", kind=kind, freezes=freezes, inside_loss=inside_loss, schedule=False)
    names = [n for n, p in model.net.named_parameters() if p.requires_grad]
    kept = {"0.weight": constants(model)[: 1 + (kind == "EWC")]}
    kept["2.weight"] = constants(model)[1 + (kind == "EWC") :]
    decay = [h().item() for n, h in named_hyperparameters(model).items() if n.startswith("l2")]
    raw = torch.stack([h.raw.clone() for h in strengths(model).values()])
    estimator = Implicit(iterations=200, tolerance=1e-13, damping=damping)
    result = last_hypergradient(observe(estimator, model, steps=1))
    held = {n: p.detach() for n, p in model.net.named_parameters()}
    sizes = [held[n].numel() for n in names]

    def split(vector):
        parts = vector.split(sizes)
        return held | {n: v.view_as(held[n]) for n, v in zip(names, parts, strict=True)}

    def loss(vector, batch):
        return F.cross_entropy(functional_call(model.net, split(vector), (batch[0],)), batch[1])

    def penalized(joint):
        theta, raws = joint[: sum(sizes)], joint[sum(sizes) :]
        value = loss(theta, train_batch(0))
        for strength, r, (name, (start, *fisher)) in zip(decay, raws, kept.items(), strict=True):
            w = split(theta)[name]
            value = value + 0.5 * strength * w.square().sum()
            weight = fisher[0] if fisher else 1.0
            value = value + 0.5 * r.exp() * (weight * (w - start).square()).sum()
        return value

    # The system is that of the step's batch, at θ after the step.
    theta = flat(held[n] for n in names)
    hessian = torch.autograd.functional.hessian(penalized, torch.cat([theta, raw]))
    n = sum(sizes)
    g_v = torch.autograd.functional.jacobian(lambda v: loss(v, VALID), theta)
    solution = torch.linalg.solve(hessian[:n, :n] + damping * torch.eye(n), g_v)
    truth = -hessian[n:, :n] @ solution
    assert truth[1].abs() > 1e-4
    torch.testing.assert_close(result, truth, rtol=1e-7, atol=1e-12)


@ALL
@FREEZES
@pytest.mark.parametrize("make", [T1T2, lambda: ClipR(radius=2.0), lambda: UnrollK(2, "reverse")])
def test_inside_the_loss_equals_in_the_gradient_while_tuning(make, freezes, kind):
    runs = []
    for inside_loss in (False, True):
        model = Tuned(kind=kind, inside_loss=inside_loss, freezes=freezes, granularity="model")
        callback = OnlineHPOCallback(
            make(), every_n_steps=2, optimizer=lambda raw: torch.optim.SGD(raw, lr=5.0)
        )
        fit(model, callback)
        runs.append((torch.tensor([list(r.values.values()) for r in callback.history]), model))
    (values, model), (other_values, other) = runs
    torch.testing.assert_close(other_values, values, rtol=1e-9, atol=0)
    torch.testing.assert_close(weights(other), weights(model), rtol=1e-9, atol=1e-12)
    assert (values[-1] / values[0]).log().abs().min() > 1e-3


# ------------------------------------------------------------------------------------ derivatives


def bound(kind, constraint=None):
    net = nn.Linear(3, 2)
    names = [(net, "weight"), (net, "bias")]
    penalty = kind(net).bound(Hyperparameter(0.3, constraint or Positive()), names)
    with torch.no_grad():
        net.weight += torch.randn(2, 3)
        net.bias += torch.randn(2)
    return net, penalty


@pytest.mark.parametrize("constraint", [None, Interval(0.0, 1.0)], ids=["log", "identity"])
@pytest.mark.parametrize("kind", [*KINDS.values(), lambda net: Quartic()])
@pytest.mark.parametrize("which", [[0, 1], [1], [0]], ids=["both", "second", "first"])
def test_both_verbs_against_a_dense_hessian(which, kind, constraint):
    """Each weight is paired with its own constant, also where others are left out."""
    net, penalty = bound(kind, constraint)
    every = [p.detach() for p in net.parameters()]
    w = [every[k] for k in which]
    n, m = sum(t.numel() for t in w), 3

    def value(vector):
        parts = vector[:-1].split([t.numel() for t in w])
        values = list(every)
        for k, part in zip(which, parts, strict=True):
            values[k] = part.view_as(every[k])
        return penalty.hyperparameter.constraint(vector[-1]) * penalty.total(values)

    joint = torch.cat([flat(w), penalty.raw.reshape(1)])
    gradient = torch.autograd.functional.jacobian(value, joint)
    hessian = torch.autograd.functional.hessian(value, joint)
    found = penalty.gradients(which, w)
    torch.testing.assert_close(penalty.hyperparameter() * flat(found), gradient[:-1])
    added = [torch.ones_like(t) for t in w]
    penalty.add_gradient_(which, added, w)
    torch.testing.assert_close(flat(added), 1 + gradient[:-1], rtol=1e-12, atol=0)

    u, e, a = [torch.randn(m, *t.shape) for t in w], torch.randn(m), torch.randn(m)
    stacked = torch.cat([d.reshape(m, -1) for d in u], dim=1)
    truth = stacked @ hessian[:n] + e[:, None] * hessian[n]

    def product(*arguments):
        result = [torch.ones(m, *t.shape) for t in w]
        penalty.tangent_(which, w, arguments[0], arguments[1], result, *arguments[2:])
        return torch.cat([t.reshape(m, -1) for t in result], dim=1) - 1

    close = {"rtol": 1e-11, "atol": 1e-13}
    torch.testing.assert_close(product(u, e.tolist()), truth[:, :n], **close)
    torch.testing.assert_close(product(u, None), (stacked @ hessian[:n])[:, :n], **close)
    torch.testing.assert_close(
        product(None, e.tolist(), a),
        e[:, None] * hessian[n, :n] + a[:, None] * gradient[:n],
        **close,
    )
    result = [torch.ones(m, *t.shape) for t in w]
    lambda_part = penalty.adjoint_(which, w, u, result)
    torch.testing.assert_close(lambda_part, stacked @ hessian[:n, n], **close)
    theta_part = torch.cat([t.reshape(m, -1) for t in result], dim=1) - 1
    torch.testing.assert_close(theta_part, (stacked @ hessian[:n])[:, :n], **close)


@pytest.mark.parametrize("kind", [L2Penalty, L1Penalty, L2SP, Quartic])
def test_closed_forms_are_those_of_autograd(kind):
    w, u = torch.randn(2, 3), torch.randn(4, 2, 3)
    penalty = kind()
    constant = torch.randn(2, 3)
    gradient = penalty.gradient(w, constant)
    torch.testing.assert_close(gradient, Penalty.gradient(penalty, w, constant))
    (together,) = (
        penalty.gradients([0], [w])
        if kind is L1Penalty  # it has one for all weights at once
        else [gradient]
    )
    torch.testing.assert_close(together, gradient)
    product = penalty.hvp(w, u, constant)
    expected = Penalty.hvp(penalty, w, u, constant)
    torch.testing.assert_close(torch.zeros_like(u) if product is None else product, expected)


@pytest.mark.parametrize("kind", [L2SP, Quartic])
def test_the_term_has_the_derivatives_of_the_plain_one(kind):
    """First and second, with respect to the weights and to raw λ."""
    net, penalty = bound(lambda net: kind())
    raw = penalty.raw.requires_grad_()
    leaves = [*net.parameters(), raw]
    directions = [torch.randn_like(t) for t in leaves]

    def derivatives(value):
        first = torch.autograd.grad(value, leaves, create_graph=True)
        along = sum((g * d).sum() for g, d in zip(first, directions, strict=True))
        return [value, *first, *torch.autograd.grad(along, leaves)]

    plain = derivatives(penalty.hyperparameter() * penalty.total(penalty.weights))
    torch.testing.assert_close(derivatives(penalty.term()), plain, rtol=1e-12, atol=1e-14)


# --------------------------------------------------------------------------- what the constants do


def test_constants_are_those_of_the_weights_at_registration():
    model = Tuned(kind="EWC", granularity="parameter")
    twin = Mlp()
    fisher = list(fisher_of(twin).values())
    first, second = model.gradient_penalties[2:]  # after those of L2
    assert torch.equal(first.constants[0][0], twin.net[0].weight)
    assert torch.equal(second.constants[0][1], fisher[2])
    before = [t.clone() for t in constants(model)]
    fit(model, OnlineHPOCallback(T1T2()))
    assert all(torch.equal(a, b) for a, b in zip(constants(model), before, strict=True))
    assert not torch.equal(model.net[0].weight, twin.net[0].weight)


@pytest.mark.parametrize("returned", ["weight", "detached", "part"])
def test_a_constant_does_not_follow_its_weight(returned):
    class Careless(L2SP):
        def constant(self, weight):
            own = {"weight": weight, "detached": weight.detach(), "part": weight[:]}
            return own[returned]

    net, penalty = bound(lambda net: Careless())
    assert not torch.equal(penalty.constants[0], net.weight)
    assert not penalty.constants[0].requires_grad


def test_constants_are_no_parameters_and_no_buffers():
    model, plain = Tuned(granularity="layer"), Mlp()
    assert len(list(model.parameters())) == len(list(plain.parameters()))
    extra = {n for n, _ in model.named_buffers()} - {n for n, _ in plain.named_buffers()}
    assert extra == {"own.net.0.raw", "own.net.2.raw"}
    assert "constants" not in "".join(plain.state_dict())


def test_constants_move_with_the_module():
    model = Tuned(kind="EWC")
    assert {t.dtype for t in constants(model)} == {torch.float64}
    model.float()
    assert {t.dtype for t in constants(model)} == {torch.float32}
    model.to("meta")
    assert {t.device.type for t in constants(model)} == {"meta"}


def test_a_copy_has_constants_of_its_own():
    model = Tuned()
    other = copy.deepcopy(model)
    other.float()
    assert {t.dtype for t in constants(other)} == {torch.float32}
    assert {t.dtype for t in constants(model)} == {torch.float64}
    fit(model)
    fit(again := Tuned())
    torch.testing.assert_close(weights(model), weights(again), rtol=0, atol=0)


@pytest.mark.parametrize("granularity", ["model", "layer"])
@ALL
def test_state_dict_round_trip(kind, granularity, tmp_path):
    model = Tuned(kind=kind, granularity=granularity)
    with torch.no_grad():
        for t in constants(model):
            t += 1.0
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other = Tuned(kind=kind, granularity=granularity)
    assert not torch.equal(constants(other)[0], constants(model)[0])
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert all(torch.equal(a, b) for a, b in zip(constants(other), constants(model), strict=True))
    assert not {t.data_ptr() for t in constants(other)} & {t.data_ptr() for t in constants(model)}
    fit(model)
    fit(other)
    assert torch.equal(weights(model), weights(other))


def test_a_state_of_before_loads():
    """Without constants those of the registration stay, and strict loading says what is missing."""
    state = {n: v for n, v in Tuned().state_dict().items() if not n.endswith("_extra_state")}
    model = Tuned()
    before = [t.clone() for t in constants(model)]
    with pytest.raises(RuntimeError, match=r"Missing key.*own\.net\.0\.constants"):
        model.load_state_dict(state)
    model.load_state_dict(state, strict=False)
    assert all(torch.equal(a, b) for a, b in zip(constants(model), before, strict=True))
    # Penalties without constants have nothing more in their state than a strength.
    Mlp().load_state_dict({n: v for n, v in state.items() if not n.startswith("own")})


def test_constants_of_other_weights_are_refused():
    state = Tuned(granularity="model").state_dict()
    state["own.constants._extra_state"] = state["own.constants._extra_state"][:1]
    with pytest.raises(
        ValueError, match=r"L2SP keeps constants.*\[\[5, 4\], \[3, 5\]\].*holds \[\[5, 4\]\]"
    ):
        Tuned(granularity="model").load_state_dict(state)


@pairwise(
    make={
        "T1T2": T1T2,
        "ClipR": lambda: ClipR(1.0, decay=0.9),
        "UnrollK": lambda: UnrollK(4, "reverse"),
    },
    kind=KINDS.keys(),
    inside_loss={"gradient": False, "loss": True},
)
def test_a_resumed_training_has_the_same_start(inside_loss, kind, make, tmp_path):
    """From a module that was built elsewhere, the run goes on bit for bit."""

    def run(epochs, path=None, shift=0.0):
        model = Tuned("adam", kind=kind, inside_loss=inside_loss)
        with torch.no_grad():
            for t in (*constants(model), *model.parameters()):
                t += shift
        callback = OnlineHPOCallback(make())
        trainer = fit(model, callback, steps=-1, max_epochs=epochs, ckpt_path=path)
        return model, callback, trainer

    whole, history, _ = run(4)
    *_, trainer = run(2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed, rest, _ = run(4, str(tmp_path / "half.ckpt"), shift=1.0)
    assert torch.equal(weights(resumed), weights(whole))
    assert all(torch.equal(a, b) for a, b in zip(constants(resumed), constants(whole), strict=True))
    assert rest.history[-1].values == history.history[-1].values


def test_values_come_from_a_checkpoint(tmp_path):
    model = Tuned(kind="EWC")
    trainer = make_trainer(callbacks=OnlineHPOCallback(T1T2()))
    trainer.fit(model, train_loader(), valid_loader())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    fresh = freeze(Tuned(kind="EWC"), tmp_path / "last.ckpt")
    assert fixed_values(fresh) == fixed_values(model)
    assert set(fixed_values(model)) >= {"own.net.0", "own.net.2"}


def test_replays_share_the_constants():
    """Neither a replay nor what is kept for one copies them."""
    seen = []

    class Watched(Tuned):
        def training_step(self, batch, batch_idx):
            seen.append([t.data_ptr() for t in constants(self)])
            return super().training_step(batch, batch_idx)

    model = Watched(inside_loss=True)
    pointers = [t.data_ptr() for t in constants(model)]
    fit(model, OnlineHPOCallback(UnrollK(2, "reverse")))
    assert len(seen) > 2 * STEPS
    assert len(pointers) == 2
    assert all(s == pointers for s in seen)


# ------------------------------------------------------------------------------- its registration


class Model(Mlp):
    def __init__(self):
        super().__init__()
        self.taken = 1


@pytest.mark.parametrize(
    ("kind", "options", "error", "message"),
    {
        "no-penalty": (nn.Linear, {}, TypeError, r"kind=<class.*Linear.*expected a subclass of Pe"),
        "function": (lambda w: w, {}, TypeError, r"kind=<function.*or an instance of one"),
        "granularity": (L2SP, {"granularity": "x"}, ValueError, r"granularity='x', expected one"),
        "name": (L2SP, {"name": "taken"}, ValueError, r"name='taken' is taken"),
        "init": (L2SP, {"init": -1.0}, ValueError, r"init=-1\.0 is refused.*start inside"),
        "inits": (L2SP, {"init": torch.ones(3)}, ValueError, r"init has 3 elements, expected one"),
        "parameter": (L2SP, {"parameters": ["x"]}, ValueError, r"has no parameter 'x'"),
    }.values(),
)
def test_what_is_refused_names_the_method(kind, options, error, message):
    model = Model()
    before = list(model.state_dict())
    with pytest.raises(error, match=rf"^register_penalty: .*{message}"):
        model.register_penalty(kind, **{"init": 0.1, "name": "own", **options})
    assert list(model.state_dict()) == before
    if kind is L2SP:
        with pytest.raises(error, match=rf"^register_l2: .*{message}"):
            model.register_l2(**{"init": 0.1, "name": "own", **options})


def test_a_constant_that_cannot_be_saved_is_refused():
    class Odd(L2SP):
        def constant(self, weight):
            return {"start": weight}

    model = Mlp()
    with pytest.raises(TypeError, match=r"constant returned a dict, expected a tensor, a tuple of"):
        model.register_penalty(Odd, 0.1, name="own")
    assert not hasattr(model, "own")


def test_a_penalty_needs_a_value():
    class Empty(Penalty):
        pass

    with pytest.raises(TypeError, match="abstract"):
        Mlp().register_penalty(Empty, 0.1, name="own")


class Mahalanobis(Penalty):
    """½ λ ⟨w − w₀, (w − w₀) C⟩: a matrix product with what is kept."""

    def constant(self, weight):
        n = weight.shape[-1]
        return weight.detach().clone(), torch.eye(n) + torch.ones(n, n)

    def value(self, weight, constant):
        start, matrix = constant
        difference = weight - start
        return 0.5 * ((difference @ matrix) * difference).sum()


@pytest.mark.parametrize(
    "make", [T1T2, ClipR, lambda: Implicit(damping=5.0), lambda: UnrollK(2, "reverse")]
)
def test_constants_come_in_the_precision_of_the_weights_that_a_penalty_gets(make):
    """Estimators hold θ in float32 where the weights are in half precision."""

    class Half(Mlp):
        def __init__(self):
            super().__init__("sgd")
            self.register_penalty(Mahalanobis, 0.5)

    found = [
        observe(make(), Half(), steps=4, precision=precision).history[-1]
        for precision in ("bf16-true", "64-true")
    ]
    half, exact = (record.hypergradients["mahalanobis"].item() for record in found)
    assert half == pytest.approx(exact, rel=0.1)


def test_a_penalty_that_needs_arguments_is_passed_as_an_instance():
    with pytest.raises(TypeError, match=r"pass an instance, EWC\(\.\.\.\), instead of the class"):
        Mlp().register_penalty(EWC, 0.1)


def test_the_name_of_a_penalty_is_that_of_its_class():
    model = Mlp()
    model.register_penalty(L2SP, init=0.1, granularity="layer", parameters=["net.0.weight"])
    model.register_penalty(L2Penalty, 0.1, inside_loss=True, name="other")
    assert named_hyperparameters(model).keys() >= {"l2sp.net.0", "other"}
