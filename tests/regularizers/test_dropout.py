import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_hpo import (
    Hyperparameter,
    Interval,
    UnitInterval,
    keep_probability,
    named_hyperparameters,
)
from lightning_hpo.derivatives import LambdaDifference, Reverse
from lightning_hpo.regularizers import DropoutMixin, StackedRNN, TunableDropout
from lightning_hpo.regularizers.tunable_dropout import _DIFFERENCE_STEP

UNITS = 4


def _network(x, theta, mask):
    w, v = theta
    return (torch.tanh(torch.tanh(x @ w) * mask @ v)).square().mean()


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2, generator=generator, dtype=torch.float64)
    theta = [
        torch.randn(2, UNITS, generator=generator, dtype=torch.float64),
        torch.randn(UNITS, 1, generator=generator, dtype=torch.float64),
    ]
    return x, theta


def _expected_gradient(x, theta, raw):
    """∇θ of the expected loss, over all 2⁴ masks; differentiable in raw."""
    keep = raw.sigmoid()
    leaves = [t.clone().requires_grad_() for t in theta]
    total = torch.zeros((), dtype=torch.float64)
    for bits in itertools.product((0.0, 1.0), repeat=UNITS):
        mask = torch.tensor(bits, dtype=torch.float64)
        probability = torch.where(mask > 0, keep, 1 - keep).prod()
        total = total + probability * _network(x, leaves, mask / keep)
    return torch.autograd.grad(total, leaves, create_graph=True)


def _sampled(x, theta, raw, step, seed, coupled=True):
    """Bᵀu for u = θ, with one mask for the batch, as differences over λ estimate it."""
    calls = itertools.count()

    def loss(th, lam):
        torch.manual_seed(seed if coupled else seed + 100_003 * next(calls))
        keep = lam[0].sigmoid()
        mask = (torch.rand(UNITS, dtype=torch.float64) < keep.detach()).double()
        return _network(x, th, mask / keep)

    leaves = [t.clone().requires_grad_() for t in theta]
    lam = [raw.clone().requires_grad_()]
    u = [t.unsqueeze(0) for t in theta]
    _, (part,) = LambdaDifference(Reverse(), [step]).adjoint(loss, leaves, lam, u, theta_part=False)
    return part.item()


@pytest.mark.slow
def test_mean_over_draws_is_the_derivative_of_the_expected_loss(problem):
    x, theta = problem
    raw = torch.tensor(0.4, dtype=torch.float64)
    leaf = raw.clone().requires_grad_()
    gradient = _expected_gradient(x, theta, leaf)
    (exact,) = torch.autograd.grad(
        sum((g * t).sum() for g, t in zip(gradient, theta, strict=True)), leaf
    )
    draws = torch.tensor([_sampled(x, theta, raw, 0.2, seed) for seed in range(6000)])
    error = draws.std() / len(draws) ** 0.5
    # Four standard errors, and the difference's own bias of order ε².
    assert abs(draws.mean() - exact) < 4 * error + 0.02 * abs(exact)
    assert error < 0.1 * abs(exact)


@pytest.mark.slow
def test_common_draws_have_a_tenth_of_the_variance(problem):
    x, theta = problem
    raw = torch.tensor(0.4, dtype=torch.float64)
    coupled = torch.tensor(
        [_sampled(x, theta, raw, _DIFFERENCE_STEP, seed) for seed in range(1500)]
    )
    independent = torch.tensor(
        [_sampled(x, theta, raw, _DIFFERENCE_STEP, seed, coupled=False) for seed in range(1500)]
    )
    assert coupled.var() * 10 < independent.var()


def test_difference_and_autograd_directions_mix(problem):
    """Where the loss is smooth in λ, a small difference step gives what autograd gives."""
    _, theta = problem
    generator = torch.Generator().manual_seed(1)

    def loss(th, lam):
        a, b = lam
        return (
            torch.tanh(th[0]).square().sum() * a.exp().sum()
            + (th[1] * torch.sin(b)).sum() * a.sum()
            + (b.pow(3)).sum()
        )

    leaves = [t.clone().requires_grad_() for t in theta]
    lam = [torch.tensor([0.3, -0.2]).double(), torch.tensor(0.5).double()]
    lam = [t.requires_grad_() for t in lam]
    u = [torch.randn(3, *t.shape, generator=generator, dtype=torch.float64) for t in theta]
    e = [torch.randn(3, *t.shape, generator=generator, dtype=torch.float64) for t in lam]

    def products(backend):
        theta_part, lambda_part = backend.adjoint(loss, leaves, lam, u)
        tangents = [backend.tangent(loss, leaves, lam, *d) for d in ((u, e), (u, None), (None, e))]
        return [*theta_part, *lambda_part, *itertools.chain(*tangents)]

    exact = products(Reverse())
    for steps in ([1e-4, None], [None, 1e-4], [1e-4, 1e-4]):
        mixed = products(LambdaDifference(Reverse(), steps))
        for left, right in zip(exact, mixed, strict=True):
            torch.testing.assert_close(right, left, rtol=1e-5, atol=1e-6)


def test_layer_keeps_units_at_the_rate_and_scales_them():
    torch.manual_seed(0)
    layer = TunableDropout(0.25)
    y = layer(torch.ones(200, 200))
    assert set(y.unique().tolist()) == {0.0, 4.0}
    assert y.mean().item() == pytest.approx(1.0, abs=0.05)
    assert torch.equal(layer.eval()(torch.ones(3)), torch.ones(3))


@pytest.mark.filterwarnings("ignore:dropout2d. Received a:UserWarning")
@pytest.mark.parametrize(
    ("kind", "spatial", "shape"),
    [
        (nn.Dropout, 0, (2, 3)),
        (nn.Dropout1d, 1, (3, 4)),
        (nn.Dropout1d, 1, (2, 3, 4)),
        (nn.Dropout2d, 2, (4, 3)),
        (nn.Dropout2d, 2, (2, 3, 4)),
        (nn.Dropout2d, 2, (2, 3, 2, 2)),
        (nn.Dropout3d, 3, (3, 2, 2, 2)),
        (nn.Dropout3d, 3, (2, 3, 2, 2, 2)),
    ],
)
def test_masks_are_shared_as_in_the_layers_of_torch(kind, spatial, shape):
    """Which units are dropped together, learned from many draws of torch's own layer."""

    def together(layer):
        torch.manual_seed(0)
        draws = torch.stack([layer(torch.ones(shape)).flatten() > 0 for _ in range(60)])
        return (draws[:, :, None] == draws[:, None, :]).all(dim=0)

    assert torch.equal(together(TunableDropout(0.5, spatial)), together(kind(0.5)))


@pytest.mark.parametrize(
    "keep",
    [
        Hyperparameter(0.5, UnitInterval()),
        Hyperparameter(0.5, Interval(0.0, 1.0), difference_step=0.05),
        Hyperparameter(1.5),
    ],
)
def test_hyperparameters_that_are_no_keep_probability_are_refused(keep):
    with pytest.raises(ValueError, match=r"expected a number, or what keep_probability"):
        TunableDropout(keep)


def test_a_keep_probability_may_be_shared():
    keep = keep_probability(0.7)
    net = nn.Sequential(TunableDropout(keep), TunableDropout(keep))
    assert list(named_hyperparameters(net).values()) == [keep]


@pytest.mark.parametrize(
    ("spatial", "shape"), [(1, (2, 5, 7)), (2, (2, 5, 3, 3)), (3, (2, 5, 2, 2, 2))]
)
def test_channels_are_dropped_whole(spatial, shape):
    torch.manual_seed(0)
    y = TunableDropout(0.5, spatial)(torch.ones(shape)).flatten(2)
    assert torch.equal(y.min(2).values, y.max(2).values)
    assert len(y.unique()) == 2


class Net(DropoutMixin):
    def __init__(self, **options):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(3, 4), nn.Dropout(0.2), nn.Conv2d(1, 1, 1), nn.Dropout2d(0.4)
        )
        self.rnn = nn.LSTM(3, 4, num_layers=3, dropout=0.3, bidirectional=True, batch_first=True)
        if options:
            self.register_dropout(**options)


def test_register_replaces_every_kind_and_names_them():
    one_each = Net(tied=False)
    assert set(named_hyperparameters(one_each)) == {"keep.net.1", "keep.net.3", "keep.rnn"}
    values = {n: h().item() for n, h in named_hyperparameters(one_each).items()}
    assert values == pytest.approx({"keep.net.1": 0.8, "keep.net.3": 0.6, "keep.rnn": 0.7})
    assert isinstance(one_each.net[1], TunableDropout)
    assert one_each.net[3].spatial == 2
    tied = Net(init=0.5)
    assert list(named_hyperparameters(tied)) == ["keep"]
    assert tied.net[1].keep is tied.keep is tied.rnn.between.keep


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_stacked_rnn_equals_what_it_replaces(kind, bidirectional, packed):
    torch.manual_seed(0)
    rnn = kind(
        3, 4, num_layers=3, dropout=0.5, bidirectional=bidirectional, batch_first=True
    ).eval()
    stacked = StackedRNN(rnn, keep_probability(0.5)).eval()
    x = torch.randn(2, 5, 3)
    if packed:
        x = nn.utils.rnn.pack_padded_sequence(x, [5, 3], batch_first=True)
    h = torch.randn(3 * (1 + bidirectional), 2, 4)
    state = (h, h.flip(0)) if kind is nn.LSTM else h
    for hx in (None, state):
        expected, found = rnn(x, hx), stacked(x, hx)
        for a, b in ((expected[0], found[0]), (expected[1], found[1])):
            torch.testing.assert_close(a, b)
    layer = stacked.train()
    torch.manual_seed(1)
    first = layer(x)[0]
    torch.manual_seed(2)
    second = layer(x)[0]
    data = (first.data, second.data) if packed else (first, second)
    assert not torch.allclose(*data)


def test_frozen_recurrent_layers_stay_frozen():
    rnn = nn.LSTM(3, 4, num_layers=2, dropout=0.3)
    rnn.weight_hh_l1.requires_grad_(False)
    stacked = StackedRNN(rnn, keep_probability(0.5))
    frozen = [name for name, p in stacked.named_parameters() if not p.requires_grad]
    assert frozen == ["layers.1.weight_hh_l0"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TunableDropout(0.0), r"is 0\.0, expected a number from 0\.0001"),
        (lambda: TunableDropout(1.0), r"is 1\.0, expected a number from 0\.0001"),
        (lambda: Net(init=1.2), r"is 1\.2, expected a number from 0\.0001"),
        (lambda: Net(tied=True), r"different keep probabilities"),
        (lambda: Net(at=["net.2"]), r"\['net\.2'\] are no dropout"),
        (lambda: Net(at=["nut.1"]), r"no module 'nut\.1'; the closest names are \['net\.1'"),
        (lambda: Net(init=0.5, name="net"), r"name='net' is taken"),
        (lambda: Hyperparameter(0.5, difference_step=0.0), r"difference_step=0\.0"),
    ],
)
def test_bad_input_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_nothing_to_replace_is_refused():
    class Plain(DropoutMixin):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(2, 2)
            self.register_dropout()

    with pytest.raises(ValueError, match=r"no nn\.Dropout"):
        Plain()


def test_untrained_rate_trains_like_torch_dropout():
    """In expectation over masks the loss is that of torch's own dropout."""
    torch.manual_seed(0)
    x, layer = torch.randn(20_000, 3), TunableDropout(0.7)
    ours = layer(x).square().mean()
    theirs = F.dropout(x, 0.3).square().mean()
    assert ours.item() == pytest.approx(theirs.item(), rel=0.05)
