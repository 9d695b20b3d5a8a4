"""Constraints: maps between raw tensors and values, and their derivatives."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_hpo import (
    Box,
    Constraint,
    Interval,
    L1Ball,
    Positive,
    Simplex,
    Unconstrained,
    UnitInterval,
)

# Each with a range of feasible values that it must represent.
CONSTRAINTS = {
    "positive": (Positive(), 1e-10, 1e4),
    "bounded-positive": (Positive(1e-3, 10.0), 1e-3, 10.0),
    "unit": (UnitInterval(), 1e-4, 1 - 1e-4),
    "interval": (Interval(-1.0, 2.0), -1.0, 2.0),
    "half-line": (Interval(), 0.0, 1e6),
    "free": (Unconstrained(), -1e6, 1e6),
}
ALL = pytest.mark.parametrize(("constraint", "low", "high"), CONSTRAINTS.values(), ids=CONSTRAINTS)


@ALL
@settings(max_examples=30, deadline=None, derandomize=True)
@given(share=st.floats(0, 1))
def test_round_trip(constraint, low, high, share):
    value = torch.tensor([low + share * (high - low), low, high], dtype=torch.float64)
    torch.testing.assert_close(constraint(constraint.inverse(value)), value, rtol=1e-9, atol=0)


@ALL
@settings(max_examples=30, deadline=None, derandomize=True)
@given(raw=st.floats(-8, 8))
def test_derivatives_are_those_of_autograd(constraint, low, high, raw):
    """The base class differentiates ``__call__``; the closed forms must agree with it."""
    tensor = torch.tensor([raw, 0.0, raw / 3], dtype=torch.float64)
    expected = Constraint.derivatives(constraint, tensor)
    result = constraint.derivatives(tensor)
    assert len(result) == 2
    for a, b in zip(result, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)
        assert a.shape == tensor.shape
        assert not a.requires_grad


def test_the_default_derivatives_against_formulas():
    """The closed forms are held to the default above, so that the default must be right."""

    class Cube(Constraint):
        def __call__(self, raw):
            return raw**3

    raw = torch.tensor([2.0, -0.5])
    value, first = Cube().derivatives(raw)
    torch.testing.assert_close(value, raw**3)
    torch.testing.assert_close(first, 3 * raw**2)


@ALL
def test_projection_is_onto_the_feasible_values(constraint, low, high):
    raw = torch.tensor([-1e9, 1e9, 0.3], dtype=torch.float64)
    projected = constraint.project(raw)
    assert torch.equal(constraint.project(projected), projected)
    # What is feasible stays as it is.
    inside = constraint.inverse(torch.tensor([0.5 * (low + min(high, 10.0))]))
    assert torch.equal(constraint.project(inside), inside)


@pytest.mark.parametrize(
    ("constraint", "bottom", "top"),
    [
        (Positive(), 1e-10, 1e4),
        (Positive(1e-3, 10.0), 1e-3, 10.0),
        (UnitInterval(), 1e-4, 1 - 1e-4),
        (UnitInterval(0.1), 0.1, 0.9),
        (Interval(-1.0, 2.0), -1.0, 2.0),
        (Interval(), 0.0, 1e9),
        (Unconstrained(), -1e9, 1e9),
    ],
)
def test_projection_stops_at_the_ends(constraint, bottom, top):
    values = constraint(constraint.project(torch.tensor([-1e9, 1e9])))
    torch.testing.assert_close(values, torch.tensor([bottom, top]), rtol=1e-9, atol=0)


@ALL
def test_values_outside_are_refused(constraint, low, high):
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match="not finite"):
            constraint.inverse(torch.tensor([0.5, bad]))
    if isinstance(constraint, Unconstrained):
        return
    outside = [low - 1e-3 * max(1.0, abs(low))]
    if constraint != Interval():
        outside.append(high * 1.001)
    for value in outside:
        with pytest.raises(ValueError, match="outside"):
            constraint.inverse(torch.tensor(value))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Positive(0.0),
        lambda: Positive(-1.0),
        lambda: Positive(2.0, 1.0),
        lambda: Positive(1.0, math.inf),
        lambda: UnitInterval(0.0),
        lambda: UnitInterval(0.5),
        lambda: Interval(1.0, 1.0),
        lambda: Interval(0.0, math.nan),
    ],
)
def test_empty_and_improper_ranges_are_refused(make):
    with pytest.raises(ValueError, match="needs"):
        make()


def test_projections_are_the_nearest_points():
    torch.manual_seed(0)
    for _ in range(20):
        x = torch.randn(6) * 2
        simplex = Simplex(2.0).project(x)
        assert simplex.sum().item() == pytest.approx(2.0)
        assert bool((simplex >= 0).all())
        ball = L1Ball(1.5).project(x)
        assert ball.abs().sum() <= 1.5 + 1e-9
        for project, feasible in ((simplex, Simplex(2.0)), (ball, L1Ball(1.5))):
            for _ in range(20):
                other = feasible.project(torch.randn(6))
                # The variational inequality of a projection onto a convex set.
                assert torch.dot(x - project, other - project) <= 1e-9
    assert torch.equal(
        Box(0.0, 1.0).project(torch.tensor([-1.0, 0.5, 2.0])), torch.tensor([0.0, 0.5, 1.0])
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: L1Ball(0.0), r"positive, finite radius"),
        (lambda: L1Ball(-1.0), r"positive, finite radius"),
        (lambda: Simplex(0.0), r"positive, finite total"),
        (lambda: L1Ball(1.0).inverse(torch.full((4,), 0.5)), r"L1 norm 2.*radius.*start at 0\.25"),
        (lambda: Simplex().inverse(torch.full((4,), 0.5)), r"sum to 2, expected 1"),
    ],
)
def test_infeasible_constraints_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
