"""The derivative of gradient clipping against autograd through torch's own clipping."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_hpo.dynamics import GradientClipping

SHAPES = [(3, 2), (4,), ()]


def clip(clipping, gradients):
    """The formulas of torch's clipping functions, which themselves run without a graph."""
    if clipping.by_value:
        return [g.clamp(-clipping.value, clipping.value) for g in gradients]
    norm = torch.cat([g.reshape(-1) for g in gradients]).norm()
    return [g * (clipping.value / (norm + 1e-6)).clamp(max=1.0) for g in gradients]


def jacobian_product(clipping, gradients, vectors):
    leaves = [g.clone().requires_grad_() for g in gradients]
    clipped = clip(clipping, leaves)
    holders = [torch.zeros_like(g) for g in gradients]
    for holder, g in zip(holders, gradients, strict=True):
        holder.grad = g.clone()
    if clipping.by_value:
        torch.nn.utils.clip_grad_value_(holders, clipping.value)
    else:
        torch.nn.utils.clip_grad_norm_(holders, clipping.value)
    # What is differentiated here is what Lightning calls.
    torch.testing.assert_close(clipped, [h.grad for h in holders], rtol=1e-12, atol=0)
    rows = [
        torch.autograd.grad(clipped, leaves, [v[j] for v in vectors], retain_graph=True)
        for j in range(len(vectors[0]))
    ]
    return [torch.stack(parts) for parts in zip(*rows, strict=True)]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    value=st.sampled_from([0.1, 0.7, 2.0, 50.0]),
    by_value=st.booleans(),
)
def test_the_product_is_that_of_autograd(seed, value, by_value):
    generator = torch.Generator().manual_seed(seed)
    gradients = [torch.randn(s, generator=generator, dtype=torch.float64) for s in SHAPES]
    vectors = [torch.randn(2, *s, generator=generator, dtype=torch.float64) for s in SHAPES]
    clipping = GradientClipping(value, by_value)
    truth = jacobian_product(clipping, gradients, vectors)
    products = [v.clone() for v in vectors]
    clipping.product_(gradients, products)
    torch.testing.assert_close(products, truth, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("by_value", [False, True])
def test_these_examples_are_clipped_and_unclipped(by_value):
    gradients = [torch.full((4,), 1.0), torch.full((5,), -2.0)]
    ones = [torch.ones(1, 4), torch.ones(1, 5)]
    for value, active in ((100.0, False), (0.5, True)):
        products = [v.clone() for v in ones]
        GradientClipping(value, by_value).product_(gradients, products)
        assert torch.equal(products[0], ones[0]) != active


@pytest.mark.parametrize("by_value", [False, True])
def test_a_parameter_without_a_gradient_takes_no_part(by_value):
    gradient = torch.tensor([3.0, -4.0])
    vectors = [torch.ones(1, 3), torch.tensor([[1.0, 2.0]])]
    clipping = GradientClipping(1.0, by_value)
    truth = jacobian_product(clipping, [gradient], [vectors[1]])
    clipping.product_([None, gradient], vectors)
    torch.testing.assert_close(vectors[1], truth[0], rtol=1e-12, atol=1e-12)
    assert torch.equal(vectors[0], torch.ones(1, 3))


def test_no_gradient_at_all():
    vectors = [torch.ones(1, 3)]
    GradientClipping(1.0).product_([None], vectors)
    assert torch.equal(vectors[0], torch.ones(1, 3))
