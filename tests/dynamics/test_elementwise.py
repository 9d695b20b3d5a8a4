"""Optimizers that declare themselves elementwise, and whether they are."""

import pytest
import torch
from cases import Lion, Mlp, observe, weights
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import optim

from lightning_hpo import ClipR
from lightning_hpo.compatibility import check_elementwise
from lightning_hpo.dynamics import (
    THETA,
    GenericDynamics,
    base,
    is_elementwise,
    jvp_lean_,
    make_dynamics,
    vjp_lean_,
)

SHAPES = [(3, 2), (2,), ()]


class Own(optim.Adam):
    """Steps as Adam does."""


class OwnStep(optim.Adam):
    """May do anything."""

    def step(self, closure=None):
        return super().step(closure)


class Child(Lion):
    """Inherits the declaration."""


class Mixing(optim.Adam):
    elementwise = False


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (optim.SGD, True),
        (optim.Adamax, True),
        (optim.LBFGS, False),
        (Own, True),
        (OwnStep, False),
        (Lion, True),
        (Child, True),
        (Mixing, False),
    ],
)
def test_who_is_elementwise(kind, expected):
    assert is_elementwise(kind) == expected


needs_muon = pytest.mark.skipif(
    not hasattr(optim, "Muon"), reason="this version of torch has no Muon"
)


@pytest.mark.parametrize(
    "kind", [OwnStep, pytest.param(getattr(optim, "Muon", None), marks=needs_muon, id="Muon")]
)
def test_a_declaration_from_outside(kind, monkeypatch):
    optimizer = kind([torch.zeros(2, 2)], lr=0.1)
    assert not make_dynamics(optimizer).is_elementwise
    monkeypatch.setattr(kind, "elementwise", True, raising=False)
    assert make_dynamics(optimizer).is_elementwise


class Rule(optim.Optimizer):
    """θ ← θ − η u(g), as a test defines it."""

    elementwise = True
    update = None

    def __init__(self, parameters, lr=0.1):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        if closure is not None:
            with torch.enable_grad():
                closure()
        for group in self.param_groups:
            self.prepare(group["params"])
            for p in group["params"]:
                p.add_(self.update(p, p.grad), alpha=-group["lr"])

    def prepare(self, parameters):
        pass


class Normalized(Rule):
    def update(self, p, g):
        return g / g.norm()


class ByRms(Rule):
    def update(self, p, g):
        return g / g.square().mean().sqrt()


class ByTrust(Rule):
    """As LARS does."""

    def update(self, p, g):
        return g * p.norm() / g.norm()


class Limited(Rule):
    """The limit does not act at the first step."""

    def update(self, p, g):
        return g / (g.square().mean().sqrt() / 100.0).clamp(min=1.0)


class Later(Rule):
    """Divides by the norm of a momentum that is zero at first."""

    def update(self, p, g):
        mean = self.state[p].setdefault("mean", torch.zeros_like(p))
        norm = mean.norm()
        mean.mul_(0.9).add_(g)
        return torch.where(norm > 0, g / norm, g)


class Together(Rule):
    """Each parameter by its own would be a single number."""

    def prepare(self, parameters):
        self.total = sum(p.grad.sum() for p in parameters)

    def update(self, p, g):
        return g * self.total


class ByRow(Rule):
    """Matrices and vectors move differently."""

    def update(self, p, g):
        return g / g.norm(dim=1, keepdim=True) if g.dim() == 2 else g


class Neighbours(Rule):
    def update(self, p, g):
        return g.flatten().cumsum(0).view_as(g)


class StateOfAnotherShape(Rule):
    def update(self, p, g):
        count = self.state[p].setdefault("count", torch.zeros(()))
        count += 1
        return g / count


class InPlace(Rule):
    """Writes its weight decay into the gradient."""

    def update(self, p, g):
        return g.add_(p, alpha=0.1)


class Counted(Rule):
    """Counts its steps in a number."""

    def update(self, p, g):
        self.state[p]["count"] = self.state[p].get("count", 0) + 1
        return g / self.state[p]["count"]


MIXING = [
    Normalized,
    ByRms,
    ByTrust,
    Limited,
    Later,
    Together,
    ByRow,
    Neighbours,
    StateOfAnotherShape,
]
APART = [
    (Lion, {"lr": 0.01, "weight_decay": 0.1}),
    (Lion, {"lr": 0.01, "sharpness": 10.0}),
    (InPlace, {}),
    (Counted, {}),
    (optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    (optim.Adam, {"amsgrad": True}),
    (optim.AdamW, {}),
    (optim.NAdam, {}),
    (optim.RAdam, {}),
    (optim.Adamax, {}),
    (optim.RMSprop, {"centered": True, "momentum": 0.9}),
    (optim.Adagrad, {"lr_decay": 0.1}),
    (optim.Adadelta, {}),
    (optim.ASGD, {}),
    (optim.Rprop, {}),
]


def first_step(kind, options=None, shapes=SHAPES):
    parameters = [torch.randn(s).requires_grad_() for s in shapes]
    for p in parameters:
        p.grad = torch.randn(p.shape)
    dynamics = GenericDynamics(kind(parameters, **options or {}))
    return dynamics, dynamics.capture()


@pytest.mark.parametrize(
    "shapes", [SHAPES, [(4, 3)], [(5,), (3, 0)]], ids=["several", "one", "empty"]
)
@pytest.mark.parametrize(("kind", "options"), APART)
def test_elementwise_steps_are_recognized(kind, options, shapes):
    dynamics, step = first_step(kind, options, shapes)
    before = step.kept(values=True)
    assert dynamics.is_elementwise_at(step)
    # What the check looked at may be the training's own.
    for name in ("theta", "gradients", "state"):
        torch.testing.assert_close(getattr(step, name), getattr(before, name), rtol=0, atol=0)


@pytest.mark.parametrize("kind", MIXING)
def test_steps_that_mix_elements_are_recognized(kind):
    dynamics, step = first_step(kind)
    assert not dynamics.is_elementwise_at(step)


def test_single_numbers_that_are_mixed():
    dynamics, step = first_step(Together, shapes=[(), (1,)])
    assert not dynamics.is_elementwise_at(step)
    dynamics, step = first_step(InPlace, shapes=[(), (1,)])
    assert dynamics.is_elementwise_at(step)


def test_parameters_without_a_gradient():
    dynamics, step = first_step(optim.Adam)
    step.gradients[0] = None
    assert dynamics.is_elementwise_at(step)


class WithRule(Mlp):
    rule = ByTrust

    def configure_optimizers(self):
        return self.rule(self.parameters())


def test_a_wrong_declaration_is_refused(monkeypatch):
    """Before θ moves; without it the same training is followed as a whole."""
    model = WithRule()
    before = weights(model)
    with pytest.raises(
        MisconfigurationException,
        match=r"ByTrust declares itself elementwise, but.*expected a step that moves each element "
        r"by its own gradient.*Set ByTrust\.elementwise = False",
    ):
        observe(ClipR(), model)
    assert torch.equal(weights(model), before)
    monkeypatch.setattr(ByTrust, "elementwise", False)
    assert len(observe(ClipR(), model, steps=3).history) == 3


@needs_muon
def test_a_class_of_torch_that_is_declared_is_verified_too(monkeypatch):
    """Muon orthogonalizes matrices."""
    dynamics, step = first_step(optim.Muon, {"lr": 0.01}, [(3, 4)])
    assert check_elementwise(dynamics, step) == []
    monkeypatch.setattr(optim.Muon, "elementwise", True, raising=False)
    dynamics, step = first_step(optim.Muon, {"lr": 0.01}, [(3, 4)])
    (finding,) = check_elementwise(dynamics, step)
    assert "Muon declares itself elementwise" in finding


@pytest.mark.parametrize("at", [0, 1], ids=["first", "second"])
def test_blocks_of_elements_are_the_whole(at, monkeypatch):
    """Declared elementwise, Lion is carried on a few elements at a time: the same numbers."""
    monkeypatch.setattr(base, "BLOCK", 3)
    dynamics, step = first_step(Lion, {"lr": 0.01, "weight_decay": 0.1, "sharpness": 2.0})
    if at:
        dynamics.optimizer.step()
        step = dynamics.capture()
    tangents = [{THETA: [torch.randn(2, *s) for s in SHAPES]}]
    tangents.append({THETA: [t.clone() for t in tangents[0][THETA]]})
    direction = [torch.randn(2, *s) for s in SHAPES]
    dynamics.jvp_(step, tangents[0], [t.clone() for t in direction])
    jvp_lean_(dynamics, step, tangents[1], [t.clone() for t in direction])
    torch.testing.assert_close(tangents[1], tangents[0], rtol=1e-12, atol=0)
    assert tangents[0]["mean"][0].abs().min() > 0
    adjoints = [{name: [t.clone() for t in ts] for name, ts in t.items()} for t in tangents]
    found = [
        dynamics.vjp_(step, adjoints[0]),
        vjp_lean_(dynamics, step, adjoints[1]),
    ]
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(adjoints[1], adjoints[0], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("spelling", ["sign_", "sign", "sgn_", "sgn", "torch.sgn", "torch.sign"])
def test_the_sign_has_no_derivative(spelling):
    """What remains is the weight decay of θ, and the momentum.

    The derivative of sgn, inside of what keeps a graph through in-place operations, ended the
    process.
    """

    class Signed(Lion):
        def sign_(self, x):
            if spelling.startswith("torch."):
                return getattr(torch, spelling.removeprefix("torch."))(x)
            return getattr(x, spelling)()

    dynamics, step = first_step(Signed, {"lr": 0.1, "weight_decay": 0.5})
    dynamics.optimizer.step()
    step = dynamics.capture()
    y, m, g = ([torch.randn(2, *s) for s in SHAPES] for _ in range(3))
    tangent = {THETA: [t.clone() for t in y], "mean": [t.clone() for t in m]}
    dynamics.jvp_(step, tangent, [t.clone() for t in g])
    expected = {
        THETA: [0.95 * t for t in y],
        "mean": [0.99 * a + 0.01 * b for a, b in zip(m, g, strict=True)],
    }
    torch.testing.assert_close(tangent, expected, rtol=1e-12, atol=0)
    adjoint = {THETA: [t.clone() for t in y], "mean": [t.clone() for t in m]}
    pulled = dynamics.vjp_(step, adjoint)
    expected = {THETA: [0.95 * t for t in y], "mean": [0.99 * t for t in m]}
    torch.testing.assert_close(adjoint, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(pulled, [0.01 * t for t in m], rtol=1e-12, atol=0)
