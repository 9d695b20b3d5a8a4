"""The two products of the three backends against a dense Hessian."""

import itertools
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from lightning_hpo.derivatives import (
    BACKENDS,
    FiniteDifference,
    LambdaDifference,
    Reverse,
    is_missing_derivative,
)

EXACT = ("reverse", "forward")
TOLERANCE = {"reverse": 1e-10, "forward": 1e-10, "finite_difference": 1e-4}

ALL_BACKENDS = pytest.mark.parametrize("backend", BACKENDS)
DIRECTIONS = pytest.mark.parametrize("given", ["u", "e", "both"])


class Problem:
    """A smooth loss in which H and B are dense.

    λ is a noise level, a decay strength, and a weight per class, so that it comes in three shapes
    and acts on the network, beside it, and after it.
    """

    def __init__(self, dtype=torch.float64):
        generator = torch.Generator().manual_seed(3)

        def draw(*shape):
            return torch.randn(shape, generator=generator, dtype=dtype)

        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)
        self.names = [name for name, _ in self.net.named_parameters()]
        self.theta = [draw(*p.shape).mul_(0.5).requires_grad_() for p in self.net.parameters()]
        # The last parameter is used nowhere.
        self.theta.append(draw(2).requires_grad_())
        self.lam = [draw().requires_grad_(), draw(1).requires_grad_(), draw(2).requires_grad_()]
        self.x, self.noise = draw(6, 3), draw(6, 3)
        self.y = torch.tensor([0, 1, 0, 1, 1, 0])
        self.draw = draw

    def loss(self, theta, lam):
        sigma, strength, class_weights = lam
        named = dict(zip(self.names, theta, strict=False))
        out = functional_call(self.net, named, (self.x + sigma.exp() * self.noise,))
        each = F.cross_entropy(out, self.y, reduction="none")
        decay = 0.5 * strength.exp().sum() * sum((t * t).sum() for t in named.values())
        return (each * class_weights.sigmoid()[self.y]).mean() + decay

    def directions(self, given, m):
        u = [self.draw(m, *t.shape) for t in self.theta] if given in ("u", "both") else None
        e = [self.draw(m, *t.shape) for t in self.lam] if given in ("e", "both") else None
        return u, e

    def tangent(self, backend, u, e, **options):
        return backend.tangent(self.loss, self.theta, self.lam, u, e, **options)

    def adjoint(self, backend, u, **options):
        return backend.adjoint(self.loss, self.theta, self.lam, u, **options)

    def all_products(self, backend, u, e):
        """Returns H u + B e, H u and Bᵀ u, one after the other."""
        return [*self.tangent(backend, u, e), *itertools.chain(*self.adjoint(backend, u))]

    def dense_product(self, u, e):
        """Multiplies with the whole Hessian over (θ, λ), a matrix."""
        joint = [*self.theta, *self.lam]
        sizes = [t.numel() for t in joint]

        def flat_loss(vector):
            parts = [p.reshape(t.shape) for p, t in zip(vector.split(sizes), joint, strict=True)]
            return self.loss(parts[: len(self.theta)], parts[len(self.theta) :])

        vector = torch.cat([t.detach().reshape(-1) for t in joint])
        hessian = torch.autograd.functional.hessian(flat_loss, vector)
        m = len((u or e)[0])
        u = [torch.zeros(m, *t.shape) for t in self.theta] if u is None else u
        e = [torch.zeros(m, *t.shape) for t in self.lam] if e is None else e
        stacked = torch.cat([d.flatten(1) if d.dim() > 1 else d[:, None] for d in (*u, *e)], dim=1)
        parts = (stacked.to(hessian.dtype) @ hessian).split(sizes, dim=1)
        shaped = [p.reshape(m, *t.shape) for p, t in zip(parts, joint, strict=True)]
        return shaped[: len(self.theta)], shaped[len(self.theta) :]


def assert_near(products, truth, tolerance):
    """Compares each block relative to its own norm, so that no block hides behind a larger one."""
    assert len(products) == len(truth)
    for product, true in zip(products, truth, strict=True):
        assert product.shape == true.shape
        assert (product - true).norm() <= tolerance * true.norm()


@ALL_BACKENDS
@DIRECTIONS
@pytest.mark.parametrize("m", [1, 3])
def test_against_a_dense_hessian(backend, given, m):
    problem = Problem()
    u, e = problem.directions(given, m)
    true_theta, true_lambda = problem.dense_product(u, e)
    assert all(t.norm() > 0 for t in (*true_theta[:-1], *true_lambda))
    theta_part = problem.tangent(BACKENDS[backend](), u, e)
    assert_near(theta_part, true_theta, TOLERANCE[backend])
    if given == "u":
        theta_part, lambda_part = problem.adjoint(BACKENDS[backend](), u)
        assert_near(theta_part, true_theta, TOLERANCE[backend])
        assert_near(lambda_part, true_lambda, TOLERANCE[backend])


@ALL_BACKENDS
def test_the_lambda_part_alone(backend):
    problem = Problem()
    u, _ = problem.directions("u", 3)
    theta_part, lambda_part = problem.adjoint(BACKENDS[backend](), u, theta_part=False)
    assert theta_part == []
    assert_near(lambda_part, problem.dense_product(u, None)[1], TOLERANCE[backend])


@ALL_BACKENDS
def test_a_loss_without_hyperparameters(backend):
    """H u is the same either way, and Bᵀ u is empty."""
    problem = Problem()
    u, _ = problem.directions("u", 2)
    product = BACKENDS[backend]()

    def loss(theta, lam):
        assert not lam
        return problem.loss(theta, [t.detach() for t in problem.lam])

    truth, _ = problem.dense_product(u, None)
    assert_near(product.tangent(loss, problem.theta, [], u, None), truth, TOLERANCE[backend])
    theta_part, lambda_part = product.adjoint(loss, problem.theta, [], u)
    assert_near(theta_part, truth, TOLERANCE[backend])
    assert lambda_part == []
    problem.loss = None  # where nothing is wanted there is nothing to evaluate
    assert product.adjoint(problem.loss, problem.theta, [], u, theta_part=False) == ([], [])


@pytest.mark.parametrize("backend", [*BACKENDS, "lambda_difference"])
def test_whether_a_backend_needs_more_than_a_gradient(backend):
    """So that the loss is evaluated on kernels that have the derivatives."""
    if backend == "lambda_difference":
        assert LambdaDifference(Reverse(), [0.1]).is_exact
        assert not LambdaDifference(FiniteDifference(), [0.1]).is_exact
    else:
        assert BACKENDS[backend]().is_exact is BACKENDS[backend].is_exact is (backend in EXACT)


def test_tangents_of_one_evaluation_share_its_graph():
    """Whatever their kinds of directions; the last one lets go of everything."""
    problem = Problem()
    backend = Reverse()
    graphs = []

    class Marked(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            graphs.append(weakref.ref(ctx))
            return x.view_as(x)

        @staticmethod
        def backward(ctx, g):
            return g

    def loss(theta, lam):
        return problem.loss([Marked.apply(theta[0]), *theta[1:]], lam)

    kinds = ("e", "u", "both")
    for position, (given, m) in enumerate(zip(kinds, (1, 3, 2), strict=True)):
        u, e = problem.directions(given, m)
        is_last = position == len(kinds) - 1
        found = backend.tangent(loss, problem.theta, problem.lam, u, e, is_last=is_last)
        assert len(graphs) == 1
        assert (graphs[0]() is None) is is_last
        assert_near(found, problem.dense_product(u, e)[0], TOLERANCE["reverse"])
    backend.tangent(loss, problem.theta, problem.lam, u, e)
    assert len(graphs) == 2
    assert graphs[1]() is None


def test_a_graph_that_was_left_behind_is_not_used():
    problem, other = Problem(), Problem()
    other.x = other.x + 1
    u, e = problem.directions("both", 2)
    backend = Reverse()
    problem.tangent(backend, u, e, is_last=False)
    assert_near(other.tangent(backend, u, e), other.dense_product(u, e)[0], TOLERANCE["reverse"])


def test_more_directions_than_one_vectorized_backward_carries():
    problem = Problem()
    u, e = problem.directions("both", 70)
    assert_near(problem.tangent(Reverse(), u, e), problem.dense_product(u, e)[0], 1e-10)
    for part, truth in zip(
        problem.adjoint(Reverse(), u), problem.dense_product(u, None), strict=True
    ):
        assert_near(part, truth, 1e-10)


def test_operators_that_cannot_be_vectorized():
    """The reverse backend then goes through the directions one by one."""

    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            return g * 3 * x**2

    class Refusing(Cube):
        @staticmethod
        def backward(ctx, g):
            if torch._C._functorch.is_batchedtensor(g):
                raise RuntimeError("vmap is not implemented for this operator")
            return Cube.backward(ctx, g)

    theta = [torch.tensor([1.0, -2.0], requires_grad=True)]
    lam = [torch.tensor(0.5, requires_grad=True)]
    u = [torch.tensor([[1.0, 0.0], [0.5, 2.0], [0.0, 1.0]])]
    e = [torch.tensor([0.0, 1.0, -1.0])]

    def loss(operator):
        return lambda th, la: (operator(operator(th[0])) * la[0].exp()).sum()

    def products(operator):
        tangent = Reverse().tangent(loss(operator), theta, lam, u, e)
        return tangent, Reverse().adjoint(loss(operator), theta, lam, u)

    plain = products(lambda x: x**3)
    torch.testing.assert_close(products(Refusing.apply), plain, rtol=1e-12, atol=0)


@ALL_BACKENDS
def test_a_parameter_that_the_loss_does_not_depend_on_gets_zeros(backend):
    problem = Problem()
    u, e = problem.directions("both", 3)
    theta_part, _ = problem.adjoint(BACKENDS[backend](), u)
    assert torch.equal(problem.tangent(BACKENDS[backend](), u, e)[-1], torch.zeros(3, 2))
    assert torch.equal(theta_part[-1], torch.zeros(3, 2))


@ALL_BACKENDS
def test_a_loss_that_is_linear_gets_zeros(backend):
    theta = [torch.tensor([1.0, 2.0], requires_grad=True)]
    lam = [torch.tensor(3.0, requires_grad=True)]

    def loss(th, la):
        return th[0].sum() + la[0]

    u, e = [torch.ones(2, 2)], [torch.ones(2)]
    assert torch.equal(BACKENDS[backend]().tangent(loss, theta, lam, u, e)[0], torch.zeros(2, 2))
    parts = BACKENDS[backend]().adjoint(loss, theta, lam, u)
    assert torch.equal(parts[0][0], torch.zeros(2, 2))
    assert torch.equal(parts[1][0], torch.zeros(2))


@ALL_BACKENDS
def test_a_step_without_a_loss_gets_zeros(backend):
    problem = Problem()
    u, e = problem.directions("both", 2)
    problem.loss = lambda th, la: None
    tangent = problem.tangent(BACKENDS[backend](), u, e)
    parts = problem.adjoint(BACKENDS[backend](), u)
    for part, like in zip((tangent, *parts), (u, u, e), strict=True):
        assert [t.shape for t in part] == [t.shape for t in like]
        assert not any(t.any() for t in part)


@ALL_BACKENDS
def test_products_have_the_dtype_of_the_model(backend):
    problem = Problem(torch.float32)
    u, e = problem.directions("both", 2)
    products = problem.all_products(BACKENDS[backend](), u, e)
    assert {t.dtype for t in products} == {torch.float32}


@ALL_BACKENDS
def test_theta_and_lambda_are_bit_identical_afterwards(backend):
    problem = Problem(torch.float32)
    u, e = problem.directions("both", 3)
    before = [t.detach().clone() for t in (*problem.theta, *problem.lam)]
    problem.all_products(BACKENDS[backend](), u, e)
    for tensor, saved in zip((*problem.theta, *problem.lam), before, strict=True):
        assert torch.equal(tensor, saved)
        assert tensor.grad is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_finite_differences_in_place_are_those_on_copies(dtype):
    """The weights keep their memory, and come back to rounding."""
    problem = Problem(dtype)
    u, e = problem.directions("both", 3)
    before = [t.detach().clone() for t in (*problem.theta, *problem.lam)]
    memory = [t.data_ptr() for t in problem.theta]
    addresses = []

    original = problem.loss

    def loss(theta, lam):
        addresses.append([t.data_ptr() for t in theta])
        return original(theta, lam)

    problem.loss = loss

    def product(**options):
        addresses.clear()
        products = problem.all_products(FiniteDifference(**options), u, e)
        return torch.cat([t.flatten() for t in products])

    copied = product()
    assert memory not in addresses[:2]
    in_place = product(theta_is_scratch=True)
    assert all(there == memory for there in addresses)
    eps = torch.finfo(dtype).eps
    assert (in_place - copied).norm() < 10 * eps ** (2 / 3) * copied.norm()
    for tensor, saved in zip((*problem.theta, *problem.lam), before, strict=True):
        assert torch.allclose(tensor, saved, rtol=4 * eps, atol=4 * eps)


@pytest.mark.parametrize("given", ["u", "e"])
def test_finite_differences_restore_when_the_loss_raises(given):
    problem = Problem(torch.float32)
    u, e = problem.directions(given, 1)
    before = [t.detach().clone() for t in (*problem.theta, *problem.lam)]
    displaced = []

    def loss(theta, lam):
        moved = zip((*theta, *lam), before, strict=True)
        displaced.append(any(not torch.equal(t, b) for t, b in moved))
        raise KeyError("a bug of the user's")

    with pytest.raises(KeyError, match="a bug of the user's"):
        FiniteDifference().tangent(loss, problem.theta, problem.lam, u, e)
    assert displaced == [True]
    for tensor, saved in zip((*problem.theta, *problem.lam), before, strict=True):
        assert torch.equal(tensor, saved)


@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_finite_differences_at_any_scale_of_the_direction(scale):
    """A tangent that has barely begun is as accurate as one of size 1."""
    problem = Problem()
    u, e = problem.directions("both", 1)
    u = [d * scale for d in u]
    parts = problem.adjoint(FiniteDifference(), u)
    for part, truth in zip(parts, problem.dense_product(u, None), strict=True):
        assert_near(part, truth, 1e-4)
    # Together with an e of size 1: what u contributes must not be lost to e's rounding.
    both = problem.tangent(FiniteDifference(), u, e)
    truth, _ = problem.dense_product(u, e)
    assert_near(both, truth, 1e-4)


def test_finite_differences_of_a_zero_direction_are_zero():
    problem = Problem()
    u = [torch.zeros(2, *t.shape) for t in problem.theta]
    products = problem.all_products(FiniteDifference(), u, None)
    assert not any(t.any() for t in products)


@pytest.mark.parametrize(
    "backend", [*(make() for make in BACKENDS.values()), LambdaDifference(Reverse(), [None] * 3)]
)
def test_nothing_to_do_is_refused(backend):
    problem = Problem()
    with pytest.raises(ValueError, match="needs a direction"):
        problem.tangent(backend, [], None)
    with pytest.raises(ValueError, match="needs a direction"):
        problem.adjoint(backend, [])


class OnceSquare(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return 2 * g * ctx.saved_tensors[0]


def attention(x):
    q = x.reshape(1, 1, 4, 4)
    return F.scaled_dot_product_attention(q, q, q)


@pytest.mark.parametrize("operator", [OnceSquare.apply, attention], ids=["once", "attention"])
@pytest.mark.parametrize("backend", EXACT)
def test_a_missing_derivative_is_recognized(operator, backend):
    """The very messages of torch, which decide whether ``auto`` falls back."""
    theta = [torch.randn(16, requires_grad=True)]
    u = [torch.randn(1, 16)]
    with pytest.raises(RuntimeError) as caught:
        BACKENDS[backend]().tangent(
            lambda th, la: operator(th[0]).square().sum(), theta, [], u, None
        )
    assert is_missing_derivative(caught.value)


@pytest.mark.parametrize(
    "mistake",
    [
        lambda: torch.ones(2) @ torch.ones(3),
        lambda: torch.ones(2, requires_grad=True).add_(1),
        lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("tried to allocate")),
        lambda: (_ for _ in ()).throw(RuntimeError("the user's own")),
    ],
    ids=["shapes", "in-place", "memory", "user"],
)
def test_other_errors_are_no_missing_derivative(mistake):
    """Falling back to finite differences would hide them, or raise them twice."""
    with pytest.raises(RuntimeError) as caught:
        mistake()
    assert not is_missing_derivative(caught.value)
