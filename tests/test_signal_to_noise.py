"""The λ-optimizer that is chosen by default, against its equations in plain numbers."""

import copy
import math

import pytest
import torch

from lightning_hpo import (
    Constraint,
    Hyperparameter,
    Interval,
    L1Ball,
    Positive,
    Simplex,
    Unconstrained,
    UnitInterval,
)
from lightning_hpo.signal_to_noise import (
    BETAS,
    DRIFT,
    FASTEST,
    FLOOR,
    NEAR,
    THRESHOLD,
    TRAVEL,
    UNKNOWN,
    WARM_UP,
    SignalToNoise,
    reach,
)

UPDATES = 200


def make(h, typical=None, **options):
    known = {} if typical is None else {h: h.constraint.inverse(torch.full_like(h.raw, typical))}
    return SignalToNoise([h], options.pop("updates", UPDATES), known, **options)


def move(optimizer, h, gradients):
    """Makes updates; returns raw λ after each."""
    raws = []
    for gradient in gradients:
        h.raw.grad = torch.as_tensor(gradient, dtype=h.raw.dtype).reshape(h.raw.shape)
        optimizer.step()
        h.raw.grad = None
        h.raw.copy_(h.constraint.project(h.raw))
        raws.append(h.raw.clone())
    return torch.stack(raws)


def by_hand(raw, gradients, unit=1.0, typical=None, updates=UPDATES):
    """The equations of the docstring, for one λ on a log scale."""
    m = v = count = 0.0
    raws = []
    for k, h in enumerate(gradients):
        rate = min(4 * TRAVEL / updates, FASTEST) * 0.5 * (1 + math.cos(math.pi * k / updates))
        m = BETAS[0] * m + (1 - BETAS[0]) * h
        v = BETAS[1] * v + (1 - BETAS[1]) * h * h
        count += 1
        q = m / (1 - BETAS[0] ** count) / math.sqrt(v / (1 - BETAS[1] ** count))
        if count <= UNKNOWN or k < WARM_UP * updates:
            q = 0.0
        if abs(q) > THRESHOLD:
            raw -= rate * unit * math.copysign((abs(q) - THRESHOLD) / (1 - THRESHOLD), q)
        elif typical is not None:
            raw -= rate * DRIFT * max(-unit, min(unit, (raw - typical) / NEAR))
        raws.append(raw)
    return torch.tensor(raws)


@pytest.mark.parametrize("typical", [None, 3e-3, 5.0])
@pytest.mark.parametrize(("mean", "spread"), [(1.0, 0.1), (-0.3, 1.0), (0.0, 1.0)])
def test_it_moves_as_its_equations_say(mean, spread, typical):
    gradients = mean + spread * torch.randn(UPDATES)
    h = Hyperparameter(1e-2, Positive())
    raws = move(make(h, typical), h, gradients)
    start = None if typical is None else math.log(typical)
    expected = by_hand(math.log(1e-2), gradients.tolist(), typical=start)
    torch.testing.assert_close(raws, expected, rtol=1e-10, atol=1e-12)


def test_the_scale_of_hypergradients_does_not_matter():
    gradients = 0.5 + torch.randn(UPDATES)
    found = []
    for scale in (1e-150, 1e-12, 1.0, 1e12):
        h = Hyperparameter(1e-2, Positive())
        found.append(move(make(h), h, scale * gradients))
    for each in found:
        torch.testing.assert_close(each, found[2], rtol=1e-10, atol=0)


@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e18, 1e30])
def test_squares_that_float32_does_not_hold(scale):
    gradients = (0.5 + torch.randn(UPDATES)).float()
    found = []
    for factor in (1.0, scale):
        h = Hyperparameter(torch.tensor(1e-2, dtype=torch.float32), Positive())
        found.append(move(make(h), h, factor * gradients))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=0)
    assert float(found[1][-1] - found[1][0]) < -1.0


def test_a_signal_travels_and_noise_does_not():
    clear, noise = Hyperparameter(1.0, Positive()), Hyperparameter(1.0, Positive())
    a = move(make(clear), clear, torch.ones(UPDATES))
    b = move(make(noise), noise, torch.randn(UPDATES))
    assert -2 * TRAVEL < a[-1] < -1.5 * TRAVEL  # all of the travel but the warm-up
    assert b.abs().max() < 1.0


@pytest.mark.parametrize(
    ("updates", "made"), [(15, 15), (40, 40), (UPDATES, UPDATES), (UPDATES, 50)]
)
def test_how_far_it_can_reach(updates, made):
    """As far as hypergradients that are all the same take it, and the drift before they count."""
    h, typical = Hyperparameter(1.0, Positive()), 1e-9
    raws = move(make(h, typical, updates=updates), h, torch.ones(made))
    assert reach(made, updates) == pytest.approx(-raws[-1].item())


def test_nothing_moves_during_the_warm_up_and_after_the_end():
    h = Hyperparameter(1.0, Positive())
    raws = move(make(h, updates=100), h, torch.ones(110))
    early = math.ceil(WARM_UP * 100)
    assert (raws[:early] == 0).all()
    assert raws[early] < 0
    assert (raws[100:] == raws[100]).all()


def test_without_a_known_end_the_rate_stays_above_its_floor():
    h = Hyperparameter(1.0, Positive())
    raws = move(make(h, updates=100, is_known=False), h, torch.ones(120))
    rate = min(4 * TRAVEL / 100, FASTEST)
    torch.testing.assert_close(raws[-2] - raws[-1], torch.tensor(FLOOR * rate))


@pytest.mark.parametrize("lr", [0.0, 0.5, 2.0])
def test_lr_scales_the_rate(lr):
    one, other = Hyperparameter(1.0, Positive()), Hyperparameter(1.0, Positive())
    a = move(make(one), one, torch.ones(50))
    b = move(make(other, lr=lr), other, torch.ones(50))
    torch.testing.assert_close(b, lr * a)


def test_elements_that_were_not_concerned_are_not_counted():
    """The weight of an example that is in every tenth batch moves like one that is in each."""
    h = Hyperparameter(torch.tensor([0.5, 0.5]), Interval(0.0, 1.0))
    rare = [[1.0, 1.0 if k % 10 == 0 else 0.0] for k in range(UPDATES)]
    raws = move(make(h), h, rare)
    assert raws[-1, 1] < 0.1
    assert raws[20, 1] == 0.5  # three have been seen: that says nothing about their noise


def test_a_resumed_optimizer_goes_on():
    gradients = 0.3 + torch.randn(UPDATES)
    h = Hyperparameter(1e-2, Positive())
    whole = move(make(h, 1e-3), h, gradients)
    first = Hyperparameter(1e-2, Positive())
    optimizer = make(first, 1e-3)
    move(optimizer, first, gradients[:77])
    second = copy.deepcopy(first)
    resumed = make(second, 1e-3)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(move(resumed, second, gradients[77:]), whole[77:])


@pytest.mark.parametrize(
    ("constraint", "first", "raw", "unit"),
    [
        (Positive(), -5.0, 2.0, 1.0),
        (UnitInterval(), 3.0, 0.0, 0.5),
        (Unconstrained(), 0.0, 0.5, 0.5),
        (Unconstrained(), 0.0, 0.0, 0.2),  # of 1
        (Unconstrained(), -3e-4, 1e-5, 6e-5),
        (Interval(0.0), 0.3, 3.0, 3.0),
        (Interval(0.0), 0.3, 0.0, 0.015),
        (Interval(high=2.0, low=-math.inf), 1.0, 0.0, 2.0),
        (Interval(0.0, 1.0), 0.3, 0.5, 0.25),
        (Interval(0.0, 10.0), 0.3, 0.0, 1.0),
        (Interval(-math.inf), -4.0, 2.0, 2.0),
        (Simplex(1.0), [0.5, 0.5], [0.9, 0.1], [0.9, 0.5]),
        (L1Ball(3.0), [1.0, 1.0], [0.1, 2.0], [1.5, 2.0]),
    ],
)
def test_units_of_raw_values(constraint, first, raw, unit):
    first, raw, unit = (torch.tensor(x) for x in (first, raw, unit))
    found = torch.as_tensor(constraint.unit(raw, first))
    torch.testing.assert_close(found.broadcast_to(unit.shape), unit)


def test_a_constraint_of_ones_own_has_a_unit():
    class Square(Constraint):
        def __call__(self, raw):
            return raw.square()

        def inverse(self, value):
            return value.sqrt()

    h = Hyperparameter(4.0, Square())
    raws = move(make(h), h, torch.ones(UPDATES))
    assert raws[-1] < 1.0
