"""The three backends of joint_hvp against a dense Hessian."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from lightning_hpo.derivatives import BACKENDS, is_missing_derivative, joint_hvp

EXACT = ("reverse", "forward")
TOLERANCE = {"reverse": 1e-10, "forward": 1e-10, "finite_difference": 1e-4}

ALL_BACKENDS = pytest.mark.parametrize("backend", BACKENDS)
DIRECTIONS = pytest.mark.parametrize("given", ["u", "e", "both"])


class Problem:
    """A smooth loss in which every block of the joint Hessian is dense.

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

    def dense_product(self, u, e):
        """Multiplies with the whole Hessian, a matrix."""
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
    theta_part, lambda_part = joint_hvp(
        problem.loss, problem.theta, problem.lam, u, e, backend=backend
    )
    true_theta, true_lambda = problem.dense_product(u, e)
    assert all(t.norm() > 0 for t in (*true_theta[:-1], *true_lambda))
    assert_near(theta_part, true_theta, TOLERANCE[backend])
    assert_near(lambda_part, true_lambda, TOLERANCE[backend])


@ALL_BACKENDS
@DIRECTIONS
@pytest.mark.parametrize("wanted", ["theta", "lambda"])
def test_one_part_alone(backend, given, wanted):
    problem = Problem()
    u, e = problem.directions(given, 3)
    parts = joint_hvp(
        problem.loss,
        problem.theta,
        problem.lam,
        u,
        e,
        backend=backend,
        theta_part=wanted == "theta",
        lambda_part=wanted == "lambda",
    )
    truth = problem.dense_product(u, e)
    position = ("theta", "lambda").index(wanted)
    assert parts[1 - position] == []
    assert_near(parts[position], truth[position], TOLERANCE[backend])


def test_more_directions_than_one_vectorized_backward_carries():
    problem = Problem()
    u, e = problem.directions("both", 70)
    parts = joint_hvp(problem.loss, problem.theta, problem.lam, u, e, backend="reverse")
    for part, truth in zip(parts, problem.dense_product(u, e), strict=True):
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

    plain = joint_hvp(loss(lambda x: x**3), theta, lam, u, e)
    result = joint_hvp(loss(Refusing.apply), theta, lam, u, e)
    torch.testing.assert_close(result, plain, rtol=1e-12, atol=0)


@ALL_BACKENDS
def test_a_parameter_that_the_loss_does_not_depend_on_gets_zeros(backend):
    problem = Problem()
    u, e = problem.directions("both", 3)
    theta_part, _ = joint_hvp(problem.loss, problem.theta, problem.lam, u, e, backend=backend)
    assert torch.equal(theta_part[-1], torch.zeros(3, 2))


@ALL_BACKENDS
def test_a_loss_that_is_linear_gets_zeros(backend):
    theta = [torch.tensor([1.0, 2.0], requires_grad=True)]
    lam = [torch.tensor(3.0, requires_grad=True)]
    parts = joint_hvp(
        lambda th, la: th[0].sum() + la[0],
        theta,
        lam,
        [torch.ones(2, 2)],
        [torch.ones(2)],
        backend=backend,
    )
    assert torch.equal(parts[0][0], torch.zeros(2, 2))
    assert torch.equal(parts[1][0], torch.zeros(2))


@ALL_BACKENDS
def test_a_step_without_a_loss_gets_zeros(backend):
    problem = Problem()
    u, e = problem.directions("both", 2)
    parts = joint_hvp(lambda th, la: None, problem.theta, problem.lam, u, e, backend=backend)
    for part, like in zip(parts, (u, e), strict=True):
        assert [t.shape for t in part] == [t.shape for t in like]
        assert not any(t.any() for t in part)


@ALL_BACKENDS
def test_products_have_the_dtype_of_the_model(backend):
    problem = Problem(torch.float32)
    u, e = problem.directions("both", 2)
    parts = joint_hvp(problem.loss, problem.theta, problem.lam, u, e, backend=backend)
    assert {t.dtype for part in parts for t in part} == {torch.float32}


@ALL_BACKENDS
def test_theta_and_lambda_are_bit_identical_afterwards(backend):
    problem = Problem(torch.float32)
    u, e = problem.directions("both", 3)
    before = [t.detach().clone() for t in (*problem.theta, *problem.lam)]
    joint_hvp(problem.loss, problem.theta, problem.lam, u, e, backend=backend)
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

    def loss(theta, lam):
        addresses.append([t.data_ptr() for t in theta])
        return problem.loss(theta, lam)

    def product(**options):
        addresses.clear()
        parts = joint_hvp(
            loss, problem.theta, problem.lam, u, e, backend="finite_difference", **options
        )
        return torch.cat([t.flatten() for part in parts for t in part])

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
        joint_hvp(loss, problem.theta, problem.lam, u, e, backend="finite_difference")
    assert displaced == [True]
    for tensor, saved in zip((*problem.theta, *problem.lam), before, strict=True):
        assert torch.equal(tensor, saved)


@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_finite_differences_at_any_scale_of_the_direction(scale):
    """A tangent that has barely begun is as accurate as one of size 1."""
    problem = Problem()
    u, e = problem.directions("both", 1)
    u = [d * scale for d in u]
    parts = joint_hvp(
        problem.loss, problem.theta, problem.lam, u, None, backend="finite_difference"
    )
    for part, truth in zip(parts, problem.dense_product(u, None), strict=True):
        assert_near(part, truth, 1e-4)
    # Together with an e of size 1: what u contributes must not be lost to e's rounding.
    both, _ = joint_hvp(problem.loss, problem.theta, problem.lam, u, e, backend="finite_difference")
    truth, _ = problem.dense_product(u, e)
    assert_near(both, truth, 1e-4)


def test_finite_differences_of_a_zero_direction_are_zero():
    problem = Problem()
    u = [torch.zeros(2, *t.shape) for t in problem.theta]
    parts = joint_hvp(
        problem.loss, problem.theta, problem.lam, u, None, backend="finite_difference"
    )
    assert not any(t.any() for part in parts for t in part)


def test_an_unknown_backend():
    problem = Problem()
    u, e = problem.directions("both", 1)
    with pytest.raises(ValueError, match=r"backend='dense'.*finite_difference.*reverse"):
        joint_hvp(problem.loss, problem.theta, problem.lam, u, e, backend="dense")


@pytest.mark.parametrize("nothing", ["direction", "part"])
def test_nothing_to_do_is_refused(nothing):
    problem = Problem()
    u, e = problem.directions("both", 1) if nothing == "part" else ([], None)
    wanted = nothing == "direction"
    with pytest.raises(ValueError, match="needs a direction"):
        joint_hvp(
            problem.loss, problem.theta, problem.lam, u, e, theta_part=wanted, lambda_part=wanted
        )


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
    with pytest.raises(RuntimeError) as caught:
        joint_hvp(
            lambda th, la: operator(th[0]).square().sum(),
            theta,
            [],
            [torch.randn(1, 16)],
            None,
            backend=backend,
            lambda_part=False,
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
