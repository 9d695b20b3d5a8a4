"""State that the optimizer, or the training, has not created yet."""

import pytest
import torch
from torch import optim

from lightning_hpo.dynamics import THETA, make_dynamics

SGD = (optim.SGD, {"lr": 0.1})
MOMENTUM = (optim.SGD, {"lr": 0.1, "momentum": 0.9})
ADAM = (optim.Adam, {"lr": 0.1})
RMSPROP = (optim.RMSprop, {"lr": 0.1})


def start(case):
    kind, options = case
    parameters = [torch.randn(3, dtype=torch.float16), torch.randn(2, 2)]
    return make_dynamics(kind([p.requires_grad_() for p in parameters], **options))


def shapes(state):
    return {name: [tuple(t.shape) for t in tensors] for name, tensors in state.items()}


def take_step(dynamics, tangent):
    for p in dynamics.theta:
        p.grad = torch.ones_like(p)
    step = dynamics.capture()
    dynamics.jvp_(step, tangent, [torch.ones_like(t) for t in tangent[THETA]])
    dynamics.optimizer.step()


@pytest.mark.parametrize(
    ("case", "names"),
    [
        (SGD, []),
        (MOMENTUM, ["momentum_buffer"]),
        (ADAM, ["exp_avg", "exp_avg_sq"]),
        (RMSPROP, []),
    ],
)
def test_zeros_are_shaped_like_theta_in_float32_or_better(case, names):
    state = start(case).zeros(5)
    assert shapes(state) == {name: [(5, 3), (5, 2, 2)] for name in [THETA, *names]}
    assert [t.dtype for t in state[THETA]] == [torch.float32, torch.float64]
    assert not any(t.any() for tensors in state.values() for t in tensors)


@pytest.mark.parametrize(
    ("case", "joined"),
    [
        (SGD, {THETA: (5, 4)}),
        (MOMENTUM, {THETA: (5, 4), "momentum_buffer": (5, 4)}),
        (ADAM, {THETA: (5, 4), "exp_avg": (5, 4), "exp_avg_sq": (5, 4)}),
        (RMSPROP, {THETA: (5, 4), "square_avg": (5, 0)}),
    ],
)
def test_parameters_that_join(case, joined):
    """They begin with zeros; those that are there keep their tangents."""
    dynamics = start(case)
    tangent = dynamics.zeros(5)
    take_step(dynamics, tangent)
    before = {name: list(tensors) for name, tensors in tangent.items()}
    dynamics.grow_(tangent)
    assert all(len(tensors) == 2 for tensors in tangent.values())
    dynamics.optimizer.add_param_group({"params": [torch.zeros(4, dtype=torch.float16)]})
    dynamics.grow_(tangent)
    assert tangent.keys() == joined.keys()
    for name, (first, second, third) in tangent.items():
        assert first is before[name][0]
        assert second is before[name][1]
        assert third.shape == joined[name]
        assert third.dtype == torch.float32
        assert not third.any()
    take_step(dynamics, tangent)
    assert shapes(tangent) == {name: [(5, 3), (5, 2, 2), (5, 4)] for name in joined}


def test_momentum_that_is_switched_off_and_on():
    """A parameter that joins without momentum has no buffer when the others have one."""
    dynamics = start(MOMENTUM)
    tangent = dynamics.zeros(1)
    take_step(dynamics, tangent)
    dynamics.optimizer.param_groups[0]["momentum"] = 0.0
    dynamics.optimizer.add_param_group({"params": [torch.ones(4)], "momentum": 0.0})
    dynamics.grow_(tangent)
    assert tangent["momentum_buffer"][2].shape == (1, 0)
    for group in dynamics.optimizer.param_groups:
        group["momentum"] = 0.9
    take_step(dynamics, tangent)
    # ẏ' = −η ġ at the first step with momentum, and before that another −η ġ for the others.
    torch.testing.assert_close(tangent[THETA][2], torch.full((1, 4), -0.1))
    torch.testing.assert_close(tangent[THETA][1], torch.full((1, 2, 2), -0.1 - 0.1 * 1.9))


def test_momentum_that_is_switched_on_adjoints():
    dynamics = start(SGD)
    for group in dynamics.optimizer.param_groups:
        group["momentum"] = 0.9
    for p in dynamics.theta:
        p.grad = torch.ones_like(p)
    adjoint = {THETA: [torch.ones(1, *p.shape) for p in dynamics.theta]}
    pulled = dynamics.vjp_(dynamics.capture(), adjoint)
    assert shapes(adjoint)["momentum_buffer"] == [(1, 3), (1, 2, 2)]
    torch.testing.assert_close(pulled, [torch.full_like(t, -0.1) for t in adjoint[THETA]])
