"""Products of a gradient with directions, taken as the gradient arrives."""

import pytest
import torch
from torch import nn

from lightning_hpo.derivatives import gradient_products


def test_gradient_products():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    unused = nn.Parameter(torch.ones(2))
    x = torch.randn(5, 3)
    targets = [*net.parameters(), frozen, unused]

    def loss():
        return (net(x) * frozen).square().mean() + net[0].weight.pow(3).sum()

    stacks = [torch.randn(m, *t.shape) for m, t in zip((1, 2, 3, 2, 2, 2), targets, strict=True)]
    stacks[1] = None
    truth = torch.autograd.grad(loss(), list(net.parameters()))
    found = gradient_products(loss(), targets, stacks)
    for i in (0, 2, 3):
        expected = torch.tensordot(stacks[i], truth[i], dims=truth[i].dim())
        torch.testing.assert_close(found[i], expected, rtol=1e-12, atol=0)
    assert found[1] is found[4] is found[5] is None
    # Nothing stays behind on the parameters.
    after = torch.autograd.grad(loss(), list(net.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(after, truth, strict=True))


def test_hooks_of_the_user_are_seen():
    """A hook that changes the gradient of a parameter does so here as well."""
    p = nn.Parameter(torch.ones(3))
    p.register_hook(lambda g: 2 * g)
    (found,) = gradient_products(p.sum(), [p], [torch.ones(1, 3)])
    assert found.item() == 6.0


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(4, 2, sparse=True)
    loss = embedding(torch.tensor([1, 2])).sum()
    with pytest.raises(TypeError, match="sparse gradient, expected dense"):
        gradient_products(loss, [embedding.weight], [torch.ones(1, 4, 2)])
