"""Tangents and adjoints through optimizer steps: closed forms, generic path, differences."""

import pytest
import torch
from cases import Lion
from torch import optim

from lightning_hpo.dynamics import (
    THETA,
    AdamDynamics,
    GenericDynamics,
    SGDDynamics,
    make_dynamics,
)

SHAPES = [(3, 2), (2,), ()]
M = 2

CLOSED_FORMS = [
    (optim.SGD, {"lr": 0.1}),
    (optim.SGD, {"lr": 0.1, "maximize": True}),
    (optim.SGD, {"lr": 0.05, "weight_decay": 0.1}),
    (optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}),
    (optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
    (optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    (
        optim.SGD,
        {"lr": 0.05, "momentum": 0.9, "dampening": 0.3, "maximize": True, "weight_decay": 0.1},
    ),
    (optim.Adam, {"lr": 0.01}),
    (optim.Adam, {"lr": 0.01, "weight_decay": 0.1}),
    (optim.Adam, {"lr": 0.01, "weight_decay": 0.1, "maximize": True, "betas": (0.7, 0.95)}),
    (optim.AdamW, {"lr": 0.01, "weight_decay": 0.3}),
    (optim.AdamW, {"lr": 0.01, "weight_decay": 0.3, "maximize": True, "eps": 1e-3}),
]
GENERIC = [
    (optim.Adam, {"lr": 0.01, "amsgrad": True}),
    (optim.AdamW, {"lr": 0.01, "amsgrad": True, "weight_decay": 0.3}),
    (optim.RMSprop, {"lr": 0.01}),
    (optim.RMSprop, {"lr": 0.01, "momentum": 0.9, "centered": True}),
    (optim.NAdam, {"lr": 0.01}),
    (optim.RAdam, {"lr": 0.01}),
    (optim.Adagrad, {"lr": 0.01}),
    (optim.Adadelta, {}),
    (optim.Adamax, {"lr": 0.01}),
    (optim.ASGD, {"lr": 0.01}),
    (optim.Rprop, {"lr": 0.01}),
    (Lion, {"lr": 0.01, "weight_decay": 0.3, "sharpness": 0.1}),
]


def name(case):
    kind, options = case
    return "-".join([kind.__name__, *(f"{k}={v}" for k, v in options.items() if k != "lr")])


ALL = pytest.mark.parametrize("case", CLOSED_FORMS + GENERIC, ids=name)


class Quadratic:
    """g = A θ with a dense, symmetric A, trained for a few steps by an optimizer.

    Tangents start in random directions, so that a run of the optimizer from displaced parameters
    is their numerical counterpart.
    """

    def __init__(self, case, steps=None):
        self.kind, self.options = case
        # RAdam follows another formula in its first five steps.
        self.steps = steps or (8 if self.kind is optim.RAdam else 4)
        self.sizes = [max(1, torch.Size(s).numel()) for s in SHAPES]
        n = sum(self.sizes)
        a = torch.randn(n, n)
        self.a = a @ a.T + torch.eye(n)
        self.start = [torch.randn(s) for s in SHAPES]
        self.directions = [torch.randn(M, *s) for s in SHAPES]

    def gradient(self, tensors):
        vector = torch.cat([t.reshape(-1) for t in tensors])
        return [
            g.reshape(s) for g, s in zip((self.a @ vector).split(self.sizes), SHAPES, strict=True)
        ]

    def stacked_gradient(self, tangents):
        rows = [self.gradient([t[j] for t in tangents]) for j in range(len(tangents[0]))]
        return [torch.stack(parts) for parts in zip(*rows, strict=True)]

    def optimizer(self, parameters):
        return self.kind(parameters, **self.options)

    def observe(self, make, directions=None):
        """Trains, carrying tangents along; returns the dynamics, the tangents and the steps."""
        parameters = [p.clone().requires_grad_() for p in self.start]
        optimizer = self.optimizer(parameters)
        dynamics = make(optimizer)
        tangent = dynamics.zeros(M)
        tangent[THETA] = [d.clone() for d in directions or self.directions]
        steps = []
        for _ in range(self.steps):
            for p, g in zip(parameters, self.gradient(parameters), strict=True):
                p.grad = g.detach().clone()
            step = dynamics.capture().kept(values=True)
            dynamics.jvp_(step, tangent, self.stacked_gradient(tangent[THETA]))
            steps.append(step)
            optimizer.step()
        return dynamics, tangent, steps

    def pull_back(self, dynamics, steps, bars):
        """Pulls adjoints of the last θ back to the first."""
        adjoint = dynamics.zeros(len(bars[0]))
        adjoint[THETA] = [b.clone() for b in bars]
        for step in reversed(steps):
            g_bar = dynamics.vjp_(step, adjoint)
            for a, extra in zip(adjoint[THETA], self.stacked_gradient(g_bar), strict=True):
                a.add_(extra)  # A is symmetric
        return adjoint[THETA]

    def trained(self, start):
        parameters = [p.clone().requires_grad_() for p in start]
        optimizer = self.optimizer(parameters)
        for _ in range(self.steps):
            for p, g in zip(parameters, self.gradient(parameters), strict=True):
                p.grad = g.detach().clone()
            optimizer.step()
        return [p.detach() for p in parameters]

    def differences(self, h=1e-6):
        rows = []
        for j in range(M):
            ends = [
                self.trained(
                    [p + s * h * d[j] for p, d in zip(self.start, self.directions, strict=True)]
                )
                for s in (1, -1)
            ]
            rows.append([(a - b) / (2 * h) for a, b in zip(*ends, strict=True)])
        return [torch.stack(parts) for parts in zip(*rows, strict=True)]


def flat(tensors):
    return torch.cat([t.reshape(len(t), -1) for t in tensors], dim=1)


@ALL
def test_tangents_against_central_differences(case):
    problem = Quadratic(case)
    truth = flat(problem.differences())
    for make in (make_dynamics, GenericDynamics):
        _, tangent, _ = problem.observe(make)
        error = (flat(tangent[THETA]) - truth).norm() / truth.norm()
        assert error < 1e-6


@pytest.mark.parametrize("case", CLOSED_FORMS, ids=name)
def test_closed_forms_against_the_generic_path(case):
    problem = Quadratic(case)
    expected = SGDDynamics if case[0] is optim.SGD else AdamDynamics
    closed, tangent, steps = problem.observe(make_dynamics)
    generic, generic_tangent, generic_steps = problem.observe(GenericDynamics)
    assert type(closed) is expected
    for key in tangent:
        torch.testing.assert_close(tangent[key], generic_tangent[key], rtol=1e-10, atol=1e-13)
    bars = [torch.randn(M, *s) for s in SHAPES]
    torch.testing.assert_close(
        problem.pull_back(closed, steps, bars),
        problem.pull_back(generic, generic_steps, bars),
        rtol=1e-10,
        atol=1e-13,
    )


@pytest.mark.parametrize("case", GENERIC, ids=name)
def test_the_generic_path_is_taken_where_there_is_no_closed_form(case):
    kind, options = case
    assert type(make_dynamics(kind([torch.zeros(2)], **options))) is GenericDynamics


@pytest.mark.parametrize("kind", [optim.SGD, optim.Adam, optim.AdamW])
def test_a_subclass_may_step_differently(kind):
    class Twice(kind):
        @torch.no_grad()
        def step(self, closure=None):
            super().step(closure)
            super().step(closure)

    problem = Quadratic((Twice, {"lr": 0.01}))
    dynamics, tangent, _ = problem.observe(make_dynamics)
    assert type(dynamics) is GenericDynamics
    torch.testing.assert_close(
        flat(tangent[THETA]), flat(problem.differences()), rtol=1e-6, atol=1e-8
    )


@ALL
@pytest.mark.parametrize("make", [make_dynamics, GenericDynamics], ids=["chosen", "generic"])
def test_adjoints_are_the_transpose_of_tangents(case, make):
    """⟨ȳ, J y⟩ = ⟨Jᵀ ȳ, y⟩ over several steps, for each pair of tangent and adjoint."""
    problem = Quadratic(case)
    dynamics, tangent, steps = problem.observe(make)
    bars = [torch.randn(3, *s) for s in SHAPES]
    pulled = problem.pull_back(dynamics, steps, bars)
    forward = flat(bars) @ flat(tangent[THETA]).T
    backward = flat(pulled) @ flat(problem.directions).T
    torch.testing.assert_close(forward, backward, rtol=1e-9, atol=1e-12)


@ALL
def test_one_step_transposes_in_every_state_tensor(case):
    """Tangents and adjoints of the optimizer's own state, and of g, take part as well."""
    problem = Quadratic(case)
    dynamics, tangent, steps = problem.observe(make_dynamics)
    step = steps[-1]
    state = {key: [torch.randn_like(t) for t in tensors] for key, tensors in tangent.items()}
    gradient = [torch.randn(M, *s) for s in SHAPES]
    bar = {key: [torch.randn_like(t) for t in tensors] for key, tensors in tangent.items()}
    moved = {key: [t.clone() for t in tensors] for key, tensors in state.items()}
    dynamics.jvp_(step, moved, [g.clone() for g in gradient])
    pulled = {key: [t.clone() for t in tensors] for key, tensors in bar.items()}
    g_bar = dynamics.vjp_(step, pulled)

    def inner(a, b):
        return sum((flat(a[key]) * flat(b[key])).sum() for key in a)

    forward = inner(bar, moved)
    backward = inner(pulled, state) + (flat(g_bar) * flat(gradient)).sum()
    torch.testing.assert_close(forward, backward, rtol=1e-9, atol=1e-12)


@ALL
@pytest.mark.parametrize("at", [0, -1], ids=["first", "last"])
@pytest.mark.parametrize("with_state", [False, True], ids=["theta", "state"])
def test_the_part_of_the_gradient_alone(case, at, with_state):
    """What the first step of a window needs: the same, without the adjoints of the state."""
    problem = Quadratic(case)
    dynamics, tangent, steps = problem.observe(make_dynamics)
    bar = {key: [torch.randn_like(t) for t in tensors] for key, tensors in tangent.items()}
    if not with_state:
        bar = {key: [t * (key == THETA) for t in tensors] for key, tensors in bar.items()}
    given = {k: [t.clone() for t in v] for k, v in bar.items() if with_state or k == THETA}
    whole = dynamics.vjp_(steps[at], bar)
    alone = dynamics.vjp_(steps[at], given, state_part=False)
    torch.testing.assert_close(alone, whole, rtol=1e-12, atol=1e-14)
    # The first step of Adam and its kin depends on the sign of g alone, as all of Rprop's do.
    if (with_state or at == -1) and case[0] is not optim.Rprop:
        assert flat(whole).norm() > 1e-6


@pytest.mark.parametrize("make", [make_dynamics, GenericDynamics], ids=["closed", "generic"])
@pytest.mark.parametrize(
    "case", [(optim.Adam, {}), (optim.AdamW, {}), (optim.RMSprop, {}), (optim.NAdam, {})], ids=name
)
def test_elements_that_never_had_a_gradient(make, case):
    """The derivative of √v at v = 0 is 0, not 0 · ∞: dead ReLUs and unused embedding rows."""
    kind, _ = case
    p = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    optimizer = kind([p], lr=0.1)
    dynamics = make(optimizer)
    tangent = dynamics.zeros(1)
    tangent[THETA][0] = torch.ones(1, 3)
    steps = []
    for _ in range(3):
        p.grad = torch.tensor([0.5, 0.0, -1.0])
        step = dynamics.capture().kept(values=True)
        dynamics.jvp_(step, tangent, [torch.tensor([[1.0, 1.0, 1.0]])])
        steps.append(step)
        optimizer.step()
    assert all(torch.isfinite(t).all() for tensors in tangent.values() for t in tensors)
    adjoint = dynamics.zeros(1)
    adjoint[THETA][0] = torch.ones(1, 3)
    for step in reversed(steps):
        (g_bar,) = dynamics.vjp_(step, adjoint)
        assert torch.isfinite(g_bar).all()
    assert all(torch.isfinite(t).all() for tensors in adjoint.values() for t in tensors)
    # Elements with a gradient are not affected by the one without.
    assert tangent[THETA][0][0, 0] != 1
    assert tangent[THETA][0][0, 2] != 1


@pytest.mark.parametrize("case", [CLOSED_FORMS[3], CLOSED_FORMS[7], GENERIC[2]], ids=name)
@pytest.mark.parametrize("make", [make_dynamics, GenericDynamics], ids=["chosen", "generic"])
def test_a_parameter_without_a_gradient_stays_put(case, make):
    """It takes no part in some steps; weight decay does not act on it there either."""
    kind, options = case
    parameters = [torch.tensor([1.0, 2.0], requires_grad=True) for _ in range(2)]
    optimizer = kind(parameters, **options)
    dynamics = make(optimizer)
    tangent = dynamics.zeros(1)
    tangent[THETA] = [torch.tensor([[1.0, -1.0]]) for _ in range(2)]
    steps = []
    for t in range(4):
        parameters[0].grad = torch.tensor([0.5, 1.0])
        # The second parameter takes part in the second and in the last step only.
        parameters[1].grad = torch.tensor([0.5, 1.0]) if t in (1, 3) else None
        step = dynamics.capture().kept(values=True)
        before = tangent[THETA][1].clone()
        dynamics.jvp_(step, tangent, [torch.ones(1, 2) for _ in range(2)])
        assert torch.equal(before, tangent[THETA][1]) == (t in (0, 2))
        steps.append(step)
        optimizer.step()
    adjoint = dynamics.zeros(1)
    adjoint[THETA] = [torch.tensor([[1.0, 2.0]]) for _ in range(2)]
    for t in (3, 2, 1, 0):
        before = adjoint[THETA][1].clone()
        g_bar = dynamics.vjp_(steps[t], adjoint)
        if t in (0, 2):
            assert torch.equal(adjoint[THETA][1], before)
            assert not g_bar[1].any()
        else:
            assert g_bar[1].any()


def test_parameters_that_join_later_are_bias_corrected_by_their_own_count():
    """Adam counts steps per parameter."""

    def run(displacement):
        parameters = [torch.tensor([1.0, 2.0]), torch.tensor([3.0]) + displacement]
        parameters = [p.requires_grad_() for p in parameters]
        optimizer = optim.Adam(parameters, lr=0.1)
        dynamics = make_dynamics(optimizer)
        tangent = dynamics.zeros(1)
        tangent[THETA][1].fill_(1.0)
        for t in range(4):
            parameters[0].grad = parameters[0].detach() ** 2
            parameters[1].grad = parameters[1].detach() ** 2 if t >= 2 else None
            dot = [2 * p.detach() * y for p, y in zip(parameters, tangent[THETA], strict=True)]
            dynamics.jvp_(dynamics.capture().kept(values=True), tangent, dot)
            optimizer.step()
        return parameters[1].item(), tangent[THETA][1].item()

    h = 1e-6
    truth = (run(h)[0] - run(-h)[0]) / (2 * h)
    assert run(0.0)[1] == pytest.approx(truth, rel=1e-6)


@pytest.mark.parametrize(
    ("kind", "first", "second"),
    [
        (optim.SGD, {"lr": 0.1}, {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.2}),
        (optim.Adam, {"lr": 0.1}, {"lr": 0.02, "betas": (0.5, 0.9), "weight_decay": 0.2}),
        (optim.AdamW, {"lr": 0.1}, {"lr": 0.02, "weight_decay": 0.5}),
        (optim.RMSprop, {"lr": 0.1}, {"lr": 0.02, "alpha": 0.5, "momentum": 0.9}),
    ],
)
def test_parameter_groups_with_options_of_their_own(kind, first, second):
    problem = Quadratic((kind, {}))

    def optimizer(parameters):
        return kind([{"params": parameters[:1], **first}, {"params": parameters[1:], **second}])

    problem.optimizer = optimizer
    truth = flat(problem.differences())
    for make in (make_dynamics, GenericDynamics):
        dynamics, tangent, steps = problem.observe(make)
        torch.testing.assert_close(flat(tangent[THETA]), truth, rtol=1e-6, atol=1e-8)
        bars = [torch.randn(M, *s) for s in SHAPES]
        pulled = problem.pull_back(dynamics, steps, bars)
        torch.testing.assert_close(
            flat(bars) @ flat(tangent[THETA]).T,
            flat(pulled) @ flat(problem.directions).T,
            rtol=1e-9,
            atol=1e-12,
        )


@pytest.mark.parametrize("case", [CLOSED_FORMS[3], CLOSED_FORMS[7], GENERIC[2]], ids=name)
def test_the_training_is_only_observed(case):
    """Neither the user's parameters, gradients nor optimizer state change under observation."""
    problem = Quadratic(case)
    for make in (make_dynamics, GenericDynamics):
        parameters = [p.clone().requires_grad_() for p in problem.start]
        optimizer = problem.optimizer(parameters)
        dynamics = make(optimizer)
        tangent = dynamics.zeros(M)
        for _ in range(3):
            for p, g in zip(parameters, problem.gradient(parameters), strict=True):
                p.grad = g.detach().clone()
            step = dynamics.capture().kept(values=True)
            dynamics.jvp_(step, tangent, [torch.ones(M, *s) for s in SHAPES])
            dynamics.vjp_(step, dynamics.zeros(1))
            optimizer.step()
        problem.steps = 3
        for p, expected in zip(parameters, problem.trained(problem.start), strict=True):
            assert torch.equal(p, expected)


def test_a_learning_rate_schedule_does_not_leak_into_the_generic_path():
    """Schedulers patch the optimizer's ``step`` in place; observing must not count as a step."""
    parameters = [torch.ones(2, requires_grad=True)]
    optimizer = optim.RMSprop(parameters, lr=0.1)
    scheduler = optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    dynamics = GenericDynamics(optimizer)
    tangent = dynamics.zeros(1)
    called = []
    optimizer.register_step_post_hook(lambda *args: called.append(1))
    for t in range(3):
        parameters[0].grad = torch.ones(2)
        step = dynamics.capture().kept(values=True)
        assert step.lr == pytest.approx(0.1 * 0.5**t)
        dynamics.jvp_(step, tangent, [torch.ones(1, 2)])
        assert len(called) == t
        optimizer.step()
        scheduler.step()
